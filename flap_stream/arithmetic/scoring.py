"""One score per unit, from statistics. Pure numpy in float64; nothing here knows where statistics are stored."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flap_stream.arithmetic.layer_shape import Sublayer
from flap_stream.errors import NonFinite


@dataclass(frozen=True)
class ChannelStatistics:
    """All that decisions and biases need to know of one linear (o_proj or down_proj) of one layer.

    count: int64 `[channel]`, tokens behind the moments; 0 where only weights were read, or no token reached an expert.
    samples: windows behind the moments.
    mean, m2, released_fluctuation, released_baseline: float64 `[channel]` as in `moments.Moments`.
    weight_squared_norm: float64 `[channel]`, sum over rows of W[:, j]^2.
    weight_abs_mean: float64 `[channel]`, mean over rows of |W[:, j]|.
    """

    count: np.ndarray
    samples: int
    mean: np.ndarray
    m2: np.ndarray
    released_fluctuation: np.ndarray
    released_baseline: np.ndarray
    weight_squared_norm: np.ndarray
    weight_abs_mean: np.ndarray


def concatenated(parts: Sequence[ChannelStatistics]) -> ChannelStatistics:
    """The statistics of several modules, their channels concatenated."""
    arrays = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0]) if name != "samples"
    }
    return ChannelStatistics(samples=max(part.samples for part in parts), **arrays)


class LayerScores(NamedTuple):
    """Scores of one layer's KV groups and neurons, float64 `[group]` and `[neuron]`; higher is better.

    experts: those of experts as a whole, float64 `[expert]`; None where only their neurons are removed.
    layer: that of the layer as a whole, not by its cost; None where only its units are removed.
    """

    kv_groups: np.ndarray
    neurons: np.ndarray
    experts: np.ndarray | None = None
    layer: float | None = None

    def of(self, sublayer: Sublayer) -> np.ndarray:
        """Those of one sublayer."""
        return self.kv_groups if sublayer == Sublayer.ATTENTION else self.neurons


@dataclass(frozen=True)
class ExpertStatistics:
    """What the experts of one layer output.

    count: int64 `[expert]`, tokens routed to it. mean: float64 `[expert]`, over these, of the router's weight times the
    L2 norm of the expert's output; 0 without tokens.
    """

    count: np.ndarray
    mean: np.ndarray


@dataclass(frozen=True)
class BlockStatistics:
    """How much one layer changes the hidden states.

    count: int64 `[1]`, tokens. similarity: float64 `[1]`, the mean over them of the cosine of the angle between the
    hidden states that enter the layer and those that leave it.
    """

    count: np.ndarray
    similarity: np.ndarray


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of both sublayers of one decoder layer.

    experts, block: only where `reap` and `shortgpt` need them.
    """

    attention: ChannelStatistics
    mlp: ChannelStatistics
    experts: ExpertStatistics | None = None
    block: BlockStatistics | None = None

    def of(self, sublayer: Sublayer) -> ChannelStatistics:
        """Those of one sublayer."""
        return self.attention if sublayer == Sublayer.ATTENTION else self.mlp


def fluctuation(statistics: ChannelStatistics, form: str) -> np.ndarray:
    """Variance of the inputs (IFV), float64 `[channel]`.

    form: `exact` is the n-1 variance over tokens; `released` is what the released code accumulates (ALGORITHM items
    1 and 2: divided by windows, not tokens; the first window contributes nothing).
    """
    if form == "released":
        return statistics.released_fluctuation / max(statistics.samples - 1, 1)
    return statistics.m2 / np.maximum(statistics.count - 1, 1)


def baseline_input(statistics: ChannelStatistics, form: str) -> np.ndarray:
    """Mean of the inputs, which stands for removed inputs in the bias; float64 `[channel]`.

    form: `exact`, or `released`, which rounds it to half precision (lib/prune.py:349 of the released code).
    """
    if form == "released":
        return statistics.released_baseline.astype(np.float16).astype(np.float64)
    return statistics.mean


def root_mean_square(statistics: ChannelStatistics) -> np.ndarray:
    """Root mean square of the inputs over tokens, float64 `[channel]`."""
    return np.sqrt(statistics.m2 / np.maximum(statistics.count, 1) + np.square(statistics.mean))


def channel_metric(statistics: ChannelStatistics, metric: str, form: str) -> np.ndarray:
    """The metric of every input channel, float64 `[channel]`.

    metric: `wifv`, `ifv`, `wifn` (FLAP, arXiv 2312.11983, section 3.2; lib/prune.py:14-18 of the released code).
    """
    if metric == "ifv":
        return fluctuation(statistics, form)
    if metric == "wifv":
        return fluctuation(statistics, form) * statistics.weight_squared_norm
    return statistics.weight_abs_mean * root_mean_square(statistics)


def standardise(metric: np.ndarray) -> np.ndarray:
    """(x - mean) / std with the n-1 std over channels; zeros if all channels are equal.

    Raises NonFinite if the metric holds NaN or infinity.
    """
    _finite(metric)
    if len(metric) < 2:
        return np.zeros_like(metric)
    deviation = metric.std(ddof=1)
    return np.zeros_like(metric) if deviation == 0 else (metric - metric.mean()) / deviation


