from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flap_stream.arithmetic.allocation import allocate
from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.arithmetic.scoring import LayerScores
from flap_stream.arithmetic.sizes import pruned_sizes
from flap_stream.config import PlanConfig, PruneConfig
from flap_stream.errors import InvalidOption, ShapeMismatch

SHAPE = LayerShape(kv_groups=2, heads_per_group=1, head_dim=3, neurons=4, group_cost=12, neuron_cost=3)


def kept(scores: Any, shapes: Any, round_neurons_to: int = 1, **options: Any) -> Any:
    config = PlanConfig(round_neurons_to=round_neurons_to, **options)
    return [(k.kv_groups.tolist(), k.neurons.tolist()) for k in allocate(scores, shapes, config)]


def pair(groups: Any, neurons: Any) -> LayerScores:
    return LayerScores(np.array(groups, float), np.array(neurons, float))


def test_the_prefix_nearest_to_the_budget_stays() -> None:
    scores = [pair([9, 1], [8, 7, 2, 0]), pair([6, 5], [4, 3, 2.5, 1.5])]
    # the total is 72; protected: group 12 and neuron 3 of either layer, 30; the best of the rest are neuron 7 (3), then
    # group 5 (12), so that the cost runs 30, 33, 45
    assert kept(scores, [SHAPE, SHAPE], ratio=0.54) == [([0], [0, 1]), ([0], [0])]
    assert kept(scores, [SHAPE, SHAPE], ratio=0.4) == [([0], [0, 1]), ([0, 1], [0])]


def test_cost_decides_where_the_cut_falls() -> None:
    scores = [pair([5, 1], [4, 3, 2, 0.5])]
    assert kept(scores, [SHAPE], ratio=0.5) == [([0], [0, 1])]  # 12 + 3 + 3 = 18 of 36
    assert kept(scores, [SHAPE], ratio=0.42) == [([0], [0, 1, 2])]  # 21 is nearest to 20.88


def test_every_layer_keeps_its_best_units_up_to_the_minimum() -> None:
    scores = [pair([-5, -6], [-7, -8, -9, -10]), pair([5, 6], [7, 8, 9, 10])]
    assert kept(scores, [SHAPE, SHAPE], ratio=0.5)[0] == ([0], [0])
    assert kept(scores, [SHAPE, SHAPE], ratio=0.4, min_neurons=2)[0] == ([0], [0, 1])
    assert kept(scores, [SHAPE, SHAPE], ratio=0.5, min_heads=0, min_neurons=0) == [([], []), ([0, 1], [0, 1, 2, 3])]


def test_minimum_heads_are_rounded_up_to_whole_groups() -> None:
    shape = LayerShape(kv_groups=4, heads_per_group=2, head_dim=3, neurons=20, group_cost=18, neuron_cost=3)
    scores = [pair([-1, -2, -3, -4], np.arange(20))]
    assert len(kept(scores, [shape], ratio=0.5, min_heads=3)[0][0]) == 2


def test_a_ratio_that_the_minimum_forbids_is_refused() -> None:
    scores = [pair([1, 2], [3, 4, 5, 6])]
    with pytest.raises(InvalidOption, match=r"allows a ratio of at most 0\.58"):
        kept(scores, [SHAPE], ratio=0.9)
    with pytest.raises(InvalidOption, match="min-heads"):
        kept(scores, [SHAPE], ratio=0.9, structure="al-mm", remove_heads=2)
    with pytest.raises(InvalidOption, match="min-neurons"):
        kept(scores, [SHAPE], ratio=0.5, structure="ul-um", min_neurons=3)


def test_uniform_structures_remove_the_same_number_in_every_layer() -> None:
    scores = [pair([1, 2], [3, 4, 5, 6]), pair([20, 10], [40, 30, 20, 10])]
    assert kept(scores, [SHAPE, SHAPE], ratio=0.5, structure="ul-um") == [([1], [2, 3]), ([0], [0, 1])]
    # per layer 18 of 36 must go: one head is 12, so two neurons go beside it
    assert kept(scores, [SHAPE, SHAPE], ratio=0.5, structure="ul-mm", remove_heads=2) == [([1], [2, 3]), ([0], [0, 1])]


def test_heads_and_neurons_are_sorted_separately_in_al_mm() -> None:
    scores = [pair([1, 2], [3, 4, 5, 6]), pair([20, 10], [40, 30, 20, 10])]
    assert kept(scores, [SHAPE, SHAPE], ratio=0.25, structure="al-mm", remove_heads=1) == [
        ([1], [2, 3]),
        ([0, 1], [0, 1, 2, 3]),
    ]


