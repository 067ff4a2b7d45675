"""Devices: which one is meant, and all that an accelerator does differently from a CPU.

Streams and events are torch's generic ones. What torch offers only for one kind of accelerator is in a class for that
kind; to support another, add a class to `_KINDS`. Nothing else in the package names one.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from flap_stream.engine.ranks import Ranks
from flap_stream.errors import InsufficientMemory, InvalidOption
from flap_stream.progress import format_bytes

# What libraries say that allocate beside torch; their errors have neither a type nor a code of their own.
_OUT_OF_MEMORY = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED")
_MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


class _Cuda:
    """NVIDIA's cards, and AMD's, for which torch uses the same names."""

    def __init__(self) -> None:
        self._before: dict[torch.device, Any] = {}  # settings to put back, by device

    def count(self) -> int:
        """Number of devices that this process sees."""
        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    def begin(self, device: torch.device) -> None:
        """Make it the current device, and products as exact as their dtypes allow, until `end`.

        Unless the environment decides otherwise, torch then reserves memory in one growing piece: unused parts of it
        are at most 0.3 times the activations of a layer, against 0.9 with blocks of a fixed size.
        """
        torch.cuda.set_device(device)  # else page-locked memory and events would open a context on the first card
        self.reset_peaks(device)
        products = torch.backends.cuda.matmul
        names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
        settings = {name: getattr(products, name) for name in names}
        fraction = torch.cuda.get_per_process_memory_fraction(device)
        self._before.setdefault(device, (fraction, torch.get_float32_matmul_precision(), settings))
        for name in names:
            setattr(products, name, False)
        torch.set_float32_matmul_precision("highest")
        self._reserve_in_one_piece(True)
        self._load_libraries(device)

    def end(self, device: torch.device) -> None:
        """Put back what `begin` and `limit` changed, but for the current device."""
        if device in self._before:
            fraction, precision, settings = self._before.pop(device)
            torch.cuda.set_per_process_memory_fraction(fraction, device)
            torch.set_float32_matmul_precision(precision)
            self._reserve_in_one_piece(False)
            for name, value in settings.items():
                setattr(torch.backends.cuda.matmul, name, value)

    def _load_libraries(self, device: torch.device) -> None:
        """Have products and attention load what they run with, so that it is in use before a job is placed.

        It takes 430 MB of host memory on an H200, which no prediction could know.
        """
        for dtype in (torch.float32, torch.bfloat16):
            values = torch.ones(1, 1, 64, 64, dtype=dtype, device=device)
            torch.nn.functional.scaled_dot_product_attention(values, values, values @ values, is_causal=True)
        with torch.inference_mode(False), torch.enable_grad():
            # The thread of gradients begins with a kernel; torch warns of one that begins with a product.
            torch.ones(1, device=device, requires_grad=True).mul(2).backward()

    def _reserve_in_one_piece(self, does: bool) -> None:
        if not any(name in os.environ for name in _ALLOCATOR_VARIABLES):
            change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # torch 2.8 has only the older one
            (change or torch.cuda.memory._set_allocator_settings)(f"expandable_segments:{does}")

    def limit(self, device: torch.device, nbytes: int) -> None:
        """Most bytes that torch may reserve on the device, until `end`."""
        torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / torch.cuda.mem_get_info(device)[1]), device)

    def free_bytes(self, device: torch.device) -> int:
        """Bytes that nobody uses, and those that torch keeps for reuse."""
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)

    def peak_bytes(self, device: torch.device) -> tuple[int, int]:
        """Most bytes since `begin` that torch reserved, and most that tensors took."""
        return torch.cuda.max_memory_reserved(device), torch.cuda.max_memory_allocated(device)

    def reset_peaks(self, device: torch.device) -> None:
        """Restart `peak_bytes`."""
        torch.cuda.reset_peak_memory_stats(device)

    def empty_cache(self) -> None:
        """Give what torch keeps for reuse back to the device."""
        torch.cuda.empty_cache()

    def card(self, device: torch.device) -> tuple[str, str]:
        """The model of a device, and which one of that model it is."""
        properties = torch.cuda.get_device_properties(device)
        return properties.name, str(getattr(properties, "uuid", device.index))

    def lock_pages(self, memory: torch.Tensor) -> None:
        """Keep host memory where it is, so that copies from and to it need no host."""
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)))

    def unlock_pages(self, memory: torch.Tensor) -> None:
        """Undo `lock_pages`, once no copy is under way."""
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())))


_KINDS = {"cuda": _Cuda()}


def choose_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` means here.

    Raises InvalidOption if it does not exist.
    """
    if name == "auto":
        name = next((kind for kind, accelerator in _KINDS.items() if accelerator.count()), "cpu")
    device = torch.device(name)
    if device.type not in _KINDS:
        return device
    count = _KINDS[device.type].count()
    if (device.index or 0) >= count:
        raise InvalidOption(f"--device {name}: torch sees {count} {device.type.upper()} devices on this machine")
    return torch.device(device.type, device.index or 0)


def own_device(name: str, ranks: Ranks) -> str:
    """The name of the device that a rank uses: for `auto` and `cuda` the GPU with the rank's number on its node.

    A launcher may show each rank only its own GPU, which is then number 0.
    Raises InvalidOption for `cuda:N` if several ranks would share it.
    """
    (index, count), kind = ranks.local, name
    if name == "auto":
        kind = choose_device(name).type
    if count == 1 or kind == "cpu":
        return name
    if ":" in name:
        kind = name.partition(":")[0]
        raise InvalidOption(
            f"--device {name} is one device for {count} ranks; use --device {kind}, and each rank takes its own"
        )
    return f"{kind}:{0 if kind in _KINDS and _KINDS[kind].count() == 1 else index}"