def flap_scores(
    layer: LayerStatistics, metric: str, form: str, head_score: str, channels_per_group: int
) -> LayerScores:
    """Standardised scores of one layer's KV groups and neurons.

    The attention metric is squared, the MLP metric is not (lib/prune.py:249 of the released code, and the authors'
    answer in its issue 6). `mean-z`: square, standardise, mean over the group's channels. `l2`, which that answer calls
    the most meticulous: standardise, square, sum, root. Neurons of experts that no token reached score infinity and are
    kept: nothing is known of them.
    Raises NonFinite if statistics hold NaN or infinity.
    """
    attention = channel_metric(layer.attention, metric, form)
    if head_score == "mean-z":
        groups = standardise(np.square(attention)).reshape(-1, channels_per_group).mean(axis=1)
    else:
        groups = np.sqrt(np.square(standardise(attention)).reshape(-1, channels_per_group).sum(axis=1))
    seen, neurons = layer.mlp.count > 0, channel_metric(layer.mlp, metric, form)
    if seen.all() or not seen.any():
        return LayerScores(groups, standardise(neurons))
    scores = np.full(len(neurons), np.inf)
    scores[seen] = standardise(neurons[seen])
    return LayerScores(groups, scores)


def wanda_scores(layer: LayerStatistics, channels_per_group: int) -> LayerScores:
    """Wanda-sp: mean_i |W[i, j]| * ||X[:, j]|| (WIFN), summed over each group (lib/prune.py, prune_wanda_sp)."""
    attention, mlp = (channel_metric(part, "wifn", "exact") for part in (layer.attention, layer.mlp))
    return LayerScores(_finite(attention.reshape(-1, channels_per_group).sum(axis=1)), _finite(mlp))


def magnitude_scores(layer: LayerStatistics, channels_per_group: int) -> LayerScores:
    """Magnitude-sp: L2 norm of a column, summed over a group's channels (lib/prune.py, prune_magnitude_sp)."""
    attention = np.sqrt(layer.attention.weight_squared_norm)
    groups = _finite(attention.reshape(-1, channels_per_group).sum(axis=1))
    return LayerScores(groups, np.sqrt(layer.mlp.weight_squared_norm))


def as_sum_over_neurons(experts: np.ndarray, neurons: np.ndarray, together: np.ndarray) -> np.ndarray:
    """F of a layer's whole experts in what a sum of F over their neurons counts, float64 `[expert]`.

    A token feels all that is removed at once, which F of an expert includes and a sum of F leaves out.
    experts, neurons: F of each. together: F of all neurons, removed at once, `[1]`.
    """
    return experts * (neurons.sum() / together) if together[0] > 0 else experts


def whole_expert_score(loss: float, neurons: np.ndarray, price: int, rest: int, least: int) -> float:
    """F of a whole expert by what is removed with it, once its neurons are gone for which that costs less.

    Removing more of them would leave less to gain with the expert: (F_e - sum of F_u of those gone) / (cost of what is
    left) rises as long as the next neuron costs less by weight than that, and falls after. So where one order is cut at
    a price, an expert is gone if that is worth more at this price than any choice of its neurons.
    loss: F of the expert, as a sum over units. neurons: F of its neurons, float64 `[neuron]`. price, rest: cost of one
    neuron, and of what else goes with the expert. least: neurons that it keeps as long as it stays.
    """
    gone = np.concatenate([[0.0], np.cumsum(np.sort(neurons))])[: max(len(neurons) - max(least, 1), 0) + 1]
    left = (len(neurons) - np.arange(len(gone))) * price + rest
    return float(((loss - gone) / np.maximum(left, 1)).max())


def reap_scores(layer: LayerStatistics, channels_per_group: int) -> LayerScores:
    """REAP: the mean weighted norm of an expert's output; nothing but experts is scored (arXiv 2510.13999)."""
    assert layer.experts is not None, "they were collected for this method"
    groups = np.zeros(len(layer.attention.mean) // channels_per_group)
    return LayerScores(groups, np.zeros(len(layer.mlp.mean)), _finite(layer.experts.mean))


def shortgpt_scores(layer: LayerStatistics, channels_per_group: int) -> LayerScores:
    """ShortGPT: block influence, 1 - mean cosine; nothing but whole layers is scored (arXiv 2403.03853, equation 1)."""
    assert layer.block is not None, "it was collected for this method"
    groups, neurons = np.zeros(len(layer.attention.mean) // channels_per_group), np.zeros(len(layer.mlp.mean))
    return LayerScores(groups, neurons, layer=float(_finite(1 - layer.block.similarity)[0]))


def _finite(scores: np.ndarray) -> np.ndarray:
    if not np.isfinite(scores).all():
        raise NonFinite(
            "the scores from these statistics are NaN or infinite; collect again in float32 (--dtype float32)"
        )
    return scores
