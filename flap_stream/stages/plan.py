"""The plan: what is kept in every layer, decided from the run directory only."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from flap_stream.arithmetic.allocation import LayerKeep, allocate, require_minimum
from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.arithmetic.predicted_loss import PredictedRise, predicted_rise
from flap_stream.arithmetic.scoring import (
    LayerScores,
    as_sum_over_neurons,
    flap_scores,
    magnitude_scores,
    reap_scores,
    shortgpt_scores,
    wanda_scores,
    whole_expert_score,
)
from flap_stream.arithmetic.sizes import PrunedSizes, pruned_sizes
from flap_stream.arithmetic.targets import LayerPrices, Target
from flap_stream.config import PlanConfig, RewriteConfig, require_restoration
from flap_stream.config.rules import FED_ON, options_of
from flap_stream.config.values import option_name
from flap_stream.errors import InvalidOption, RunMismatch
from flap_stream.stages.targets import counts_of, run_target
from flap_stream.storage.loss import LossScores, LossStore
from flap_stream.storage.run_directory import RunDirectory

logger = logging.getLogger(__name__)

_BASELINES = {
    "wanda-sp": wanda_scores,
    "magnitude-sp": magnitude_scores,
    "reap": reap_scores,
    "shortgpt": shortgpt_scores,
}


@dataclass(frozen=True)
class PlanResult:
    """A plan: what is kept in every layer, and the resulting sizes.

    kv_groups, neurons: of each dense layer. left_whole: what of the layers loses nothing, in words.
    target: its name, its limit and what is reached; None with a ratio.
    predicted: the rise of the loss, for the metric fisher.
    """

    run: Path
    options: PlanConfig
    layers: list[LayerKeep] = field(repr=False)
    kv_groups: list[int] = field(repr=False)
    neurons: list[int] = field(repr=False)
    sizes: PrunedSizes
    left_whole: tuple[str, ...] = ()
    target: dict[str, Any] | None = None
    predicted: PredictedRise | None = None

    @property
    def decoder_ratio(self) -> float:
        """Removed share of the decoder layers' prunable weights."""
        return self.sizes.decoder_ratio

    @property
    def model_ratio(self) -> float:
        """Removed share of the whole model's parameters, net of added biases."""
        return self.sizes.model_ratio

    @property
    def parameters_before(self) -> int:
        """Parameters of the dense model."""
        return self.sizes.parameters_before

    @property
    def parameters_after(self) -> int:
        """Parameters of the pruned model, added biases included."""
        return self.sizes.parameters_after


def plan(run: str | Path, options: PlanConfig | None = None, **keywords: Any) -> PlanResult:
    """Decide what is kept, from the run directory only, and store the plan there for `rewrite`.

    keywords: the fields of `PlanConfig`, in place of `options`.
    Raises RunMismatch if the statistics do not fit the method, CorruptRun if they are incomplete or altered,
    InvalidOption if the ratio cannot be met.
    """
    options = options_of(PlanConfig, "plan", options, keywords)
    with RunDirectory(Path(run)) as directory:
        decided = store_plan(directory, decide(directory, options))
        return replace(decided, predicted=predictor(directory)(decided)) if is_by_loss(options) else decided


def decide(
    run: RunDirectory,
    options: PlanConfig,
    rewrite: RewriteConfig | None = None,
    read_scores: Callable[[], Sequence[LayerScores]] | None = None,
) -> PlanResult:
    """The plan that `plan` would store; nothing is stored.

    rewrite: how the checkpoint will be written, whose added biases and files are counted. read_scores: returns what
    `unit_scores` does, for several plans that are to read it once.
    """
    _require_fitting_statistics(run, options)
    if options.statistics == "released" and run.manifest.get("window_prefix"):
        logger.warning(
            "the windows of %s begin with BOS, those of the released code do not; collect with --bos never", run.path
        )
    shapes = run.layer_shapes
    require_minimum(shapes, options)
    rewrite = rewrite or RewriteConfig()
    target = run_target(run, options, rewrite)
    scores = unit_scores(run, options, target) if read_scores is None else read_scores()
    keeps = allocate(scores, shapes, options, target)
    restore = require_restoration(options.method, rewrite.restore)
    return PlanResult(
        run=run.path,
        options=options,
        layers=keeps,
        kv_groups=[shape.kv_groups for shape in shapes],
        neurons=[shape.neurons for shape in shapes],
        sizes=pruned_sizes(shapes, keeps, run.manifest["parameters"], restore),
        left_whole=tuple(run.manifest.get("left_whole", [])),
        target=None if target is None else target.record(counts_of(shapes, keeps)),
    )


def store_plan(run: RunDirectory, decided: PlanResult) -> PlanResult:
    """Store a plan in its run directory and return it. Raises InvalidOption if it removes nothing."""
    if decided.decoder_ratio == 0:
        raise InvalidOption(f"--ratio {decided.options.ratio} removes nothing from this model; raise it")
    run.plan.write(decided.options, decided.layers)
    return decided


def is_by_loss(options: PlanConfig) -> bool:
    """Whether the loss scores decide."""
    return options.method == "flap" and options.metric == "fisher"


