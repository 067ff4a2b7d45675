"""One collection, many ratios: the size and perplexity at each, measured in one reading of the model."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flap_stream.arithmetic.predicted_loss import PredictedRise
from flap_stream.config import PlanConfig, RewriteConfig, SweepConfig, part_of, require_restoration
from flap_stream.config.rules import options_of, warn_of_positions
from flap_stream.engine.device import in_use
from flap_stream.engine.layer_pass import LayerPass
from flap_stream.engine.placement.prediction import Placement
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import InvalidOption
from flap_stream.model.opening import open_checkpoint
from flap_stream.progress import Progress, peak_device_bytes, peak_host_bytes
from flap_stream.stages.evaluate import perplexity_of, score_outputs, windows_of
from flap_stream.stages.job_header import engine_rows, model_row
from flap_stream.stages.masked_layers import Decision, masked, mending
from flap_stream.stages.plan import PlanResult, decide, is_by_loss, predictor, unit_scores
from flap_stream.stages.same_source import require_model_of
from flap_stream.storage import files
from flap_stream.storage.loss import LossStore
from flap_stream.storage.plan import recorded_options
from flap_stream.storage.run_directory import RunDirectory
from flap_stream.storage.run_manifest import tokens_digest
from flap_stream.storage.snapshots import SnapshotStore
from flap_stream.storage.sweeps import POINT
from flap_stream.text.windows import check_text, evaluation_text

logger = logging.getLogger(__name__)

_SAME_RATIO = 1e-9  # above the float error of a difference of ratios, below their sixth digit


@dataclass(frozen=True)
class SweepPoint:
    """The result at one ratio.

    decoder_ratio, model_ratio: see `PlanResult`. parameters: those left. perplexity: None if it was not measured.
    predicted: the rise of the loss; None unless it was asked for.
    """

    ratio: float
    decoder_ratio: float
    model_ratio: float
    parameters: int
    perplexity: float | None
    predicted: PredictedRise | None = None

    def __repr__(self) -> str:
        """With significant digits only."""
        measured = "" if self.perplexity is None else f", perplexity={self.perplexity:.4f}"
        return f"SweepPoint(ratio={self.ratio:g}, removed={self.decoder_ratio:.2%}{measured})"


@dataclass(frozen=True)
class Limit:
    """The largest ratio found whose perplexity exceeds the dense model's by at most a given share.

    increase: that share. perplexity: the limit. ratio: None if even the smallest ratio tried exceeds the limit.
    is_last: whether no larger ratio was tried.
    """

    increase: float
    perplexity: float
    resolution: float
    ratio: float | None
    is_last: bool


@dataclass(frozen=True)
class SweepResult:
    """Points in order of ratio, including those from the search for the limit, and what this call took."""

    run: Path
    restore: str
    parameters: int
    dense_perplexity: float | None
    points: list[SweepPoint]
    limit: Limit | None
    windows: int
    sequence_length: int
    seconds: float
    bytes_read: int
    peak_host_bytes: int
    peak_device_bytes: int


def sweep(
    run: str | Path,
    options: SweepConfig | None = None,
    *,
    model: str | Path | None = None,
    progress: Progress | bool | None = None,
    **keywords: Any,
) -> SweepResult:
    """Plan many ratios from the run directory and, with `options.evaluate`, measure the perplexity of each.

    With `options.predict`, predict the rise of the loss from the loss scores, without the model.

    The stored plan is not changed. The model is read once if the hidden states of all ratios fit into memory, otherwise
    a few times. Perplexities are stored in the run directory as soon as they are known, so that a repeated call
    resumes.
    model: where the dense model is now, if it was moved since `collect`. progress: True shows it on stderr.
    keywords: the fields of `SweepConfig`, in place of `options`.
    Raises what `plan`, `rewrite` and `evaluate` would.
    """
    options = options_of(SweepConfig, "sweep", options, keywords)
    started, progress = time.monotonic(), Progress.of(progress)
    restore = require_restoration(options.method, options.restore)
    with RunDirectory(Path(run)) as directory:
        plan_at = _planner(directory, options, restore)
        plans = [plan_at(ratio) for ratio in options.ratios]
        if not options.evaluate:
            points = [_point(plan, None) for plan in plans]
            return _result(directory, restore, _predicted(directory, options, points, plan_at), started)
        place = model or directory.manifest["source"]
        check_text(evaluation_text(options.evaluate, options.samples, options.sequence_length, options), place)
        with open_checkpoint(place) as source, torch.inference_mode(), ExitStack() as opened:
            require_model_of(directory, source)
            streamed = StreamedModel(source, options)
            opened.enter_context(in_use(streamed.device))
            progress.header({**model_row(source, len(streamed.layers)), "run directory": str(run)})
            curve = _Curve(directory, streamed, options, restore, progress, plan_at)
            warn_of_positions(source.config, curve.tokens.shape[1])
            curve.measure(plans)
            increase = options.max_perplexity_increase
            limit = None if increase is None else curve.find_limit(increase, options.resolution)
            return replace(
                _result(directory, restore, _predicted(directory, options, curve.seen(), plan_at), started),
                dense_perplexity=curve.dense,
                limit=limit,
                windows=len(curve.tokens),
                sequence_length=curve.tokens.shape[1],
                bytes_read=source.bytes_read,
                peak_device_bytes=peak_device_bytes(streamed.device),
            )


def _plan_options(options: SweepConfig, ratio: float) -> PlanConfig:
    return part_of(options, PlanConfig, ratio=ratio)


def _planner(run: RunDirectory, options: SweepConfig, restore: str) -> Callable[[float], PlanResult]:
    """A function that returns the plan at a ratio; scores are read once."""
    read = cache(lambda: unit_scores(run, _plan_options(options, options.ratios[0])))
    rewrite = RewriteConfig(restore=restore)
    return lambda ratio: decide(run, _plan_options(options, ratio), rewrite, read)


def _predicted(
    run: RunDirectory, options: SweepConfig, points: list[SweepPoint], plan_at: Callable[[float], PlanResult]
) -> list[SweepPoint]:
    """The points with the predicted rise of the loss, if that was asked for."""
    if not options.predict:
        return points
    predict = predictor(run)
    return [replace(point, predicted=predict(plan_at(point.ratio))) for point in points]


def _point(plan: PlanResult, perplexity: float | None) -> SweepPoint:
    return SweepPoint(plan.options.ratio, plan.decoder_ratio, plan.model_ratio, plan.parameters_after, perplexity)


def _within(point: SweepPoint, most: float) -> bool:
    assert point.perplexity is not None
    return point.perplexity <= most


def _result(run: RunDirectory, restore: str, points: list[SweepPoint], started: float) -> SweepResult:
    return SweepResult(
        run=run.path,
        restore=restore,
        parameters=run.manifest["parameters"],
        dense_perplexity=None,
        points=points,
        limit=None,
        windows=0,
        sequence_length=0,
        seconds=time.monotonic() - started,
        bytes_read=0,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=0,
    )


class _Curve:
    """Perplexities by ratio for one model, text and set of plan options, kept in the run directory."""

    def __init__(
        self,
        run: RunDirectory,
        model: StreamedModel,
        options: SweepConfig,
        restore: str,
        progress: Progress,
        plan_at: Callable[[float], PlanResult],
    ) -> None:
        self._run, self._model, self._options, self._progress, self._plan_at = run, model, options, progress, plan_at
        self._mend = mending(restore, model, run, options.statistics)
        wanted = evaluation_text(options.evaluate, options.samples, options.sequence_length, options)
        self.tokens = windows_of(wanted, model, options)
        plan_options = _plan_options(options, options.ratios[0])
        decides = recorded_options(plan_options)
        del decides["ratio"]
        job: dict[str, Any] = {
            "options": decides,
            "restore": restore,
            "text": {"sha256": tokens_digest(self.tokens), "shape": list(self.tokens.shape)},
            "dtype": str(model.dtype),
            "device": model.device.type,
        }
        if is_by_loss(plan_options):
            job["loss"] = LossStore.of(run).job
        self._name = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]
        job["text"]["sources"] = [Path(source).name for source in options.evaluate]
        fresh: dict[str, Any] = {**job, "dense_perplexity": None, "points": []}
        stored = run.sweeps.read(self._name)
        self._body = fresh if stored is None else stored
        if self._body is fresh:
            same = ("text", "dtype", "device")
            alike = [curve for curve in run.sweeps.curves() if all(curve[key] == job[key] for key in same)]
            fresh["dense_perplexity"] = alike[-1]["dense_perplexity"] if alike else None
        self._seen: set[float] = set()

    @property
    def dense(self) -> float:
        """Perplexity of the dense model, once measured."""
        return self._body["dense_perplexity"]

    def seen(self) -> list[SweepPoint]:
        """The points measured or looked up in this call, in order of ratio."""
        known = [SweepPoint(**{name: point[name] for name in POINT}) for point in self._body["points"]]
        return [point for point in known if point.ratio in self._seen]

    def measure(self, plans: Sequence[PlanResult]) -> None:
        """Measure the perplexities of the dense model and of plans that are not known yet."""
        self._seen |= {plan.options.ratio for plan in plans}
        known = {point["ratio"] for point in self._body["points"]}
        missing: list[PlanResult | None] = [plan for plan in plans if plan.options.ratio not in known]
        if self._body["dense_perplexity"] is None:
            missing.insert(0, None)
        if not missing:
            return
        group, placement = _group(self._model, self._options, self.tokens, len(missing), self._run.path)
        count, length = self.tokens.shape
        self._progress.header(engine_rows(self._model, placement, group * count, length))
        readings = range(0, len(missing), group)
        with self._progress.job([("sweep", 1.0)] * len(readings)):
            for first in readings:
                for plan, perplexity in self._perplexities(missing[first : first + group], placement):
                    self._take(plan, perplexity)
                self._run.sweeps.write(self._name, self._body)

    def _take(self, plan: PlanResult | None, perplexity: float) -> None:
        """Record one perplexity; without a plan it is the dense model's."""
        if plan is None:
            self._body["dense_perplexity"] = perplexity
        else:
            point = asdict(_point(plan, perplexity))
            points = [*self._body["points"], {name: point[name] for name in POINT}]
            self._body["points"] = sorted(points, key=lambda point: point["ratio"])

    def find_limit(self, increase: float, resolution: float) -> Limit:
        """Bisect between the largest measured ratio within the limit and the next larger one."""
        most, measured = self.dense * (1 + increase), self.seen()
        found = low = max((point.ratio for point in measured if _within(point, most)), default=0.0)
        high = min((point.ratio for point in measured if point.ratio > low), default=None)
        is_last = high is None
        while high is not None and high - low > resolution + _SAME_RATIO:
            middle = round((low + high) / 2, 6)
            try:
                plan = self._plan_at(middle)
            except InvalidOption:  # the ratio is too small for this rounding or these options
                low = middle
                continue
            self.measure([plan])
            if next(_within(point, most) for point in self.seen() if point.ratio == middle):
                found = low = middle
            else:
                high = middle
        return Limit(increase, most, resolution, found or None, is_last)

    def _perplexities(
        self, plans: Sequence[PlanResult | None], placement: Placement
    ) -> list[tuple[PlanResult | None, float]]:
        decisions = [None if plan is None else Decision(plan.layers, self._mend) for plan in plans]
        ratios = [0.0 if plan is None else plan.options.ratio for plan in plans]
        store = self._run.sweeps.snapshots(f"{self._name} {ratios} {placement.batch_size}")
        found = perplexities(self._model, self.tokens, decisions, placement, store, self._progress)
        self._model.checkpoint.require_unchanged()
        return list(zip(plans, found, strict=True))


