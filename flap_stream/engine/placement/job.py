"""A job described by sizes only: all windows through all layers once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.arithmetic.least_squares import experts_workspace_bytes, product_windows, workspace_bytes
from flap_stream.engine.placement.workspace import Way, layer_workspace
from flap_stream.engine.ranks import window_shares
from flap_stream.model.safetensors_format import TensorEntry
from flap_stream.model.skeleton import LOGIT_BYTES, Skeleton

_LOSS_LOGIT_BYTES = 1 << 25  # of a chunk of float32 logits that are differentiated; not measured
_HEAD_WORKSPACE = 7 * LOGIT_BYTES // 2  # of a chunk as computed, in float32, and what is made of it; not measured

BATCHES_BEHIND = 2  # whose moments wait on the host to be merged, on an accelerator

# Bytes per channel: seven float64 figures, those of the moments held once and all of them up to twice more.
_STATISTIC_BYTES = 19 * 8

ProjectionSizes = tuple[int, int, int]  # outputs, input channels and how many of those are kept


@dataclass(frozen=True)
class Refit:
    """Sizes of what restoration refits.

    projections: the output projections of all layers, by least squares, but those of experts. Without a plan any of
    them may keep almost all channels.
    experts: those of each layer that has experts. choices: how many of them a token is routed to.
    arranged: most parameters that read hidden states in one part of a layer, which are copied, kept rows first.
    follows_dense: whether the hidden states of the dense model are carried along as the target.
    fitted: parameters of each layer that are fitted with gradients, in `epochs` passes over the windows and steps of
    `step_tokens`.
    """

    projections: tuple[ProjectionSizes, ...] = ()
    arranged: int = 0
    experts: tuple[tuple[ProjectionSizes, ...], ...] = ()
    choices: int = 0
    follows_dense: bool = False
    fitted: tuple[int, ...] = ()
    epochs: int = 0
    step_tokens: int = 0

    @property
    def cached(self) -> int:
        """Most input channels that a projection keeps."""
        return max((kept for _, _, kept in self.projections), default=0)

    def host_bytes(self, item_bytes: int) -> int:
        """Bytes on the host, beside an accelerator: of an output projection, or of a fitted layer, best and last."""
        together = [*((sizes,) for sizes in self.projections), *self.experts]
        largest = max((sum(out * kept for out, _, kept in one) for one in together), default=0)
        return item_bytes * (largest + 2 * max(self.fitted, default=0))

    def operations(self, ratio: float, tokens: int) -> tuple[int, int]:
        """Multiplications and additions to accumulate the moments, and to solve for the weights.

        ratio: share of the channels that is removed.
        """
        moments = solving = 0.0
        for out, channels, share in self._seen():
            stays = (1 - ratio) * channels
            beside = out if self.follows_dense else channels - stays
            moments += share * tokens * stays * (stays + 2 * beside)
            moments += 2 * share * tokens * out * channels * self.follows_dense
            solving += stays**3 / 3 + 2 * stays**2 * min(beside, out)
        moments += (3 * self.epochs + 1) * tokens * sum(self.fitted)
        return int(moments), int(solving)

    def _seen(self) -> Iterator[tuple[int, int, float]]:
        """Outputs, inputs, and the share of all tokens that it gets, of each projection."""
        for out, channels, _ in self.projections:
            yield out, channels, 1.0
        for experts in self.experts:
            yield from ((out, channels, self.choices / len(experts)) for out, channels, _ in experts)

    def sum_bytes(self, ratio: float) -> int:
        """Bytes of the sums of all projections that one rank accumulates."""
        total = 0.0
        for out, channels, _ in self._seen():
            stays = (1 - ratio) * channels
            total += 8 * stays * (stays / 2 + (out if self.follows_dense else channels - stays))
        return int(total)


@dataclass(frozen=True, eq=False)
class Job:
    """All windows through all layers once, described by sizes only.

    layers: the tensors of each layer by relative name. dtype: of the forward. head: None if no logits are wanted.
    refit: None if nothing is refitted. backward: whether gradients flow through the layers. of_experts: whether they
    are also taken of the outputs of mixtures of experts.
    keeps_batch_size: whether a batch size asked for is used or refused; otherwise smaller ones are tried, too.
    ranks: processes that share the windows. local_ranks: the most of them on one machine.
    base_bytes: host memory that the process uses before the job; None is what it uses when the job is placed.
    """

    skeleton: Skeleton
    layers: Sequence[Mapping[str, TensorEntry]]
    dtype: torch.dtype
    device: str
    samples: int
    tokens: int
    head: TensorEntry | None = None
    refit: Refit | None = None
    backward: bool = False
    of_experts: bool = False
    keeps_batch_size: bool = True
    ranks: int = 1
    local_ranks: int = 1
    base_bytes: int | None = None

    @property
    def state_size(self) -> int:
        """Width of what layers hand on: of most models that of the hidden states."""
        return self.skeleton.state.width

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states of all windows between two layers."""
        return self.batch_bytes(self.samples)

    def share(self, batch_size: int) -> int:
        """Most windows that one rank has."""
        together = batch_size
        if self.refit is not None:
            together = undivided_windows((self.samples, self.tokens), batch_size, fits=bool(self.refit.fitted))
        return max(map(len, window_shares(self.samples, together, self.ranks)))

    def waiting_bytes(self, batch_size: int) -> int:
        """Bytes of moments of windows that are held on the host.

        With several ranks, of all windows of a rank, sent and received, until a layer is done; else, beside an
        accelerator, of few batches.
        """
        if self.refit is not None or (self.ranks == 1 and self.device == "cpu"):
            return 0
        shapes = list(map(self.skeleton.layer_shape, range(len(self.layers))))
        if self.ranks == 1:
            return landing_bytes(shapes, batch_size)
        return max(3 * moment_bytes(shape, self.share(batch_size), batch_size) for shape in shapes)

    @property
    def statistics_bytes(self) -> int:
        """Bytes of a layer's statistics on the host, with the copies made until they are stored."""
        shapes = map(self.skeleton.layer_shape, range(len(self.layers)))
        return _STATISTIC_BYTES * max(s.attention_channels + s.neurons for s in shapes)

    def batch_bytes(self, windows: int) -> int:
        """Bytes of the hidden states of that many windows; in a refit, of the dense ones and the kept inputs too."""
        width = self.state_size
        if self.refit is not None:
            width += self.refit.cached + self.refit.follows_dense * self.state_size
        gradient = windows * self.tokens * self.state_size * 4 if self.backward else 0  # float32, next to the inputs
        return windows * self.tokens * width * self.dtype.itemsize + gradient

    def refit_bytes(self, batch_size: int) -> tuple[int, int]:
        """Most bytes that refitting takes while a layer runs, and while none does."""
        if self.refit is None or self.refit.fitted:
            return 0, 0
        item, on_cpu = self.dtype.itemsize, self.device == "cpu"
        has_target = self.refit.follows_dense
        of = [workspace_bytes(sizes, item, on_cpu, has_target) for sizes in self.refit.projections]
        block = product_windows(batch_size, self.tokens) * self.tokens
        of += [
            experts_workspace_bytes(experts, block, self.refit.choices, item, on_cpu)
            for experts in set(self.refit.experts)
        ]
        # Beside the sums, what a batch's outputs lack of the target, in float32, and what it is computed from.
        missing = has_target * (8 + item) * batch_size * self.tokens * self.state_size
        return max(adding for adding, _ in of) + missing, max(solving for _, solving in of)

    def head_bytes(self, batch_size: int) -> int:
        """Most bytes that the head and what it computes take at once, while no layer is in memory."""
        if self.head is None or (self.refit is not None and self.refit.fitted):
            return 0
        if not self.backward:
            return self.head.nbytes + _HEAD_WORKSPACE
        # Logits and their gradient in both dtypes, log-probabilities and theirs, beside what a norm keeps of a window;
        # after the last chunk the gradient of that norm.
        chunk, window = self._chunk_bytes(self.tokens, 16 + 2 * self.dtype.itemsize), self.batch_bytes(1)
        return self.head.nbytes + 2 * self.batch_bytes(batch_size) + max(chunk + 3 * window, 8 * window)

    def _chunk_bytes(self, tokens: int, each: int) -> int:
        """Bytes of a chunk of logits of so many tokens at most, `each` per logit."""
        assert self.head is not None
        vocabulary = self.head.shape[0]
        logits = min(tokens, chunk_tokens(vocabulary)) * vocabulary
        return each * logits + (self.head.nbytes if self.device == "cpu" else 0)  # a CPU copies the head for a product

    def workspace(self, batch_size: int) -> tuple[int, int]:
        """Peak bytes alive while one batch runs through any layer: of all tensors, and of small ones only.

        See `layer_workspace`.
        """
        backward: Way = "experts" if self.of_experts else "backward"
        return self._workspace(batch_size, backward if self.backward else "forward")

    def fit(self, batch_size: int) -> tuple[int, int, int]:
        """Most bytes that fitting a layer takes: those of parameters, of all other tensors, and of small ones only.

        The head, which the last layer is fitted through, counts as parameters.
        """
        if self.refit is None or not self.refit.fitted:
            return 0, 0, 0
        # In float32 the parameters, their gradients and Adam's two moments; as they run.
        each = 16 + self.dtype.itemsize
        largest = max(prod(entry.shape) for layer in self.layers for entry in layer.values())
        parameters = each * max(self.refit.fitted) + 8 * largest  # one product with a mask, and its gradient
        if self.device == "cpu":
            # The best so far, and what it is compared with, which wait on the host; what a heap keeps beyond that.
            parameters = (each + 14 + 3 * self.dtype.itemsize) * max(self.refit.fitted)
        windows = min(batch_size, max(1, self.refit.step_tokens // self.tokens))
        if self.head is not None:  # logits of both models, probabilities, gradients; hidden states and theirs
            chunk = self._chunk_bytes(windows * self.tokens, 20 + 4 * self.dtype.itemsize)
            parameters += self.head.nbytes + chunk + 8 * self.batch_bytes(windows)
        return parameters, *self._workspace(windows, "fit")

    def _workspace(self, batch_size: int, way: Way) -> tuple[int, int]:
        return layer_workspace(self.skeleton.config, (batch_size, self.tokens), self.dtype, self.device, way)


def undivided_windows(shape: tuple[int, int], batch_size: int, fits: bool) -> int:
    """How many windows of a refit are not divided among ranks.

    shape: all windows, and the tokens of one. fits: whether layers are fitted with gradients, which the first rank does
    alone, on all windows.
    """
    samples, tokens = shape
    return samples if fits else product_windows(batch_size, tokens)


def chunk_tokens(vocabulary: int) -> int:
    """Most tokens whose logits are differentiated at once."""
    return max(1, _LOSS_LOGIT_BYTES // (4 * vocabulary))


def moment_bytes(shape: LayerShape, samples: int, batch_size: int) -> int:
    """Bytes of the means and m2s, float32, of all windows of a layer.

    For an expert, all tokens of a batch count as one window.
    """
    return 8 * (
        samples * shape.attention_channels + (-(-samples // batch_size) if shape.experts else samples) * shape.neurons
    )


def landing_bytes(shapes: Sequence[LayerShape], batch_size: int) -> int:
    """Bytes of page-locked memory for the moments of the batches that have not been merged yet."""
    return (1 + BATCHES_BEHIND) * max(moment_bytes(shape, batch_size, batch_size) for shape in shapes)
