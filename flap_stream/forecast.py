"""`--dry-run`: what a whole job would take, from config.json and headers alone, and how fast it could be at best."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flap_stream import checkpoint as checkpoints
from flap_stream import files, memory, output, planner, store
from flap_stream.architecture import ROWS
from flap_stream.checkpoint import Checkpoint
from flap_stream.config import PruneConfig
from flap_stream.layers import StreamedModel
from flap_stream.restoration import refit_sizes, refit_stored_bytes, require_refittable
from flap_stream.skeleton import Skeleton

_PRODUCT_SECONDS, _FEW_TOKENS = 0.5, 64
_PROBE_BYTES, _PROBE_BLOCK_BYTES = 1 << 28, 1 << 24


@dataclass(frozen=True)
class Rates:
    """What this machine does now: operations and bytes per second."""

    product: float
    disk_read: float
    disk_write: float


@dataclass(frozen=True)
class Forecast:
    """What a job would take.

    has_headers: whether sizes come from safetensors headers; else from config.json alone.
    placement: how pass 1 would be run, with the predicted peaks. limits: what may be taken.
    bytes_read, bytes_written: of the model, the output and hidden states on disk.
    disk_bytes: room needed for OUT and the run directory; more, if there is, is used for snapshots.
    run_directory_bytes: the most that the run directory takes, three snapshots of the hidden states included.
    operations: floating-point, of pass 1 and of refitting.
    floor_seconds: a stage, if nothing but the matrix products or the disk took time.
    """

    model: str
    parameters: int
    layers: int
    has_headers: bool
    placement: planner.Placement
    limits: memory.Limits
    bytes_read: int
    bytes_written: int
    disk_bytes: int
    run_directory_bytes: int
    free_disk_bytes: int
    operations: int
    rates: Rates
    floor_seconds: dict[str, float]


def forecast(model: str | Path, out: str | Path, options: PruneConfig) -> Forecast:
    """What `prune` with these options would take; no tensor is read and nothing stays written.

    model: a directory (config.json is enough), a config.json or a Hub id, of which config.json alone is downloaded.
    Raises InvalidInput as `prune` would, InsufficientMemory among it.
    """
    out = Path(out)
    source, has_headers = _open(str(model))
    with source:
        streamed = StreamedModel(source, options)
        limits = memory.limits(streamed.device, options.host_memory, options.device_memory)
        windows = (options.samples, options.sequence_length) if options.method != "magnitude-sp" else (0, 0)
        job = streamed.job(*windows)
        placement = planner.place(job, limits, options.batch_size, options.prefetch)
        refits = refit_sizes(streamed, None, options.refit_target) if options.refits else None
        if refits is not None:
            require_refittable(streamed.family, streamed.shapes, options.refit_target, source.source)
            refitting = planner.place(replace(job, refit=refits), limits, placement.batch_size, options.prefetch)
            placement = placement.together(refitting)
        rates = _measure_rates(streamed, placement.batch_size * job.tokens, source, has_headers, out)
        layer_bytes = sum(streamed.layer_bytes(i) for i in range(len(streamed.layers)))
        hidden_traffic = len(streamed.layers) * job.hidden_bytes if placement.hidden_place == "disk" else 0
        cut_bytes = options.ratio * sum(
            entry.nbytes
            for layer, shape in zip(streamed.layer_entries, streamed.shapes, strict=True)
            for part in streamed.family.parts(shape)
            for projection in part.kind.projections
            if projection.axis == ROWS and (entry := layer.get(f"{projection.name}.weight")) is not None
        )
        read_again = source.nbytes - int(cut_bytes)  # rows that go are not read
        written = output.estimated_bytes(source, streamed.shapes, options.ratio)
        on_disk = 2 * job.hidden_bytes if hidden_traffic else 0
        stored = store.stored_bytes(streamed.shapes, windows[0] * windows[1])
        stored += 0 if refits is None else refit_stored_bytes(streamed)
        snapshots = 3 * job.hidden_bytes if windows[0] else 0  # one is written before the oldest of two goes
        operations = _operations(streamed, *windows)
        pass_1 = max(operations / rates.product, (layer_bytes + hidden_traffic) / rates.disk_read)
        pass_2 = read_again / rates.disk_read + written / rates.disk_write
        floor = {"collect": pass_1, "rewrite": pass_2}
        if refits is not None:
            refit_operations = refits.operations(options.ratio, windows[0] * windows[1]) + operations
            refit_operations += operations if refits.has_dense else 0
            floor["refit"] = max(refit_operations / rates.product, (layer_bytes + hidden_traffic) / rates.disk_read)
            operations += refit_operations
        return Forecast(
            model=source.source,
            parameters=source.parameters,
            layers=len(streamed.layers),
            has_headers=has_headers,
            placement=placement,
            limits=limits,
            bytes_read=layer_bytes + hidden_traffic + read_again,
            bytes_written=written + hidden_traffic,
            disk_bytes=written + stored + on_disk,
            run_directory_bytes=stored + on_disk + snapshots,
            free_disk_bytes=files.free_bytes(out.absolute()),
            operations=operations,
            rates=rates,
            floor_seconds=floor,
        )


def _open(model: str) -> tuple[Checkpoint, bool]:
    """The checkpoint, or the one that a config.json without shards describes; whether it has headers."""
    if Path(model).is_dir() and checkpoints.has_shards(Path(model)):
        return checkpoints.open_checkpoint(model), True
    directory, config = checkpoints.read_config(model)
    skeleton = Skeleton(config, model)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return checkpoints.describe(model, directory, config, skeleton.tensors(), dtype), False


def _operations(model: StreamedModel, samples: int, tokens: int) -> int:
    """Multiplications and additions of all layers' products, the whole square of the attention included."""
    matrices = sum(
        entry.shape[0] * entry.shape[1] * (model.expert_share if ".experts." in name else 1)
        for layer in model.layer_entries
        for name, entry in layer.items()
        if len(entry.shape) == 2
    )
    queries = sum(shape.kv_groups * shape.heads_per_group * shape.head_dim for shape in model.shapes)
    return samples * tokens * (2 * int(matrices) + 4 * tokens * queries)


def _measure_rates(model: StreamedModel, tokens: int, source: Checkpoint, has_headers: bool, out: Path) -> Rates:
    shard = source.directory / next(iter(source.shard_bytes)) if has_headers else None
    read, written = _disk_rates(files.existing_directory(out.absolute()), shard)
    return Rates(_product_rate(model, max(tokens, 1)), read, written)


def _product_rate(model: StreamedModel, tokens: int) -> float:
    """Operations per second of the largest matrix of a layer on one batch."""
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
    """How often a second something can be done."""
    started, count = time.monotonic(), 0
    while (spent := time.monotonic() - started) < seconds:
        action()
        count += 1
    return count / spent


def _disk_rates(directory: Path, shard: Path | None) -> tuple[float, float]:
    """Bytes per second that come from a shard, and that a nameless file takes (with fsync).

    Without a shard, what was written is read back.
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
    """Bytes per second of a file's beginning, out of the page cache."""
    os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)
    buffer, at, started = bytearray(_PROBE_BLOCK_BYTES), 0, time.monotonic()
    while at < size and (count := os.preadv(descriptor, [buffer], at)):
        at += count
    return max(at, 1) / max(time.monotonic() - started, 1e-9)
