"""Devices: which one is meant, how many CPU threads compute, and giving memory back."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flap_stream.engine import memory
from flap_stream.errors import InvalidOption


def choose_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` means here.

    Raises InvalidOption if it does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidOption(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices on this machine")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Run torch's CPU kernels with `count` threads: with another number, products may round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def free_cached(device: torch.device) -> None:
    """Give freed memory back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def release(device: torch.device) -> None:
    """End a stage: give freed memory back and lift the limit that `memory.enforce` set."""
    free_cached(device)
    memory.lift_limit(device)