def begin(device: torch.device) -> None:
    """Begin a stage on a device; `release` ends it."""
    if device.type in _KINDS:
        _KINDS[device.type].begin(device)


def release(device: torch.device) -> None:
    """End a stage: give freed memory back, lift the limit, and put back torch's settings."""
    free_cached(device)
    if device.type in _KINDS:
        _KINDS[device.type].end(device)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Run torch's CPU kernels with `count` threads: with another number, products may round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def card(device: torch.device) -> tuple[str, str] | None:
    """The model of an accelerator, and which one of that model it is; None for a CPU."""
    return _KINDS[device.type].card(device) if device.type in _KINDS else None


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Of an NVIDIA GPU, major and minor; (0, 0) of anything else."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if is_nvidia else (0, 0)


def device_record(device: torch.device) -> dict[str, str]:
    """What a run's results depend on: the kind of device, and the model of an accelerator, to the last bit."""
    found = card(device)
    return {"device": device.type, **({} if found is None else {"card": found[0]})}


# --- memory ---


def free_cached(device: torch.device) -> None:
    """Give freed memory back to the device."""
    gc.collect()
    if device.type in _KINDS:
        _KINDS[device.type].empty_cache()


def free_bytes(device: torch.device) -> int:
    """Device memory that this process can use, with what it uses already; 0 on a CPU."""
    return _KINDS[device.type].free_bytes(device) if device.type in _KINDS else 0


def peak_bytes(device: torch.device) -> tuple[int, int]:
    """Most device memory since `begin` that torch reserved, and most that tensors took; 0 on a CPU."""
    return _KINDS[device.type].peak_bytes(device) if device.type in _KINDS else (0, 0)


def reset_peaks(device: torch.device) -> None:
    """Restart `peak_bytes` now."""
    if device.type in _KINDS:
        _KINDS[device.type].reset_peaks(device)


def limit_memory(device: torch.device, nbytes: int) -> None:
    """Limit torch's allocator, until `release`; exceeding the limit raises torch.OutOfMemoryError."""
    if device.type in _KINDS:
        _KINDS[device.type].limit(device, nbytes)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device had no memory left, whoever raised it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if isinstance(error, torch.AcceleratorError):
        return getattr(error, "error_code", None) == _MEMORY_ALLOCATION
    return isinstance(error, RuntimeError) and any(name in str(error) for name in _OUT_OF_MEMORY)


@contextmanager
def in_use(device: torch.device) -> Iterator[None]:
    """A stage on a device that `begin` was called for; it is released at the end.

    Raises InsufficientMemory for whatever says that the device has no memory left.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reserved, _ = peak_bytes(device)
        raise InsufficientMemory(
            f"{device} ran out of memory outside a layer's batches; torch reserved {format_bytes(reserved)} at most; "
            "end what else uses the device, lower --device-memory so that more is left for its libraries, or lower "
            "--batch-size"
        ) from error
    finally:
        release(device)


# --- copies beside computations ---


def new_stream(device: torch.device) -> torch.Stream:
    """A second queue of work on an accelerator, which begins when the work queued so far is done.

    Memory from torch's cache may still be used by earlier work, which is ordered only on the current stream.
    """
    stream = torch.Stream(device)
    stream.wait_stream(current_stream(device))
    return stream


def current_stream(device: torch.device) -> torch.Stream:
    """The queue that computations go to."""
    return torch.accelerator.current_stream(device)


def new_event(device: torch.device) -> torch.Event:
    """A mark in a queue; nothing waits for it until it is recorded."""
    return torch.Event(device)


def synchronize(device: torch.device) -> None:
    """Wait until all work queued on a device is done."""
    if device.type in _KINDS:
        torch.accelerator.synchronize(device)


def lock_pages(device: torch.device, memory: torch.Tensor) -> None:
    """Page-lock host memory for copies from and to an accelerator without the host's help; does nothing on a CPU.

    Raises InsufficientMemory if the system refuses.
    """
    if device.type not in _KINDS or not memory.nbytes:
        return
    try:
        _KINDS[device.type].lock_pages(memory)
    except RuntimeError as error:
        raise InsufficientMemory(
            f"{memory.nbytes:,} bytes of host memory cannot be page-locked for {device} ({error}); lower --host-memory"
        ) from error


def unlock_pages(device: torch.device, memory: torch.Tensor) -> None:
    """Undo `lock_pages`, once no copy from or to the memory is under way."""
    if device.type in _KINDS and memory.nbytes:
        _KINDS[device.type].unlock_pages(memory)


class HostCopy:
    """A tensor on its way to host memory: on an accelerator the copy is queued, and nothing waits for it until asked.

    On an accelerator its source may be changed or freed at once, by work that is queued later; on a CPU it is the
    source itself, which must stay as it is until it has been used.
    """

    def __init__(self, values: torch.Tensor, into: torch.Tensor | None = None) -> None:
        """Begin the copy. into: page-locked memory; None takes some of torch's."""
        self._event: torch.Event | None = None
        if values.device.type not in _KINDS:
            self._values = values.cpu()
            return
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True) if into is None else into
        self._values.copy_(values, non_blocking=True)
        self._event = new_event(values.device)
        self._event.record(current_stream(values.device))

    def result(self) -> torch.Tensor:
        """The values, in host memory, once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._values
