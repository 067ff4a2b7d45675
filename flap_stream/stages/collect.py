"""Collection: every layer's statistics from the calibration text into the run directory, from preparation to end."""

import logging
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flap_stream.arithmetic.allocation import require_minimum
from flap_stream.config import CollectConfig, PruneConfig, changed_options
from flap_stream.config.rules import FED_ON, options_of, warn_of_positions
from flap_stream.engine.device import cpu_threads, device_record, in_use
from flap_stream.engine.membership import joined
from flap_stream.engine.memory import give_back_heap
from flap_stream.engine.placement import Job
from flap_stream.engine.placement.prediction import Placement
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.output.destination import estimated_bytes, require_space
from flap_stream.output.fp8_config import fp8_linears
from flap_stream.progress import Progress
from flap_stream.restore.requirements import refit_sizes, refit_stored_bytes, require_refittable
from flap_stream.stages.expert_loss import require_removable_experts
from flap_stream.stages.job_header import engine_rows, model_row
from flap_stream.stages.layer_statistics import collect_statistics
from flap_stream.stages.loss import collect_loss_scores, require_inputs
from flap_stream.stages.loss_sizes import kept_input_bytes, sweep_job
from flap_stream.stages.measured import Measured
from flap_stream.stages.removable_layers import require_removable_layers
from flap_stream.stages.same_source import absolute, require_same_weights
from flap_stream.stages.session import Session, opened_model, opened_run
from flap_stream.stages.targets import expected_ratio, rehearse, sizes_of
from flap_stream.storage import files
from flap_stream.storage.loss import LossStore, loss_job
from flap_stream.storage.run_directory import RunDirectory, stored_bytes
from flap_stream.storage.run_manifest import tokens_digest
from flap_stream.text.tokenization import load_tokenizer
from flap_stream.text.windows import Windows, calibration_text, calibration_tokens, check_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CollectResult:
    """A complete collection: its run directory, how many layers and windows, what this call took."""

    run: Path
    layers: int
    samples: int
    sequence_length: int
    measured: Measured


def collect(
    model: str | Path,
    run: str | Path,
    options: CollectConfig | None = None,
    *,
    progress: Progress | bool | None = None,
    **keywords: Any,
) -> CollectResult:
    """Collect the statistics of every layer into the run directory `run`, which serves any number of plans.

    With `method="wanda-sp"` the statistics fit one `options.ratio` only, since each pruned layer feeds the next.
    keywords: the fields of `CollectConfig`, in place of `options`. progress: see `prune`.
    """
    options = options_of(CollectConfig, "collect", options, keywords)
    with joined() as ranks, ExitStack() as stack:
        ranks.from_first(lambda: check_calibration(options, model))
        source = stack.enter_context(opened_model(model, ranks))
        return collect_into(Session(source, ranks, Progress.of(progress)), Path(run), options, stack)[1]


