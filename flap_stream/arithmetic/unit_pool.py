"""The units of all layers as one table, from which the decision selects."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from flap_stream.arithmetic.layer_shape import LayerShape, Sublayer
from flap_stream.arithmetic.scoring import LayerScores
from flap_stream.config import PlanConfig
from flap_stream.errors import InvalidOption, ShapeMismatch


@dataclass(frozen=True)
class UnitPool:
    """Units, or blocks of them, that compete in one sort. All arrays are `[unit]`.

    layer, in_attention: the sublayer of each. unit: its index there, or that of a block's first unit. size: units in
    each. module: ascending number of what it belongs to: the attention or the MLP of a layer, or an expert. whole: the
    score of that module as a whole; infinite where it is not removed as one, -inf where it must be. experts: how many
    are kept or removed together in a module; 1 where it is none.
    """

    score: np.ndarray
    cost: np.ndarray
    size: np.ndarray
    layer: np.ndarray
    unit: np.ndarray
    in_attention: np.ndarray
    module: np.ndarray
    whole: np.ndarray
    experts: np.ndarray

    @classmethod
    def of(cls, scores: Sequence[LayerScores], shapes: Sequence[LayerShape]) -> "UnitPool":
        """All KV groups in order of layers, then all neurons, as the released code concatenates them.

        Raises ShapeMismatch if a layer has more or fewer scores than units.
        """
        parts, module = [], 0
        for sublayer in Sublayer:
            for i, (own, shape) in enumerate(zip(scores, shapes, strict=True)):
                score, size = own.of(sublayer), shape.units(sublayer)
                if len(score) != size:
                    raise ShapeMismatch(f"layer {i} has {size} {sublayer.units}, but {len(score)} scores for them")
                modules: tuple[int, ...] = (size,)
                whole = np.full(1, np.inf)
                if shape.experts and sublayer is Sublayer.MLP:
                    modules = shape.experts
                    whole = np.full(len(modules), np.inf) if own.experts is None else own.experts
                parts.append(
                    cls(
                        score=score if shape.unit_cost(sublayer) else np.full(size, np.inf),
                        cost=np.full(size, shape.unit_cost(sublayer)),
                        size=np.ones(size, dtype=np.int64),
                        layer=np.full(size, i),
                        unit=np.arange(size),
                        in_attention=np.full(size, sublayer is Sublayer.ATTENTION),
                        module=np.repeat(np.arange(module, module + len(modules)), modules),
                        whole=np.repeat(whole, modules),
                        experts=np.ones(size, dtype=np.int64),
                    )
                )
                module += len(modules)
        return cls(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in cls.__annotations__})

    def without_last_experts(self, shapes: Sequence[LayerShape], options: PlanConfig) -> "UnitPool":
        """The same, with each mixture's best experts, up to the minimum that it keeps, exempt from removal as a whole.

        So are experts that score infinity, of which nothing is known and which do not count towards the minimum: tokens
        may reach none of them. More of the best are exempted until the number of all is a multiple of
        `round_experts_to`; where that cannot be, the last experts of infinite score must be removed.
        Raises InvalidOption if a mixture has too few experts for that multiple.
        """
        whole = self.whole.copy()
        for i, shape in enumerate(shapes):
            own = self.modules((self.layer == i) & ~self.in_attention) if shape.experts else []
            own.sort(key=lambda units: -self.whole[units[0]] if np.isfinite(self.whole[units[0]]) else np.inf)
            known = sum(bool(np.isfinite(self.whole[units[0]])) for units in own)
            best, unknown = _experts_that_stay(i, shape, len(own) - known, options)
            for units in own[:best]:
                whole[units] = np.inf
            for units in own[known + unknown :]:
                whole[units] = -np.inf
        return replace(self, whole=whole)

    def belongs_to(self, sublayer: Sublayer) -> np.ndarray:
        """Which units are of attention, or of the MLP; bool `[unit]`."""
        return self.in_attention == (sublayer is Sublayer.ATTENTION)

    def sublayer_of(self, index: int) -> Sublayer:
        """The sublayer of one unit."""
        return Sublayer.ATTENTION if self.in_attention[index] else Sublayer.MLP

    def modules(self, among: np.ndarray | None = None) -> list[np.ndarray]:
        """Indices of the units of each module that has any. among: some of the units, bool `[unit]`; None is all."""
        units = np.arange(len(self.module)) if among is None else np.flatnonzero(among)
        starts = np.flatnonzero(np.diff(self.module[units])) + 1
        return np.split(units, starts) if len(units) else []

    def protected(self, shapes: Sequence[LayerShape], options: PlanConfig) -> np.ndarray:
        """The best-scored units of each module, up to the minimum that every layer keeps; bool `[unit]`.

        Each expert keeps its minimum of neurons, at least one, unless it may go as a whole. Units that score infinity,
        of which nothing is known, are protected too.
        """
        protected = np.isposinf(self.score)
        for own in self.modules():
            shape = shapes[self.layer[own[0]]]
            if self.in_attention[own[0]]:
                least = ceil(options.min_heads / shape.heads_per_group)
            else:
                least = max(options.min_neurons, 1) if shape.experts else options.min_neurons
            if np.isfinite(self.whole[own[0]]):
                least = 0
            ranked = own[np.argsort(-self.score[own], kind="stable")]
            protected[ranked[np.cumsum(self.size[ranked]) - self.size[ranked] < least]] = True
        return protected


def _experts_that_stay(layer: int, shape: LayerShape, unknown: int, options: PlanConfig) -> tuple[int, int]:
    """How many of a mixture's best experts stay in any case, and how many of the `unknown` ones, which score infinity.

    Raises InvalidOption if no multiple of what is asked for is as many as must stay.
    """
    count, multiple = len(shape.experts), options.expert_multiple
    least = min(max(options.min_experts or 0, shape.router_needs), count)
    most = count // multiple * multiple
    if most < least:
        raise InvalidOption(
            f"layer {layer} has {count} experts, of which at least {least} must stay, but --round-experts-to asks for "
            f"a multiple of {multiple}; lower it"
        )
    best = min(least, count - unknown)
    stay = min(ceil((best + unknown) / multiple) * multiple, most)
    best = max(best, stay - unknown)
    return best, stay - best


def nearest_prefix(pool: UnitPool, protected: np.ndarray, budget: float, options: PlanConfig) -> np.ndarray:
    """The prefix of the descending sort whose cost is nearest to the budget; bool `[unit]`.

    Protected units come first, so that the same budget pays for them.
    Raises InvalidOption if it is not enough for these.
    """
    order = np.lexsort((-pool.score, ~protected))
    spent = np.cumsum(pool.cost[order])
    length = int(np.argmin(np.abs(spent - budget))) + 1
    if length < protected.sum():
        rounding = f", {rounding_options(options)}" if options.rounds else ""
        unreached = ", experts that no token reached" if np.isposinf(pool.score).any() else ""
        needed = 1 - (1 - options.ratio) * spent[protected.sum() - 1] / budget
        raise InvalidOption(
            f"--ratio {options.ratio} would remove units that must be kept ({minima(options)}{rounding}{unreached}), "
            f"which allows a ratio of at most {needed:.4f}"
        )
    keep = np.zeros(len(order), dtype=bool)
    keep[order[:length]] = True
    return keep


def neurons_to_remove(shapes: Sequence[LayerShape], groups: int, options: PlanConfig, clips: bool = False) -> int:
    """Neurons to remove in these layers together, in addition to `groups` KV groups, to meet the ratio.

    Raises InvalidOption if the groups alone exceed it, unless `clips`: then none.
    Source: cal_remove_neuron, lib/prune.py:226-237, in its order of multiplication.
    """
    prunable = sum(shape.prunable for shape in shapes)
    group_cost, neuron_cost = (max(shape.unit_cost(sublayer) for shape in shapes) for sublayer in Sublayer)
    if not neuron_cost:
        return 0
    removed_cost = len(shapes) * options.ratio * (prunable / len(shapes))
    neurons = int((removed_cost - groups * group_cost) / neuron_cost)
    if neurons < 0 and not clips:
        raise InvalidOption(
            f"--remove-heads {options.remove_heads} alone removes more than --ratio {options.ratio} of the weights; "
            "lower it or raise the ratio"
        )
    return max(neurons, 0)


def minima(options: PlanConfig) -> str:
    """The options for the least that is kept, for messages."""
    experts = "" if options.min_experts is None else f", --min-experts {options.min_experts}"
    return f"--min-heads {options.min_heads}, --min-neurons {options.min_neurons}{experts}"


def rounding_options(options: PlanConfig) -> str:
    """The rounding options in force, for messages."""
    multiples = {
        "--round-heads-to": options.round_heads_to,
        "--round-neurons-to": options.neuron_multiple,
        "--round-experts-to": options.expert_multiple,
        "--tensor-parallel": options.tensor_parallel,
    }
    return ", ".join(f"{name} {multiple}" for name, multiple in multiples.items() if multiple > 1)
