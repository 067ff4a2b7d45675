"""The order of the stages, and how each goes on after an interruption. Nothing else knows that order."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flap_stream.arithmetic.allocation import LayerKeep, allocate, require_minimum
from flap_stream.arithmetic.layer_shape import LayerShape, Sublayer
from flap_stream.arithmetic.scoring import LayerScores, baseline_input, flap_scores, magnitude_scores, wanda_scores
from flap_stream.arithmetic.sizes import PrunedSizes, pruned_sizes
from flap_stream.config import (
    CollectConfig,
    PlanConfig,
    PruneConfig,
    RewriteConfig,
    changed_options,
    part_of,
    require_restoration,
)
from flap_stream.config.rules import FED_ON, options_of, warn_of_positions
from flap_stream.config.values import option_name
from flap_stream.engine import placement as planner
from flap_stream.engine.memory import give_back_heap
from flap_stream.engine.ranks import ALONE, Ranks, joined
from flap_stream.engine.streamed_model import StreamedModel, cpu_threads, release
from flap_stream.errors import CorruptRun, InvalidOption, OutputConflict, RunMismatch
from flap_stream.model import checkpoint as checkpoints
from flap_stream.model.skeleton import Skeleton
from flap_stream.output import pruned_checkpoint as output
from flap_stream.output.shards import Restoration
from flap_stream.progress import Progress, peak_device_bytes, peak_host_bytes
from flap_stream.restore.refit_layers import RefitJob, refit_layers, refitted_tensors
from flap_stream.restore.requirements import refit_record, refit_sizes, refit_stored_bytes, require_refittable
from flap_stream.stages.collect import collect_statistics
from flap_stream.stages.job_header import engine_rows, model_row
from flap_stream.stages.loss import collect_loss_scores, require_inputs
from flap_stream.stages.same_source import require_same_weights
from flap_stream.storage import files, places
from flap_stream.storage.differences import model_differences, output_differences
from flap_stream.storage.loss import LossScores, LossStore
from flap_stream.storage.run_directory import RunDirectory, stored_bytes
from flap_stream.storage.run_manifest import tokens_digest
from flap_stream.text.tokenization import code_files
from flap_stream.text.windows import Windows, calibration_text, calibration_tokens, check_text, load_tokenizer

logger = logging.getLogger(__name__)

# How long pass 2 takes beside pass 1, about, for the bar of a whole job: measured on CPUs, see the README.
_REFIT_WEIGHTS = {"own": 1.5, "dense": 2.5, "aligned": 3.5, "joint": 10.0}
_REWRITE_WEIGHT = 0.1


@dataclass
class Measured:
    """What a call took: seconds a stage, bytes read from the model and written to the output, peak memory.

    device: that ran the layers; empty if they were not run.
    placement: how they were run, and the peaks that were predicted; None if they were not. Of a job of several ranks,
    peaks are one rank's, the largest, and bytes those of all; node_bytes_read: of those on each machine.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    bytes_read: int = 0
    node_bytes_read: list[int] = field(default_factory=list)
    bytes_written: int = 0
    peak_host_bytes: int = 0
    peak_device_bytes: int = 0
    device: str = ""
    placement: planner.Placement | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
            self.peak_host_bytes, self.peak_device_bytes = peak_host_bytes(), peak_device_bytes(self.device)
            give_back_heap()

    def of_all(self, ranks: Ranks, bytes_read: int) -> None:
        """Bring together what the ranks took. bytes_read: by this one."""
        found = ranks.gathered((bytes_read, self.bytes_written, self.peak_host_bytes, self.peak_device_bytes))
        read, written, host, device = (list(values) for values in zip(*found, strict=True))
        self.bytes_read, self.bytes_written = sum(read), sum(written)
        self.node_bytes_read = [sum(read[rank] for rank in node) for node in ranks.nodes]
        self.peak_host_bytes, self.peak_device_bytes = max(host), max(device)