def collect_into(
    session: Session, run: Path, options: CollectConfig, stack: ExitStack, out: Path | None = None
) -> tuple[RunDirectory, CollectResult]:
    """Collect into a run directory, which is returned open and closed with `stack`.

    out: where a whole job will write its output; its free space is checked first.
    """
    source, ranks, progress, measured = session.source, session.ranks, session.progress, session.measured
    with measured.stage("collect"), ExitStack() as using:
        model = StreamedModel(source, options, ranks)
        using.enter_context(in_use(model.device))
        measured.device = str(model.device)
        require_removable_experts(model, options)
        require_removable_layers(model, options)
        if isinstance(options, PruneConfig):
            _require_possible(model, options)
        progress.header({**model_row(source, len(model.layers)), "run directory": str(run)})
        if options.method != "magnitude-sp":
            progress.say("reading the calibration text")
        windows = ranks.from_first(lambda: _calibration_windows(model, options))
        samples, length = windows.tokens.shape
        give_back_heap()
        warn_of_positions(source.config, length)
        sweep = sweep_job(model, options, samples, length)
        if out is not None and ranks.is_first:
            _require_space(model, options, windows.tokens.size, run, out, sweep)
        placement = _place(model, options, windows, run, sweep)
        measured.placement = placement
        if sweep is not None:
            measured.placement = placement.together(_place_sweep(model, options, sweep, placement))
        progress.header(engine_rows(model, measured.placement, samples, length))
        opened = opened_run(ranks, run, lambda: _begun_run(model, run, options, windows, placement.batch_size))
        directory = stack.enter_context(opened)
        if ranks.is_first:
            directory.record_promise(measured.placement.host_bytes, measured.placement.device_bytes)
        with cpu_threads(directory.manifest["threads"]):
            loss = None if sweep is None else _loss_store(directory, sweep, options)
            collect_statistics(model, directory, options, placement, progress, loss)
            if loss is not None and sweep is not None:
                require_inputs(model, loss, placement, progress)
                swept = _place_sweep(model, options, sweep, placement, loss)
                measured.placement = measured.placement.together(swept)
                collect_loss_scores(model, loss, swept, progress, options.snapshot_interval)
    measured.of_all(ranks, source.bytes_read)
    return directory, CollectResult(run, len(model.shapes), samples, length, measured)


def _loss_store(run: RunDirectory, sweep: Job, options: CollectConfig) -> LossStore:
    return LossStore(run, sweep.samples, options.whole_experts, options.depth)


def check_calibration(options: CollectConfig, model: str | Path) -> None:
    """Raise InvalidInput if the calibration text, where one is needed, cannot be read."""
    if options.method != "magnitude-sp":
        check_text(calibration_text(options), model)


def calibration_record(options: CollectConfig) -> dict[str, Any]:
    """The calibration as asked for, as run.json and pruning.json record it."""
    if options.method == "magnitude-sp":
        return {}
    sources = [Path(source).name for source in options.calibration]
    asked = ("samples", "sequence_length", "seed", "bos", "text_column", "chat_template")
    return {"sources": sources, **{key: getattr(options, key) for key in asked}}


def _require_possible(model: StreamedModel, options: PruneConfig) -> None:
    """Raise what planning and refitting would raise for this model whatever the scores."""
    require_minimum(model.shapes, options)
    fp8_linears(model.checkpoint, options, model.skeleton)
    rehearse(model, options)
    if options.refit is not None:
        require_refittable(model, options.refit)


def _calibration_windows(model: StreamedModel, options: CollectConfig) -> Windows:
    """The windows to run; none if only weights are read."""
    if options.method == "magnitude-sp":
        return Windows(np.zeros((0, 0), dtype=np.int64))
    found = calibration_tokens(
        calibration_text(options),
        options.seed,
        lambda: load_tokenizer(model.checkpoint.directory, options.trust_remote_code),
        model.vocab_size,
        model.room(options),
    )
    available = len(found.tokens)
    if available < options.samples and "samples" in changed_options(options):
        logger.warning("--samples is %d, but there are only %d windows; all are used", options.samples, available)
    return found


def _refit(options: CollectConfig) -> str | None:
    """The refit after this collection; None if this call does not refit."""
    return options.refit if isinstance(options, PruneConfig) else None


def _require_space(
    model: StreamedModel, options: CollectConfig, tokens: int, run: Path, out: Path, sweep: Job | None
) -> None:
    """Raise InsufficientSpace unless OUT and the run directory fit; what an interrupted call has written counts."""
    refit = _refit(options)
    ratio, linears = options.ratio, None
    if isinstance(options, PruneConfig):
        ratio, linears = expected_ratio(model, options), fp8_linears(model.checkpoint, options, model.skeleton)
    written = estimated_bytes(model.checkpoint, model.shapes, ratio, linears)
    written -= files.tree_bytes(files.partial_path(out))
    kept = stored_bytes(model.shapes, tokens) - files.tree_bytes(run)
    kept += 0 if refit is None else refit_stored_bytes(model, refit)
    if sweep is not None:
        job = loss_job(sweep.samples, options.whole_experts, options.depth)
        kept += 0 if LossStore.is_swept(run, job, len(model.shapes)) else kept_input_bytes(sweep)
    require_space(out, max(0, written), run, max(0, kept))


