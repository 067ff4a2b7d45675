"""Writing the pruned checkpoint that a plan describes, after preparing what its restoration needs."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.layer_shape import Sublayer
from flap_stream.arithmetic.scoring import baseline_input
from flap_stream.config import PlanConfig, RewriteConfig, require_restoration
from flap_stream.config.rules import options_of
from flap_stream.engine.device import cpu_threads, in_use
from flap_stream.engine.membership import joined
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import OutputConflict, RunMismatch
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.model.families import family_of
from flap_stream.model.hub import base_name
from flap_stream.output.carried import tell_left_out
from flap_stream.output.destination import require_own_place
from flap_stream.output.fp8_config import fp8_linears, tell_unconverted
from flap_stream.output.pruned_model import PrunedModel, Restoration
from flap_stream.output.pruning_record import (
    fingerprint_digest,
    options_record,
    output_dtype_record,
    pruning_record,
    read_record,
)
from flap_stream.output.recipe import recipe
from flap_stream.output.shard_plan import plan_shards
from flap_stream.output.shard_writer import write_shard
from flap_stream.output.staging import Staging
from flap_stream.progress import Progress
from flap_stream.restore.refit_layers import RefitJob, refit_layers, refitted_tensors
from flap_stream.restore.requirements import refit_record, refit_sizes, require_refittable
from flap_stream.stages.job_header import engine_rows, model_row
from flap_stream.stages.measured import Measured
from flap_stream.stages.removable_layers import config_of_kept
from flap_stream.stages.same_source import require_model_of
from flap_stream.stages.session import Session, opened_model, opened_run
from flap_stream.stages.targets import counts_of, run_target
from flap_stream.storage import places
from flap_stream.storage.differences import output_differences
from flap_stream.storage.run_directory import RunDirectory
from flap_stream.text.tokenization import code_files

# About how long refitting and rewriting take relative to collection, for the bar of a whole job; measured on CPUs, see
# the README.
_REFIT_WEIGHTS = {"least-squares": 1.5, "reconstruct": 10.0}
_REWRITE_WEIGHT = 0.1


@dataclass(frozen=True)
class PruneResult:
    """A pruned checkpoint: its path, the contents of its pruning.json, what this call took."""

    out: Path
    record: dict[str, Any]
    measured: Measured

    def __repr__(self) -> str:
        """The path and how much was removed."""
        ratios, counts = self.record["realised_ratio"], self.record["parameters"]
        return (
            f"PruneResult(out={str(self.out)!r}, removed={ratios['decoder']:.2%} of the prunable weights, "
            f"parameters={counts['before']:,} -> {counts['after']:,})"
        )


def rewrite(
    run: str | Path,
    out: str | Path,
    options: RewriteConfig | None = None,
    *,
    model: str | Path | None = None,
    progress: Progress | bool | None = None,
    **keywords: Any,
) -> PruneResult:
    """Write the pruned checkpoint that the run directory's plan describes.

    model: where the dense model is now, if it was moved since `collect`. progress: see `prune`.
    keywords: the fields of `RewriteConfig`, in place of `options`.
    """
    options = options_of(RewriteConfig, "rewrite", options, keywords)
    run, out, shown = Path(run), Path(out), Progress.of(progress)
    places.require_name(out)
    with ExitStack() as stack:
        ranks = stack.enter_context(joined())
        directory = stack.enter_context(opened_run(ranks, run, lambda: RunDirectory(run)))
        source = stack.enter_context(opened_model(model or directory.manifest["source"], ranks))
        if ranks.is_first and read_record(out) is None:
            require_own_place(source, out, directory.path)
            tell_left_out(source.directory)
        shown.header({**model_row(source, len(directory.layer_shapes)), "run directory": str(run)})
        stack.enter_context(shown.job(progress_weights(options)))
        return rewrite_from(Session(source, ranks, shown), directory, out, options)


def progress_weights(options: RewriteConfig) -> list[tuple[str, float]]:
    """The stages after the plan, and about how long each takes relative to collection."""
    return [
        *([] if options.refit is None else [("refit", _REFIT_WEIGHTS[options.refit])]),
        ("rewrite", _REWRITE_WEIGHT),
    ]


def rewrite_from(
    session: Session, run: RunDirectory, out: Path, options: RewriteConfig, snapshot_interval: int | None = None
) -> PruneResult:
    """Refit if the restoration asks for it, then write the checkpoint. run: open for writing on rank 0."""
    source, measured = session.source, session.measured
    plan_options, keeps = run.plan.read()
    require_model_of(run, source, session.ranks)
    found = session.ranks.from_first(lambda: read_record(out))
    if found is not None:
        require_same_job(source, out, found, plan_options, options, run.manifest["calibration"])
    pruned = _unrestored(source, run, plan_options, keeps, options)
    if options.refit is not None:
        tell_unconverted(pruned, plan_shards(pruned, options.max_shard_bytes), warns=False)  # before it takes hours
        with measured.stage("refit"):
            refitted = _refitted(session, run, keeps, options, options.refit, snapshot_interval)
        pruned = replace(pruned, restoration=refitted)
    elif pruned.restore == "bias":
        means = [_means(run, i, plan_options.statistics) for i in range(len(keeps))]
        pruned = replace(pruned, restoration=Restoration(means))
    with measured.stage("rewrite"):
        record = _write(session, run, out, pruned, options.max_shard_bytes)
    measured.of_all(session.ranks, source.bytes_read)
    return PruneResult(out, record, measured)


def require_same_job(
    source: Checkpoint,
    out: Path,
    record: dict[str, Any],
    plan: PlanConfig,
    options: RewriteConfig,
    calibration: dict[str, Any],
) -> None:
    """Raise OutputConflict unless a complete output is of this model and these options. record: its pruning.json."""
    family = family_of(source.config, source.source)
    wanted = {
        **({} if options.refit is None else {"refit": refit_record(options.refit, family)}),
        "options": options_record(plan),
        "restore": require_restoration(plan.method, options.restore),
        **output_dtype_record(options.output_dtype == "fp8"),
        "calibration": calibration,
        "base": {"name": base_name(source.source), "fingerprint": fingerprint_digest(source.fingerprint)},
    }
    differences = output_differences(record, wanted)
    if differences is not None:
        raise OutputConflict(f"{out} was pruned {differences}; name another OUT or move it away")


def _unrestored(
    source: Checkpoint, run: RunDirectory, plan: PlanConfig, keeps: list[LayerKeep], options: RewriteConfig
) -> PrunedModel:
    """What will be written, without the values that compensate for what is removed."""
    code = [name for name in code_files(source.directory) if (source.directory / name).is_file()]
    target = run_target(run, plan, options)
    return PrunedModel(
        source,
        run.layer_shapes,
        plan,
        keeps,
        require_restoration(plan.method, options.restore),
        Restoration(),
        run.manifest["calibration"],
        code if options.trust_remote_code else [],
        None if target is None else target.record(counts_of(run.layer_shapes, keeps)),
        recipe(run, plan, options, source.source),
        config_of_kept(source, keeps),
        fp8_linears(source, options),
    )


def _write(session: Session, run: RunDirectory, out: Path, pruned: PrunedModel, max_shard_bytes: int) -> dict[str, Any]:
    """Write the pruned checkpoint, keeping shards that an interrupted call finished; returns its pruning.json.

    Each rank writes a part of the shards, the first everything else.
    Raises OutputConflict or InsufficientSpace before anything is written.
    """
    ranks, plan = session.ranks, plan_shards(pruned, max_shard_bytes)
    staging = Staging(pruned, run, out, plan, pruning_record(pruned))
    tell_unconverted(pruned, plan, warns=ranks.is_first)
    found = ranks.from_first(lambda: read_record(out))
    if found is not None:
        staging.require_same(found)
        return found
    digests = _write_shards(session, staging, ranks.from_first(staging.begin))
    if ranks.is_first:
        session.measured.bytes_written += staging.finish(digests)
    ranks.barrier()
    return staging.record


def _write_shards(session: Session, staging: Staging, finished: dict[str, str]) -> dict[str, str]:
    """Write this rank's part of the shards that are not finished; returns name to sha256 of all.

    finished: name to sha256 of those that are whole.
    """
    ranks, source, digests = session.ranks, session.source, dict(finished)
    with session.progress.stage("rewrite", len(staging.plan.shards), unit="shard") as stage:
        stage.skip(len(finished))
        left = [shard for shard in staging.plan.shards if shard.name not in finished]
        for first in range(0, len(left), ranks.world):
            shards, own = left[first : first + ranks.world], ""
            for shard in shards[ranks.rank : ranks.rank + 1]:
                own = write_shard(source, shard, staging.directory)
                source.require_unchanged()
                session.measured.bytes_written += shard.nbytes
            for shard, digest in zip(shards, ranks.gathered(own), strict=False):
                if ranks.is_first:
                    staging.note(shard.name, digest)
                digests[shard.name] = digest
                stage.advance(bytes_moved=shard.nbytes)
    return digests


def _refitted(
    session: Session,
    run: RunDirectory,
    keeps: list[LayerKeep],
    options: RewriteConfig,
    restore: str,
    snapshot_interval: int | None,
) -> Restoration:
    """Refit with the dtype, batch size and number of threads that the statistics were collected with."""
    source, measured = session.source, session.measured
    model = StreamedModel(source, replace(options, dtype=_collected_dtype(run, options)), session.ranks)
    measured.device = str(model.device)
    require_refittable(model, restore)
    samples, length = run.manifest["tokens"]["shape"]
    refit = refit_sizes(model, restore, samples * length, keeps)
    collected = measured.placement  # of a collection in this process: the slack in it covers what it left in memory
    whole = replace(
        model.job(samples, length, refit=refit), base_bytes=None if collected is None else collected.base_bytes
    )
    placement = model.place(options, whole, recorded=run.manifest["options"]["batch_size"])
    if placement != collected:
        session.progress.header(engine_rows(model, placement, samples, length))
    measured.placement = placement if collected is None else collected.together(placement)
    if session.ranks.is_first:
        run.record_promise(measured.placement.host_bytes, measured.placement.device_bytes)
    with in_use(model.device), cpu_threads(run.manifest["threads"]):
        job = RefitJob(keeps, restore, placement, snapshot_interval)
        refit_layers(model, run, job, session.progress)
    how, count = refit_record(restore, model.family), len(model.layers)
    return session.ranks.from_first(
        lambda: Restoration(refitted=refitted_tensors(run, count), digests=run.refits.digests(), how=how)
    )


def _collected_dtype(run: RunDirectory, options: RewriteConfig) -> str:
    """The dtype that layers ran in during collection. Raises RunMismatch if the options name another."""
    dtype = run.manifest["options"]["dtype"].removeprefix("torch.")
    if options.dtype not in ("auto", dtype):
        raise RunMismatch(f"{run.path} was collected in {dtype}, not {options.dtype}; leave out --dtype")
    return dtype


def _means(run: RunDirectory, layer: int, form: str) -> dict[str, np.ndarray]:
    """Mean inputs of a layer's output projections, by kind, float64 `[channel]`."""
    statistics = run.statistics.read(layer)
    return {kind: baseline_input(statistics.of(kind), form) for kind in Sublayer}