@dataclass(frozen=True)
class CollectResult:
    """Pass 1 is complete: its run directory, how many layers and windows, what this call took."""

    run: Path
    layers: int
    samples: int
    sequence_length: int
    measured: Measured


@dataclass(frozen=True)
class PlanResult:
    """A decision: what stays in every layer, and what it comes to."""

    run: Path
    options: PlanConfig
    layers: list[LayerKeep] = field(repr=False)
    kv_groups: list[int] = field(repr=False)
    neurons: list[int] = field(repr=False)
    sizes: PrunedSizes

    @property
    def decoder_ratio(self) -> float:
        """Removed share of the decoder layers' prunable weights."""
        return self.sizes.decoder_ratio

    @property
    def model_ratio(self) -> float:
        """The share by which the whole model's parameters become fewer, biases that are added counted."""
        return self.sizes.model_ratio

    @property
    def parameters_before(self) -> int:
        """Of the dense model."""
        return self.sizes.parameters_before

    @property
    def parameters_after(self) -> int:
        """Of the pruned model, biases that are added counted."""
        return self.sizes.parameters_after


@dataclass(frozen=True)
class PruneResult:
    """A pruned checkpoint: where it is, the contents of its pruning.json, what this call took."""

    out: Path
    record: dict[str, Any]
    measured: Measured

    def __repr__(self) -> str:
        """Where it is and what is gone."""
        ratios, counts = self.record["realised_ratio"], self.record["parameters"]
        return (
            f"PruneResult(out={str(self.out)!r}, removed={ratios['decoder']:.2%} of the prunable weights, "
            f"parameters={counts['before']:,} -> {counts['after']:,})"
        )


def prune(
    model: str | Path,
    out: str | Path,
    options: PruneConfig | None = None,
    *,
    run: str | Path | None = None,
    progress: Progress | bool | None = None,
    **keywords: Any,
) -> PruneResult:
    """Prune a model into a checkpoint at `out`; called again after any interruption, it goes on.

    model: a directory or a Hub id. run: the run directory; by default `<out>.run`, removed at the end unless
    `options.keep_run`; one that is named here stays. progress: True shows it on stderr.
    keywords: the fields of `PruneConfig`, in place of `options`.
    Raises InvalidInput (see errors.py) before any long work for what cannot be pruned.
    """
    options = options_of(PruneConfig, "prune", options, keywords)
    out, measured, progress = Path(out), Measured(), Progress.of(progress)
    places.require_name(out)
    run_path = Path(run) if run is not None else out.with_name(out.name + ".run")
    removes_run = run is None and not options.keep_run
    with joined() as ranks, ExitStack() as opened:
        ranks.from_first(lambda: _check_text(options, model))
        source = opened.enter_context(_open_model(model, ranks))
        record = ranks.from_first(lambda: output.read_record(out))
        if record is not None:
            _require_same_job(source, out, record, options)
            logger.warning("%s is complete already; nothing to do", out)
            if ranks.is_first:
                files.sync_directory(out.absolute().parent)  # a kill may have come between its rename and this
                if removes_run:
                    RunDirectory.remove_leftover(run_path)
            return PruneResult(out, record, measured)
        if ranks.is_first:
            output.require_own_place(source, out, run_path)
            output.tell_left_out(source.directory)
        with ExitStack() as stack:  # one lock for the whole job: no other can plan in between
            stack.enter_context(progress.job([("collect", 1.0), *_pass2_weights(options)]))
            directory, _ = _collect(source, run_path, options, progress, measured, stack, out, ranks)
            with measured.stage("plan"):
                ranks.from_first(lambda: _store_plan(directory, decide(directory, part_of(options, PlanConfig))))
            if not ranks.is_first:
                directory = RunDirectory(run_path, is_writer=False)  # as it is now
            parts, interval = part_of(options, RewriteConfig), options.snapshot_interval
            result = _rewrite(source, directory, out, parts, progress, measured, ranks, interval)
            if removes_run and ranks.is_first:
                directory.remove()
    return result