def perplexities(
    model: StreamedModel,
    tokens: np.ndarray,
    decisions: Sequence[Decision | None],
    placement: Placement,
    store: SnapshotStore,
    progress: Progress,
) -> list[float]:
    """Perplexity of each decision, None being the dense model; each layer is read once.

    tokens: int64 `[sample, token]`. placement: for these windows once per decision. store: where snapshots of all
    hidden states are kept, from which an interrupted call resumes.
    """
    count, batch = len(tokens), placement.batch_size
    shares = [range(i * count, (i + 1) * count) for i in range(len(decisions))]  # windows of each decision
    with (
        model.hidden_states(
            placement.hidden_place, len(decisions) * count, tokens.shape[1], store.directory.parent
        ) as hidden,
        progress.stage("sweep", len(model.layers), device=model.device) as stage,
    ):
        batches = LayerPass(model, placement, tokens, [hidden], stores=[store], copies=len(decisions))
        for i, weights in batches.layers(stage):
            for decision, windows in zip(decisions, shares, strict=True):
                if decision is not None and decision.keeps[i].is_gone:
                    batches.pass_on(windows)
                    continue
                with masked(model, i, weights, decision) as own:
                    batches.run_all(i, own, windows=windows)
            hidden.advance()
        logits_of = model.head()
        scores = (score_outputs(model, logits_of, hidden.stream(batch, w), tokens)[0] for w in shares)
        found = [perplexity_of(score) for score in scores]
    store.drop()
    return found