def _place(model: StreamedModel, options: CollectConfig, windows: Windows, run: Path, sweep: Job | None) -> Placement:
    """How to run the layers, such that what follows fits into memory as well: a sweep, a refit whatever the plan."""
    refit, job = _refit(options), model.job(*windows.tokens.shape)
    then = [] if refit is None else [model.refit_after(job, refit_sizes(model, refit, windows.tokens.size))]
    then += [] if sweep is None else [sweep]
    return model.place(options, job, then=then, recorded=RunDirectory.recorded_batch_size(run))


def _begun_run(
    model: StreamedModel, run: Path, options: CollectConfig, windows: Windows, batch_size: int
) -> RunDirectory:
    """The run directory with its tokens stored, once the model's files have been compared with those recorded."""
    directory = RunDirectory.create(run, _manifest(model, options, windows, batch_size))
    try:
        if windows.tokens.size and not directory.tokens.exists():
            directory.tokens.write(windows.tokens)
        require_same_weights(model.checkpoint, directory)
    except BaseException:
        directory.close()
        raise
    return directory


def _manifest(model: StreamedModel, options: CollectConfig, windows: Windows, batch_size: int) -> dict[str, Any]:
    """What the statistics depend on (`model`, `tokens`, `options`), and what planning needs to know of the model."""
    sizes, whole = sizes_of(model), model.family.left_whole(model.checkpoint.tensors, model.shapes)
    decides: dict[str, Any] = {"method": options.method}
    if options.method != "magnitude-sp":
        decides |= {"dtype": str(model.dtype), **device_record(model.device), "batch_size": batch_size}
    if options.method == "wanda-sp":
        decides |= {name: getattr(options, name) for name in FED_ON}
    return {
        "model": model.checkpoint.fingerprint,
        "tokens": {"sha256": tokens_digest(windows.tokens), "shape": list(windows.tokens.shape)},
        "options": decides,
        "source": absolute(model.checkpoint.source),
        "calibration": calibration_record(options),
        "window_prefix": list(windows.prefix),
        "threads": torch.get_num_threads(),
        "parameters": model.checkpoint.parameters,
        "sizes": {
            "hidden": model.hidden_size,
            **({} if model.skeleton.state.is_plain else {"state": model.skeleton.state.width}),
            "vocabulary": model.vocab_size,
            "weight_bytes": model.checkpoint.nbytes,
            "expert_share": model.expert_share,
            "unit_bytes": [list(own) for own in sizes.unit_bytes],
            "header_bytes": list(sizes.header_bytes),
            **({"expert_bytes": list(sizes.expert_bytes)} if any(sizes.expert_bytes) else {}),
            **({} if sizes.fp8 is None else {"fp8": asdict(sizes.fp8)}),
        },
        **({"left_whole": whole} if whole else {}),
        "layers": [asdict(shape) for shape in model.shapes],
    }


def _place_sweep(
    model: StreamedModel, options: CollectConfig, sweep: Job, collected: Placement, loss: LossStore | None = None
) -> Placement:
    """How to run the sweep by the loss. collected: the placement of the collection.

    loss: the store of a sweep that begins now or goes on, with the batch size recorded there.
    """
    ranks = model.ranks
    recorded = None if loss is None else ranks.from_first(loss.recorded_batch_size)
    job = replace(sweep, base_bytes=collected.base_bytes, keeps_batch_size=recorded is not None)
    wanted = replace(options, batch_size=recorded or collected.batch_size)
    placement = model.place(wanted, job, recorded=recorded)
    if loss is not None and recorded is None and ranks.is_first:
        loss.begin(placement.batch_size)
    return placement