def _pass2_weights(options: RewriteConfig) -> list[tuple[str, float]]:
    """About how long the stages of pass 2 take, beside pass 1."""
    return [
        *([("refit", _REFIT_WEIGHTS[options.refit_target])] if options.refits else []),
        ("rewrite", _REWRITE_WEIGHT),
    ]


def collect(
    model: str | Path,
    run: str | Path,
    options: CollectConfig | None = None,
    *,
    progress: Progress | bool | None = None,
    **keywords: Any,
) -> CollectResult:
    """Pass 1 alone: statistics of every layer into the run directory `run`, which serves any number of plans.

    With `method="wanda-sp"` the collection belongs to `options.ratio`, since the pruned layers feed the next.
    keywords: the fields of `CollectConfig`, in place of `options`. progress: as of `prune`.
    """
    options = options_of(CollectConfig, "collect", options, keywords)
    with joined() as ranks, ExitStack() as stack:
        ranks.from_first(lambda: _check_text(options, model))
        source = stack.enter_context(_open_model(model, ranks))
        return _collect(source, Path(run), options, Progress.of(progress), Measured(), stack, ranks=ranks)[1]


def plan(run: str | Path, options: PlanConfig | None = None, **keywords: Any) -> PlanResult:
    """Decide from the run directory alone what stays; the decision is stored there for `rewrite`.

    keywords: the fields of `PlanConfig`, in place of `options`.
    Raises RunMismatch if the statistics do not serve the method, CorruptRun if they are incomplete or altered,
    InvalidOption if the ratio cannot be met.
    """
    options = options_of(PlanConfig, "plan", options, keywords)
    with RunDirectory(Path(run)) as directory:
        return _store_plan(directory, decide(directory, options))


def rewrite(
    run: str | Path,
    out: str | Path,
    options: RewriteConfig | None = None,
    *,
    model: str | Path | None = None,
    progress: Progress | bool | None = None,
    **keywords: Any,
) -> PruneResult:
    """Pass 2 alone: write the pruned checkpoint that the run directory's plan describes.

    model: where the dense model is now, if it was moved since `collect`. progress: as of `prune`.
    keywords: the fields of `RewriteConfig`, in place of `options`.
    """
    options = options_of(RewriteConfig, "rewrite", options, keywords)
    places.require_name(Path(out))
    with (
        joined() as ranks,
        _run_directory(ranks, Path(run), lambda: RunDirectory(Path(run))) as directory,
        _open_model(model or directory.manifest["source"], ranks) as source,
    ):
        if ranks.is_first and output.read_record(Path(out)) is None:
            output.require_own_place(source, Path(out), directory.path)
            output.tell_left_out(source.directory)
        shown = Progress.of(progress)
        shown.header({**model_row(source, len(directory.layer_shapes)), "run directory": str(run)})
        with shown.job(_pass2_weights(options)):
            return _rewrite(source, directory, Path(out), options, shown, Measured(), ranks)


@contextmanager
def _open_model(model: str | Path, ranks: Ranks) -> Iterator[checkpoints.Checkpoint]:
    """The model, which must be the same for all ranks; the first of each machine fetches it from the Hub."""
    if not ranks.leads_node:
        ranks.node_barrier()
    with checkpoints.open_checkpoint(model) as source:
        if ranks.leads_node:
            ranks.node_barrier()
        ranks.require_same(f"the model {model}", output.fingerprint_digest(source.fingerprint))
        yield source


@contextmanager
def _run_directory(ranks: Ranks, path: Path, opened: Callable[[], RunDirectory]) -> Iterator[RunDirectory]:
    """The run directory, which rank 0 opens and prepares for writing; the others read what is committed by then."""
    if not ranks.is_first:
        ranks.barrier()
    directory = opened() if ranks.is_first else RunDirectory(path, is_writer=False)
    del opened  # and what it holds on to
    with directory:
        if ranks.is_first:
            ranks.barrier()
        yield directory


