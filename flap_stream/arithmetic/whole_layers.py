"""Which layers are removed as a whole."""

from collections.abc import Callable, Sequence
from math import ceil

import numpy as np

from flap_stream.arithmetic.layer_shape import LayerShape, Sublayer
from flap_stream.arithmetic.scoring import LayerScores
from flap_stream.config import PlanConfig
from flap_stream.errors import InvalidOption

_SAME_SHARE = 1e-9  # above the float error of a sum of shares


def layers_of_least_influence(
    scores: Sequence[LayerScores], shapes: Sequence[LayerShape], options: PlanConfig
) -> list[int]:
    """`shortgpt`: the layers that score lowest, as many as do not exceed the ratio, worst first.

    At least one stays, and so do layers without prunable weights, of which the ratio counts nothing.
    Raises InvalidOption if the first to go alone exceeds it.
    """
    order = _ordered([own.layer or 0.0 for own in scores], shapes)
    shares = np.cumsum([shapes[number].prunable for number in order]) / sum(shape.prunable for shape in shapes)
    if not order:
        raise InvalidOption("--method shortgpt removes whole layers, of which the model has one only; use another")
    count = int(np.count_nonzero(shares <= options.ratio + _SAME_SHARE))
    if not count:
        needed = ceil(shares[0] * 10_000) / 10_000
        raise InvalidOption(
            f"--ratio {options.ratio} removes no layer: the first to go has {needed} of the "
            "prunable weights; raise the ratio to that at least"
        )
    return order[:count]


def layers_by_loss(
    scores: Sequence[LayerScores],
    shapes: Sequence[LayerShape],
    options: PlanConfig,
    loss_without: Callable[[list[int], float], float],
) -> tuple[list[int], float]:
    """`--depth`: the layers that are worth less than the units which would go in their place, in the order of
    `whole_layer_score`.

    Returns them, and the share of the others' prunable weights that their units have to lose.
    loss_without: the predicted rise of the loss without these layers, and of the others without so large a share of
    their units; infinite where these must stay. It falls from layer to layer as long as the next one costs less by
    weight than the units at the cut, and rises after.
    """
    of_layers = [whole_layer_score(own, shape, options) for own, shape in zip(scores, shapes, strict=True)]
    order, total = _ordered(of_layers, shapes), sum(shape.prunable for shape in shapes)
    best: tuple[list[int], float] = [], options.ratio
    least = loss_without(*best)
    for count in range(1, len(order) + 1):
        gone = order[:count]
        share = 1 - (1 - options.ratio) * total / (total - sum(shapes[number].prunable for number in gone))
        if share < -_SAME_SHARE:  # the layers alone exceed the ratio
            break
        found = loss_without(gone, max(share, 0.0))
        if found < least:
            best, least = (gone, max(share, 0.0)), found
        elif np.isfinite(least):
            break
    return best


def whole_layer_score(scores: LayerScores, shape: LayerShape, options: PlanConfig) -> float:
    """F of a whole layer by what is removed with it, once its units are gone for which that costs less.

    It is to the layer what `whole_expert_score` is to an expert: the most that (F_layer - sum of F_u of those gone) /
    (weights of what is left) can be, units going in their order.
    scores: F of each unit by its cost, and F of the layer.
    """
    assert scores.layer is not None
    removable, costs = [], []
    for sublayer in Sublayer:
        own, cost = scores.of(sublayer), shape.unit_cost(sublayer)
        least, ends = ceil(options.min_heads / shape.heads_per_group), [len(own)]
        if sublayer is Sublayer.MLP:
            least, ends = options.min_neurons, np.cumsum(shape.experts).tolist() or ends
            least = max(least, 1) if shape.experts else least
        for part in np.split(own, ends[:-1]):  # each expert keeps its minimum
            removable.append(np.sort(part)[: max(len(part) - least, 0)])
            costs.append(np.full(len(removable[-1]), cost))
    values, weights = np.concatenate(removable), np.concatenate(costs)
    order = np.argsort(values, kind="stable")
    loss = scores.layer - np.concatenate([[0.0], np.cumsum((values * weights)[order])])
    left = shape.prunable - np.concatenate([[0], np.cumsum(weights[order])])
    return float((loss / np.maximum(left, 1)).max())


def _ordered(values: Sequence[float], shapes: Sequence[LayerShape]) -> list[int]:
    """The layers that may go, by their values: those with prunable weights, but for the best where that is all."""
    order = [int(i) for i in np.argsort(np.array(values), kind="stable") if shapes[i].prunable]
    return order[: len(shapes) - 1]
