"""How much memory this process takes, and how much it may take."""

import ctypes
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

import psutil
import torch

from flap_stream.engine import control_groups
from flap_stream.errors import InvalidOption

OWN_BLOCK_BYTES = 8 << 20  # what malloc gives a mapping of its own, and takes back at once

# The same for mixtures of experts, whose blocks have other sizes for every expert, and leave many more holes.
OWN_BLOCK_BYTES_OF_MIXTURES = 128 << 10

_HOST_MARGIN = 0.1  # of what is free, left to others when nobody sets a limit
_DEVICE_MARGIN = 0.05
_KERNELS = 16  # more than a layer has shapes of products
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@dataclass(frozen=True)
class Limits:
    """Most bytes that this process may take: host resident memory, and device memory through torch (0 without one)."""

    host: int
    device: int


def limits(device: torch.device, host_memory: int | None, device_memory: int | None, sharers: int = 1) -> Limits:
    """What was asked for, else what is free now minus a margin, the host's divided among `sharers` processes.

    Raises InvalidOption for a limit of device memory where there is no such device.
    """
    if device_memory is not None and device.type == "cpu":
        raise InvalidOption("--device-memory is the limit of a GPU; this run is on the CPU, so give --host-memory")
    host = host_memory or resident_bytes() + int(free_host_bytes() * (1 - _HOST_MARGIN)) // sharers
    on_device = 0
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        on_device = device_memory or torch.cuda.memory_reserved(device) + int(free * (1 - _DEVICE_MARGIN))
    return Limits(host, on_device)


def room(device: torch.device, host_memory: int | None, device_memory: int | None, sharers: int = 1) -> int:
    """Bytes of host memory that this process may take beside what it has now; limits as of `limits`."""
    return max(0, limits(device, host_memory, device_memory, sharers).host - resident_bytes())


def enforce(device: torch.device, limit: int) -> None:
    """Hold torch's allocator to a limit: what would exceed it raises torch.OutOfMemoryError."""
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)


def keep_malloc_steady(own_block_bytes: int = OWN_BLOCK_BYTES) -> None:
    """Have glibc give blocks of so many bytes and more back at once, and keep the rest for reuse.

    By itself it moves that border up to 32 MiB as a program runs; then activations come from a heap in which they leave
    holes, and the peak is up to a third higher, by chance. Keeping up to 64 MiB was 4 % faster, and not predictable.
    """
    _call_malloc("mallopt", _M_MMAP_THRESHOLD, own_block_bytes)
    _call_malloc("mallopt", _M_TRIM_THRESHOLD, 512 << 20)


def keep_few_kernels() -> None:
    """Have oneDNN keep the few kernels that a dense layer needs, unless the user has said how many.

    It compiles one for every shape of a product, which takes up to 1 MB, and by itself keeps 1024 of them in each of
    two caches. A batch gives every expert another number of tokens, and a pruned model has shapes of its own in every
    layer: that came to 450 MiB. It reads these when it is first used; compiling anew costs a layer at most a few ms.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_KERNELS))


def give_back_heap() -> None:
    """Give back what malloc keeps for reuse, between stages that have little use for each other's."""
    _call_malloc("malloc_trim", 0)


def _call_malloc(function: str, *arguments: int) -> None:
    """Call one of glibc's functions about its heap; nothing where there is another allocator."""
    with suppress(AttributeError, OSError):
        getattr(ctypes.CDLL(None), function)(*arguments)


def host_buffer(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Host memory for what lives long: a mapping of its own, given back as soon as it is dropped.

    malloc would place it in a hole of the heap if there is one, by chance, and what is short-lived beyond it.
    """
    nbytes = prod(shape) * dtype.itemsize
    if not nbytes:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=dtype).view(shape)


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return psutil.Process().memory_info().rss


def free_host_bytes(root: Path = Path("/")) -> int:
    """Memory that this process can still take without swapping: the machine's, and its control groups'.

    root: where /proc and the mounted control groups are.
    """
    free, allowed = psutil.virtual_memory().available, control_groups.free_bytes(root)
    return free if allowed is None else min(free, allowed)
