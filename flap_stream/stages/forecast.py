"""`--dry-run`: what a whole job would take, from config.json and headers only, and the least time it could take."""

from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from flap_stream.config import PruneConfig
from flap_stream.config.rules import require_effect, warn_of_positions
from flap_stream.engine import memory
from flap_stream.engine import placement as placements
from flap_stream.engine.placement import Job
from flap_stream.engine.placement.job import Refit
from flap_stream.engine.placement.prediction import Placement
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import InvalidOption
from flap_stream.model.checkpoint import Checkpoint, describe
from flap_stream.model.opening import has_shards, open_checkpoint, read_config
from flap_stream.model.skeleton import Skeleton
from flap_stream.model.units import ROWS
from flap_stream.output.destination import estimated_bytes
from flap_stream.output.fp8_config import fp8_linears
from flap_stream.restore.requirements import refit_sizes, refit_stored_bytes, require_refittable
from flap_stream.stages.expert_loss import require_removable_experts
from flap_stream.stages.loss_sizes import backward_job, backward_operations, kept_input_bytes
from flap_stream.stages.machine_rates import measure_rates
from flap_stream.stages.preparation import require_possible
from flap_stream.stages.removable_layers import require_removable_layers
from flap_stream.stages.scaling import LossWork, Rates, RefitWork, Work, scale
from flap_stream.stages.targets import expected_ratio
from flap_stream.storage import files
from flap_stream.storage.run_directory import stored_bytes
from flap_stream.text.tokenization import load_tokenizer
from flap_stream.text.windows import calibration_text, check_text

NETWORK_RATE = 1.25e9  # bytes per second: 10 Gbit/s, a common data-centre link; not measured

_ASSUMED = Rates(product=1e14, disk_read=1.5e9, disk_write=1e9)  # of a card that is not here, and a common disk


