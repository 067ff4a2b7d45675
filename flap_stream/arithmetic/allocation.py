"""The decision: from scores to the KV groups and neurons that are kept. Pure numpy, seconds for 80 layers of 65B."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from flap_stream.arithmetic.layer_shape import LayerShape, Sublayer
from flap_stream.arithmetic.rounded_allocation import keep_rounded, keep_rounded_to_target
from flap_stream.arithmetic.scoring import LayerScores
from flap_stream.arithmetic.targets import Target
from flap_stream.arithmetic.unit_pool import UnitPool, nearest_prefix, neurons_to_remove
from flap_stream.arithmetic.whole_layers import layers_by_loss, layers_of_least_influence
from flap_stream.config import PlanConfig
from flap_stream.config.options import removes_experts, removes_layers
from flap_stream.errors import InvalidOption

_NO_SHARE = 1e-9  # of weights: less is a float error


@dataclass(frozen=True)
class LayerKeep:
    """Units of one layer that are kept: ascending int64 indices into the dense model's.

    is_gone: whether the layer is removed as a whole, with all that belongs to no unit.
    """

    kv_groups: np.ndarray
    neurons: np.ndarray
    is_gone: bool = False

    def __repr__(self) -> str:
        """How many of each are kept."""
        if self.is_gone:
            return "LayerKeep(nothing)"
        return f"LayerKeep({len(self.kv_groups)} KV groups, {len(self.neurons)} neurons)"

    def of(self, sublayer: Sublayer) -> np.ndarray:
        """Those of one sublayer."""
        return self.kv_groups if sublayer == Sublayer.ATTENTION else self.neurons

    def cost(self, shape: LayerShape) -> int:
        """Weights that remain in the layer's pruned projections."""
        return len(self.kv_groups) * shape.group_cost + len(self.neurons) * shape.neuron_cost


def kept_layers(keeps: Sequence[LayerKeep]) -> list[int]:
    """Numbers of the layers that are not removed as a whole."""
    return [number for number, keep in enumerate(keeps) if not keep.is_gone]


def allocate(
    scores: Sequence[LayerScores], shapes: Sequence[LayerShape], options: PlanConfig, target: Target | None = None
) -> list[LayerKeep]:
    """Decide for every layer which KV groups and neurons are kept.

    target: what the pruned model may have at most, in place of the ratio.
    Raises InvalidOption if the ratio or the target cannot be met without leaving a layer below its minimum, or with
    this rounding, or if the dense model meets the target; ShapeMismatch if a layer has more or fewer scores than units.
    """
    if any(shape.experts for shape in shapes):
        _require_experts_suit(options)
    if removes_layers(options):
        return _without_layers(scores, shapes, options)
    pool = UnitPool.of(scores, shapes).without_last_experts(shapes, options)
    if target is not None:
        keep = _keep_to_target(pool, shapes, options, target)
    else:
        keep = (keep_rounded if _cuts_blocks(options) else _keep_published)(pool, shapes, options)
    kept = []
    for i in range(len(shapes)):
        here = keep & (pool.layer == i)
        kept.append(LayerKeep(*(pool.unit[here & pool.belongs_to(sublayer)] for sublayer in Sublayer)))
    return kept


def _without_layers(
    scores: Sequence[LayerScores], shapes: Sequence[LayerShape], options: PlanConfig
) -> list[LayerKeep]:
    """The decision where layers may go as a whole."""
    if options.method == "shortgpt":
        return _keep_but(layers_of_least_influence(scores, shapes, options), 0, scores, shapes, options)

    def loss_without(gone: list[int], share: float) -> float:
        try:
            keeps = _keep_but(gone, share, scores, shapes, options)
        except InvalidOption:  # units would go that must stay, as long as no more layers go in their place
            return np.inf
        return sum(map(_removed_loss, scores, shapes, keeps))

    gone, share = layers_by_loss(scores, shapes, options, loss_without)
    return _keep_but(gone, share, scores, shapes, options)


def _keep_but(
    gone: Sequence[int],
    share: float,
    scores: Sequence[LayerScores],
    shapes: Sequence[LayerShape],
    options: PlanConfig,
) -> list[LayerKeep]:
    """The decision without these layers, if the others lose this share of their prunable weights."""
    stay = [number for number in range(len(shapes)) if number not in gone]
    own = [shapes[number] for number in stay]
    if share > _NO_SHARE:
        plain = replace(options, ratio=share, depth=False)
        kept = dict(zip(stay, allocate([scores[number] for number in stay], own, plain), strict=True))
    else:
        kept = {n: LayerKeep(np.arange(s.kv_groups), np.arange(s.neurons)) for n, s in zip(stay, own, strict=True)}
    nothing = np.zeros(0, dtype=np.int64)
    return [kept.get(number, LayerKeep(nothing, nothing, is_gone=True)) for number in range(len(shapes))]