def _group(
    model: StreamedModel, options: SweepConfig, tokens: np.ndarray, count: int, directory: Path
) -> tuple[int, Placement]:
    """How many of `count` decisions to measure per reading of the model, and how to run them.

    All together if their hidden states fit into memory; otherwise whatever moves the fewest bytes: reading the model
    again, or writing hidden states to disk and reading them back at every layer.
    """
    candidates: list[tuple[int, int, Placement]] = []
    for passes in range(1, count + 1):
        group = -(-count // passes)
        if any(group == known for _, known, _ in candidates):
            continue
        placement = model.place(options, model.job(group * len(tokens), tokens.shape[1], head=True))
        window_bytes = tokens.shape[1] * model.skeleton.state.width * model.dtype.itemsize
        layers_bytes = sum(model.layer_bytes(i) for i in range(len(model.layers)))
        moved = passes * layers_bytes
        if placement.hidden_place == "disk":
            hidden_bytes = len(tokens) * window_bytes
            moved += 2 * len(model.layers) * count * hidden_bytes
            if group > 1 and files.free_bytes(directory) < 2 * group * hidden_bytes:
                continue
        candidates.append((moved, group, placement))
        if placement.hidden_place != "disk":
            break
    _, group, placement = min(candidates, key=lambda candidate: candidate[0])
    if group < count:
        logger.info("the hidden states of %d ratios do not fit into memory; measuring %d at a time", count, group)
    return group, placement
