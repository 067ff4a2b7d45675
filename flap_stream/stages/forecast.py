"""`--dry-run`: what a whole job would take, from config.json and headers alone, and how fast it could be at best."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flap_stream.arithmetic.allocation import require_minimum
from flap_stream.config import PruneConfig
from flap_stream.config.rules import require_effect, warn_of_positions
from flap_stream.engine import memory
from flap_stream.engine import placement as planner
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import InvalidOption
from flap_stream.model import checkpoint as checkpoints
from flap_stream.model.architecture import ROWS
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.model.skeleton import Skeleton
from flap_stream.output import pruned_checkpoint as output
from flap_stream.restore.requirements import refit_sizes, refit_stored_bytes, require_refittable
from flap_stream.stages import scaling
from flap_stream.storage import files
from flap_stream.storage import run_directory as store
from flap_stream.text.windows import calibration_text, check_text, load_tokenizer

NETWORK_RATE = 1.25e9  # bytes per second: 10 Gbit/s
_PRODUCT_SECONDS, _FEW_TOKENS = 0.5, 64
_PROBE_BYTES, _PROBE_BLOCK_BYTES = 1 << 28, 1 << 24


@dataclass(frozen=True)
class Forecast:
    """What a job would take.

    ranks: processes on so many nodes; memory is that of each, bytes and times are those of all.
    busy_ranks: those that have windows to run. network_bytes: moments that leave each node.
    has_headers: whether sizes come from safetensors headers; else from config.json alone.
    placement: how pass 1 would be run, with the predicted peaks. limits: what may be taken.
    bytes_read, bytes_written: of the model, the output and hidden states on disk.
    disk_bytes: room needed for OUT and the run directory; more, if there is, is used for snapshots.
    run_directory_bytes: the most that the run directory takes, three snapshots of the hidden states included.
    operations: floating-point, of pass 1 and of refitting.
    floor_seconds: a stage, if nothing but the matrix products or the disk took time.
    """

    model: str
    ranks: int
    nodes: int
    busy_ranks: int
    network_bytes: int
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
    rates: scaling.Rates
    floor_seconds: dict[str, float]


def forecast(
    model: str | Path,
    out: str | Path,
    options: PruneConfig,
    ranks: int = 1,
    nodes: int = 1,
    network: float = NETWORK_RATE,
) -> Forecast:
    """What `prune` with these options would take; no tensor is computed with and nothing stays written.

    model: a directory (config.json is enough), a config.json or a Hub id, of which config.json alone is downloaded.
    ranks, nodes: processes on so many machines, each like this one, which share the disk of `out` and of the model and
    a network of so many bytes per second in and out of each.
    Raises InvalidInput as `prune` would, InsufficientMemory among it, and for a text or tokenizer that cannot serve.
    """
    if not 1 <= nodes <= ranks:
        raise InvalidOption(f"--nodes is {nodes}; {ranks} ranks can be on 1 to {ranks}")
    out = Path(out)
    if options.method != "magnitude-sp":
        check_text(calibration_text(options))
    source, has_headers = _open(str(model))
    require_effect(options)
    with source:
        streamed = StreamedModel(source, options)
        require_minimum(streamed.shapes, options)
        warn_of_positions(source.config, options.sequence_length)
        local = -(-ranks // nodes)
        limits = memory.limits(streamed.device, options.host_memory, options.device_memory, local)
        windows = (options.samples, options.sequence_length) if options.method != "magnitude-sp" else (0, 0)
        job, refits = replace(streamed.job(*windows), ranks=ranks, local_ranks=local), None
        then = []
        if options.refits:
            require_refittable(streamed.family, streamed.shapes, options.refit_target, source.source)
            refits = refit_sizes(streamed, options.refit_target)
            then.append(streamed.refit_after(job, refits))
        placement = planner.place(job, limits, options.batch_size, options.prefetch, then)
        for second in then:
            based = replace(second, base_bytes=placement.base_bytes)
            placement = placement.together(planner.place(based, limits, placement.batch_size, options.prefetch))
        if has_headers and options.method != "magnitude-sp" and not options.calibration[0].endswith(".npy"):
            load_tokenizer(source.directory, options.trust_remote_code)
        rates = _measure_rates(streamed, placement.batch_size * job.tokens, source, has_headers, out, local, network)
        hidden_traffic = len(streamed.layers) * job.hidden_bytes if placement.hidden_place == "disk" else 0
        work = work_of(streamed, options, placement.batch_size, hidden_traffic, refits)
        on_disk = 2 * job.hidden_bytes if hidden_traffic else 0
        stored = store.stored_bytes(streamed.shapes, windows[0] * windows[1])
        stored += 0 if refits is None else refit_stored_bytes(streamed, options.refit_target)
        snapshots = 3 * job.hidden_bytes if windows[0] else 0  # one is written before the oldest of two goes
        found, operations = scaling.scale(work, rates, ranks, nodes), work.operations
        passes = 1 if work.refit is None else 2
        if work.refit is not None:
            operations += work.refit.operations + work.refit.solving
        return Forecast(
            model=source.source,
            ranks=ranks,
            nodes=nodes,
            busy_ranks=found.busy_ranks,
            network_bytes=int(found.network_bytes),
            parameters=source.parameters,
            layers=len(streamed.layers),
            has_headers=has_headers,
            placement=placement,
            limits=limits,
            bytes_read=passes * (nodes * work.layer_bytes + hidden_traffic) + work.read_again,
            bytes_written=work.written + passes * hidden_traffic,
            disk_bytes=work.written + stored + on_disk,
            run_directory_bytes=stored + on_disk + snapshots,
            free_disk_bytes=files.free_bytes(out.absolute()),
            operations=operations,
            rates=rates,
            floor_seconds=found.seconds,
        )


def work_of(
    model: StreamedModel,
    options: PruneConfig,
    batch_size: int,
    hidden_traffic: int = 0,
    refits: planner.Refit | None = None,
) -> scaling.Work:
    """What a whole job consists of. hidden_traffic: bytes of hidden states that go to disk and back, in one pass."""
    source = model.checkpoint
    samples = options.samples if options.method != "magnitude-sp" else 0
    # Not read when shards are written: rows that go, and columns that a refit has left out.
    not_read = options.ratio * sum(
        entry.nbytes
        for layer, shape in zip(model.layer_entries, model.shapes, strict=True)
        for part in model.family.parts(shape)
        for projection in part.kind.projections
        if refits is not None or projection.axis == ROWS
        if (entry := layer.get(f"{projection.name}.weight")) is not None
    )
    written = output.estimated_bytes(source, model.shapes, options.ratio)
    operations, refit = _operations(model, samples, options.sequence_length), None
    if refits is not None:
        moments, solving = refits.operations(options.ratio, samples * options.sequence_length)
        forwards = operations * (2 if refits.has_dense else 1)
        refit = scaling.RefitWork(moments + forwards, solving, refits.sum_bytes(options.ratio))
    return scaling.Work(
        layers=len(model.layers),
        samples=samples,
        batch_size=batch_size,
        operations=operations,
        layer_bytes=sum(model.layer_bytes(i) for i in range(len(model.layers))),
        moment_bytes=sum(planner.moment_bytes(shape, samples, batch_size) for shape in model.shapes),
        hidden_traffic=hidden_traffic,
        read_again=source.nbytes - int(not_read),
        written=written,
        shards=max(1, round(written / options.max_shard_bytes)),
        refit=refit,
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


def _measure_rates(
    model: StreamedModel, tokens: int, source: Checkpoint, has_headers: bool, out: Path, local: int, network: float
) -> scaling.Rates:
    """What this machine does now, shared by so many ranks on it: a CPU's products, the disk."""
    shard = source.directory / next(iter(source.shard_bytes)) if has_headers else None
    read, written = _disk_rates(files.existing_directory(out.absolute()), shard)
    product = _product_rate(model, max(tokens, 1))
    together = product if model.device.type == "cpu" else local * product
    return scaling.Rates(
        product=product,
        node_product=together,
        disk_read=read,
        disk_write=written,
        shared_read=read,
        shared_write=written,
        network=network,
    )


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