def _collect(
    source: checkpoints.Checkpoint,
    run: Path,
    options: CollectConfig,
    progress: Progress,
    measured: Measured,
    stack: ExitStack,
    out: Path | None = None,
    ranks: Ranks = ALONE,
) -> tuple[RunDirectory, CollectResult]:
    """Pass 1; the run directory comes out open, and is closed with `stack`.

    out: where the output will go, if this is part of a whole job; its place and room are checked first.
    """
    with measured.stage("collect"):
        model = StreamedModel(source, options, ranks)
        measured.device = str(model.device)
        progress.header({**model_row(source, len(model.layers)), "run directory": str(run)})
        if isinstance(options, PruneConfig):
            _require_possible(model, options)
        target = options.refit_target if isinstance(options, PruneConfig) and options.refits else None
        if options.method != "magnitude-sp":
            progress.say("reading the calibration text")
        windows = ranks.from_first(lambda: _windows_for(model, options))
        tokens = windows.tokens
        give_back_heap()
        warn_of_positions(source.config, tokens.shape[1])
        if out is not None and ranks.is_first:  # what an interrupted call has written counts
            written = output.estimated_bytes(source, model.shapes, options.ratio)
            written -= files.tree_bytes(files.partial_path(out))
            kept = stored_bytes(model.shapes, tokens.size) - files.tree_bytes(run)
            kept += 0 if target is None else refit_stored_bytes(model, target)
            output.require_space(out, max(0, written), run, max(0, kept))
        samples, length = tokens.shape
        recorded = RunDirectory.recorded_batch_size(run)
        job = model.job(samples, length)  # pass 2 must fit as well, whatever the plan will be
        then = [] if target is None else [model.refit_after(job, refit_sizes(model, target))]
        placement = model.place(options, job, then=then, recorded=recorded)
        measured.placement = placement
        progress.header(engine_rows(model, placement, samples, length))
        opened = _run_directory(ranks, run, lambda: _begun_run(model, run, options, windows, placement))
        directory = stack.enter_context(opened)
        with cpu_threads(directory.manifest["threads"]):
            loss = LossStore(directory, min(options.loss_windows, samples)) if options.loss_windows else None
            collect_statistics(model, directory, options, placement, progress, loss)
            if loss is not None:
                _sweep_loss(model, loss, options, placement, progress)
        release(model.device)
    measured.of_all(ranks, source.bytes_read)
    return directory, CollectResult(run, len(model.shapes), samples, length, measured)


def _sweep_loss(
    model: StreamedModel, loss: LossStore, options: CollectConfig, placement: planner.Placement, progress: Progress
) -> None:
    """Bring in the scores by the loss. placement: of the collection."""
    ranks, length = model.ranks, loss.run.manifest["tokens"]["shape"][1]
    require_inputs(model, loss, placement, progress)
    recorded = ranks.from_first(loss.recorded_batch_size)
    job = replace(model.job(loss.windows, length, head=True, backward=True), base_bytes=placement.base_bytes)
    own = model.place(options, job, recorded=recorded)
    if ranks.is_first:
        loss.begin(own.batch_size)
    collect_loss_scores(model, loss, own, progress, options.snapshot_interval)


def _require_possible(model: StreamedModel, options: PruneConfig) -> None:
    """Raise what planning and refitting would for this model, whatever the scores turn out to be."""
    require_minimum(model.shapes, options)
    nothing = [LayerScores(np.zeros(shape.kv_groups), np.zeros(shape.neurons)) for shape in model.shapes]
    allocate(nothing, model.shapes, part_of(options, PlanConfig))
    if options.refits:
        require_refittable(model.family, model.shapes, options.refit_target, model.checkpoint.source)