@dataclass(frozen=True)
class Machines:
    """What a job would run on.

    ranks, nodes: processes, and machines like this one. network: bytes per second in and out of each.
    card: bytes of a GPU that each rank has; None is the device that there is here. With one, rates are assumed.
    Raises InvalidOption if there are more machines than processes.
    """

    ranks: int = 1
    nodes: int = 1
    network: float = NETWORK_RATE
    card: int | None = None

    def __post_init__(self) -> None:
        """Refuse machines without a process."""
        if not 1 <= self.nodes <= self.ranks:
            raise InvalidOption(f"--nodes is {self.nodes}; {self.ranks} ranks can be on 1 to {self.ranks}")

    @property
    def local_ranks(self) -> int:
        """Ranks on one node."""
        return -(-self.ranks // self.nodes)


@dataclass(frozen=True)
class Forecast:
    """What a job would take.

    ranks, nodes: processes and machines; memory is per process, bytes and times are for all together.
    busy_ranks: ranks that have windows to run. network_bytes: what each node sends, moments and the sums of a refit.
    has_headers: whether sizes come from safetensors headers; otherwise from config.json only.
    placement: how collection would run, with the predicted peaks. limits: the memory that may be used.
    bytes_read, bytes_written: of the model, the output and hidden states on disk.
    disk_bytes: space needed for OUT and the run directory; any more is used for snapshots.
    run_directory_bytes: the most that the run directory takes, including three snapshots of the hidden states.
    operations: floating-point operations of collection, of the backward pass and of refitting.
    floor_seconds: seconds per stage if only matrix products or the disk took time.
    """

    model: str
    ranks: int
    nodes: int
    busy_ranks: int
    network_bytes: int
    parameters: int
    layers: int
    has_headers: bool
    placement: Placement
    limits: memory.Limits
    bytes_read: int
    bytes_written: int
    disk_bytes: int
    run_directory_bytes: int
    free_disk_bytes: int
    operations: int
    rates: Rates
    floor_seconds: dict[str, float]

    def record(self) -> dict[str, Any]:
        """As `--json` prints it: without rates that are infinite, which JSON does not have."""
        known = {name: rate for name, rate in asdict(self.rates).items() if isfinite(rate)}
        return {**asdict(self), "rates": known}


def forecast(
    model: str | Path,
    out: str | Path,
    options: PruneConfig,
    machines: Machines | None = None,
) -> Forecast:
    """What `prune` with these options would take; no tensor is loaded and nothing is left on the disk.

    model: a directory (config.json is enough), a config.json or a Hub id, from which only config.json is downloaded.
    machines: by default this one alone. Several share the disk of `out` and of the model.
    Raises InvalidInput as `prune` would, InsufficientMemory included, also for an unusable text or tokenizer.
    """
    machines = machines or Machines()
    if options.method != "magnitude-sp":
        check_text(calibration_text(options))
    source, has_headers = opened_or_described(str(model))
    require_effect(options)
    with source:
        streamed = StreamedModel(source, options)
        require_removable_experts(streamed, options)
        require_removable_layers(streamed, options)
        require_possible(streamed, options)
        warn_of_positions(source.config, options.sequence_length)
        return _forecast(streamed, Path(out), options, machines, has_headers)


def _forecast(model: StreamedModel, out: Path, options: PruneConfig, machines: Machines, has_headers: bool) -> Forecast:
    """What a job that has been found possible would take. has_headers: whether the model's shards are there."""
    source, local = model.checkpoint, machines.local_ranks
    limits = memory.limits(model.device, options.host_memory, options.device_memory, local)
    windows = (options.samples, options.sequence_length) if options.method != "magnitude-sp" else (0, 0)
    job = replace(model.job(*windows), ranks=machines.ranks, local_ranks=local)
    if machines.card is not None:
        job = replace(job, device="cuda")
        limits = replace(limits, device=int(machines.card * (1 - memory.DEVICE_MARGIN)))
    refit, backward = _refit(model, options), _backward(model, options, job)
    placement, placed = _place(model, options, job, limits, refit, backward)
    if has_headers and options.method != "magnitude-sp" and not options.calibration[0].endswith(".npy"):
        load_tokenizer(source.directory, options.trust_remote_code)
    shard = source.directory / next(iter(source.shard_bytes)) if has_headers else None
    rates = _ASSUMED
    if machines.card is None:
        rates = measure_rates(model, placement.batch_size * job.tokens, shard, out, local)
    rates = replace(rates, network=machines.network)
    hidden_traffic = len(model.layers) * job.hidden_bytes if placement.hidden_place == "disk" else 0
    work = work_of(model, options, placement.batch_size, hidden_traffic, refit)
    if backward is not None and placed is not None:
        share = backward.samples / job.samples
        operations = backward_operations(backward, int(work.operations * share))
        loss = LossWork(backward.samples, placed.batch_size, operations, kept_input_bytes(backward))
        work = replace(work, loss=loss)
    scaled = scale(work, rates, machines.ranks, machines.nodes)
    disk_bytes, run_directory_bytes = _disk_bytes(model, options, work, job)
    return Forecast(
        model=source.source,
        ranks=machines.ranks,
        nodes=machines.nodes,
        busy_ranks=scaled.busy_ranks,
        network_bytes=int(scaled.network_bytes),
        parameters=source.parameters,
        layers=len(model.layers),
        has_headers=has_headers,
        placement=placement,
        limits=limits,
        bytes_read=work.bytes_read(machines.nodes),
        bytes_written=work.bytes_written,
        disk_bytes=disk_bytes,
        run_directory_bytes=run_directory_bytes,
        free_disk_bytes=files.free_bytes(out.absolute()),
        operations=work.total_operations,
        rates=rates,
        floor_seconds=scaled.seconds,
    )


def _refit(model: StreamedModel, options: PruneConfig) -> Refit | None:
    """What there is to refit; None if nothing."""
    if options.refit is None:
        return None
    require_refittable(model, options.refit)
    return refit_sizes(model, options.refit, options.samples * options.sequence_length)


def _backward(model: StreamedModel, options: PruneConfig, job: Job) -> Job | None:
    """The backward pass; None if there is none."""
    backward = backward_job(model, options, job.samples, job.tokens)
    if backward is None:
        return None
    return replace(backward, device=job.device, ranks=job.ranks, local_ranks=job.local_ranks)


def _place(
    model: StreamedModel,
    options: PruneConfig,
    job: Job,
    limits: memory.Limits,
    refit: Refit | None,
    backward: Job | None,
) -> tuple[Placement, Placement | None]:
    """How all stages of the job would run, with the largest peaks of any; and the backward pass, if any."""
    refits = [] if refit is None else [model.refit_after(job, refit)]
    then = [*refits, *([] if backward is None else [backward])]
    placement = placements.place(job, limits, options.batch_size, options.prefetch, then)
    for second in refits:
        based = replace(second, base_bytes=placement.base_bytes)
        placement = placement.together(placements.place(based, limits, placement.batch_size, options.prefetch))
    if backward is None:
        return placement, None
    based = replace(backward, base_bytes=placement.base_bytes)
    placed = placements.place(based, limits, placement.batch_size, options.prefetch)
    return placement.together(placed), placed


def _disk_bytes(model: StreamedModel, options: PruneConfig, work: Work, job: Job) -> tuple[int, int]:
    """The space needed for OUT and the run directory, and the most that the run directory takes."""
    has_windows = options.method != "magnitude-sp"
    stored = stored_bytes(model.shapes, options.samples * options.sequence_length if has_windows else 0)
    stored += 0 if options.refit is None else refit_stored_bytes(model, options.refit)
    stored += 0 if work.loss is None else work.loss.input_bytes
    on_disk = 2 * job.hidden_bytes if work.hidden_traffic else 0
    snapshots = 3 * job.hidden_bytes if has_windows else 0  # a new one is written before the older of two is deleted
    return work.written + stored + on_disk, stored + on_disk + snapshots


def work_of(
    model: StreamedModel,
    options: PruneConfig,
    batch_size: int,
    hidden_traffic: int = 0,
    refit: Refit | None = None,
) -> Work:
    """What a whole job consists of.

    hidden_traffic: bytes of hidden states that are written to disk and read back in one pass over the layers.
    refit: what is refitted; None if nothing.
    """
    source = model.checkpoint
    samples = options.samples if options.method != "magnitude-sp" else 0
    # Not read when shards are written: removed rows, and columns that a refit has already left out.
    ratio = expected_ratio(model, options)
    not_read = ratio * sum(
        entry.stored_bytes
        for layer, shape in zip(model.layer_entries, model.shapes, strict=True)
        for part in model.family.parts(shape)
        for projection in part.kind.projections
        if refit is not None or projection.axis == ROWS
        if (entry := layer.get(f"{projection.name}.weight")) is not None
    )
    written = estimated_bytes(source, model.shapes, ratio, fp8_linears(source, options, model.skeleton))
    operations, refit_work = _operations(model, samples, options.sequence_length), None
    if refit is not None:
        moments, solving = refit.operations(ratio, samples * options.sequence_length)
        forwards = operations * (1 + refit.follows_dense)
        refit_work = RefitWork(moments + forwards, solving, refit.sum_bytes(ratio), is_shared=not refit.fitted)
    return Work(
        layers=len(model.layers),
        samples=samples,
        batch_size=batch_size,
        operations=operations,
        layer_bytes=sum(model.layer_bytes(i) for i in range(len(model.layers))),
        moment_bytes=sum(placements.moment_bytes(shape, samples, batch_size) for shape in model.shapes),
        hidden_traffic=hidden_traffic,
        read_again=source.stored_bytes - int(not_read),
        written=written,
        shards=max(1, -(-written // options.max_shard_bytes)),
        refit=refit_work,
    )


def opened_or_described(model: str) -> tuple[Checkpoint, bool]:
    """The checkpoint, or the one that a config.json without shards describes, and whether it has headers."""
    if Path(model).is_dir() and has_shards(Path(model)):
        return open_checkpoint(model), True
    directory, config = read_config(model)
    skeleton = Skeleton(config, model)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return describe(model, directory, config, skeleton.tensors(), dtype), False


def _operations(model: StreamedModel, samples: int, tokens: int) -> int:
    """Multiplications and additions of all layers' products, counting attention over the full square of tokens."""
    matrices = sum(
        entry.shape[0] * entry.shape[1] * (model.expert_share if ".experts." in name else 1)
        for layer in model.layer_entries
        for name, entry in layer.items()
        if len(entry.shape) == 2
    )
    queries = sum(shape.attention_channels for shape in model.shapes)
    return samples * tokens * (2 * int(matrices) + 4 * tokens * queries)