def predictor(run: RunDirectory) -> Callable[[PlanResult], PredictedRise]:
    """A function that returns the rise of the loss that the run's loss scores predict for a plan.

    Raises RunMismatch if the run has none.
    """
    loss, tokens = LossStore.of(run), run.manifest["tokens"]["shape"][1]
    found = [loss.read(i) for i in range(len(run.layer_shapes))]
    losses = [LayerScores(own.attention, own.mlp, own.experts, _of_layer(own)) for own in found]
    return lambda plan: predicted_rise(losses, run.layer_shapes, plan.layers, tokens)


def unit_scores(run: RunDirectory, options: PlanConfig, target: Target | None = None) -> list[LayerScores]:
    """The scores of each layer's KV groups and neurons, float64 `[group]`, `[neuron]`; higher is better.

    target: of memory, in whose bytes the metric fisher counts the costs of units.
    Raises CorruptRun if the statistics are incomplete or altered.
    """
    if is_by_loss(options):
        loss = LossStore.of(run)
        _require_scored_experts(run, loss, options)
        _require_scored_layers(run, loss, options)
        prices = [LayerPrices(s.group_cost, s.neuron_cost, expert_rest=s.expert_rest) for s in run.layer_shapes]
        prices = list(target.prices) if target is not None and target.name == "target_memory" else prices
        found = [loss.read(i) for i in range(len(prices))]
        found = found if options.whole_experts else [replace(own, experts=None) for own in found]
        found = found if options.depth else [replace(own, layer=None) for own in found]
        least = options.min_neurons
        return [loss_scores(*own, least) for own in zip(found, run.layer_shapes, prices, strict=True)]
    scores = []
    for i, shape in enumerate(run.layer_shapes):
        statistics, channels = run.statistics.read(i), shape.heads_per_group * shape.head_dim
        if options.method == "flap":
            pair = flap_scores(statistics, options.metric, options.statistics, options.head_score, channels)
            _warn_of_unreached_experts(i, shape, statistics.mlp.count)
        else:
            pair = _BASELINES[options.method](statistics, channels)
        scores.append(pair)
    return scores


def loss_scores(found: LossScores, shape: LayerShape, prices: LayerPrices, min_neurons: int) -> LayerScores:
    """F of each unit and each expert by its cost, float64 `[group]`, `[neuron]`, `[expert]`; comparable across layers.

    So is F of the layer, which is not divided by its cost: that depends on which of its units go before.

    An expert that no token reached scores infinity and stays, with the least of neurons, which no token misses.
    prices: weights, or bytes, that are removed with one KV group, one neuron and, besides its neurons, one expert.
    """
    groups, neurons = found.attention / max(prices.group, 1), found.mlp / max(prices.neuron, 1)
    if found.experts is None or not shape.experts:
        return LayerScores(groups, neurons, found.experts, _of_layer(found))
    assert found.together is not None, "it is stored with the scores of experts"
    parts = np.split(found.mlp, np.cumsum(shape.experts)[:-1])
    losses = as_sum_over_neurons(found.experts, found.mlp, found.together)
    experts = [
        whole_expert_score(loss, own, prices.neuron, prices.expert_rest, min_neurons)
        for loss, own in zip(losses, parts, strict=True)
    ]
    return LayerScores(groups, neurons, np.array(experts))


def _of_layer(found: LossScores) -> float | None:
    return None if found.layer is None else float(found.layer[0])


def _require_scored_layers(run: RunDirectory, loss: LossStore, options: PlanConfig) -> None:
    """Raise RunMismatch if whole layers are to be removed, but the run does not know what they are worth."""
    if options.depth and not all(shape.elements for shape in run.layer_shapes):
        raise RunMismatch(f"{run.path} is of a version without whole layers; collect again, into a new directory")
    if options.depth and not loss.of_layers:
        raise RunMismatch(
            f"{run.path} holds no loss scores of whole layers; collect them with flap-stream collect MODEL {run.path} "
            f"--loss-windows {loss.windows} --depth"
        )


def _require_scored_experts(run: RunDirectory, loss: LossStore, options: PlanConfig) -> None:
    """Raise RunMismatch if whole experts are to be removed, but the run does not know what they are worth."""
    if not options.whole_experts:
        return
    if any(shape.experts and not shape.router_needs for shape in run.layer_shapes):
        raise RunMismatch(f"{run.path} is of a version without whole experts; collect again, into a new directory")
    if not loss.of_experts:
        raise RunMismatch(
            f"{run.path} holds no loss scores of whole experts; collect them with flap-stream collect MODEL {run.path} "
            f"--loss-windows {loss.windows} --whole-experts"
        )


def _require_fitting_statistics(run: RunDirectory, options: PlanConfig) -> None:
    """Raise RunMismatch if the statistics were collected for a method or ratio that does not fit the options."""
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


def _warn_of_unreached_experts(layer: int, shape: LayerShape, counts: np.ndarray) -> None:
    """Name the experts that no token reached: without statistics, they are kept whole.

    counts: int64 `[neuron]`, tokens behind each neuron's statistics.
    """
    parts = np.split(counts, np.cumsum(shape.experts)[:-1]) if shape.experts else []
    unreached = [str(number) for number, part in enumerate(parts) if len(part) and part.max() == 0]
    if unreached:
        logger.warning(
            "no calibration token reached experts %s of layer %d; they are kept whole", ", ".join(unreached), layer
        )