def _begun_run(
    model: StreamedModel, run: Path, options: CollectConfig, windows: Windows, placement: planner.Placement
) -> RunDirectory:
    """The run directory with its tokens, held against the model's files."""
    tokens = windows.tokens
    directory = RunDirectory.create(run, _manifest(model, options, windows, placement.batch_size))
    try:
        if tokens.size and not directory.has_tokens():
            directory.write_tokens(tokens)
        require_same_weights(model.checkpoint, directory)
    except BaseException:
        directory.close()
        raise
    return directory


def _check_text(options: CollectConfig, model: str | Path) -> None:
    if options.method != "magnitude-sp":
        check_text(calibration_text(options), model)


def _windows_for(model: StreamedModel, options: CollectConfig) -> Windows:
    if options.method == "magnitude-sp":
        return Windows(np.zeros((0, 0), dtype=np.int64))
    found = calibration_tokens(
        calibration_text(options),
        options.seed,
        lambda: load_tokenizer(model.checkpoint.directory, options.trust_remote_code),
        model.vocab_size,
        model.room(options),
    )
    there = len(found.tokens)
    if there < options.samples and "samples" in changed_options(options):
        logger.warning("--samples is %d, but there are only %d windows; all are taken", options.samples, there)
    return found


def _manifest(model: StreamedModel, options: CollectConfig, windows: Windows, batch_size: int) -> dict[str, Any]:
    """What the statistics depend on (`model`, `tokens`, `options`), and what planning needs to know of the model."""
    decides: dict[str, Any] = {"method": options.method}
    if options.method != "magnitude-sp":
        decides |= {"dtype": str(model.dtype), "device": model.device.type, "batch_size": batch_size}
    if options.method == "wanda-sp":
        decides |= {name: getattr(options, name) for name in FED_ON}
    return {
        "model": model.checkpoint.fingerprint,
        "tokens": {"sha256": tokens_digest(windows.tokens), "shape": list(windows.tokens.shape)},
        "options": decides,
        "source": _absolute(model.checkpoint.source),
        "calibration": _calibration_record(options),
        "window_prefix": list(windows.prefix),
        "threads": torch.get_num_threads(),
        "parameters": model.checkpoint.parameters,
        "sizes": {
            "hidden": model.hidden_size,
            "vocabulary": model.vocab_size,
            "weight_bytes": model.checkpoint.nbytes,
            "expert_share": model.expert_share,
        },
        "layers": [asdict(shape) for shape in model.shapes],
    }


def _calibration_record(options: CollectConfig) -> dict[str, Any]:
    """What the calibration was asked to be, as run.json and pruning.json hold it."""
    if options.method == "magnitude-sp":
        return {}
    sources = [Path(source).name for source in options.calibration]
    asked = ("samples", "sequence_length", "seed", "bos", "text_column", "chat_template")
    return {"sources": sources, **{key: getattr(options, key) for key in asked}}


def _known_to(record: Any, calibration: dict[str, Any]) -> dict[str, Any]:
    """A calibration without what a record of an older version does not have."""
    return {name: calibration[name] for name in calibration if not isinstance(record, dict) or name in record}


