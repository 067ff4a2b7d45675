"""The decision: from scores to the KV groups and neurons that stay. Pure numpy, seconds for 80 layers of 65B."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, gcd, lcm

import numpy as np

from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.config import FAST_MULTIPLE, PlanConfig
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
    """Units, or blocks of them, that compete in one sort. All arrays are `[unit]`.

    layer, unit: where each stands; is_group: whether it is a KV group. size: units in each. module: ascending number of
    what it belongs to, the attention or the MLP of a layer, or an expert.
    """

    score: np.ndarray
    cost: np.ndarray
    size: np.ndarray
    layer: np.ndarray
    unit: np.ndarray
    is_group: np.ndarray
    module: np.ndarray

    @classmethod
    def of(cls, scores: Sequence[tuple[np.ndarray, np.ndarray]], shapes: Sequence[LayerShape]) -> "_Pool":
        """All KV groups in order of layers, then all neurons, as the released code concatenates them."""
        parts, module = [], 0
        for is_group in (True, False):
            for i, (pair, shape) in enumerate(zip(scores, shapes, strict=True)):
                score = pair[0] if is_group else pair[1]
                expected = shape.kv_groups if is_group else shape.neurons
                if len(score) != expected:
                    raise ShapeMismatch(f"layer {i} has {expected} units, but {len(score)} scores")
                cost = shape.group_cost if is_group else shape.neuron_cost
                modules = shape.experts if shape.experts and not is_group else (expected,)
                size = len(score)
                parts.append(
                    (
                        *(score, np.full(size, cost), np.ones(size, dtype=np.int64), np.full(size, i)),
                        *(np.arange(size), np.full(size, is_group, dtype=bool)),
                        np.repeat(np.arange(module, module + len(modules)), modules),
                    )
                )
                module += len(modules)
        return cls(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def modules(self) -> list[np.ndarray]:
        """Indices of the units of each module that has any."""
        starts = np.flatnonzero(np.diff(self.module)) + 1
        return np.split(np.arange(len(self.module)), starts) if len(self.module) else []


def allocate(
    scores: Sequence[tuple[np.ndarray, np.ndarray]], shapes: Sequence[LayerShape], options: PlanConfig
) -> list[LayerKeep]:
    """Decide for every layer which KV groups and neurons stay.

    scores: a layer's `[group]` and `[neuron]` scores, the better the higher.
    Raises InvalidOption if the ratio cannot be met without leaving a layer below its minimum, or with sizes so rounded.
    """
    if any(shape.experts for shape in shapes):
        _require_experts_suit(options)
    pool = _Pool.of(scores, shapes)
    keep = _keep_rounded(pool, shapes, options) if options.rounds else _keep_published(pool, shapes, options)
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


def _keep_published(pool: _Pool, shapes: Sequence[LayerShape], options: PlanConfig) -> np.ndarray:
    """The decision unit by unit, whatever the sizes; bool `[unit]`."""
    protected = _protected(pool, shapes, options)
    released = options.method == "flap" and options.statistics == "released"
    if options.structure == "al-am":
        budget = (1 - options.ratio) * pool.cost.sum()
        keep = _released_prefix(pool, shapes, options) if released else _prefix(pool, protected, budget, options)
        return keep | protected
    if options.structure == "al-mm":
        return _remove_globally(pool, protected, shapes, options, released)
    return _remove_uniformly(pool, protected, shapes, options, released)


def _require_experts_suit(options: PlanConfig) -> None:
    """Raise InvalidOption for what is not defined with experts, each of which sees other tokens."""
    if options.tensor_parallel > 1:
        raise InvalidOption("experts are not divided among ranks here; leave out --tensor-parallel")
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
    for own in pool.modules():
        shape = shapes[pool.layer[own[0]]]
        if pool.is_group[own[0]]:
            least = ceil(options.min_heads / shape.heads_per_group)
        else:
            least = max(options.min_neurons, 1) if shape.experts else options.min_neurons
        ranked = own[np.argsort(-pool.score[own], kind="stable")]
        protected[ranked[np.cumsum(pool.size[ranked]) - pool.size[ranked] < least]] = True
    return protected


def _prefix(pool: _Pool, protected: np.ndarray, budget: float, options: PlanConfig) -> np.ndarray:
    """The prefix of the descending sort whose cost is nearest to the budget; bool `[unit]`.

    Protected units stand first, so that they are paid for out of the same budget.
    """
    order = np.lexsort((-pool.score, ~protected))
    spent = np.cumsum(pool.cost[order])
    length = int(np.argmin(np.abs(spent - budget))) + 1
    if length < protected.sum():
        rounding = f"{_rounding(options)}, " if options.rounds else ""
        needed = 1 - (1 - options.ratio) * spent[protected.sum() - 1] / budget
        raise InvalidOption(
            f"--ratio {options.ratio} would take what must stay (--min-heads {options.min_heads}, --min-neurons "
            f"{options.min_neurons}, {rounding}experts that no token reached), which allows a ratio of at most "
            f"{needed:.4f}"
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


def _rounding(options: PlanConfig) -> str:
    """The rounding in force, as messages name it."""
    multiples = {
        "--round-heads-to": options.round_heads_to,
        "--round-neurons-to": options.neuron_multiple,
        "--tensor-parallel": options.tensor_parallel,
    }
    return ", ".join(f"{name} {multiple}" for name, multiple in multiples.items() if multiple > 1)


def _keep_rounded(pool: _Pool, shapes: Sequence[LayerShape], options: PlanConfig) -> np.ndarray:
    """The decision among blocks of units, so that what stays is a multiple of a block in every module; bool `[unit]`.

    A block scores the mean of its units and costs their sum. The budget is that of all units.
    """
    block_of, blocks = _blocks(pool, shapes, options)
    protected = _protected(blocks, shapes, options)
    if options.structure == "al-am":
        budget = (1 - options.ratio) * pool.cost.sum()
        _require_enough_blocks(blocks, budget, options)
        keep = _prefix(blocks, protected, budget, options)
    else:
        scopes = [range(len(shapes))] if options.structure == "al-mm" else [range(i, i + 1) for i in range(len(shapes))]
        keep = protected.copy()
        for layers in scopes:
            _keep_counts(keep, blocks, layers, shapes, options)
    return (block_of >= 0) & keep[block_of]


def _blocks(pool: _Pool, shapes: Sequence[LayerShape], options: PlanConfig) -> tuple[np.ndarray, _Pool]:
    """The block of each unit, int64 `[unit]`, -1 for what goes in any case; and the blocks.

    Units are ranked in each module and cut into blocks of a step. What is left over, the worst, goes before anything
    else, and in any case if the size that was asked for forbids that all stay.
    """
    block_of, count = np.full(len(pool.score), -1), 0
    left_over: list[int] = []  # blocks
    for own in pool.modules():
        step, asked = _steps(int(pool.layer[own[0]]), shapes, bool(pool.is_group[own[0]]), len(own), options)
        whole = len(own) // step
        stays = len(own) if len(own) % step % asked == 0 else whole * step
        ranked = own[np.argsort(-pool.score[own], kind="stable")]
        block_of[ranked[:stays]] = count + np.arange(stays) // step
        count += -(-stays // step)
        if whole and stays > whole * step:
            left_over.append(count - 1)
    own = np.flatnonzero(block_of >= 0)
    own = own[np.argsort(block_of[own], kind="stable")]
    size = np.bincount(block_of[own], minlength=count)
    first = own[np.cumsum(size) - size]
    score = np.add.reduceat(pool.score[own], np.cumsum(size) - size) / size if count else np.zeros(0)
    score[left_over] = np.where(np.isposinf(score[left_over]), np.inf, -np.inf)
    blocks = _Pool(
        score=score,
        cost=pool.cost[first] * size,
        size=size,
        **{name: getattr(pool, name)[first] for name in ("layer", "unit", "is_group", "module")},
    )
    return block_of, blocks


def _steps(
    layer: int, shapes: Sequence[LayerShape], is_group: bool, units: int, options: PlanConfig
) -> tuple[int, int]:
    """How many units of a module stay or go together, and what their number must be a multiple of in any case.

    Beside what was asked for, every width (of a rank, with `tensor_parallel`) is to be a multiple of `FAST_MULTIPLE`,
    which a module may miss only whole.
    """
    shape, ranks = shapes[layer], options.tensor_parallel
    if is_group:
        asked = lcm(options.round_heads_to // gcd(options.round_heads_to, shape.heads_per_group), ranks)
        fast = FAST_MULTIPLE // gcd(FAST_MULTIPLE, shape.head_dim)
        step = lcm(asked, fast * ranks) if options.neuron_multiple > 1 else asked
    elif options.neuron_multiple == FAST_MULTIPLE:
        asked, step = ranks, FAST_MULTIPLE * ranks
    else:
        asked = step = lcm(options.neuron_multiple, ranks)
    if units < step and units % asked:
        name = "KV groups" if is_group else "neurons"
        raise InvalidOption(
            f"layer {layer} has {units} {name}, but --round-heads-to, --round-neurons-to and --tensor-parallel ask for "
            f"a multiple of {asked}; lower them"
        )
    return step, asked


def _require_enough_blocks(pool: _Pool, budget: float, options: PlanConfig) -> None:
    most = pool.cost.sum()
    if budget > most + pool.cost.max():
        least = 1 - (1 - options.ratio) * most / budget
        raise InvalidOption(
            f"sizes so rounded remove at least {least:.4f} of the weights, more than --ratio {options.ratio}; raise it "
            "or round to smaller multiples"
        )


def _keep_counts(
    keep: np.ndarray, blocks: _Pool, layers: range, shapes: Sequence[LayerShape], options: PlanConfig
) -> None:
    """Mark the best blocks of these layers together: as many KV groups as the structure says, neurons for the rest.

    keep: bool `[block]`, True where a block is protected.
    """
    here = (blocks.layer >= layers.start) & (blocks.layer < layers.stop)
    dense, is_uniform = [shapes[i] for i in layers], options.structure == "ul-um"
    groups = sum(shape.kv_groups for shape in dense)
    removed = options.ratio * groups
    if not is_uniform:
        removed = (options.remove_heads or 0) * len(layers) // len(shapes) // dense[0].heads_per_group
        _neurons_to_remove(dense, int(removed), options)
    budget = (1 - options.ratio) * sum(shape.prunable for shape in dense)
    for is_group in (True, False):
        own = np.flatnonzero(here & (blocks.is_group == is_group))
        ranked = own[np.lexsort((-blocks.score[own], ~keep[own]))]
        spent = np.concatenate([[0], np.cumsum((blocks.size if is_group else blocks.cost)[ranked])])
        wanted, least = int(np.argmin(np.abs(spent - (groups - removed if is_group else budget)))), int(keep[own].sum())
        if wanted < least and not (is_group and is_uniform):
            kind, option = ("KV groups", "--min-heads") if is_group else ("neurons", "--min-neurons")
            raise InvalidOption(
                f"--ratio {options.ratio} with {options.structure} and sizes so rounded ({_rounding(options)}) leaves "
                f"fewer {kind} than {option} asks for; lower the ratio"
            )
        best = ranked[: max(wanted, least)]
        keep[best] = True
        budget -= blocks.cost[best].sum()
