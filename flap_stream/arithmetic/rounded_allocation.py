"""The decision with rounded sizes: among blocks of units, so that what is kept is a multiple of a block everywhere.

Where experts may go as a whole, the first block of each is what it cannot do without, and scores what the whole expert
scores; no other block of it scores more. So these go before it, and an expert is gone when its first block is.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil, gcd, lcm

import numpy as np

from flap_stream.arithmetic.layer_shape import LayerShape, Sublayer
from flap_stream.arithmetic.targets import Target
from flap_stream.arithmetic.unit_pool import UnitPool, nearest_prefix, neurons_to_remove, rounding_options
from flap_stream.config import FAST_MULTIPLE, PlanConfig
from flap_stream.errors import InvalidOption


def keep_rounded(pool: UnitPool, shapes: Sequence[LayerShape], options: PlanConfig, clips: bool = False) -> np.ndarray:
    """Which units are kept, bool `[unit]`.

    A block scores the mean of its units and costs their sum. The budget is that of all units.
    clips: a ratio that cannot be met is no error; as much is removed as can be, or as little as must be.
    Raises InvalidOption if the ratio cannot be met with this rounding.
    """
    block_of, blocks = _blocks(pool, shapes, options)
    protected = blocks.protected(shapes, options)
    if options.structure == "al-am":
        budget = (1 - options.ratio) * pool.cost.sum()
        _require_enough_blocks(blocks, budget, options)
        keep = nearest_prefix(blocks, protected, budget, options)
    else:
        scopes = [range(len(shapes))] if options.structure == "al-mm" else [range(i, i + 1) for i in range(len(shapes))]
        keep = protected.copy()
        for layers in scopes:
            _keep_counts(keep, blocks, layers, shapes, options, clips)
    return (block_of >= 0) & keep[block_of]


def keep_rounded_to_target(
    pool: UnitPool, shapes: Sequence[LayerShape], options: PlanConfig, target: Target
) -> np.ndarray:
    """Which units are kept where one order of blocks is cut to meet a target, bool `[unit]`."""
    block_of, blocks = _blocks(pool, shapes, options)
    keep = target.prefix(blocks, blocks.protected(shapes, options), options)
    return (block_of >= 0) & keep[block_of]


def _blocks(pool: UnitPool, shapes: Sequence[LayerShape], options: PlanConfig) -> tuple[np.ndarray, UnitPool]:
    """The block of each unit, int64 `[unit]`, -1 for units that are removed in any case; and the blocks.

    Experts that go together are one module in these, and have one first block.
    """
    block_of, module = np.full(len(pool.score), -1), list[int]()  # of each block
    remainders: list[int] = []  # blocks
    groups = _together(pool, shapes, options)
    for number, group in enumerate(groups):
        start, further = len(module), 0
        for own in group:
            ranked, blocks, has_remainder = _cut(pool, own, shapes, options)
            block_of[ranked] = np.where(blocks == 0, start, start + further + blocks)
            further += int(blocks[-1])
            remainders += [start + further] if has_remainder else []
        module += [number] * (1 + further)
    own = np.flatnonzero(block_of >= 0)
    own = own[np.argsort(block_of[own], kind="stable")]
    size = np.bincount(block_of[own], minlength=len(module))
    first = own[np.cumsum(size) - size]
    score = np.add.reduceat(pool.score[own], np.cumsum(size) - size) / size if module else np.zeros(0)
    of_module = np.array(module, dtype=np.int64)
    whole = np.array([np.mean([pool.whole[own[0]] for own in group]) for group in groups])[of_module]
    score = _with_whole_experts(score, of_module, whole)
    score[remainders] = np.where(np.isposinf(score[remainders]), np.inf, -np.inf)
    firsts = UnitPool(**{name: values[first] for name, values in vars(pool).items()})
    experts = np.array(list(map(len, groups)), dtype=np.int64)[of_module]
    found = replace(firsts, score=score, cost=firsts.cost * size, size=size)
    return block_of, replace(found, module=of_module, whole=whole, experts=experts)


def _together(pool: UnitPool, shapes: Sequence[LayerShape], options: PlanConfig) -> list[list[np.ndarray]]:
    """The units of each module, listed with those of the experts that are kept or removed together with it.

    The experts of a mixture that may go are ranked and grouped, from the best on. The remainder, the worst ones, is
    missing: it is removed in any case.
    """
    alone, size = [[own] for own in pool.modules()], options.expert_multiple
    if size == 1:
        return alone
    groups = [group for group in alone if np.isposinf(pool.whole[group[0][0]])]
    for i in range(len(shapes)):
        own = pool.modules((pool.layer == i) & ~np.isposinf(pool.whole))
        own.sort(key=lambda units: -pool.whole[units[0]])
        groups += [own[at : at + size] for at in range(0, len(own) // size * size, size)]
    return groups


def _cut(
    pool: UnitPool, own: np.ndarray, shapes: Sequence[LayerShape], options: PlanConfig
) -> tuple[np.ndarray, np.ndarray, bool]:
    """The units of a module that may be kept, best first; the block that each is in; whether there is a remainder.

    Units are ranked and cut into blocks of a step. The remainder, the worst units, is the last block, removed before
    anything else, and in any case if the requested multiple forbids keeping all. The first block of an expert that may
    go as a whole has its minimum of neurons.
    """
    step, asked = _steps(int(pool.layer[own[0]]), shapes, pool.sublayer_of(own[0]), len(own), options)
    whole = len(own) // step
    usable = len(own) if len(own) % step % asked == 0 else whole * step
    ranked = own[np.argsort(-pool.score[own], kind="stable")]
    first = ceil(options.min_neurons / step) if np.isfinite(pool.whole[own[0]]) else 1
    blocks = np.maximum(np.arange(usable) // step - max(first - 1, 0), 0)
    return ranked[:usable], blocks, bool(whole and usable > whole * step and blocks[-1] > 0)


def _with_whole_experts(score: np.ndarray, module: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The blocks' scores where experts may go as a whole, for which their first blocks stand; float64 `[block]`."""
    is_first = np.diff(module, prepend=-1) != 0
    return np.where(is_first & np.isfinite(whole), whole, np.minimum(score, whole))