def _absolute(source: str) -> str:
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def decide(run: RunDirectory, options: PlanConfig, restore: str | None = None) -> PlanResult:
    """What `plan` decides; nothing is stored. restore: what biases are counted for; None is the method's own."""
    collected = run.manifest["options"]
    if options.method != collected["method"] and not (
        options.method == "magnitude-sp" and collected["method"] == "flap"
    ):
        raise RunMismatch(
            f"{run.path} was collected for {collected['method']}, which does not serve {options.method}; "
            f"collect again with --method {options.method}"
        )
    for name in FED_ON:
        if name in collected and getattr(options, name) != collected[name]:
            raise RunMismatch(
                f"{run.path} was collected with wanda-sp for --{option_name(name)} {collected[name]} (pruned layers "
                f"feed the next), which does not serve {getattr(options, name)}; collect again for that"
            )
    if options.statistics == "released" and run.manifest.get("window_prefix"):
        logger.warning(
            "the windows of %s begin with BOS, those of the released code do not; collect with --bos never", run.path
        )
    shapes = run.layer_shapes
    require_minimum(shapes, options)
    keeps = allocate(unit_scores(run, options), shapes, options)
    restore = require_restoration(options.method, restore)
    return PlanResult(
        run=run.path,
        options=options,
        layers=keeps,
        kv_groups=[shape.kv_groups for shape in shapes],
        neurons=[shape.neurons for shape in shapes],
        sizes=pruned_sizes(shapes, keeps, run.manifest["parameters"], restore),
    )


def unit_scores(run: RunDirectory, options: PlanConfig) -> list[LayerScores]:
    """A layer's scores of its KV groups and of its neurons, float64 `[group]`, `[neuron]`, the better the higher.

    Raises CorruptRun if the statistics are incomplete or altered.
    """
    if options.method == "flap" and options.metric == "fisher":
        loss = LossStore.of(run)
        return [loss_scores(loss.read(i), shape) for i, shape in enumerate(run.layer_shapes)]
    scores = []
    for i, shape in enumerate(run.layer_shapes):
        statistics, channels = run.read_statistics(i), shape.heads_per_group * shape.head_dim
        if options.method == "flap":
            pair = flap_scores(statistics, options.metric, options.statistics, options.head_score, channels)
            _tell_unreached(i, shape, statistics.mlp.count)
        else:
            pair = (wanda_scores if options.method == "wanda-sp" else magnitude_scores)(statistics, channels)
        scores.append(pair)
    return scores


def loss_scores(found: LossScores, shape: LayerShape) -> LayerScores:
    """F of each unit for each weight that goes with it, float64 `[group]`, `[neuron]`; comparable across layers."""
    return LayerScores(found.attention / max(shape.group_cost, 1), found.mlp / max(shape.neuron_cost, 1))


def _store_plan(run: RunDirectory, decided: PlanResult) -> PlanResult:
    if decided.decoder_ratio == 0:
        raise InvalidOption(f"--ratio {decided.options.ratio} removes nothing from this model; raise it")
    run.write_plan(decided.options, decided.layers)
    return decided


def _tell_unreached(layer: int, shape: LayerShape, counts: np.ndarray) -> None:
    """Say which experts saw no token: nothing is known of them, so they stay whole."""
    parts = np.split(counts, np.cumsum(shape.experts)[:-1]) if shape.experts else []
    unreached = [str(number) for number, part in enumerate(parts) if len(part) and part.max() == 0]
    if unreached:
        logger.warning(
            "no calibration token reached experts %s of layer %d; they are kept whole", ", ".join(unreached), layer
        )


def _rewrite(
    source: checkpoints.Checkpoint,
    run: RunDirectory,
    out: Path,
    options: RewriteConfig,
    progress: Progress,
    measured: Measured,
    ranks: Ranks,
    snapshot_interval: int | None = None,
) -> PruneResult:
    plan_options, keeps = run.read_plan()
    restore = require_restoration(plan_options.method, options.restore)
    require_model_of(run, source, ranks)
    restoration = Restoration()
    if restore == "bias":
        restoration = Restoration([_means(run, i, plan_options.statistics) for i in range(len(keeps))])
    elif restore == "least-squares":
        with measured.stage("refit"):
            restoration = _refitted(source, run, keeps, options, progress, measured, ranks, snapshot_interval)
    code = [name for name in code_files(source.directory) if (source.directory / name).is_file()]
    code = code if options.trust_remote_code else []
    with measured.stage("rewrite"):
        record, measured.bytes_written = output.write_checkpoint(
            source, run, out, plan_options, keeps, restoration, restore, options.max_shard_bytes, progress, ranks, code
        )
    measured.of_all(ranks, source.bytes_read)
    return PruneResult(out, record, measured)


