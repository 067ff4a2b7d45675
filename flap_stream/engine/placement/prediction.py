"""The memory that a job takes, predicted for one way to run it."""

from dataclasses import dataclass, replace
from math import prod

from flap_stream.engine.memory import OWN_BLOCK_BYTES, Limits, resident_bytes
from flap_stream.engine.placement.job import Job
from flap_stream.engine.weight_stream import (
    RING_BLOCK_BYTES,
    cast_bytes,
    decoding_bytes,
    ring_blocks,
    stored_slab_bytes,
)

# What lazy imports, thread stacks, kernels compiled on first use and freed but unreturned memory add to the buffers.
# Predictions are checked with tools/memory_grid.py. On a CPU seven runs of the same job (22 layers of hidden 2048)
# reached 810 to 865 MiB; 44 MiB are enough for all of them.
# Beside an accelerator mostly kernels, which are loaded on first use: up to 300 MiB on an H200.
_HOST_SLACK = (44 << 20, 384 << 20)  # on a CPU, beside an accelerator
# Most memory that lies idle in the heap, as a share of the activations and of the small tensors: malloc fills a hole
# even with blocks large enough for a mapping of their own. Chosen with tools/memory_grid.py.
_HEAP_HOLES, _BACKWARD_HEAP_HOLES = (0.5, 1.5), (0.0, 0.75)  # of a graph most is alive at the peak
_STATE_HOLES = 1.25  # of small tensors, where layers hand on more than hidden states, which is cut apart and joined
_DEVICE_SLACK = 128 << 20  # cuBLAS workspaces and the allocator's rounding; not measured separately
_DEVICE_HOLES = 0.35  # the same on an accelerator, where torch's allocator leaves them


@dataclass(frozen=True)
class Placement:
    """How a job is run, and the predicted peak of its memory.

    batch_size: windows per batch. hidden_place: one of hidden_states.PLACES. prefetch: layers read ahead.
    base_bytes: host memory that was in use before.
    """

    batch_size: int
    hidden_place: str
    prefetch: int
    host_bytes: int
    device_bytes: int
    base_bytes: int = 0

    def together(self, other: "Placement") -> "Placement":
        """The same placement, with the larger memory of the two."""
        host, device = (max(getattr(p, n) for p in (self, other)) for n in ("host_bytes", "device_bytes"))
        return replace(self, host_bytes=host, device_bytes=device)

    def fits(self, limits: Limits) -> bool:
        """Whether it stays within the limits."""
        return self.host_bytes <= limits.host and self.device_bytes <= limits.device


def predict(job: Job, batch_size: int, hidden_place: str, prefetch: int) -> Placement:
    """The placement of a job at these settings, with its memory."""
    slab = max(map(stored_slab_bytes, job.layers))
    dtypes = job.skeleton.dtypes(job.dtype)
    weights = min(prefetch + 1, len(job.layers)) * slab + max(cast_bytes(layer, dtypes) for layer in job.layers)
    weights += max(map(decoding_bytes, job.layers))
    batch, (activations, small) = job.batch_bytes(batch_size), job.workspace(batch_size)
    head = job.head_bytes(batch_size)
    adding, solving = job.refit_bytes(batch_size)
    workspace = max(activations + adding, solving)
    parameters, fitting, small_fitting = job.fit(batch_size)
    refitted = 0
    if job.refit is not None:
        weights += job.refit.arranged * job.dtype.itemsize
        refitted = job.refit.host_bytes(job.dtype.itemsize)
    slack = _HOST_SLACK[job.device != "cpu"]
    base = resident_bytes() if job.base_bytes is None else job.base_bytes
    host_always = base + slack + job.waiting_bytes(batch_size) + job.statistics_bytes
    own_hidden = job.batch_bytes(job.share(batch_size))
    hidden = {"device": 0, "host": own_hidden, "disk": 3 * batch}[hidden_place]
    if job.device == "cpu":
        # oneDNN copies a weight into its own layout for each product.
        largest = max(prod(entry.shape) for layer in job.layers for entry in layer.values()) * job.dtype.itemsize
        small += largest if largest < OWN_BLOCK_BYTES else 0
        of_all, of_small = _BACKWARD_HEAP_HOLES if job.backward else _HEAP_HOLES
        of_small = of_small if job.skeleton.state.is_plain else max(of_small, _STATE_HOLES)
        holes = int(of_all * activations + of_small * small)
        of_all, of_small = _BACKWARD_HEAP_HOLES
        fitted = parameters + fitting + int(of_all * fitting + of_small * small_fitting)
        host = host_always + hidden + max(weights + largest + max(workspace + holes, fitted), head)
        return Placement(batch_size, hidden_place, prefetch, host, 0, base)
    on_device = {"device": own_hidden, "host": batch, "disk": batch}[hidden_place]
    workspace = max(
        workspace + int(_DEVICE_HOLES * (activations + adding)), parameters + int((1 + _DEVICE_HOLES) * fitting)
    )
    device = on_device + max(weights + workspace, head) + _DEVICE_SLACK
    ring = ring_blocks(job.local_ranks) * RING_BLOCK_BYTES
    host = host_always + hidden + ring + refitted + max(batch, 0 if job.head is None else job.head.nbytes)
    return Placement(batch_size, hidden_place, prefetch, host, device, base)
