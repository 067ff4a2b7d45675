"""How much memory this process uses, and how much it may use.

`keep_malloc_steady` and `keep_few_kernels` change the whole process for good: neither glibc's malloc nor oneDNN can be
put back."""

import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

import psutil
import torch

from flap_stream.engine import control_groups
from flap_stream.engine.device import free_bytes, lock_pages, synchronize, unlock_pages
from flap_stream.errors import InvalidOption

OWN_BLOCK_BYTES = 8 << 20  # malloc gives larger blocks a mapping of their own and unmaps them when freed

# The same for mixtures of experts, whose block sizes differ from expert to expert and leave many more holes.
OWN_BLOCK_BYTES_OF_MIXTURES = 128 << 10

_HOST_MARGIN = 0.1  # share of the free memory left to others by default; not measured
DEVICE_MARGIN = 0.05  # the same on the device; not measured
_KERNELS = 16  # a layer has fewer shapes of matrix products
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@dataclass(frozen=True)
class Limits:
    """Most bytes that this process may use: host resident memory, and device memory through torch (0 on a CPU)."""

    host: int
    device: int


def limits(device: torch.device, host_memory: int | None, device_memory: int | None, sharers: int = 1) -> Limits:
    """The limits requested, or what is free now less a margin, the host's divided among `sharers` processes.

    Of a device's memory never more than that: its driver and libraries need some in addition to torch.
    Raises InvalidOption for a device memory limit on a CPU.
    """
    if device_memory is not None and device.type == "cpu":
        raise InvalidOption("--device-memory is the limit of a GPU; this run is on the CPU, so give --host-memory")
    host = host_memory or resident_bytes() + int(free_host_bytes() * (1 - _HOST_MARGIN)) // sharers
    available = int(free_bytes(device) * (1 - DEVICE_MARGIN))
    return Limits(host, available if device_memory is None else min(device_memory, available))


def room(device: torch.device, host_memory: int | None, device_memory: int | None, sharers: int = 1) -> int:
    """Bytes of host memory that this process may use in addition to what it uses now; arguments as of `limits`."""
    return max(0, limits(device, host_memory, device_memory, sharers).host - resident_bytes())


def keep_malloc_steady(own_block_bytes: int = OWN_BLOCK_BYTES) -> None:
    """Have glibc return blocks of at least that many bytes to the system when freed, and keep smaller ones for reuse.

    By default it raises that threshold, up to 32 MiB, as a program runs; then activations leave holes in the heap, and
    the peak is up to a third higher, unpredictably. Keeping blocks of up to 64 MiB was 4 % faster but not predictable.
    Lasts as long as the process: glibc's own adaptive threshold cannot be switched on again.
    """
    _call_malloc("mallopt", _M_MMAP_THRESHOLD, own_block_bytes)
    _call_malloc("mallopt", _M_TRIM_THRESHOLD, 512 << 20)


def keep_few_kernels() -> None:
    """Have oneDNN cache only the few kernels that a dense layer needs, unless the environment sets a number.

    It compiles one of up to 1 MB for every shape of a matrix product, and by default caches 1024 in each of two caches.
    With experts, the number of tokens differs between experts and batches, and in a pruned model shapes differ between
    layers: that took 450 MiB. Recompiling costs a layer at most a few ms.
    Lasts as long as the process: oneDNN reads these variables once, on first use.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_KERNELS))


def give_back_heap() -> None:
    """Return what malloc keeps for reuse to the system; called between stages that would not reuse it."""
    _call_malloc("malloc_trim", 0)


def _call_malloc(function: str, *arguments: int) -> None:
    """Call one of glibc's heap functions; does nothing with another C library."""
    with suppress(AttributeError, OSError):
        getattr(ctypes.CDLL(None), function)(*arguments)


def host_buffer(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Host memory for long-lived buffers: a separate mapping, returned to the system when dropped.

    malloc might place it in a hole of the heap, and short-lived blocks beyond it.
    """
    nbytes = prod(shape) * dtype.itemsize
    if not nbytes:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=dtype).view(shape)


@contextmanager
def page_locked(device: torch.device, nbytes: int) -> Iterator[torch.Tensor]:
    """Host memory, uint8, that an accelerator copies to and from without the host's help."""
    buffer = host_buffer((nbytes,), torch.uint8)
    lock_pages(device, buffer)
    try:
        yield buffer
    finally:
        synchronize(device)  # copies may be queued
        unlock_pages(device, buffer)


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return psutil.Process().memory_info().rss


def free_host_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process can still use without swapping, within the limits of its control groups.

    root: the directory that contains /proc and the mounted control groups.
    """
    free, allowed = psutil.virtual_memory().available, control_groups.free_bytes(root)
    return free if allowed is None else min(free, allowed)