def require_model_of(run: RunDirectory, source: checkpoints.Checkpoint, ranks: Ranks = ALONE) -> None:
    """Raise RunMismatch unless the statistics were collected from this very model."""
    if source.fingerprint != run.manifest["model"]:
        now = {"model": source.fingerprint, "source": _absolute(source.source), "parameters": source.parameters}
        raise RunMismatch(
            f"{run.path} was collected {model_differences(run.manifest, now)}; give that model, or collect again"
        )
    skeleton, vocabulary = Skeleton(source.config, source.source), run.manifest["sizes"]["vocabulary"]
    shapes = [skeleton.layer_shape(i) for i in range(len(skeleton.layers))]
    if shapes != run.layer_shapes or vocabulary != source.tensors[skeleton.family.embedding].shape[0]:
        raise CorruptRun(f"{run.path / 'run.json'} has other sizes than {source.source}; delete it and collect again")
    if ranks.is_first:
        require_same_weights(source, run)


def _refitted(
    source: checkpoints.Checkpoint,
    run: RunDirectory,
    keeps: list[LayerKeep],
    options: RewriteConfig,
    progress: Progress,
    measured: Measured,
    ranks: Ranks,
    snapshot_interval: int | None,
) -> Restoration:
    """Refit with the dtype, batch size and number of threads that the statistics were collected with."""
    collected = run.manifest["options"]
    dtype = collected["dtype"].removeprefix("torch.")
    if options.dtype not in ("auto", dtype):
        raise RunMismatch(f"{run.path} was collected in {dtype}, not {options.dtype}; leave out --dtype")
    model = StreamedModel(source, replace(options, dtype=dtype), ranks)
    measured.device = str(model.device)
    require_refittable(model.family, model.shapes, options.refit_target, source.source)
    samples, length = run.manifest["tokens"]["shape"]
    refit = refit_sizes(model, options.refit_target, keeps)
    first = measured.placement  # of a pass 1 that came before in this process: what it left is in its slack
    job = replace(model.job(samples, length, refit=refit), base_bytes=None if first is None else first.base_bytes)
    placement = model.place(options, job, recorded=collected["batch_size"])
    if placement != first:
        progress.header(engine_rows(model, placement, samples, length))
    measured.placement = placement if first is None else first.together(placement)
    with cpu_threads(run.manifest["threads"]):
        refit_layers(model, run, RefitJob(keeps, options.refit_target, placement, snapshot_interval), progress)
    release(model.device)
    how, files_count = refit_record(options.refit_target), len(model.layers) + refit.has_head
    return ranks.from_first(
        lambda: Restoration(refitted=refitted_tensors(run, files_count), digests=run.refit_digests(), how=how)
    )


def _means(run: RunDirectory, layer: int, form: str) -> dict[str, np.ndarray]:
    statistics = run.read_statistics(layer)
    return {kind: baseline_input(statistics.of(kind), form) for kind in Sublayer}


def _require_same_job(source: checkpoints.Checkpoint, out: Path, record: dict[str, Any], options: PruneConfig) -> None:
    """Raise OutputConflict unless the output's record is what this command would write again."""
    wanted = {
        **({"refit": refit_record(options.refit_target)} if options.refits else {}),
        "options": output.options_record(part_of(options, PlanConfig)),
        "restore": require_restoration(options.method, options.restore),
        "calibration": _known_to(record.get("calibration"), _calibration_record(options)),
        "base": {"name": Path(source.source).name, "fingerprint": output.fingerprint_digest(source.fingerprint)},
    }
    differences = output_differences(record, wanted)
    if differences is not None:
        raise OutputConflict(f"{out} was pruned {differences}; name another OUT or move it away")