def _removed_loss(scores: LayerScores, shape: LayerShape, keep: LayerKeep) -> float:
    """Sum of F of what is removed of a layer. scores: F of each unit by its cost, and F of the layer."""
    if keep.is_gone:
        return scores.layer or 0.0
    total = 0.0
    for sublayer in Sublayer:
        values = scores.of(sublayer)
        total += shape.unit_cost(sublayer) * float(values.sum() - values[keep.of(sublayer)].sum())
    return total


def keep_in_layer(scores: LayerScores, shape: LayerShape, options: PlanConfig) -> LayerKeep:
    """The decision for a single layer, which the uniform structures allow."""
    return allocate([scores], [shape], options)[0]


def require_minimum(shapes: Sequence[LayerShape], options: PlanConfig) -> None:
    """Raise InvalidOption for a minimum that exceeds every layer of the model; a smaller layer just keeps all.

    So too for experts of a model without any.
    """
    heads = max(shape.kv_groups * shape.heads_per_group for shape in shapes)
    neurons = max(max(shape.experts, default=shape.neurons) for shape in shapes)
    experts = max(len(shape.experts) for shape in shapes)
    if removes_experts(options) and not experts:
        raise InvalidOption("--whole-experts and --method reap remove experts, but the model has none; leave them out")
    for option, least, most, name in (
        ("--min-heads", options.min_heads, heads, "query heads"),
        ("--min-neurons", options.min_neurons, neurons, "neurons"),
        ("--min-experts", options.min_experts or 0, experts, "experts"),
    ):
        if least > max(most, 1):
            raise InvalidOption(f"{option} is {least}, but no layer has more than {most} {name}; lower it")


def _require_experts_suit(options: PlanConfig) -> None:
    """Raise InvalidOption for what is not defined with experts, each of which sees other tokens."""
    if options.tensor_parallel > 1:
        raise InvalidOption("experts are not divided among ranks here; leave out --tensor-parallel")
    if options.method == "wanda-sp" or (options.method == "flap" and options.statistics == "released"):
        raise InvalidOption(
            "the released code does not support mixtures of experts; use --method flap with --statistics exact, or "
            "--method magnitude-sp"
        )


def _keep_to_target(pool: UnitPool, shapes: Sequence[LayerShape], options: PlanConfig, target: Target) -> np.ndarray:
    """The decision that meets a target and removes as little as it can; bool `[unit]`."""
    target.require_unmet()
    if options.structure == "al-am" and _cuts_blocks(options):
        return keep_rounded_to_target(pool, shapes, options, target)
    if options.structure == "al-am" and not _is_released(options):
        return target.prefix(pool, pool.protected(shapes, options), options)
    decide = keep_rounded if _cuts_blocks(options) else _keep_published
    plain = replace(options, target_parameters=None, target_size=None, target_memory=None, context=None, batch=None)
    return target.search(pool, lambda ratio: decide(pool, shapes, replace(plain, ratio=ratio), clips=True), options)


def _cuts_blocks(options: PlanConfig) -> bool:
    """Whether units are kept or removed in blocks: of rounded sizes, or because an expert has a minimum of neurons."""
    return options.whole_experts or (options.rounds and options.method != "reap")


# --- the published decision, unit by unit, without rounding ---


def _keep_published(
    pool: UnitPool, shapes: Sequence[LayerShape], options: PlanConfig, clips: bool = False
) -> np.ndarray:
    """The decision for each unit, whatever the sizes; bool `[unit]`.

    clips: a ratio that cannot be met is no error; as much is removed as can be, or as little as must be.
    """
    if options.method == "reap":
        return _remove_worst_experts(pool, shapes, options, clips)
    protected = pool.protected(shapes, options)
    if options.structure == "al-am":
        budget = (1 - options.ratio) * pool.cost.sum()
        if _is_released(options):
            return _released_prefix(pool, shapes, options) | protected
        return nearest_prefix(pool, protected, budget, options) | protected
    if options.structure == "al-mm":
        return _remove_globally(pool, protected, shapes, options, clips)
    return _remove_uniformly(pool, protected, shapes, options, clips)


def _is_released(options: PlanConfig) -> bool:
    """Whether ties and rounding are those of the released code."""
    return options.method == "flap" and options.statistics == "released"


