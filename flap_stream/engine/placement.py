"""What a job will take, from config and headers alone, and how it is arranged to fit into the memory allowed.

Predictions are made before anything is allocated: buffers are counted, and the workspace of a layer is found by
running the real layer on tensors that have sizes but no memory.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flap_stream.arithmetic.gauss_newton import DIRECTIONS, step_workspace_bytes
from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.arithmetic.least_squares import product_windows, workspace_bytes
from flap_stream.arithmetic.moments import window_moments
from flap_stream.engine.memory import OWN_BLOCK_BYTES, Limits, give_back_heap, resident_bytes
from flap_stream.engine.ranks import window_shares
from flap_stream.engine.weight_stream import RING_BLOCK_BYTES, cast_bytes, ring_blocks, slab_bytes
from flap_stream.errors import InsufficientMemory
from flap_stream.model.checkpoint import TensorEntry
from flap_stream.model.skeleton import LayerCall, Skeleton
from flap_stream.progress import format_bytes

# Tokens that one batch holds when nobody chooses: enough to keep the matrix products efficient, little workspace.
_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
# Below this, products wait for weights from memory: rather keep hidden states on disk or give up reading ahead.
_EFFICIENT_TOKENS = {"cpu": 512, "cuda": 4096}
# What lazy imports, thread stacks, kernels compiled at first use and freed but unreturned memory add to the buffers.
_HOST_SLACK = {"cpu": 36 << 20, "cuda": 40 << 20}
# What lies idle in the heap at most, as a share of the activations and again of those that are always there: where
# there is a hole, malloc puts what could have memory of its own, too. Chosen by tools/memory_grid.py.
_HEAP_HOLES = (0.5, 1.5)
_HEAD_WORKSPACE = 224 << 20  # a chunk of logits, in float32 twice over; of a refitted head, a block of rows likewise
# By how much two processes that do the same may differ when they place it.
_BETWEEN_PROCESSES = 8 << 20
_STATISTIC_BYTES = 19 * 8  # of a channel: seven figures, those of moments once and all of them twice more at times
_FEWEST_TOKENS = 16  # shorter windows are not advised
_DEVICE_SLACK = 128 << 20  # workspaces of the matrix library, and rounding of the allocator


@dataclass(frozen=True)
class Refit:
    """Sizes of what pass 2 refits.

    projections: `(out, channels, kept)` of the output projections of all layers. Before there is a plan any of them may
    keep almost all channels.
    has_dense: whether the dense hidden states go along, as the target.
    readers: parameters that read hidden states, all of one module as pass 2 arranges them and those that are refitted.
    The squares of which the matrices come that align them are among the projections.
    has_head: whether the head is refitted.
    steps: for each layer of which a Gauss-Newton step is taken, rows that move, neurons that stay and hidden size.
    """

    projections: tuple[tuple[int, int, int], ...]
    has_dense: bool
    readers: int = 0
    has_head: bool = False
    steps: tuple[tuple[int, int, int], ...] = ()

    @property
    def cached(self) -> int:
        """Most channels that are kept of the inputs of a projection."""
        return max((kept for _, _, kept in self.projections), default=0)

    def operations(self, ratio: float, tokens: int) -> tuple[int, int]:
        """Multiplications and additions of the moments, and of solving, if so large a share of the channels goes."""
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
        return int(moments), int(solving)

    def sum_bytes(self, ratio: float) -> int:
        """Bytes of the sums of all projections, as one rank has them."""
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
    """All windows through all layers once, described by sizes alone.

    layers: a layer's tensors by relative name. dtype: of the forward. head: None if only statistics are wanted.
    refit: None if nothing is refitted. backward: whether gradients go through the layers.
    ranks: processes that share the windows; local_ranks: those of them on one machine, at most.
    base_bytes: host memory that the process takes before the job; None is what it takes when it is placed.
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
    ranks: int = 1
    local_ranks: int = 1
    base_bytes: int | None = None
    _workspaces: dict[int, tuple[int, int]] = field(default_factory=dict, repr=False)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.skeleton.config["hidden_size"]

    @property
    def hidden_bytes(self) -> int:
        """Bytes of what all windows have between two layers."""
        return self.batch_bytes(self.samples)

    def share(self, batch_size: int) -> int:
        """Most windows that one rank has."""
        together = batch_size if self.refit is None else product_windows(batch_size, self.tokens)
        return max(map(len, window_shares(self.samples, together, self.ranks)))

    def waiting_bytes(self, batch_size: int) -> int:
        """Bytes of the moments of a rank's windows, which wait on the host until a layer is done: sent and received."""
        if self.ranks == 1 or self.refit is not None:
            return 0
        shapes = map(self.skeleton.layer_shape, range(len(self.layers)))
        return max(3 * moment_bytes(shape, self.share(batch_size), batch_size) for shape in shapes)

    @property
    def statistics_bytes(self) -> int:
        """Bytes of a layer's statistics on the host, with the copies that are made until they are stored."""
        shapes = map(self.skeleton.layer_shape, range(len(self.layers)))
        return _STATISTIC_BYTES * max(s.kv_groups * s.heads_per_group * s.head_dim + s.neurons for s in shapes)

    def batch_bytes(self, windows: int) -> int:
        """Bytes of the hidden states of so many windows; in a refit, of the dense ones and the kept inputs too."""
        width = self.hidden_size
        if self.refit is not None:
            width += self.refit.has_dense * self.hidden_size + self.refit.cached
        gradient = windows * self.tokens * self.hidden_size * 4 if self.backward else 0  # float32, beside the inputs
        return windows * self.tokens * width * self.dtype.itemsize + gradient

    def refit_bytes(self, batch_size: int) -> tuple[int, int]:
        """Most bytes that refitting takes while a layer runs, and when none does."""
        if self.refit is None:
            return 0, 0
        tokens, item, on_cpu = batch_size * self.tokens, self.dtype.itemsize, self.device == "cpu"
        of = [workspace_bytes(*sizes, item, self.refit.has_dense, on_cpu) for sizes in self.refit.projections]
        of += [step_workspace_bytes(*sizes, tokens, item, on_cpu) for sizes in self.refit.steps]
        return max(adding for adding, _ in of), max(solving for _, solving in of)

    def workspace(self, batch_size: int) -> tuple[int, int]:
        """Most bytes that live at once, weights and hidden states aside, while one batch runs through any layer.

        The second figure is that of tensors too small for memory of their own (`memory.OWN_BLOCK_BYTES`) alone.
        """
        if batch_size not in self._workspaces:
            self._workspaces[batch_size] = _find_workspace(self, batch_size)
            give_back_heap()  # fake tensors leave more behind than real ones
        return self._workspaces[batch_size]


