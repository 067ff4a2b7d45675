"""Collection: from the calibration text to the statistics of every layer, which go to the run directory."""

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flap_stream.arithmetic.scoring import LayerStatistics
from flap_stream.config import CollectConfig, changed_options
from flap_stream.config.rules import options_of, warn_of_positions
from flap_stream.engine.device import cpu_threads, in_use
from flap_stream.engine.layer_pass import LayerPass
from flap_stream.engine.membership import joined
from flap_stream.engine.memory import give_back_heap, page_locked
from flap_stream.engine.placement import Job, landing_bytes
from flap_stream.engine.placement.prediction import Placement
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.progress import Progress, Stage, peak_device_bytes, peak_host_bytes
from flap_stream.stages.expert_loss import require_removable_experts
from flap_stream.stages.job_header import engine_rows, model_row
from flap_stream.stages.layer_statistics import Collection, layer_statistics
from flap_stream.stages.loss import collect_loss_scores, keep_inputs, require_inputs
from flap_stream.stages.loss_sizes import backward_job
from flap_stream.stages.measured import Measured
from flap_stream.stages.preparation import (
    manifest_contents,
    place_backward,
    place_collection,
    require_free_space,
    require_possible,
)
from flap_stream.stages.removable_layers import require_removable_layers
from flap_stream.stages.same_source import require_same_weights
from flap_stream.stages.session import Session, opened_model, opened_run
from flap_stream.storage.collected import LayerCost
from flap_stream.storage.loss import LossStore
from flap_stream.storage.run_directory import RunDirectory
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
        require_possible(model, options)
        progress.header({**model_row(source, len(model.layers)), "run directory": str(run)})
        if options.method != "magnitude-sp":
            progress.say("reading the calibration text")
        windows = ranks.from_first(lambda: _calibration_windows(model, options))
        samples, length = windows.tokens.shape
        give_back_heap()
        warn_of_positions(source.config, length)
        backward = backward_job(model, options, samples, length)
        if out is not None and ranks.is_first:
            require_free_space(model, options, windows.tokens.size, run, out, backward)
        placement = place_collection(model, options, windows, run, backward)
        measured.placement = placement
        if backward is not None:
            measured.placement = placement.together(place_backward(model, options, backward, placement))
        progress.header(engine_rows(model, measured.placement, samples, length))
        opened = opened_run(ranks, run, lambda: _begun_run(model, run, options, windows, placement.batch_size))
        directory = stack.enter_context(opened)
        if ranks.is_first:
            directory.record_promise(measured.placement.host_bytes, measured.placement.device_bytes)
        with cpu_threads(directory.manifest["threads"]):
            loss = None if backward is None else _loss_store(directory, backward, options)
            collect_statistics(model, directory, options, placement, progress, loss)
            if loss is not None and backward is not None:
                require_inputs(model, loss, placement, progress)
                placed = place_backward(model, options, backward, placement, loss)
                measured.placement = measured.placement.together(placed)
                collect_loss_scores(model, loss, placed, progress, options.snapshot_interval)
    measured.of_all(ranks, source.bytes_read)
    return directory, CollectResult(run, len(model.shapes), samples, length, measured)


def _loss_store(run: RunDirectory, backward: Job, options: CollectConfig) -> LossStore:
    return LossStore(run, backward.samples, options.whole_experts, options.depth)


def check_calibration(options: CollectConfig, model: str | Path) -> None:
    """Raise InvalidInput if the calibration text, where one is needed, cannot be read."""
    if options.method != "magnitude-sp":
        check_text(calibration_text(options), model)


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


def _begun_run(
    model: StreamedModel, run: Path, options: CollectConfig, windows: Windows, batch_size: int
) -> RunDirectory:
    """The run directory with its tokens stored, once the model's files have been compared with those recorded."""
    directory = RunDirectory.create(run, manifest_contents(model, options, windows, batch_size))
    try:
        if windows.tokens.size and not directory.tokens.exists():
            directory.tokens.write(windows.tokens)
        require_same_weights(model.checkpoint, directory)
    except BaseException:
        directory.close()
        raise
    return directory