def test_heads_that_alone_exceed_the_ratio_are_refused() -> None:
    with pytest.raises(InvalidOption, match="alone removes more"):
        kept([pair([1, 2], [3, 4, 5, 6])], [SHAPE], ratio=0.1, structure="al-mm", remove_heads=1)


def test_scores_must_fit_the_layer() -> None:
    with pytest.raises(ShapeMismatch):
        kept([pair([1], [3, 4, 5, 6])], [SHAPE], ratio=0.5)


def test_a_released_cut_removes_the_unit_at_the_cut_too() -> None:
    scores = [pair([5, 1], [4, 3, 2, 0.5])]  # released costs: 3 * 4 // 3 = 4 a head, 1 a neuron; total 12
    assert kept(scores, [SHAPE], ratio=0.5, statistics="released") == [([0], [0])]  # 4, 5, 6: the neuron at 6 goes


def test_planning_80_layers_of_a_65b_model_is_quick() -> None:
    shape = LayerShape(64, 1, 128, 22016, 4 * 8192 * 128, 3 * 8192)
    draw = np.random.default_rng(0)
    scores = [LayerScores(draw.normal(size=64), draw.normal(size=22016)) for _ in range(80)]
    result = allocate(scores, [shape] * 80, PlanConfig(ratio=0.2))
    share = sum(keep.cost(shape) for keep in result) / (80 * shape.prunable)
    assert share == pytest.approx(0.8, abs=1e-4)


def rounded(structure: Any, shape: Any, layers: Any = 6, ratio: Any = 0.3, seed: int = 1, **options: Any) -> Any:
    draw = np.random.default_rng(seed)
    scores = [
        LayerScores(*(draw.normal(i / 4, 1, units) for units in (shape.kv_groups, shape.neurons)))
        for i in range(layers)
    ]
    if structure.endswith("mm"):
        options["remove_heads"] = round(ratio * layers * shape.kv_groups) * shape.heads_per_group
    keeps = allocate(scores, [shape] * layers, PlanConfig(ratio=ratio, structure=structure, **options))
    share = sum(keep.cost(shape) for keep in keeps) / (layers * shape.prunable)
    return scores, keeps, share


GROUPED = LayerShape(kv_groups=8, heads_per_group=4, head_dim=16, neurons=1400, group_cost=40960, neuron_cost=768)


@pytest.mark.parametrize("structure", ["al-am", "al-mm", "ul-mm", "ul-um"])
@pytest.mark.parametrize("multiple", [32, 64, 256])
def test_rounded_sizes_are_multiples_at_the_requested_ratio(structure: str, multiple: int) -> None:
    _, keeps, share = rounded(structure, GROUPED, round_neurons_to=multiple, round_heads_to=8)
    assert all(len(keep.neurons) % multiple == 0 and len(keep.neurons) > 0 for keep in keeps)
    assert all(len(keep.kv_groups) * 4 % 8 == 0 and len(keep.kv_groups) > 0 for keep in keeps)
    unit = max(multiple * GROUPED.neuron_cost, 2 * GROUPED.group_cost)
    scopes = 1 if structure.startswith("al") else len(keeps)  # of every layer by itself, in the uniform structures
    assert abs(share - 0.7) * len(keeps) * GROUPED.prunable <= unit * scopes


