"""The decision: from scores to the KV groups and neurons that stay. Pure numpy, seconds for 80 layers of 65B."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, gcd, lcm

import numpy as np

from flap_stream.architecture import LayerShape
from flap_stream.config import PlanConfig
from flap_stream.errors import InvalidOption, ShapeMismatch


@dataclass(frozen=True)
class LayerKeep:
    """Units of one layer that stay: ascending int64 indices into the dense model's."""

    kv_groups: np.ndarray
    neurons: np.ndarray

    def __repr__(self) -> str:
        """How many of each stay."""
        return f"LayerKeep({len(self.kv_groups)} KV groups, {len(self.neurons)} neurons)"

    def of(self, kind: str) -> np.ndarray:
        """Those of a kind of unit."""
        return self.kv_groups if kind == "attention" else self.neurons

    def cost(self, shape: LayerShape) -> int:
        """Weights that stay in the layer's pruned projections."""
        return len(self.kv_groups) * shape.group_cost + len(self.neurons) * shape.neuron_cost


@dataclass(frozen=True)
class _Pool:
    """Units that compete in one sort. All arrays are `[unit]`.

    layer, unit: where each stands; is_group: whether it is a KV group.
    """

    score: np.ndarray
    cost: np.ndarray
    layer: np.ndarray
    unit: np.ndarray
    is_group: np.ndarray

    @classmethod
    def of(cls, scores: Sequence[tuple[np.ndarray, np.ndarray]], shapes: Sequence[LayerShape]) -> "_Pool":
        """All KV groups in order of layers, then all neurons, as the released code concatenates them."""
        parts = []
        for is_group in (True, False):
            for i, (pair, shape) in enumerate(zip(scores, shapes, strict=True)):
                score = pair[0] if is_group else pair[1]
                expected = shape.kv_groups if is_group else shape.neurons
                if len(score) != expected:
                    raise ShapeMismatch(f"layer {i} has {expected} units, but {len(score)} scores")
                cost = shape.group_cost if is_group else shape.neuron_cost
                size = len(score)
                parts.append(
                    (score, np.full(size, cost), np.full(size, i), np.arange(size), np.full(size, is_group, dtype=bool))
                )
        return cls(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def subset(self, chosen: np.ndarray) -> "_Pool":
        return _Pool(*(column[chosen] for column in vars(self).values()))


def allocate(
    scores: Sequence[tuple[np.ndarray, np.ndarray]], shapes: Sequence[LayerShape], options: PlanConfig
) -> list[LayerKeep]:
    """Decide for every layer which KV groups and neurons stay.

    scores: a layer's `[group]` and `[neuron]` scores, the better the higher.
    Raises InvalidOption if the ratio cannot be met without leaving a layer below its minimum, or with sizes so rounded.
    """
    if any(shape.experts for shape in shapes):
        _require_experts_suit(options)
    if options.rounds:
        return _allocate_rounded(scores, shapes, options)
    pool = _Pool.of(scores, shapes)
    protected = _protected(pool, shapes, options)
    released = options.method == "flap" and options.statistics == "released"
    if options.structure == "al-am":
        budget = (1 - options.ratio) * pool.cost.sum()
        keep = _released_prefix(pool, shapes, options) if released else _prefix(pool, protected, budget, options)
        keep |= protected
    elif options.structure == "al-mm":
        keep = _remove_globally(pool, protected, shapes, options, released)
    else:
        keep = _remove_uniformly(pool, protected, shapes, options, released)
    kept = []
    for i in range(len(shapes)):
        here = keep & (pool.layer == i)
        kept.append(LayerKeep(pool.unit[here & pool.is_group], pool.unit[here & ~pool.is_group]))
    return kept


def require_minimum(shapes: Sequence[LayerShape], options: PlanConfig) -> None:
    """Raise InvalidOption for a minimum that no layer of the model can keep; a layer that has less keeps all."""
    heads = max(shape.kv_groups * shape.heads_per_group for shape in shapes)
    neurons = max(max(shape.experts, default=shape.neurons) for shape in shapes)
    for option, least, most, name in (
        ("--min-heads", options.min_heads, heads, "query heads"),
        ("--min-neurons", options.min_neurons, neurons, "neurons"),
    ):
        if least > max(most, 1):
            raise InvalidOption(f"{option} is {least}, but no layer has more than {most} {name}; lower it")


def _require_experts_suit(options: PlanConfig) -> None:
    """Raise InvalidOption for what is not defined with experts, each of which sees other tokens."""
    if options.rounds:
        raise InvalidOption("sizes of experts are not rounded; leave out --round-*-to and --tensor-parallel")
    if options.method == "wanda-sp" or (options.method == "flap" and options.statistics == "released"):
        raise InvalidOption(
            "the released code knows no experts; use --method flap with --statistics exact, or --method magnitude-sp"
        )


def keep_in_layer(scores: tuple[np.ndarray, np.ndarray], shape: LayerShape, options: PlanConfig) -> LayerKeep:
    """The decision for one layer by itself, which the uniform structures allow."""
    return allocate([scores], [shape], options)[0]


def _protected(pool: _Pool, shapes: Sequence[LayerShape], options: PlanConfig) -> np.ndarray:
    """The best-scored units of each layer, up to the minimum that stays in every layer; bool `[unit]`.

    Of experts, each keeps its minimum of neurons, one at least. What scores infinity, of which nothing is known, stays.
    """
    protected = np.isposinf(pool.score)
    for i, shape in enumerate(shapes):
        least_groups = ceil(options.min_heads / shape.heads_per_group)
        for is_group, least in ((True, least_groups), (False, options.min_neurons)):
            own = np.flatnonzero((pool.layer == i) & (pool.is_group == is_group))
            if shape.experts and not is_group:
                parts, least = np.split(own, np.cumsum(shape.experts)[:-1]), max(least, 1)
            else:
                parts = [own]
            for part in parts:
                protected[part[np.argsort(-pool.score[part], kind="stable")[:least]]] = True
    return protected


def _prefix(pool: _Pool, protected: np.ndarray, budget: float, options: PlanConfig) -> np.ndarray:
    """The prefix of the descending sort whose cost is nearest to the budget; bool `[unit]`.

    Protected units stand first, so that they are paid for out of the same budget.
    """
    order = np.lexsort((-pool.score, ~protected))
    spent = np.cumsum(pool.cost[order])
    length = int(np.argmin(np.abs(spent - budget))) + 1
    if length < protected.sum():
        needed = 1 - (1 - options.ratio) * spent[protected.sum() - 1] / budget
        raise InvalidOption(
            f"--ratio {options.ratio} would take what must stay (--min-heads {options.min_heads}, --min-neurons "
            f"{options.min_neurons}, experts that no token reached), which allows a ratio of at most {needed:.4f}"
        )
    keep = np.zeros(len(order), dtype=bool)
    keep[order[:length]] = True
    return keep


def _released_prefix(pool: _Pool, shapes: Sequence[LayerShape], options: PlanConfig) -> np.ndarray:
    """The released code's cut, decision for decision; bool `[unit]`.

    Source: lib/prune.py:383-393. A head's cost 512/3 lands in an int64 tensor and is truncated, the distance to the
    budget is taken in float32, and what equals the score at the cut goes too.
    """
    group_costs = np.array([shape.head_dim * (2 * shape.heads_per_group + 2) // 3 for shape in shapes])
    cost = np.where(pool.is_group, group_costs[pool.layer], 1)
    order = np.argsort(-pool.score, kind="stable")
    budget = np.float32(cost.sum()) * np.float32(1 - options.ratio)
    cut = np.argmin(np.abs(np.cumsum(cost[order]).astype(np.float32) - budget))
    return pool.score > pool.score[order[cut]]


def _remove_globally(
    pool: _Pool, protected: np.ndarray, shapes: Sequence[LayerShape], options: PlanConfig, released: bool
) -> np.ndarray:
    """`al-mm`: the lowest KV groups of all layers go, and the lowest neurons of all layers; bool `[unit]`."""
    groups = (options.remove_heads or 0) // shapes[0].heads_per_group
    keep = np.ones(len(pool.score), dtype=bool)
    for is_group, count in ((True, groups), (False, _neurons_to_remove(shapes, groups, options))):
        own = np.flatnonzero(pool.is_group == is_group)
        _require_left(count, len(own) - int(protected[own].sum()), is_group, "all layers together", options)
        lowest = own[np.lexsort((pool.score[own], protected[own]))[:count]]
        keep[lowest] = False
        if released and count:  # strictly greater stays: lib/prune.py:377 and 381
            keep[own] = (pool.score[own] > pool.score[own].take(np.argsort(pool.score[own])[count - 1])) | protected[
                own
            ]
    return keep


def _remove_uniformly(
    pool: _Pool, protected: np.ndarray, shapes: Sequence[LayerShape], options: PlanConfig, released: bool
) -> np.ndarray:
    """`ul-um`, `ul-mm`: the same number of KV groups and of neurons goes in every layer; bool `[unit]`."""
    keep = np.ones(len(pool.score), dtype=bool)
    for i, shape in enumerate(shapes):
        if options.structure == "ul-um":
            groups, neurons = int(options.ratio * shape.kv_groups), int(options.ratio * shape.neurons)
        else:
            groups = (options.remove_heads or 0) // len(shapes) // shape.heads_per_group
            neurons = _neurons_to_remove([shape], groups, options)
        for is_group, count in ((True, groups), (False, neurons)):
            own = np.flatnonzero((pool.layer == i) & (pool.is_group == is_group))
            _require_left(count, len(own) - int(protected[own].sum()), is_group, f"layer {i}", options)
            order = own[np.argsort(pool.score[own], kind="stable")]
            keep[order[:count]] = False
            if released and len(own):  # ties with the score at the cut stay: lib/prune.py:254 and 259
                keep[own] = pool.score[own] >= pool.score[order[count]]
    return keep


def _neurons_to_remove(shapes: Sequence[LayerShape], groups: int, options: PlanConfig) -> int:
    """Neurons that must go beside `groups` KV groups to meet the ratio in these layers together.

    Source: cal_remove_neuron, lib/prune.py:226-237, in its order of multiplication.
    """
    prunable = sum(shape.prunable for shape in shapes)
    group_cost, neuron_cost = (max(getattr(s, name) for s in shapes) for name in ("group_cost", "neuron_cost"))
    removed_cost = len(shapes) * options.ratio * (prunable / len(shapes))
    neurons = int((removed_cost - groups * group_cost) / neuron_cost)
    if neurons < 0:
        raise InvalidOption(
            f"--remove-heads {options.remove_heads} alone removes more than --ratio {options.ratio} of the weights; "
            "lower it or raise the ratio"
        )
    return neurons


def _require_left(count: int, removable: int, is_group: bool, where: str, options: PlanConfig) -> None:
    if count > removable:
        units, option = ("KV groups", "--min-heads") if is_group else ("neurons", "--min-neurons")
        raise InvalidOption(
            f"--ratio {options.ratio} with {options.structure} removes {count} {units} of {where}, but {option} leaves "
            f"only {removable} to remove; lower the ratio"
        )


def _allocate_rounded(
    scores: Sequence[tuple[np.ndarray, np.ndarray]], shapes: Sequence[LayerShape], options: PlanConfig
) -> list[LayerKeep]:
    """The decision among blocks of units, so that what stays is a multiple of a block in every layer.

    In each layer and kind the units are ranked and cut into blocks; a block scores the mean of its units and costs
    their sum. What does not fill a block, the worst, goes. The budget is that of all units.
    """
    steps = [_steps(i, shape, options) for i, shape in enumerate(shapes)]
    coarse = [
        replace(
            shape,
            kv_groups=shape.kv_groups // groups,
            heads_per_group=shape.heads_per_group * groups,
            group_cost=shape.group_cost * groups,
            neurons=shape.neurons // neurons,
            neuron_cost=shape.neuron_cost * neurons,
        )
        for shape, (groups, neurons) in zip(shapes, steps, strict=True)
    ]
    blocks = [
        (_block_means(pair[0], groups), _block_means(pair[1], neurons))
        for pair, (groups, neurons) in zip(scores, steps, strict=True)
    ]
    pool = _Pool.of(blocks, coarse)
    least_neurons = max(ceil(options.min_neurons / neurons) for _, neurons in steps)
    protected = _protected(pool, coarse, replace(options, min_neurons=least_neurons))
    if options.structure == "al-am":
        budget = (1 - options.ratio) * sum(shape.prunable for shape in shapes)
        _require_enough_blocks(pool, budget, options)
        keep = _prefix(pool, protected, budget, options)
    else:
        scopes = [range(len(shapes))] if options.structure == "al-mm" else [range(i, i + 1) for i in range(len(shapes))]
        keep = protected.copy()
        for layers in scopes:
            _keep_counts(keep, pool, layers, shapes, coarse, options)
    return [
        LayerKeep(
            *(
                np.sort(np.argsort(-score, kind="stable")[: step * int((keep & (pool.layer == i) & own).sum())])
                for score, step, own in zip(pair, steps[i], (pool.is_group, ~pool.is_group), strict=True)
            )
        )
        for i, pair in enumerate(scores)
    ]


def _steps(layer: int, shape: LayerShape, options: PlanConfig) -> tuple[int, int]:
    """How many KV groups, and how many neurons, stay or go together."""
    groups = options.round_heads_to // gcd(options.round_heads_to, shape.heads_per_group)
    steps = lcm(groups, options.tensor_parallel), lcm(options.round_neurons_to, options.tensor_parallel)
    for step, units, name in zip(steps, (shape.kv_groups, shape.neurons), ("KV groups", "neurons"), strict=True):
        if 0 < units < step:
            raise InvalidOption(
                f"layer {layer} has {units} {name}, but --round-heads-to, --round-neurons-to and --tensor-parallel ask "
                f"for a multiple of {step}; lower them"
            )
    return steps


def _block_means(score: np.ndarray, step: int) -> np.ndarray:
    """Mean scores `[block]` of the ranked units, those left over at the end not counted."""
    ranked = -np.sort(-score)
    return ranked[: len(score) // step * step].reshape(-1, step).mean(axis=1)


def _require_enough_blocks(pool: _Pool, budget: float, options: PlanConfig) -> None:
    most = pool.cost.sum()
    if budget > most + pool.cost.max():
        least = 1 - (1 - options.ratio) * most / budget
        raise InvalidOption(
            f"sizes so rounded remove at least {least:.4f} of the weights, more than --ratio {options.ratio}; raise it "
            "or round to smaller multiples"
        )


def _keep_counts(
    keep: np.ndarray,
    pool: _Pool,
    layers: range,
    shapes: Sequence[LayerShape],
    coarse: Sequence[LayerShape],
    options: PlanConfig,
) -> None:
    """Mark the best blocks of these layers together: as many KV groups as the structure says, neurons for the rest.

    keep: bool `[block]`, True where a block is protected.
    """
    here, first = (pool.layer >= layers.start) & (pool.layer < layers.stop), layers.start
    dense = [shapes[i] for i in layers]
    groups, head_groups = sum(shape.kv_groups for shape in dense), shapes[first].heads_per_group
    if options.structure == "ul-um":
        removed = options.ratio * groups
    else:
        removed = (options.remove_heads or 0) * len(layers) / len(shapes) / head_groups
    budget = (1 - options.ratio) * sum(shape.prunable for shape in dense)
    step = coarse[first].heads_per_group // head_groups
    for is_group, cost in ((True, coarse[first].group_cost), (False, coarse[first].neuron_cost)):
        own = np.flatnonzero(here & (pool.is_group == is_group))
        wanted = round((groups - removed) / step) if is_group else round(budget / max(cost, 1))
        least = int(keep[own].sum())
        if wanted < least:
            kind, option = ("KV groups", "--min-heads") if is_group else ("neurons", "--min-neurons")
            raise InvalidOption(
                f"--ratio {options.ratio} with {options.structure} and sizes so rounded leaves fewer {kind} than "
                f"{option} asks for; lower the ratio"
            )
        best = own[np.lexsort((-pool.score[own], ~keep[own]))[: max(wanted, 0)]]
        keep[best] = True
        budget -= len(best) * cost
