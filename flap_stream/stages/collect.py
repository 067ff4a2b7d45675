"""Pass 1: every decoder layer's statistics, taken while the dense model streams by."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flap_stream.arithmetic.allocation import keep_in_layer
from flap_stream.arithmetic.moments import Moments, column_norms, joined_channels, window_moments
from flap_stream.arithmetic.scoring import ChannelStatistics, LayerStatistics, concatenated, wanda_scores
from flap_stream.arithmetic.surgery import removed_indices
from flap_stream.config import CollectConfig, PlanConfig, part_of
from flap_stream.engine.layer_pass import LayerPass
from flap_stream.engine.placement import Placement
from flap_stream.engine.ranks import Ranks
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import CorruptCheckpoint
from flap_stream.progress import Progress, peak_device_bytes, peak_host_bytes
from flap_stream.stages.loss import keep_inputs
from flap_stream.storage.loss import LossStore
from flap_stream.storage.run_directory import RunDirectory
from flap_stream.storage.statistics import LayerCost

_CHANNEL_BLOCK = 16
# Means and m2s of a batch's windows, float32 [sample, channel], and the tokens of each.
_Windows = tuple[torch.Tensor, torch.Tensor, int]


def collect_statistics(
    model: StreamedModel,
    run: RunDirectory,
    options: CollectConfig,
    placement: Placement,
    progress: Progress,
    loss: LossStore | None = None,
) -> None:
    """Bring the statistics of all layers into the run directory, going on where an earlier run stopped.

    Layers whose statistics are stored are not measured again; they are only run, from the newest snapshot on, to
    give the next layer its input. All ranks of the model do this together, each on its share of the windows; `run`
    is open for writing on the first. loss: where the inputs of all layers are kept for the backward sweep, if there is
    to be one.
    """
    ranks = model.ranks
    first = run.statistics.complete_layers()
    count = len(model.layers)
    if first == count:
        with progress.stage("collect", count) as stage:
            stage.skip(count)
        if ranks.is_first:
            run.snapshots.drop()  # a kill may have come between the last layer and this
        return
    with progress.stage("collect", count, device=model.device) as stage, torch.inference_mode(), ExitStack() as stack:
        if options.method == "magnitude-sp":
            stage.skip(first)
            costs = _Costs(0, model.device)
            for i, weights in model.stream(range(first, count), placement.prefetch):
                if ranks.is_first:
                    _store(model, run, i, _layer_statistics(model, i, weights, {}), costs)
                stage.advance(bytes_moved=model.layer_bytes(i))
            return
        tokens = run.tokens.read()
        own = ranks.share(len(tokens), placement.batch_size)
        hidden = stack.enter_context(model.hidden_states(placement.hidden_place, len(own), tokens.shape[1], run.path))
        batches = LayerPass(
            model,
            placement,
            tokens[own.start : own.stop],
            [hidden],
            stores=[run.snapshots],
            reductions=run.batch_reductions("collect"),
            windows=own,
        )
        collection, costs = _Collection(batches, run, options), _Costs(tokens.size, model.device)
        for i, weights in batches.layers(stage, first, options.snapshot_interval):
            if loss is not None:
                keep_inputs(batches, loss, i)
            if i < first:
                collection.repeat(i, weights)
                costs.of_layer()  # it has been recorded
            else:
                statistics = collection.measure(i, weights)
                if ranks.is_first:
                    _store(model, run, i, statistics, costs)
                if collection.hands_on_pruned:
                    collection.repeat(i, weights)
        if loss is not None:
            keep_inputs(batches, loss, count)
        if ranks.is_first:
            run.snapshots.drop()


class _Costs:
    """Tells what each layer took. tokens: that run through every one, on `device`."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self._tokens, self._device, self._since = tokens, device, time.monotonic()

    def of_layer(self) -> LayerCost:
        """What was taken since the last call."""
        before, self._since = self._since, time.monotonic()
        return LayerCost(self._since - before, self._tokens, peak_host_bytes(), peak_device_bytes(self._device))


def _store(model: StreamedModel, run: RunDirectory, index: int, statistics: LayerStatistics, costs: _Costs) -> None:
    """Record a layer, unless the model's files were changed while it was taken."""
    model.checkpoint.require_unchanged()
    checksum = model.checkpoint.checksum(list(model.layer_entries[index].values()))
    run.statistics.write(index, statistics, checksum, costs.of_layer())