def collect_statistics(
    model: StreamedModel,
    run: RunDirectory,
    options: CollectConfig,
    placement: Placement,
    progress: Progress,
    loss: LossStore | None = None,
) -> None:
    """Collect the statistics of all layers into the run directory, resuming where an earlier call stopped.

    Layers whose statistics are stored are not measured again; they are only run, from the newest snapshot on, to
    produce the next layer's input. All ranks of the model take part, each with its share of the windows; `run` is open
    for writing on rank 0. loss: where to keep the inputs of all layers for the backward pass; None if there is none.
    """
    first, count = run.statistics.complete_layers(), len(model.layers)
    with progress.stage("collect", count, device=model.device) as stage, torch.inference_mode():
        if first == count:
            stage.skip(count)
            if model.ranks.is_first:
                run.snapshots.drop()  # a kill may have come between the last layer and this
        elif options.method == "magnitude-sp":
            stage.skip(first)
            _collect_norms(model, run, range(first, count), placement.prefetch, stage)
        else:
            _collect_moments(model, run, options, placement, stage, loss)


def _collect_norms(model: StreamedModel, run: RunDirectory, layers: range, prefetch: int, stage: Stage) -> None:
    """Collect statistics of the weights; no layer is run."""
    costs = _Costs(0, model.device)
    with model.stream(layers, prefetch) as streamed:
        for i, weights in streamed:
            if model.ranks.is_first:
                _store(model, run, i, layer_statistics(model, i, weights, {}), costs)
            stage.advance(bytes_moved=model.layer_bytes(i))


def _collect_moments(
    model: StreamedModel,
    run: RunDirectory,
    options: CollectConfig,
    placement: Placement,
    stage: Stage,
    loss: LossStore | None,
) -> None:
    """Collect statistics of the weights and of what output projections read, while the windows run through."""
    ranks, first, tokens = model.ranks, run.statistics.complete_layers(), run.tokens.read()
    own = ranks.share(len(tokens), placement.batch_size)
    landing = 0 if model.device.type == "cpu" or ranks.world > 1 else landing_bytes(model.shapes, placement.batch_size)
    with (
        model.hidden_states(placement.hidden_place, len(own), tokens.shape[1], run.path) as hidden,
        page_locked(model.device, landing) as memory,
    ):
        batches = LayerPass(
            model,
            placement,
            tokens[own.start : own.stop],
            [hidden],
            stores=[run.snapshots],
            reductions=run.batch_reductions("collect"),
            windows=own,
        )
        collection, costs = Collection(batches, run, options, memory), _Costs(tokens.size, model.device)
        for i, weights in batches.layers(stage, first, options.snapshot_interval):
            if loss is not None:
                keep_inputs(batches, loss, i)
            if i < first:
                collection.repeat(i, weights)
                costs.of_layer()  # it has been recorded
            else:
                statistics = collection.measure(i, weights)
                if ranks.is_first:
                    _store(model, run, i, statistics, costs)
                if collection.hands_on_pruned:
                    collection.repeat(i, weights)
        if loss is not None:
            keep_inputs(batches, loss, len(model.layers))
        if ranks.is_first:
            run.snapshots.drop()


class _Costs:
    """Measures what each layer takes. tokens: the tokens that run through it, on `device`."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self._tokens, self._device, self._since = tokens, device, time.monotonic()

    def of_layer(self) -> LayerCost:
        """Time since the last call, and the peaks of memory so far."""
        before, self._since = self._since, time.monotonic()
        return LayerCost(self._since - before, self._tokens, peak_host_bytes(), peak_device_bytes(self._device))


def _store(model: StreamedModel, run: RunDirectory, index: int, statistics: LayerStatistics, costs: _Costs) -> None:
    """Store a layer's statistics, unless the model's files changed in the meantime."""
    model.checkpoint.require_unchanged()
    checksum = model.checkpoint.checksum(list(model.layer_entries[index].values()))
    run.statistics.write(index, statistics, checksum, costs.of_layer())
