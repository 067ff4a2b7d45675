"""How much each unit affects the loss: a backward pass over the layers, one layer's graph in memory at a time.

With x the input of an output projection, `mean` its baseline and g the gradient with respect to x of what is drawn for
a window (see `HeadGradient.of_fisher_draw`), s_wtu = -sum (x - mean) g over the channels of unit u, and F_u = mean_w
sum_t s_wtu^2: the Fisher information of a mask that replaces the unit by its bias at one token (Kwon et al. 2022, who
take the text's own tokens; the centring is ours).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from flap_stream.engine.finite import all_finite
from flap_stream.engine.head_gradient import HeadGradient
from flap_stream.engine.hidden_states import Feed, HiddenStates
from flap_stream.engine.layer_pass import LayerPass, StandIns
from flap_stream.engine.placement.prediction import Placement
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.engine.wide_attention import wide_attention
from flap_stream.errors import NonFinite
from flap_stream.model.units import Part
from flap_stream.progress import Progress
from flap_stream.stages.expert_loss import MixtureRead, captured_mixture
from flap_stream.storage import files
from flap_stream.storage.loss import LossScores, LossStore
from flap_stream.storage.run_directory import RunDirectory
from flap_stream.storage.run_files import KINDS

_SUMMED_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}  # at once, widened to float64 on a CPU; not measured

# By kind of unit, sum_t s_wtu^2, float64 [window, unit]; where experts are scored as a whole, of `experts`, too, of how
# many tokens each was `reached`, int64, and of all their neurons `together`, sum_t (sum_u s_wtu)^2, [window, 1]; where
# layers are, of the `layer`, [window, 1].
Scores = dict[str, torch.Tensor]


@dataclass(kw_only=True)
class BackwardPass(LayerPass):
    """Gradients of the windows' losses, carried from the last layer to the first.

    hidden: one entry, the gradient with respect to the current layer's output, float32 `[sample, token, hidden]`.
    inputs: holds the hidden states that enter the current layer. store: where they are stored.
    """

    begins_beside_weights: ClassVar[bool] = False  # it loads the head

    inputs: HiddenStates
    store: LossStore
    _feed: Feed = field(init=False)
    _means: dict[str, torch.Tensor] = field(init=False)
    _scores: dict[int, Scores] = field(init=False)

    def order(self) -> range:
        """From the last layer to the first."""
        return range(len(self.model.layers))[::-1]

    def begin(self) -> None:
        """Compute the gradient of the loss with respect to the last layer's output."""
        self._load_inputs(len(self.model.layers))
        head, first = HeadGradient(self.model), self.first_window
        for start, hidden in self.inputs.stream(self.placement.batch_size):
            # one by one, so that the result does not depend on the batch size
            gradients = [head.of_fisher_draw(own, self._signs(first + start + i)) for i, own in enumerate(hidden)]
            found = torch.stack(gradients)
            if not all_finite([found])[0]:
                raise NonFinite(
                    "the gradient of the loss with respect to the last layer's output holds NaN or infinity; try "
                    f"--dtype float32 (it ran in {self.model.dtype})"
                )
            self.hidden[0].put(start, found)
        self.hidden[0].advance()

    def _signs(self, window: int) -> torch.Tensor:
        """The random signs of a window's tokens and words, packed; they depend on its number alone."""
        shape = self.tokens.shape[1] - 1, -(-self.model.vocab_size // 8)
        packed = np.frombuffer(np.random.default_rng(window).bytes(shape[0] * shape[1]), np.uint8).reshape(shape)
        return torch.tensor(packed, device=self.model.device)

    def scores(self, index: int, weights: Mapping[str, torch.Tensor]) -> Scores:
        """Propagate the gradient through a layer; return what each window adds to F of each of its units."""
        self._load_inputs(index)
        self._feed, self._scores = Feed(self.inputs, self.placement.batch_size), {}
        means = self.model.ranks.from_first(lambda: _baselines(self.model, self.store.run, index))
        self._means = {name: torch.from_numpy(mean).float().to(self.model.device) for name, mean in means.items()}
        self.run_all(index, weights)
        parts = [self._zeros(index, 0)] + [self._scores[start] for start in sorted(self._scores)]
        return {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}

    def _load_inputs(self, layer: int) -> None:
        digest = self.model.ranks.from_first(lambda: self.store.inputs_digest(layer))
        assert digest is not None, "the inputs of all layers are stored before the backward pass"
        self.inputs.load(self.store.inputs_path(layer), digest, self.model.ranks)

    def run_batch(
        self, index: int, weights: Mapping[str, torch.Tensor], start: int, values: torch.Tensor, modules: StandIns
    ) -> torch.Tensor:
        """The gradient with respect to the layer's input for a batch, from that with respect to its output."""
        shift = torch.frexp(values.flatten(1).abs().amax(dim=1)).exponent[:, None, None]
        gradient = torch.ldexp(values, -shift).to(self.model.dtype)  # half precision neither overflows nor vanishes
        hidden = self._feed.take(start, len(values)).detach().requires_grad_()
        with torch.enable_grad(), _captured(self.model, index) as reads, self._mixture(index) as mixture:
            with wide_attention(self.model.dtype, self.model.device.type):
                output = self.model.run_batch(index, weights, hidden, modules)
            seen = [read.inputs for read in reads] + ([] if mixture is None else [mixture.output])
            below, *gradients = torch.autograd.grad(output, [hidden, *seen], gradient)
        if not all_finite([below])[0]:
            raise NonFinite(
                f"the gradient of the loss with respect to the input of layer {index} holds NaN or infinity; try "
                f"--dtype float32 (it ran in {self.model.dtype})"
            )
        scores = self._zeros(index, len(values))
        together = None if mixture is None else torch.zeros_like(hidden[..., 0], dtype=torch.float64)
        for read, found in zip(reads, gradients[: len(reads)], strict=True):
            own = slice(read.part.first, read.part.first + read.part.units)
            squares = read.squares(self._means[read.part.kind.output.name], found, together)
            scores[read.part.kind.name][:, own] = torch.ldexp(squares, 2 * shift[:, 0]).cpu()
        if mixture is not None and together is not None:
            squares = together.square_().sum(dim=1, keepdim=True)
            scores["together"] = torch.ldexp(squares, 2 * shift[:, 0]).cpu()
            squares, scores["reached"] = mixture.squares(weights, gradients[-1])
            scores["experts"] = torch.ldexp(squares, 2 * shift[:, 0].cpu())
        if self.store.of_layers:
            squares = _layer_squares(hidden.detach(), output.detach(), gradient)
            scores["layer"] = torch.ldexp(squares, 2 * shift[:, 0]).cpu()
        self._scores[start] = scores
        return below.float().ldexp_(shift)

    def _mixture(self, index: int) -> AbstractContextManager[MixtureRead | None]:
        """What the layer's mixture reads and gives in the block, if whole experts are scored."""
        return captured_mixture(self.model, index) if self.store.of_experts else nullcontext()

    def _zeros(self, index: int, windows: int) -> Scores:
        shape = self.model.shapes[index]
        scores: Scores = {kind: torch.zeros(windows, shape.units(kind), dtype=torch.float64) for kind in KINDS}
        if self.store.of_experts:
            scores["experts"] = torch.zeros(windows, len(shape.experts), dtype=torch.float64)
            scores["reached"] = scores["experts"].long()
            scores["together"] = torch.zeros(windows, 1, dtype=torch.float64)
        if self.store.of_layers:
            scores["layer"] = torch.zeros(windows, 1, dtype=torch.float64)
        return scores


def _layer_squares(inputs: torch.Tensor, outputs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Sums over a window's tokens of (g_t . (y_t - x_t))^2: what the layer adds is what goes with it.

    inputs, outputs, gradient: `[window, token, hidden]`; float64 `[window, 1]`.
    """
    found = []
    for x, y, g in zip(inputs, outputs, gradient, strict=True):  # so that the result does not depend on the batch size
        changes = (y.float() - x.float()).mul_(g)
        found.append(changes.sum(dim=-1, dtype=torch.float64).square_().sum())
    return torch.stack(found)[:, None]


def keep_inputs(batches: LayerPass, store: LossStore, layer: int) -> None:
    """Store the hidden states of the windows of the backward pass as they enter a layer.

    layer: the number of layers stores the last one's output.
    """
    ranks = batches.model.ranks
    if ranks.from_first(lambda: store.inputs_digest(layer)) is None:
        if ranks.is_first:
            files.make_directory(store.inputs_path(layer).parent)
        own = min(max(store.windows - batches.first_window, 0), len(batches.tokens))
        digest = batches.hidden[0].save(store.inputs_path(layer), ranks, own)
        if ranks.is_first:
            store.record_inputs(layer, digest)


def require_inputs(model: StreamedModel, store: LossStore, placement: Placement, progress: Progress) -> None:
    """Run these windows again if inputs of layers are missing, as when the statistics were already complete.

    placement: of the collection, whose batches are repeated so that the inputs are byte-identical.
    """
    ranks, run, count = model.ranks, store.run, len(model.layers)
    missing = ranks.from_first(lambda: [i for i in range(count + 1) if store.inputs_digest(i) is None])
    if not missing or ranks.from_first(store.complete) == count:
        return
    batch = placement.batch_size
    tokens = run.tokens.read()[: -(-store.windows // batch) * batch]
    own = ranks.share(len(tokens), batch)
    with (
        progress.stage("loss inputs", count, device=model.device) as stage,
        torch.inference_mode(),
        model.hidden_states(placement.hidden_place, len(own), tokens.shape[1], run.path) as hidden,
    ):
        reductions = run.batch_reductions("collect")
        batches = LayerPass(
            model, placement, tokens[own.start : own.stop], [hidden], reductions=reductions, windows=own
        )
        for i, weights in batches.layers(stage):
            keep_inputs(batches, store, i)
            batches.run_all(i, weights)
        keep_inputs(batches, store, count)


def collect_loss_scores(
    model: StreamedModel, store: LossStore, placement: Placement, progress: Progress, interval: int | None = None
) -> None:
    """Collect the loss scores of all layers into the run directory, resuming where an earlier call stopped.

    The inputs of all layers must be stored. interval: layers between two snapshots of the gradient.
    All ranks of the model take part; the run directory is open for writing on rank 0.
    Raises NonFinite, naming the layer, if a gradient holds NaN or infinity.
    """
    ranks, run = model.ranks, store.run
    done = ranks.from_first(store.complete)
    if done < len(model.layers):
        model.forget_calls()
        tokens = run.tokens.read()[: store.windows]
        own, length = ranks.share(len(tokens), placement.batch_size), tokens.shape[1]
        place = partial(model.hidden_states, placement.hidden_place, len(own), length, run.path)
        with (
            progress.stage("loss", len(model.layers), device=model.device) as stage,
            place() as inputs,
            place(dtype=torch.float32) as hidden,
        ):
            backward = BackwardPass(
                model,
                placement,
                tokens[own.start : own.stop],
                [hidden],
                stores=[store.snapshots],
                reductions=run.batch_reductions(f"loss {store.job}"),
                windows=own,
                inputs=inputs,
                store=store,
            )
            for i, weights in backward.layers(stage, done, interval):
                scores = backward.scores(i, weights)
                if i < len(model.layers) - done:  # otherwise an earlier call stored them
                    found = ranks.gathered(scores)
                    model.checkpoint.require_unchanged()
                    if ranks.is_first:
                        store.write(i, _means_over_windows(found))
    if ranks.is_first:
        store.snapshots.drop()
        store.drop_inputs()


def _means_over_windows(found: Sequence[Scores]) -> LossScores:
    """F of each unit. found: what every rank's windows add."""
    whole = {kind: torch.cat([part[kind] for part in found]) for kind in found[0]}
    means = {kind: whole[kind].mean(dim=0) for kind in whole if kind != "reached"}
    if "reached" in whole:
        means["experts"][whole["reached"].sum(dim=0) == 0] = torch.inf
    return LossScores(**{kind: mean.numpy() for kind, mean in means.items()})


def _baselines(model: StreamedModel, run: RunDirectory, index: int) -> dict[str, np.ndarray]:
    """The mean of each output projection's inputs, float64 `[channel]`."""
    statistics, shape = run.statistics.read(index), model.shapes[index]
    parts = model.family.parts(shape)
    return {part.kind.output.name: statistics.of(part.kind.name).mean[part.channels(shape)] for part in parts}


@dataclass(frozen=True)
class _Read:
    """What an output projection read.

    inputs: `[window, token, channel]`; for an expert `[routed token, channel]`, those of each window in `routed`.
    """

    part: Part
    inputs: torch.Tensor
    routed: list[torch.Tensor]

    def squares(self, mean: torch.Tensor, gradient: torch.Tensor, together: torch.Tensor | None) -> torch.Tensor:
        """Sums over a window's tokens of the squared sums of (x - mean) g over a unit's channels.

        float64 `[window, unit]`. together: gets an expert's sums over all channels added, float64 `[window, token]`.
        """
        inputs, gradients = (
            values if values.ndim == 3 else values.split([len(own) for own in self.routed])
            for values in (self.inputs.detach(), gradient)
        )
        squares = torch.zeros(len(inputs), self.part.units, dtype=torch.float64, device=mean.device)
        for window, (x, g) in enumerate(zip(inputs, gradients, strict=True)):
            sums = []
            for changes in _changes(x, g, mean, self.part.units):
                if self.routed and together is not None:
                    sums.append(changes.sum(dim=1))
                squares[window] += changes.square_().sum(dim=0)
            if together is not None and sums:
                together[window, self.routed[window]] += torch.cat(sums)
        return squares


def _changes(inputs: torch.Tensor, gradient: torch.Tensor, mean: torch.Tensor, units: int) -> Iterator[torch.Tensor]:
    """Sums of (x - mean) g over a unit's channels, float64 `[token, unit]`, of some tokens of one window at a time.

    inputs, gradient: `[token, channel]`.
    """
    rows = max(1, _SUMMED_ELEMENTS[inputs.device.type] // inputs.shape[1])
    for x, g in zip(inputs.split(rows), gradient.split(rows), strict=True):
        changes = (x.float() - mean).mul_(g)
        is_own = changes.shape[1] == units  # one channel a unit, which need not be summed
        yield changes.double() if is_own else changes.unflatten(-1, (units, -1)).sum(dim=-1, dtype=torch.float64)


@contextmanager
def _captured(model: StreamedModel, index: int) -> Iterator[list[_Read]]:
    """What a layer's output projections read while it runs in the block."""
    layer, shape = model.layers[index], model.shapes[index]
    number = len(shape.experts)
    reads: list[_Read] = []
    routed: list[list[torch.Tensor]] = []  # once the router has run: of each expert those of each window

    def see(part: Part) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            expert = part.kind.expert if inputs[0].ndim == 2 else None
            reads.append(_Read(part, inputs[0], [] if expert is None else routed[expert]))

        return hook

    handles = []
    for part in model.family.parts(shape):
        name = part.kind.output.name
        if f"{name}.weight" in model.layer_entries[index]:
            handles.append(layer.get_submodule(name).register_forward_pre_hook(see(part)))
    if number:
        router = layer.get_submodule(model.family.experts_path)
        windows = [0]
        handles.append(layer.register_forward_pre_hook(lambda _module, inputs: windows.append(len(inputs[0]))))
        handles.append(
            router.register_forward_pre_hook(
                lambda _module, inputs: routed.extend(_routed(inputs, number, windows[-1]))
            )
        )
    try:
        yield reads
    finally:
        for handle in handles:
            handle.remove()


def _routed(inputs: tuple[torch.Tensor, ...], experts: int, windows: int) -> list[list[torch.Tensor]]:
    """The numbers of the tokens of each window that are routed to each expert, `[expert][window]`.

    inputs: of all experts, see `SeparateExperts`.
    """
    if len(inputs) == 1:
        chosen = inputs[0].unflatten(0, (experts, -1)).ne(0).any(dim=-1).T
    else:
        ids = torch.arange(experts, device=inputs[1].device)
        chosen = (inputs[1][..., None] == ids).any(dim=1)  # [token, expert]
    own = chosen.unflatten(0, (windows, -1)).permute(2, 0, 1)  # [expert, window, token]
    tokens = own.nonzero()[:, 2].split(own.sum(dim=-1).flatten().tolist())
    return [list(tokens[first : first + windows]) for first in range(0, len(tokens), windows)]