def _released_prefix(pool: UnitPool, shapes: Sequence[LayerShape], options: PlanConfig) -> np.ndarray:
    """The released code's cut, decision for decision; bool `[unit]`.

    Source: lib/prune.py:383-393. A head's cost 512/3 is truncated when stored in an int64 tensor, the distance to the
    budget is taken in float32, and units that equal the score at the cut are removed too.
    """
    group_costs = np.array([shape.head_dim * (2 * shape.heads_per_group + 2) // 3 for shape in shapes])
    cost = np.where(pool.in_attention, group_costs[pool.layer], 1)
    order = np.argsort(-pool.score, kind="stable")
    budget = np.float32(cost.sum()) * np.float32(1 - options.ratio)
    cut = np.argmin(np.abs(np.cumsum(cost[order]).astype(np.float32) - budget))
    return pool.score > pool.score[order[cut]]


def _remove_globally(
    pool: UnitPool, protected: np.ndarray, shapes: Sequence[LayerShape], options: PlanConfig, clips: bool
) -> np.ndarray:
    """`al-mm`: the lowest KV groups of all layers are removed, and the lowest neurons of all; bool `[unit]`."""
    groups = (options.remove_heads or 0) // shapes[0].heads_per_group
    counts = {Sublayer.ATTENTION: groups, Sublayer.MLP: neurons_to_remove(shapes, groups, options, clips)}
    keep = np.ones(len(pool.score), dtype=bool)
    for sublayer, count in counts.items():
        own = np.flatnonzero(pool.belongs_to(sublayer))
        removable = len(own) - int(protected[own].sum())
        count = min(count, removable) if clips else count
        _require_left(count, removable, sublayer, "all layers together", options)
        lowest = own[np.lexsort((pool.score[own], protected[own]))[:count]]
        keep[lowest] = False
        if _is_released(options) and count:  # only what is strictly above the cut is kept: lib/prune.py:377 and 381
            cut = pool.score[own].take(np.argsort(pool.score[own])[count - 1])
            keep[own] = (pool.score[own] > cut) | protected[own]
    return keep


def _remove_uniformly(
    pool: UnitPool, protected: np.ndarray, shapes: Sequence[LayerShape], options: PlanConfig, clips: bool
) -> np.ndarray:
    """`ul-um`, `ul-mm`: every layer loses the same number of KV groups and of neurons; bool `[unit]`."""
    keep = np.ones(len(pool.score), dtype=bool)
    for i, shape in enumerate(shapes):
        if options.structure == "ul-um":
            groups = int(options.ratio * shape.kv_groups)
            neurons = int(options.ratio * shape.neurons) if shape.neuron_cost else 0
        else:
            groups = (options.remove_heads or 0) // len(shapes) // shape.heads_per_group
            neurons = neurons_to_remove([shape], groups, options, clips)
        for sublayer, count in ((Sublayer.ATTENTION, groups), (Sublayer.MLP, neurons)):
            own = np.flatnonzero((pool.layer == i) & pool.belongs_to(sublayer))
            removable = len(own) - int(protected[own].sum())
            count = min(count, removable) if clips else count
            _require_left(count, removable, sublayer, f"layer {i}", options)
            order = own[np.argsort(pool.score[own], kind="stable")]
            keep[order[:count]] = False
            if _is_released(options) and count < len(
                own
            ):  # ties with the score at the cut are kept: lib/prune.py:254 and 259
                keep[own] = pool.score[own] >= pool.score[order[count]]
    return keep


def _remove_worst_experts(pool: UnitPool, shapes: Sequence[LayerShape], options: PlanConfig, clips: bool) -> np.ndarray:
    """`reap`: every mixture loses its worst experts, as near as possible to the ratio; bool `[unit]`."""
    keep = np.ones(len(pool.score), dtype=bool)
    for i, shape in enumerate(shapes):
        own = pool.modules((pool.layer == i) & ~pool.in_attention) if shape.experts else []
        own.sort(key=lambda units: pool.whole[units[0]])
        removed = np.cumsum([0, *map(len, own)])
        counts = [n for n in range(len(own) + 1) if (len(own) - n) % options.expert_multiple == 0]
        count = min(counts, key=lambda n: abs(removed[n] - options.ratio * shape.neurons))
        most = sum(bool(np.isfinite(pool.whole[units[0]])) for units in own)
        if count > most and not clips:
            raise InvalidOption(
                f"--ratio {options.ratio} removes {count} of {len(own)} experts of layer {i}, but {len(own) - most} "
                "must stay (--min-experts, what its router chooses for a token, --round-experts-to); lower the ratio"
            )
        for units in own[: min(count, most)]:
            keep[units] = False
    return keep


def _require_left(count: int, removable: int, sublayer: Sublayer, where: str, options: PlanConfig) -> None:
    if count > removable:
        raise InvalidOption(
            f"--ratio {options.ratio} with {options.structure} removes {count} {sublayer.units} of {where}, but "
            f"{sublayer.minimum_option} leaves only {removable} to remove; lower the ratio"
        )
