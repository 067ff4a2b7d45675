"""The rise of the loss that the loss scores predict for a decision."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

import numpy as np

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.layer_shape import LayerShape, Sublayer
from flap_stream.arithmetic.scoring import LayerScores

_MOST = 700.0  # the largest exponent that a float64 has room for


@dataclass(frozen=True)
class PredictedRise:
    """How much the loss on the calibration text is predicted to rise, in nats, with the bias restored.

    window: of the summed loss of one window. token: of its mean. perplexity_factor: what perplexity is multiplied by.
    """

    window: float
    token: float
    perplexity_factor: float

    def __str__(self) -> str:
        """One line."""
        return f"{self.window:.4g} nats a window, {self.token:.4g} a token: perplexity x {self.perplexity_factor:.4g}"


def predicted_rise(
    losses: Sequence[LayerScores], shapes: Sequence[LayerShape], keeps: Sequence[LayerKeep], window_tokens: int
) -> PredictedRise:
    """Half the sum of F of the removed units: the loss to second order, at its minimum, without cross terms.

    Where an expert or a layer is removed as a whole, its own F stands for those of its units.
    losses: F of each unit of each layer, nats squared, float64 `[group]`, `[neuron]`. window_tokens: tokens of a
    window, all but the first of which are predicted.
    """
    window = 0.0
    for loss, shape, keep in zip(losses, shapes, keeps, strict=True):
        if keep.is_gone:
            assert loss.layer is not None
            window += loss.layer / 2
            continue
        neurons = loss.neurons
        if loss.experts is not None:
            gone = shape.expert_sizes(keep.neurons) == 0
            neurons = np.where(np.repeat(gone, shape.experts), 0, neurons) if shape.experts else neurons
            window += float(loss.experts[gone].sum()) / 2
        for sublayer, values in zip(Sublayer, (loss.kv_groups, neurons), strict=True):
            removed = np.ones(len(values), dtype=bool)
            removed[keep.of(sublayer)] = False
            window += float(values[removed].sum()) / 2
    token = window / max(window_tokens - 1, 1)
    return PredictedRise(window, token, exp(min(token, _MOST)))
