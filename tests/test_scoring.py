from typing import Any

import numpy as np
import pytest

from flap_stream.arithmetic.scoring import (
    ChannelStatistics,
    LayerStatistics,
    as_sum_over_neurons,
    baseline_input,
    channel_metric,
    flap_scores,
    magnitude_scores,
    standardise,
    wanda_scores,
    whole_expert_score,
)
from flap_stream.errors import NonFinite


def statistics(variance: Any, mean: Any, norms: Any, absolute: Any, count: int = 11) -> ChannelStatistics:
    variance, mean = np.asarray(variance, float), np.asarray(mean, float)
    return ChannelStatistics(
        count=np.full(len(variance), count),
        samples=3,
        mean=mean,
        m2=variance * (count - 1),
        released_fluctuation=variance * 20,
        released_baseline=mean,
        weight_squared_norm=np.asarray(norms, float),
        weight_abs_mean=np.asarray(absolute, float),
    )


FOUR = statistics([1, 2, 3, 6], [0.1, 0.2, -0.3, 0.0], [1, 4, 1, 0.5], [0.5, 1.0, 0.25, 2.0])


def test_metrics_are_those_of_the_paper() -> None:
    np.testing.assert_allclose(channel_metric(FOUR, "ifv", "exact"), [1, 2, 3, 6])
    np.testing.assert_allclose(channel_metric(FOUR, "wifv", "exact"), [1, 8, 3, 3])
    mean_square = np.array([1, 2, 3, 6]) * 10 / 11 + np.square([0.1, 0.2, 0.3, 0.0])
    np.testing.assert_allclose(channel_metric(FOUR, "wifn", "exact"), np.sqrt(mean_square) * [0.5, 1, 0.25, 2])


def test_released_fluctuation_is_divided_by_windows() -> None:
    np.testing.assert_allclose(channel_metric(FOUR, "ifv", "released"), np.array([1, 2, 3, 6]) * 10)


def test_released_baseline_is_cut_to_half_precision() -> None:
    assert baseline_input(FOUR, "exact")[0] == 0.1
    assert baseline_input(FOUR, "released")[0] == float(np.float16(0.1))


def test_standardise_has_zero_mean_and_unit_n_minus_1_deviation() -> None:
    z = standardise(np.array([1.0, 2.0, 3.0, 6.0]))
    np.testing.assert_allclose(z, np.array([-2, -1, 0, 3]) / np.sqrt(14 / 3))


def test_channels_that_are_all_alike_score_zero() -> None:
    np.testing.assert_array_equal(standardise(np.full(4, 7.0)), np.zeros(4))


def test_mean_z_squares_then_standardises_then_averages() -> None:
    groups, neurons = flap_scores(LayerStatistics(FOUR, FOUR), "ifv", "exact", "mean-z", 2)[:2]
    z = standardise(np.array([1.0, 4.0, 9.0, 36.0]))
    np.testing.assert_allclose(groups, [(z[0] + z[1]) / 2, (z[2] + z[3]) / 2])
    np.testing.assert_allclose(neurons, standardise(np.array([1.0, 2.0, 3.0, 6.0])))


def test_l2_standardises_then_squares_sums_and_roots() -> None:
    groups, _ = flap_scores(LayerStatistics(FOUR, FOUR), "ifv", "exact", "l2", 2)[:2]
    z = standardise(np.array([1.0, 2.0, 3.0, 6.0]))
    np.testing.assert_allclose(groups, [np.hypot(z[0], z[1]), np.hypot(z[2], z[3])])


def test_baselines_sum_over_a_groups_channels() -> None:
    groups, neurons = magnitude_scores(LayerStatistics(FOUR, FOUR), 2)[:2]
    np.testing.assert_allclose(groups, [3, 1 + np.sqrt(0.5)])
    np.testing.assert_allclose(neurons, [1, 2, 1, np.sqrt(0.5)])
    wanda_groups, wanda_neurons = wanda_scores(LayerStatistics(FOUR, FOUR), 4)[:2]
    np.testing.assert_allclose(wanda_groups, [wanda_neurons.sum()])


def test_statistics_that_overflowed_are_refused() -> None:
    broken = statistics([1, np.inf], [0, 0], [1, 1], [1, 1])
    with pytest.raises(NonFinite):
        flap_scores(LayerStatistics(broken, FOUR), "wifv", "exact", "mean-z", 2)


def test_whole_experts_count_as_sums_over_neurons_do() -> None:
    losses, neurons = np.array([2.0, np.inf, 6.0]), np.array([1.0, 2.0, 0.0, 0.0, 3.0, 4.0])
    np.testing.assert_allclose(as_sum_over_neurons(losses, neurons, np.array([20.0])), [1.0, np.inf, 3.0])
    np.testing.assert_array_equal(as_sum_over_neurons(losses, np.zeros(6), np.zeros(1)), losses)


def test_an_expert_is_gone_at_a_price_if_that_is_worth_more_than_any_choice_of_its_neurons() -> None:
    draw = np.random.default_rng(0)
    for _ in range(200):
        neurons, price, rest = draw.exponential(size=draw.integers(1, 7)), int(draw.integers(1, 4)), 2
        loss = float(draw.uniform(0, 2 * neurons.sum()))
        score = whole_expert_score(loss, neurons, price, rest, least=1)
        for cut in (0.999 * score, 1.001 * score):
            best = np.minimum(np.sort(neurons)[: len(neurons) - 1] - cut * price, 0).sum()
            is_gone = loss - cut * (price * len(neurons) + rest) < best
            assert is_gone == (cut > score)
    assert whole_expert_score(6.0, np.array([1.0, 9.0]), 1, 1, least=2) == 2.0
