"""A target in place of a ratio: what every unit weighs against it, and where the order of units is cut to meet it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flap_stream.arithmetic.layer_shape import Sublayer
from flap_stream.arithmetic.unit_pool import UnitPool, minima, rounding_options
from flap_stream.config import PlanConfig
from flap_stream.config.values import option_name
from flap_stream.errors import InvalidOption

_STEPS = 32  # of a bisection of the ratio: finer than one neuron of the largest models


@dataclass(frozen=True)
class LayerPrices:
    """What the units of one layer count towards a target: parameters or bytes.

    group, neuron: of one unit. attention_rest, mlp_rest: of other tensors, which go with the module's last unit.
    expert_rest: of what goes with an expert's last neuron.
    """

    group: int
    neuron: int
    attention_rest: int = 0
    mlp_rest: int = 0
    expert_rest: int = 0

    def unit(self, sublayer: Sublayer) -> int:
        """Of one unit of a sublayer."""
        return self.group if sublayer is Sublayer.ATTENTION else self.neuron

    def rest(self, sublayer: Sublayer) -> int:
        """Of what goes with the last unit of a sublayer."""
        return self.attention_rest if sublayer is Sublayer.ATTENTION else self.mlp_rest


@dataclass(frozen=True)
class Target:
    """What the pruned model may have at most.

    name: the field of `TargetConfig`. limit: parameters, else bytes. dense: what the dense model has. bare: what a
    pruned model without any unit has, added biases included. prices: of each layer.
    """

    name: str
    limit: int
    dense: int
    bare: int
    prices: Sequence[LayerPrices]

    def __str__(self) -> str:
        """The option as one writes it."""
        return f"--{option_name(self.name)} {self.limit}"

    def amount(self, keep: np.ndarray, pool: UnitPool) -> int:
        """What a model has that keeps these units. keep: bool `[unit]`."""
        order = np.flatnonzero(keep)
        return self.bare + int(self._added(pool, order).sum())

    def reached(self, counts: Sequence[tuple[int, int, int]]) -> int:
        """What a model has that keeps so many KV groups, neurons and experts of each layer."""
        total = self.bare
        for layer, (groups, neurons, experts) in zip(self.prices, counts, strict=True):
            kept = zip(Sublayer, (groups, neurons), strict=True)
            total += sum(n * layer.unit(s) + layer.rest(s) * (n > 0) for s, n in kept) + experts * layer.expert_rest
        return total

    def record(self, counts: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
        """As pruning.json and `--json` hold it. counts: as in `reached`."""
        return {"name": self.name, "limit": self.limit, "reached": self.reached(counts), "dense": self.dense}

    def prefix(self, pool: UnitPool, protected: np.ndarray, options: PlanConfig) -> np.ndarray:
        """The longest prefix of the descending sort that meets the target, protected units first; bool `[unit]`.

        Raises InvalidOption if these alone exceed it.
        """
        order = np.lexsort((-pool.score, ~protected))
        amounts = self.bare + np.cumsum(self._added(pool, order))
        least, length = max(int(protected.sum()), 1), int(np.searchsorted(amounts, self.limit, side="right"))
        if length < least:
            raise self.unmet(int(amounts[least - 1]), options)
        keep = np.zeros(len(order), dtype=bool)
        keep[order[:length]] = True
        return keep

    def search(self, pool: UnitPool, keep_at: Callable[[float], np.ndarray], options: PlanConfig) -> np.ndarray:
        """The decision at the smallest ratio that meets the target; bool `[unit]`.

        keep_at: the decision at a ratio, bool `[unit]`; beyond what can be removed it removes all that can be.
        Raises InvalidOption if no ratio meets it.
        """
        low, high = 2.0**-_STEPS, 1 - 2.0**-_STEPS
        found, least = keep_at(low), keep_at(high)
        if self.amount(found, pool) <= self.limit:
            return found
        found, smallest = least, self.amount(least, pool)
        if smallest > self.limit:
            raise self.unmet(smallest, options)
        while high - low > 2.0**-_STEPS:
            middle = (low + high) / 2
            keep = keep_at(middle)
            if self.amount(keep, pool) <= self.limit:
                found, high = keep, middle
            else:
                low = middle
        return found

    def require_unmet(self) -> None:
        """Raise InvalidOption if the dense model meets the target already."""
        if self.dense <= self.limit:
            raise InvalidOption(
                f"{self} removes nothing: the dense model has {self.quantity(self.dense)} already; lower the target"
            )

    def unmet(self, smallest: int, options: PlanConfig) -> InvalidOption:
        """The error for a target that cannot be met. smallest: the least that can be reached."""
        rounding = f", {rounding_options(options)}" if options.rounds else ""
        return InvalidOption(
            f"{self} cannot be met: the smallest model with structure {options.structure}, {minima(options)}{rounding} "
            f"has {self.quantity(smallest)}; raise the target to that at least"
        )

    def quantity(self, amount: int) -> str:
        """An amount in words."""
        return f"{amount:,} {target_unit(self.name)}"

    def _added(self, pool: UnitPool, order: np.ndarray) -> np.ndarray:
        """What each unit adds when units are kept one after another, int64 `[unit of order]`.

        The first unit of a module brings the module's other tensors with it.
        """
        prices, rests = (
            np.array([[price(layer, sublayer) for sublayer in Sublayer] for layer in self.prices], dtype=np.int64)
            for price in (LayerPrices.unit, LayerPrices.rest)
        )
        layer, sublayer = pool.layer[order], np.where(pool.in_attention[order], 0, 1)
        added = prices[layer, sublayer] * pool.size[order]
        _, first = np.unique(2 * layer + sublayer, return_index=True)
        added[first] += rests[layer[first], sublayer[first]]
        _, first = np.unique(pool.module[order], return_index=True)
        of_experts = np.array([layer.expert_rest for layer in self.prices], dtype=np.int64)
        added[first] += np.where(
            pool.in_attention[order][first], 0, of_experts[layer[first]] * pool.experts[order][first]
        )
        return added


def target_unit(name: str) -> str:
    """What a target counts. name: the field of `TargetConfig`."""
    return {
        "target_parameters": "parameters",
        "target_size": "bytes of weight files",
        "target_memory": "bytes of weights and KV cache",
    }[name]


def target_sentence(record: Mapping[str, Any]) -> str:
    """What was asked for and what came of it. record: as `Target.record` makes it."""
    return f"{record['reached']:,} of at most {record['limit']:,} {target_unit(record['name'])}"
