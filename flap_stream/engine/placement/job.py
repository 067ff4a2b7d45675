"""A job described by sizes only: all windows through all layers once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from flap_stream.arithmetic.gauss_newton import DIRECTIONS, step_workspace_bytes
from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.arithmetic.least_squares import product_windows, workspace_bytes
from flap_stream.engine.memory import give_back_heap
from flap_stream.engine.placement.workspace import layer_workspace
from flap_stream.engine.ranks import window_shares
from flap_stream.model.safetensors_format import TensorEntry
from flap_stream.model.skeleton import Skeleton

LOSS_LOGIT_BYTES = 1 << 25  # of a chunk of float32 logits that are differentiated; not measured
_HEAD_WORKSPACE = 224 << 20  # a chunk of logits in float32, held twice, or a block of rows of a refitted head

BATCHES_BEHIND = 2  # whose moments wait on the host to be merged, beside an accelerator

# Bytes per channel: seven float64 figures, those of the moments held once and all of them up to twice more.
_STATISTIC_BYTES = 19 * 8


@dataclass(frozen=True)
class Refit:
    """Sizes of what restoration refits.

    projections: `(out, channels, kept)` of the output projections of all layers. Without a plan any of them may keep
    almost all channels.
    has_dense: whether the hidden states of the dense model are carried along as the target.
    readers: parameters that read hidden states: all of one module, as they are aligned, and the refitted ones. The
    squares that the alignment matrices come from are among the projections.
    has_head: whether the head is refitted.
    steps: `(rows that move, neurons kept, hidden size)` of each layer in which a Gauss-Newton step is taken.
    fitted: parameters of each layer that are fitted with gradients, in `epochs` passes over the windows and steps of
    `step_tokens`.
    """

    projections: tuple[tuple[int, int, int], ...]
    has_dense: bool
    readers: int = 0
    has_head: bool = False
    steps: tuple[tuple[int, int, int], ...] = ()
    fitted: tuple[int, ...] = ()
    epochs: int = 0
    step_tokens: int = 0

    @property
    def cached(self) -> int:
        """Most input channels that a projection keeps."""
        return max((kept for _, _, kept in self.projections), default=0)

    def host_bytes(self, item_bytes: int) -> int:
        """Bytes of what is refitted, on the host: what reads hidden states, a step in float32 and what it leads to."""
        steps = ((8 + item_bytes) * rows * hidden for rows, _, hidden in self.steps)
        return self.readers * item_bytes + max(steps, default=0)

    def operations(self, ratio: float, tokens: int) -> tuple[int, int]:
        """Multiplications and additions to accumulate the moments, and to solve for the weights.

        ratio: share of the channels that is removed.
        """
        moments = solving = 0.0
        for out, channels, _ in self.projections:
            stays = (1 - ratio) * channels
            beside = out if self.has_dense else channels - stays
            moments += tokens * stays * (stays + 2 * beside)
            solving += stays**3 / 3 + 2 * stays**2 * min(beside, out)
        for rows, neurons, hidden in self.steps:
            moments += tokens * (1 - ratio) ** 2 * neurons * (neurons + 2 * hidden)  # before the step
            pulls = hidden * (2 * rows + neurons + hidden / 2)  # reading and summing included
            pushes = hidden * (rows + neurons)
            moments += 2 * tokens * (1 - ratio) * ((1 + DIRECTIONS) * (pulls + pushes) + pushes)
            solving += hidden**3 / 3 + (1 - ratio) * (2 * DIRECTIONS + 2) * rows * hidden**2
        moments += (3 * self.epochs + 1) * tokens * sum(self.fitted)
        return int(moments), int(solving)

    def sum_bytes(self, ratio: float) -> int:
        """Bytes of the sums of all projections that one rank accumulates."""
        total = 0.0
        for out, channels, _ in self.projections:
            stays = (1 - ratio) * channels
            total += 8 * stays * (stays / 2 + (out if self.has_dense else channels - stays))
        for rows, neurons, hidden in self.steps:
            total += 8 * (1 - ratio) * neurons * ((1 - ratio) * neurons / 2 + hidden)
            total += 8 * (1 + DIRECTIONS) * hidden * (hidden / 2 + (1 - ratio) * rows)
        return int(total)


@dataclass(frozen=True, eq=False)
class Job:
    """All windows through all layers once, described by sizes only.

    layers: the tensors of each layer by relative name. dtype: of the forward. head: None if no logits are wanted.
    refit: None if nothing is refitted. backward: whether gradients flow through the layers.
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
    keeps_batch_size: bool = True
    ranks: int = 1
    local_ranks: int = 1
    base_bytes: int | None = None
    _workspaces: dict[tuple[int, bool], tuple[int, int]] = field(default_factory=dict, repr=False)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.skeleton.config["hidden_size"]

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states of all windows between two layers."""
        return self.batch_bytes(self.samples)

    def share(self, batch_size: int) -> int:
        """Most windows that one rank has."""
        together = batch_size if self.refit is None else product_windows(batch_size, self.tokens)
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
        return _STATISTIC_BYTES * max(s.kv_groups * s.heads_per_group * s.head_dim + s.neurons for s in shapes)

    def batch_bytes(self, windows: int) -> int:
        """Bytes of the hidden states of that many windows; in a refit, of the dense ones and the kept inputs too."""
        width = self.hidden_size
        if self.refit is not None:
            width += self.refit.has_dense * self.hidden_size + self.refit.cached
        gradient = windows * self.tokens * self.hidden_size * 4 if self.backward else 0  # float32, next to the inputs
        return windows * self.tokens * width * self.dtype.itemsize + gradient

    def refit_bytes(self, batch_size: int) -> tuple[int, int]:
        """Most bytes that refitting takes while a layer runs, and while none does."""
        if self.refit is None or self.refit.fitted:
            return 0, 0
        tokens, item, on_cpu = batch_size * self.tokens, self.dtype.itemsize, self.device == "cpu"
        of = [workspace_bytes(*sizes, item, self.refit.has_dense, on_cpu) for sizes in self.refit.projections]
        of += [step_workspace_bytes(*sizes, tokens, item, on_cpu) for sizes in self.refit.steps]
        return max(adding for adding, _ in of), max(solving for _, solving in of)

    def head_bytes(self, batch_size: int) -> int:
        """Most bytes that the head and what it computes take at once, while no layer is in memory."""
        if self.head is None:
            return 0
        if not self.backward:
            return self.head.nbytes + _HEAD_WORKSPACE
        vocabulary = self.head.shape[0]
        logits = min(self.tokens, max(1, LOSS_LOGIT_BYTES // (4 * vocabulary))) * vocabulary
        # Logits and their gradient in both dtypes, log-probabilities and theirs; a CPU copies the head for a product.
        chunk = (16 + 2 * self.dtype.itemsize) * logits + (self.head.nbytes if self.device == "cpu" else 0)
        return self.head.nbytes + chunk + 2 * self.batch_bytes(batch_size) + 8 * self.batch_bytes(1)

    def workspace(self, batch_size: int) -> tuple[int, int]:
        """Peak bytes alive while one batch runs through any layer: of all tensors, and of small ones only.

        See `layer_workspace`; found once per batch size.
        """
        return self._workspace(batch_size, False)

    def fit(self, batch_size: int) -> tuple[int, int, int]:
        """Most bytes that fitting a layer takes: those of parameters, of all other tensors, and of small ones only."""
        if self.refit is None or not self.refit.fitted:
            return 0, 0, 0
        # In float32 the parameters, their gradients, Adam's two moments, and products with masks; as they run, with
        # gradients; the best so far, and what it is compared with. The rest is what a heap of a CPU kept beyond that.
        parameters = (30 + 4 * self.dtype.itemsize) * max(self.refit.fitted)
        windows = min(batch_size, max(1, self.refit.step_tokens // self.tokens))
        return parameters, *self._workspace(windows, True)

    def _workspace(self, batch_size: int, fits: bool) -> tuple[int, int]:
        key = batch_size, fits
        if key not in self._workspaces:
            batch = batch_size, self.tokens
            self._workspaces[key] = layer_workspace(
                self.skeleton, self.layers, batch, self.dtype, self.device, self.backward, fits
            )
            give_back_heap()  # fake tensors leave more behind than real ones
        return self._workspaces[key]


def moment_bytes(shape: LayerShape, samples: int, batch_size: int) -> int:
    """Bytes of the means and m2s, float32, of all windows of a layer.

    For an expert, all tokens of a batch count as one window.
    """
    channels = shape.kv_groups * shape.heads_per_group * shape.head_dim
    return 8 * (samples * channels + (-(-samples // batch_size) if shape.experts else samples) * shape.neurons)


def landing_bytes(shapes: Sequence[LayerShape], batch_size: int) -> int:
    """Bytes of page-locked memory for the moments of the batches that have not been merged yet."""
    return (1 + BATCHES_BEHIND) * max(moment_bytes(shape, batch_size, batch_size) for shape in shapes)