@dataclass(frozen=True)
class Placement:
    """How a job is run, and the most memory that it takes by prediction.

    batch_size: windows at once. hidden_place: one of hidden_states.PLACES. prefetch: layers read ahead.
    base_bytes: what of the host's memory was taken before.
    """

    batch_size: int
    hidden_place: str
    prefetch: int
    host_bytes: int
    device_bytes: int
    base_bytes: int = 0

    def together(self, other: "Placement") -> "Placement":
        """The same, with the memory of whichever of the two takes more."""
        host, device = (max(getattr(p, n) for p in (self, other)) for n in ("host_bytes", "device_bytes"))
        return replace(self, host_bytes=host, device_bytes=device)

    def fits(self, limits: Limits) -> bool:
        """Whether it keeps within the limits."""
        return self.host_bytes <= limits.host and self.device_bytes <= limits.device


def moment_bytes(shape: LayerShape, samples: int, batch_size: int) -> int:
    """Bytes of the means and m2s, float32, of all windows of a layer; of an expert a batch's tokens are one window."""
    channels = shape.kv_groups * shape.heads_per_group * shape.head_dim
    return 8 * (samples * channels + (-(-samples // batch_size) if shape.experts else samples) * shape.neurons)


def place(
    job: Job,
    limits: Limits,
    batch_size: int | None = None,
    prefetch: int | None = None,
    then: Sequence[Job] = (),
    recorded: int | None = None,
) -> Placement:
    """The fastest placement that fits, with a batch size at which the jobs that come `then` fit as well.

    batch_size, prefetch: wishes; None leaves them open. recorded: the batch size of a run that is taken up, in force
    unless another is wished for.
    Raises InsufficientMemory, naming what would fit, if there is none.
    """
    jobs = _on_one_base((job, *then), batch_size or recorded, prefetch)
    found = _fitting(jobs, limits, batch_size or recorded, prefetch)
    if found is None:
        raise InsufficientMemory(_refusal(jobs, limits, batch_size, prefetch, recorded))
    return found


def _on_one_base(jobs: Sequence[Job], batch_size: int | None, prefetch: int | None) -> list[Job]:
    """The jobs, all of them on top of what is resident before the first."""
    base = jobs[0].base_bytes
    if base is None:
        for job in jobs:
            next(_placements(job, batch_size, prefetch))  # finding a workspace loads something, and keeps it
        base = resident_bytes()
    return [replace(job, base_bytes=base) for job in jobs]


def _fitting(jobs: Sequence[Job], limits: Limits, batch_size: int | None, prefetch: int | None) -> Placement | None:
    """The fastest placement of the first job at whose batch size all of them fit."""
    for first in _placements(jobs[0], batch_size, prefetch):
        if first.fits(limits) and all(
            any(placement.fits(limits) for placement in _placements(job, first.batch_size, prefetch))
            for job in jobs[1:]
        ):
            return first
    return None


def _smallest(jobs: Sequence[Job], limits: Limits, batch_size: int | None, prefetch: int | None) -> Placement:
    """The placement of the first job at whose batch size all need the least beyond the limits, with that memory."""

    def excess(placement: Placement) -> tuple[int, int]:
        return max(0, placement.device_bytes - limits.device), placement.host_bytes

    found = []
    for placement in _placements(jobs[0], batch_size, prefetch):
        for job in jobs[1:]:
            placement = placement.together(min(_placements(job, placement.batch_size, prefetch), key=excess))
        found.append(placement)
    return min(found, key=excess)


def _placements(job: Job, batch_size: int | None, prefetch: int | None) -> Iterator[Placement]:
    """Placements from the fastest to the smallest."""
    places = ("host", "disk") if job.device == "cpu" else ("device", "host", "disk")
    prefetches = (1, 0) if prefetch is None else (prefetch,)
    if batch_size is not None:
        sizes = [min(batch_size, job.samples)]
    else:
        wanted = min(job.samples, max(1, _BATCH_TOKENS[job.device] // job.tokens))
        sizes = [max(1, wanted >> shift) for shift in range(wanted.bit_length())]
    efficient = [size for size in sizes if size * job.tokens >= _EFFICIENT_TOKENS[job.device]] or sizes[:1]
    for group in (efficient, sizes[len(efficient) :]):
        for ahead in prefetches:
            for hidden_place in places:
                for size in group:
                    yield predict(job, size, hidden_place, ahead)


def predict(job: Job, batch_size: int, hidden_place: str, prefetch: int) -> Placement:
    """A placement with its memory."""
    slab = max(slab_bytes([entry.nbytes for entry in layer.values()]) for layer in job.layers)
    weights = min(prefetch + 1, len(job.layers)) * slab + max(cast_bytes(e.values(), job.dtype) for e in job.layers)
    batch, (activations, small) = job.batch_bytes(batch_size), job.workspace(batch_size)
    head = 0 if job.head is None else job.head.nbytes + _HEAD_WORKSPACE
    adding, solving = job.refit_bytes(batch_size)
    workspace = max(activations + adding, solving)
    if job.refit is not None:
        weights += job.refit.readers * job.dtype.itemsize
        if job.head is not None:  # as it was and refitted, and the last layer
            head = 2 * job.head.nbytes + slab + _HEAD_WORKSPACE
    slack = _HOST_SLACK[job.device]
    base = resident_bytes() if job.base_bytes is None else job.base_bytes
    host_always = base + slack + job.waiting_bytes(batch_size) + job.statistics_bytes
    own_hidden = job.batch_bytes(job.share(batch_size))
    hidden = {"device": 0, "host": own_hidden, "disk": 3 * batch}[hidden_place]
    if job.device == "cpu":
        # oneDNN lays a weight out anew for each product, in memory of its own.
        largest = max(prod(entry.shape) for layer in job.layers for entry in layer.values()) * job.dtype.itemsize
        small += largest if largest < OWN_BLOCK_BYTES else 0
        holes = int(_HEAP_HOLES[0] * activations + _HEAP_HOLES[1] * small)
        host = host_always + hidden + max(weights + workspace + largest + holes, head)
        return Placement(batch_size, hidden_place, prefetch, host, 0, base)
    on_device = {"device": own_hidden, "host": batch, "disk": batch}[hidden_place]
    device = on_device + max(weights + workspace, head) + _DEVICE_SLACK
    ring = ring_blocks(job.local_ranks) * RING_BLOCK_BYTES
    host = host_always + hidden + ring + max(batch, 0 if job.head is None else job.head.nbytes)
    return Placement(batch_size, hidden_place, prefetch, host, device, base)


def _find_workspace(job: Job, batch_size: int) -> tuple[int, int]:
    widest = max(range(len(job.layers)), key=lambda i: job.skeleton.layer_shape(i).neurons)
    largest = max(range(len(job.layers)), key=lambda i: sum(entry.nbytes for entry in job.layers[i].values()))
    skeleton, peak, small_peak = job.skeleton, 0, 0
    skeleton.ignore_values()  # there are none here
    # The same mode each time: what a module keeps of one call must be of use in the next.
    with torch.set_grad_enabled(job.backward), torch.inference_mode(not job.backward), _fake_mode():
        shape = (batch_size, job.tokens, job.hidden_size)
        hidden = torch.empty(shape, dtype=job.dtype)
        live = _LiveBytes()
        with live:
            _, calls = skeleton.record(hidden)
        for index in {widest, largest}:
            sizes = skeleton.layer_tensors(index)
            weights = {name: torch.empty(size, dtype=job.dtype) for name, size in sizes.items()}
            handles = [] if job.backward else _take_moments(skeleton, index)
            with live:
                if job.backward:
                    _run_backward(skeleton, index, weights, hidden, calls[index])
                else:
                    skeleton.run_layer(index, weights, hidden, calls[index])
            peak, small_peak = max(peak, live.peak), max(small_peak, live.small_peak)
            for handle in handles:
                handle.remove()
    return peak, small_peak


def _run_backward(
    skeleton: Skeleton, index: int, weights: Mapping[str, torch.Tensor], hidden: torch.Tensor, call: LayerCall
) -> None:
    """What the backward sweep does with a layer, for its workspace."""
    leaf = hidden.detach().requires_grad_()
    reads: list[torch.Tensor] = []
    layer = skeleton.layers[index]
    names = [part.kind.output.name for part in skeleton.family.parts(skeleton.layer_shape(index))]
    tensors = skeleton.layer_tensors(index)
    handles = [
        layer.get_submodule(name).register_forward_pre_hook(lambda _module, inputs: reads.append(inputs[0]))
        for name in names
        if f"{name}.weight" in tensors
    ]
    output = skeleton.run_layer(index, weights, leaf, call)
    for handle in handles:
        handle.remove()
    found = torch.autograd.grad(output, [leaf, *reads], torch.empty_like(output))
    for inputs, gradient in zip(reads, found[1:], strict=True):
        (inputs.float() * gradient.float()).sum(dim=-2)


@lru_cache(maxsize=1)
def _fake_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def _take_moments(skeleton: Skeleton, index: int) -> list[Any]:
    """Hooks that compute what statistics need, for their workspace."""

    def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        window_moments(inputs[0] if inputs[0].ndim == 3 else inputs[0][None])

    layer, parts = skeleton.layers[index], skeleton.family.parts(skeleton.layer_shape(index))
    names, tensors = (part.kind.output.name for part in parts), skeleton.layer_tensors(index)
    present = [name for name in names if f"{name}.weight" in tensors]
    return [layer.get_submodule(name).register_forward_pre_hook(hook) for name in present]


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, for as long as anyone holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.small_live = self.small_peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self._seen:
                storage = tensor.untyped_storage()
                self._seen.add(storage)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return output

    def _count(self, change: int) -> None:
        self.live += change
        self.small_live += change if abs(change) < OWN_BLOCK_BYTES else 0
        self.peak, self.small_peak = max(self.peak, self.live), max(self.small_peak, self.small_live)


def _refusal(
    jobs: Sequence[Job], limits: Limits, batch_size: int | None, prefetch: int | None, recorded: int | None
) -> str:
    """What is lacking, and what can be done about it: any one of the ways named is enough."""
    smallest = _smallest(jobs, limits, batch_size or recorded, prefetch)
    found, more = [], []
    for name, need, limit in (
        ("host", smallest.host_bytes, limits.host),
        ("device", smallest.device_bytes, limits.device),
    ):
        if need > limit:
            found.append(f"{format_bytes(need)} of {name} memory, but {format_bytes(limit)} may be used")
            more.append(f"--{name}-memory {-(-(need + _BETWEEN_PROCESSES) >> 20)}MiB")
    ways = [" ".join(more) + ", if there is as much"]
    other = _other_wishes(jobs, limits, batch_size, prefetch, recorded)
    if other is None and recorded is None:  # else it would be another run
        other = _shorter_windows(jobs, limits, batch_size, prefetch)
    ways += [] if other is None else [other]
    return f"this job needs at least {' and '.join(found)}; it would run with {', or '.join(ways)}"


def _roomier(limits: Limits) -> Limits:
    """Limits within which a job must fit to be advised, since the process that takes the advice is another."""
    return replace(limits, host=limits.host - _BETWEEN_PROCESSES)


def _other_wishes(
    jobs: Sequence[Job], limits: Limits, batch_size: int | None, prefetch: int | None, recorded: int | None
) -> str | None:
    """Options in the place of those that were wished for, with which the jobs fit."""
    kept = batch_size or recorded  # a run that is taken up has its batch size for good
    for batch_wish, prefetch_wish in ((None, prefetch), (kept, None), (None, None)):
        if batch_wish is None and recorded is not None:
            continue
        freer = _fitting(jobs, _roomier(limits), batch_wish, prefetch_wish)
        if freer is not None:
            changes = [f"--batch-size {freer.batch_size}"] if freer.batch_size != kept else []
            changes += (
                [f"--prefetch {freer.prefetch}"] if freer.prefetch != (1 if prefetch is None else prefetch) else []
            )
            return " ".join(changes) or None
    return None


def _shorter_windows(jobs: Sequence[Job], limits: Limits, batch_size: int | None, prefetch: int | None) -> str | None:
    """The longest windows, of those halved again and again, with which the jobs fit as they were wished for."""
    tokens = jobs[0].tokens // 2
    while tokens >= _FEWEST_TOKENS:
        shorter = [replace(job, tokens=tokens, _workspaces={}) for job in jobs]
        if _fitting(shorter, _roomier(limits), batch_size, prefetch) is not None:
            return f"windows of {tokens} tokens (--sequence-length {tokens})"
        tokens //= 2
    return None
