"""What this machine does now: the rate of its matrix products, and of the disk."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.stages.scaling import Rates
from flap_stream.storage import files

_PRODUCT_SECONDS = 0.5  # how long products are repeated; not measured
_FEW_TOKENS = 64  # measured first, and only these if one product of the batch would take over a second
_PROBE_BYTES = 1 << 28  # written and read to measure the disk; not measured
_PROBE_BLOCK_BYTES = 1 << 24  # at once; not measured


def measure_rates(model: StreamedModel, tokens: int, shard: Path | None, out: Path, local_ranks: int) -> Rates:
    """Rates of this machine: matrix products of `tokens` tokens, and the disks of the model and of `out`.

    shard: a file of the model; None reads back what was written. local_ranks: the ranks that share the machine.
    """
    read, written = disk_rates(files.existing_directory(out.absolute()), shard)
    product = _product_rate(model, max(tokens, 1))
    return Rates(
        product=product,
        node_product=product if model.device.type == "cpu" else local_ranks * product,
        disk_read=read,
        disk_write=written,
        shared_read=read,
        shared_write=written,
    )


def _product_rate(model: StreamedModel, tokens: int) -> float:
    """Operations per second when multiplying one batch by a layer's largest matrix."""
    rows, columns = max((e.shape for e in model.layer_entries[0].values() if len(e.shape) == 2), key=lambda s: s[0])
    weight = torch.full((rows, columns), 0.5, dtype=model.dtype, device=model.device)

    def rate_of(count: int) -> float:
        inputs = torch.full((count, columns), 0.5, dtype=model.dtype, device=model.device)

        def product() -> None:
            float(torch.nn.functional.linear(inputs, weight)[0, 0])  # reading one number waits for the device

        product()
        return 2 * count * rows * columns * _rate(product, _PRODUCT_SECONDS)

    with torch.inference_mode():
        few = rate_of(min(tokens, _FEW_TOKENS))
        if 2 * tokens * rows * columns > few:  # one product would take longer than a second
            return few
        return rate_of(tokens)


def _rate(action: Callable[[], None], seconds: float) -> float:
    """Repetitions of an action per second, measured over `seconds`."""
    started, count = time.monotonic(), 0
    while (spent := time.monotonic() - started) < seconds:
        action()
        count += 1
    return count / spent


def disk_rates(directory: Path, shard: Path | None) -> tuple[float, float]:
    """Bytes per second read from a shard, and written to an unnamed file (including fsync).

    Without a shard, the written file is read back.
    """
    size = min(_PROBE_BYTES, files.free_bytes(directory) // 4)
    block = os.urandom(_PROBE_BLOCK_BYTES)
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        started = time.monotonic()
        written = 0
        while written < size:
            files.write_all(file.fileno(), block)
            written += len(block)
        os.fsync(file.fileno())
        seconds = time.monotonic() - started
        read = _read_back(file.fileno(), max(written, 1)) if shard is None else _read_rate(shard)
        return read, max(written, 1) / seconds


def _read_rate(path: Path) -> float:
    with open(path, "rb", buffering=0) as file:
        return _read_back(file.fileno(), min(_PROBE_BYTES, path.stat().st_size))


def _read_back(descriptor: int, size: int) -> float:
    """Bytes per second when reading a file's beginning after dropping it from the page cache."""
    os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)
    buffer, at, started = bytearray(_PROBE_BLOCK_BYTES), 0, time.monotonic()
    while at < size and (count := os.preadv(descriptor, [buffer], at)):
        at += count
    return max(at, 1) / max(time.monotonic() - started, 1e-9)