@dataclass(frozen=True)
class _Collection:
    """The windows on their way through the layers, and what is measured there."""

    batches: LayerPass
    run: RunDirectory
    options: CollectConfig

    @property
    def hands_on_pruned(self) -> bool:
        """Whether the pruned output of a layer feeds the next, which takes another run of the layer."""
        return self.options.method == "wanda-sp"

    def measure(self, index: int, weights: Mapping[str, torch.Tensor]) -> LayerStatistics:
        """Run a layer; the statistics of what its output projections read, of the windows of all ranks."""
        model = self.batches.model
        with _input_moments(model, index, weights) as merger:
            for _ in self.batches.run(index, weights, keep_output=not self.hands_on_pruned):
                merger.take_batch()
        moments = merger.finish()
        _require_same_on_all_machines(model, index)
        return _layer_statistics(model, index, weights, moments)

    def repeat(self, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Hand on the output of a layer that has been measured; for wanda-sp, pruned: removed channels output zero."""
        if self.hands_on_pruned:
            self.batches.step = (index, 1)
            self._zero_removed(index, weights)
        self.batches.run_all(index, weights)

    def _zero_removed(self, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        model, decision = self.batches.model, part_of(self.options, PlanConfig)
        shape = model.shapes[index]
        channels = shape.heads_per_group * shape.head_dim
        keep = model.ranks.from_first(
            lambda: keep_in_layer(wanda_scores(self.run.statistics.read(index), channels), shape, decision)
        )
        for part in model.family.parts(shape):
            output = part.kind.output
            kept = output.kept_indices(part.own(keep.of(part.kind.name)), part.units, shape)
            removed = removed_indices(kept, output.size(part.units, shape))
            if len(removed):
                weights[f"{output.name}.weight"][:, torch.from_numpy(removed).to(model.device)] = 0


def _require_same_on_all_machines(model: StreamedModel, index: int) -> None:
    """Raise CorruptCheckpoint if a layer was read with other bytes on one machine than on another."""
    ranks, entries = model.ranks, list(model.layer_entries[index].values())
    checksum = model.checkpoint.checksum(entries) if ranks.leads_node else None
    if len({found for found in ranks.gathered(checksum) if found is not None}) > 1:
        raise CorruptCheckpoint(
            f"layer {index} of {model.checkpoint.source} has other bytes on one machine than on another; "
            "give all machines the same files and run the same command again"
        )


def _layer_statistics(
    model: StreamedModel, index: int, weights: Mapping[str, torch.Tensor], moments: Mapping[str, Moments]
) -> LayerStatistics:
    """Moments and the norms of the weights together, experts one after another; without moments, counts are 0."""
    found: dict[str, list[ChannelStatistics]] = {"attention": [], "mlp": []}
    for part in model.family.parts(model.shapes[index]):
        weight = weights.get(f"{part.kind.output.name}.weight")
        channels = 0 if weight is None else weight.shape[1]
        squared, absolute = (np.zeros(0), np.zeros(0)) if weight is None else column_norms(weight)
        own = vars(moments.get(part.kind.output.name, Moments.empty(channels)))
        norms: dict[str, Any] = {"weight_squared_norm": squared, "weight_abs_mean": absolute}
        count = np.full(channels, own["count"], dtype=np.int64)
        found[part.kind.name].append(ChannelStatistics(**{**own, **norms, "count": count}))
    return LayerStatistics(**{kind: concatenated(parts) for kind, parts in found.items()})


class _Merger:
    """Merges the window moments of a layer's output projections: those of every channel in the order of windows.

    Ranks run their windows side by side, so the merging is divided by channels: each rank gets the moments of some of
    them, of all windows, and adds them batch by batch as one process would. No operation mixes channels; so every sum
    has the same terms in the same order, whatever the number of ranks.
    """

    def __init__(self, ranks: Ranks, channels: Mapping[str, int]) -> None:
        self._ranks, self._channels = ranks, channels
        self._moments = {name: Moments.empty(len(self._own(name, ranks.rank))) for name in channels}
        self._pending: dict[str, _Windows] = {}
        self._batches: list[dict[str, _Windows]] = []

    def _own(self, name: str, rank: int) -> range:
        """The channels of a projection that a rank merges; not very few, which numpy might sum in another order."""
        count, world = self._channels[name], self._ranks.world
        first, last = (count * part // world // _CHANNEL_BLOCK * _CHANNEL_BLOCK for part in (rank, rank + 1))
        return range(first, count if rank + 1 == world else last)

    def hook(self, name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        """What sees the inputs of a projection."""

        def see(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            windows = inputs[0] if inputs[0].ndim == 3 else inputs[0][None]  # an expert's tokens are one window
            means, m2s = window_moments(windows)
            self._pending[name] = (means, m2s, windows.shape[1])

        return see

    def begin_batch(self) -> None:
        """A batch is about to run: what one that failed has left does not count."""
        self._pending = {}

    def take_batch(self) -> None:
        """A batch has run."""
        on_host = {name: (means.cpu(), m2s.cpu(), tokens) for name, (means, m2s, tokens) in self._pending.items()}
        self._batches.append(on_host)
        self._pending = {}
        if self._ranks.world == 1:
            self._merge()

    def finish(self) -> dict[str, Moments]:
        """Moments of all windows, by projection."""
        self._merge()
        parts = self._ranks.gathered(self._moments)
        return {name: joined_channels([part[name] for part in parts]) for name in self._channels}

    def _merge(self) -> None:
        for batches in self._ranks.exchanged([self._columns(rank) for rank in range(self._ranks.world)]):
            for batch in batches:
                for name, (means, m2s, tokens) in batch.items():
                    self._moments[name].add_windows(means, m2s, tokens)
        self._batches = []

    def _columns(self, rank: int) -> list[dict[str, tuple[np.ndarray, np.ndarray, int]]]:
        """The channels that a rank merges, of the windows that have run here."""
        return [
            {
                name: (means.numpy()[:, own.start : own.stop], m2s.numpy()[:, own.start : own.stop], tokens)
                for name, (means, m2s, tokens) in batch.items()
                if len(own := self._own(name, rank)) or rank == 0
            }
            for batch in self._batches
        ]


@contextmanager
def _input_moments(model: StreamedModel, index: int, weights: Mapping[str, torch.Tensor]) -> Iterator[_Merger]:
    """What takes the moments of the inputs of the layer's output projections while it runs."""
    names = [part.kind.output.name for part in model.family.parts(model.shapes[index])]
    present = {name: weights[f"{name}.weight"].shape[1] for name in names if f"{name}.weight" in weights}
    merger = _Merger(model.ranks, {name: present.get(name, 0) for name in names})
    layer = model.layers[index]
    handles = [layer.get_submodule(name).register_forward_pre_hook(merger.hook(name)) for name in present]
    handles.append(layer.register_forward_pre_hook(lambda _module, _inputs: merger.begin_batch()))
    try:
        yield merger
    finally:
        for handle in handles:
            handle.remove()
