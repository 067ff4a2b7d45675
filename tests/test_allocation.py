import numpy as np
import pytest

from flap_stream.allocation import allocate
from flap_stream.architecture import LayerShape
from flap_stream.config import PlanConfig
from flap_stream.errors import InvalidOption, ShapeMismatch

SHAPE = LayerShape(kv_groups=2, heads_per_group=1, head_dim=3, neurons=4, group_cost=12, neuron_cost=3)


def kept(scores, shapes, **options):
    return [(k.kv_groups.tolist(), k.neurons.tolist()) for k in allocate(scores, shapes, PlanConfig(**options))]


def pair(groups, neurons):
    return np.array(groups, float), np.array(neurons, float)


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
    with pytest.raises(InvalidOption, match=r"allow a ratio of at most 0\.58"):
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
    scores = [(draw.normal(size=64), draw.normal(size=22016)) for _ in range(80)]
    result = allocate(scores, [shape] * 80, PlanConfig(ratio=0.2))
    share = sum(keep.cost(shape) for keep in result) / (80 * shape.prunable)
    assert share == pytest.approx(0.8, abs=1e-4)