def test_the_best_scored_units_win_when_sizes_are_rounded() -> None:
    scores, keeps, _ = rounded("al-am", GROUPED, round_neurons_to=32)
    kept_means, removed_means = [], []
    for (_, neurons, *_), keep in zip(scores, keeps, strict=True):
        order = np.argsort(-neurons)
        assert set(keep.neurons) == set(order[: len(keep.neurons)])
        means = neurons[order][: 1400 // 32 * 32].reshape(-1, 32).mean(axis=1)
        kept_means += means[1 : len(keep.neurons) // 32].tolist()  # the first is protected
        removed_means += means[len(keep.neurons) // 32 :].tolist()
    assert min(kept_means) > max(removed_means)


def test_tensor_parallel_ranks_can_divide_every_layer() -> None:
    _, keeps, _ = rounded("al-am", GROUPED, tensor_parallel=4, round_neurons_to=6)
    assert all(len(keep.kv_groups) % 4 == 0 and len(keep.neurons) % 12 == 0 for keep in keeps)


def test_rounding_that_no_layer_can_meet_is_refused() -> None:
    with pytest.raises(InvalidOption, match=r"layer 0 has 8 KV groups.*multiple of 16"):
        rounded("al-am", GROUPED, tensor_parallel=16)
    with pytest.raises(InvalidOption, match=r"removes at least 0\.\d+ of the weights, more than --ratio 0\.02"):
        rounded("al-am", GROUPED, ratio=0.02, round_neurons_to=512)
    with pytest.raises(InvalidOption, match="released"):
        PlanConfig(statistics="released", round_neurons_to=32)
    with pytest.raises(InvalidOption, match="round-heads-to is 0"):
        PlanConfig(round_heads_to=0)


@pytest.mark.parametrize("structure", ["al-am", "al-mm", "ul-mm", "ul-um"])
def test_widths_are_multiples_of_8_by_default_at_the_requested_ratio(structure: str) -> None:
    odd_heads = replace(GROUPED, head_dim=20, heads_per_group=3, group_cost=38400, neurons=1397)
    for shape in (GROUPED, odd_heads):
        _, keeps, share = rounded(structure, shape)
        assert all(len(keep.kv_groups) * shape.head_dim % 8 == 0 and len(keep.neurons) % 8 == 0 for keep in keeps)
        assert pruned_sizes([shape] * len(keeps), keeps, 10**9, "none").width_multiple % 8 == 0
        groups = 2 if shape is odd_heads else 1  # that go together
        unit = max(8 * shape.neuron_cost, groups * shape.group_cost if structure == "al-am" else 0)
        scopes = len(keeps) if structure.startswith("ul") else 1
        assert abs(share - 0.7) * len(keeps) * shape.prunable <= unit * scopes


def test_the_published_sizes_come_back_with_1() -> None:
    _, keeps, _ = rounded("al-am", GROUPED, round_neurons_to=1)
    assert pruned_sizes([GROUPED] * len(keeps), keeps, 10**9, "none").width_multiple == 1
    assert PlanConfig().round_neurons_to == 8
    for options in (
        PlanConfig(statistics="released"),
        PruneConfig(statistics="released"),
        PlanConfig(round_neurons_to=1),
    ):
        assert options.round_neurons_to == 1 and not options.rounds


def test_a_dense_width_that_is_no_multiple_of_8_stays_or_becomes_one() -> None:
    shape = replace(GROUPED, kv_groups=3, head_dim=20, neurons=100)
    for ratio, low, high in ((0.002, 3, 6), (0.3, 0, 0)):
        _, keeps, share = rounded("al-am", shape, ratio=ratio)
        whole = [len(keep.neurons) for keep in keeps if len(keep.neurons) % 8]
        assert set(whole) <= {100} and {len(keep.kv_groups) for keep in keeps} <= {2, 3}
        assert low <= len(whole) <= high and share == pytest.approx(1 - ratio, abs=0.02)
    narrow = replace(shape, neurons=5, kv_groups=1)
    for keep in rounded("al-am", narrow, layers=2, ratio=1e-9)[1]:
        assert (len(keep.neurons), len(keep.kv_groups)) == (5, 1)
    for keep in rounded("al-am", replace(shape, neurons=102), ratio=0.02)[1]:
        assert len(keep.neurons) in (102, 96, 88)


def test_every_rank_has_a_multiple_of_8_and_what_ranks_cannot_divide_does_not_stay() -> None:
    for neurons, allowed in ((202, {192, 160, 128}), (204, {204, 192, 160, 128})):  # 204 can be divided by 4
        for keep in rounded("al-am", replace(GROUPED, neurons=neurons), ratio=0.06, tensor_parallel=4)[1]:
            assert len(keep.neurons) in allowed and len(keep.kv_groups) % 4 == 0


def test_each_expert_keeps_a_multiple_of_8() -> None:
    shape = LayerShape(4, 2, 16, 3 * 52, 6144, 192, experts=(52, 52, 52))
    draw = np.random.default_rng(3)
    scores = [LayerScores(draw.normal(size=4), draw.normal(size=156)) for _ in range(3)]
    scores[1][1][52:104] = np.inf  # an expert that no token reached
    keeps = allocate(scores, [shape] * 3, PlanConfig(ratio=0.4))
    sizes = [np.diff(np.searchsorted(keep.neurons, [0, 52, 104, 156])).tolist() for keep in keeps]
    assert sizes[1][1] == 52  # whole
    assert all(size % 8 == 0 and size for layer in sizes for size in layer if size != 52)
    assert sum(52 in layer for layer in sizes) == 1 and len({size for layer in sizes for size in layer}) > 2
    kept_cost = sum(keep.cost(shape) for keep in keeps)
    assert abs(kept_cost / (3 * shape.prunable) - 0.6) * 3 * shape.prunable <= 6144