def _steps(
    layer: int, shapes: Sequence[LayerShape], sublayer: Sublayer, units: int, options: PlanConfig
) -> tuple[int, int]:
    """How many units of a module are kept or removed together, and what their number must always be a multiple of.

    Besides what was asked for, every width (per rank, with `tensor_parallel`) should be a multiple of `FAST_MULTIPLE`,
    which only a module that is kept whole may miss.
    """
    shape, ranks = shapes[layer], options.tensor_parallel
    if sublayer is Sublayer.ATTENTION:
        asked = lcm(options.round_heads_to // gcd(options.round_heads_to, shape.heads_per_group), ranks)
        fast = FAST_MULTIPLE // gcd(FAST_MULTIPLE, shape.head_dim)
        step = lcm(asked, fast * ranks) if options.neuron_multiple > 1 else asked
    elif options.neuron_multiple == FAST_MULTIPLE:
        asked, step = ranks, FAST_MULTIPLE * ranks
    else:
        asked = step = lcm(options.neuron_multiple, ranks)
    if units < step and units % asked:
        raise InvalidOption(
            f"layer {layer} has {units} {sublayer.units}, but --round-heads-to, --round-neurons-to and "
            f"--tensor-parallel ask for a multiple of {asked}; lower them"
        )
    return step, asked


def _require_enough_blocks(pool: UnitPool, budget: float, options: PlanConfig) -> None:
    most = pool.cost.sum()
    if budget > most + pool.cost.max():
        least = 1 - (1 - options.ratio) * most / budget
        raise InvalidOption(
            f"this rounding removes at least {least:.4f} of the weights, more than --ratio {options.ratio}; raise the "
            "ratio or round to smaller multiples"
        )


def _keep_counts(
    keep: np.ndarray, blocks: UnitPool, layers: range, shapes: Sequence[LayerShape], options: PlanConfig, clips: bool
) -> None:
    """Mark the best blocks of these layers together: as many KV groups as the structure says, neurons for the rest.

    keep: bool `[block]`, True where a block is protected; changed in place.
    """
    here = (blocks.layer >= layers.start) & (blocks.layer < layers.stop) & (blocks.cost > 0)
    dense, is_uniform = [shapes[i] for i in layers], options.structure == "ul-um"
    groups = sum(shape.kv_groups for shape in dense)
    removed = options.ratio * groups
    if not is_uniform:
        removed = (options.remove_heads or 0) * len(layers) // len(shapes) // dense[0].heads_per_group
        neurons_to_remove(dense, int(removed), options, clips)
    budget = (1 - options.ratio) * sum(shape.prunable for shape in dense)
    for sublayer in Sublayer:
        is_attention = sublayer is Sublayer.ATTENTION
        own = np.flatnonzero(here & blocks.belongs_to(sublayer))
        ranked = own[np.lexsort((-blocks.score[own], ~keep[own]))]
        spent = np.concatenate([[0], np.cumsum((blocks.size if is_attention else blocks.cost)[ranked])])
        goal = groups - removed if is_attention else budget
        wanted, least = int(np.argmin(np.abs(spent - goal))), int(keep[own].sum())
        if wanted < least and not clips and not (is_attention and is_uniform):
            raise InvalidOption(
                f"--ratio {options.ratio} with {options.structure} and this rounding ({rounding_options(options)}) "
                f"leaves fewer {sublayer.units} than {sublayer.minimum_option} asks for; lower the ratio"
            )
        best = ranked[: max(wanted, least)]
        keep[best] = True
        budget -= blocks.cost[best].sum()
