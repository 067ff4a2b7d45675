"""Moments of a linear's inputs: computed per window on the device, combined on the host in float64."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flap_stream.errors import ShapeMismatch

_ROW_BLOCK = 256  # rows of a weight that are reduced at once; not measured
# Elements that are widened to float32 at once: few enough to stay in cache, enough that per-call overhead is small.
_BLOCK_ELEMENTS = (1 << 20, 1 << 24)  # on a CPU, on an accelerator


def window_moments(inputs: torch.Tensor, device: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sum of squared deviations of every window's inputs.

    inputs: `[sample, token, channel]`, any floating dtype, any device. device: the type whose block size is used;
    None is theirs.
    Both results are float32 `[sample, channel]`; two passes, so that nothing cancels.
    """
    block_elements = _BLOCK_ELEMENTS[(device or inputs.device.type) != "cpu"]
    if inputs[0].numel() > block_elements:
        rows = max(1, block_elements // inputs.shape[2])
        pairs = [_long_window_moments(window, rows) for window in inputs]
        return torch.stack([mean for mean, _ in pairs]), torch.stack([squares for _, squares in pairs])
    means, squares = [], []
    for block in inputs.split(block_elements // inputs[0].numel()):
        values = block.float()
        mean = values.mean(dim=1)
        means.append(mean)
        squares.append((values - mean[:, None]).square_().sum(dim=1))
    return torch.cat(means), torch.cat(squares)


def _long_window_moments(window: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for one window `[token, channel]`, `rows` tokens at a time."""
    total = window.new_zeros(window.shape[1], dtype=torch.float32)
    for block in window.split(rows):
        total += block.sum(dim=0, dtype=torch.float32)
    mean, squares = total / len(window), torch.zeros_like(total)
    for block in window.split(rows):
        squares += (block.float() - mean).square_().sum(dim=0)
    return mean, squares


@dataclass
class Moments:
    """Running moments of a linear's inputs over windows of equal length.

    count: tokens. mean, m2: float64 `[channel]`; m2 is the sum of squared deviations from the mean.
    released_fluctuation, released_baseline: float64 `[channel]`, what the released code accumulates (`add_windows`).
    """

    count: int
    samples: int
    mean: np.ndarray
    m2: np.ndarray
    released_fluctuation: np.ndarray
    released_baseline: np.ndarray

    @classmethod
    def empty(cls, channels: int) -> "Moments":
        """Moments of no tokens."""
        return cls(0, 0, *(np.zeros(channels) for _ in range(4)))

    def add_windows(self, means: np.ndarray, m2s: np.ndarray, tokens: int) -> None:
        """Add windows, in order.

        means, m2s: float32 `[sample, channel]` from `window_moments`; tokens: of each window.
        Raises ShapeMismatch if channel counts differ.

        The fluctuation is that of lib/layerwrapper.py:70-81 of the released code in closed form: with b_k the mean of
        the first k + 1 window means and S_k = sum over tokens of (x - b_k)^2, counted from 0,
        F = 1/(N - 1) * sum_{k=1..N-1} S_k * k/(k + 1). The sum is kept here and divided when it is read.
        The baseline is its running mean in float32, rounding included, since the released code rounds it
        to half precision before use.
        """
        if means.shape[1:] != self.mean.shape:
            raise ShapeMismatch(f"windows have {means.shape[1]} channels, the moments {self.mean.shape[0]}")
        new = len(means)
        k = np.arange(self.samples, self.samples + new, dtype=np.float64)[:, None]
        wide, wide_m2s = means.astype(np.float64), m2s.astype(np.float64)
        baselines = (self.mean * self.samples + np.cumsum(wide, axis=0)) / (k + 1)
        deviations = wide_m2s + tokens * np.square(wide - baselines)
        self.released_fluctuation += (deviations * (k / (k + 1))).sum(axis=0)
        baseline = self.released_baseline.astype(np.float32)
        for n, mean in enumerate(means, start=self.samples):
            baseline = baseline * np.float32(n / (n + 1)) + mean / np.float32(n + 1)
        self.released_baseline = baseline.astype(np.float64)

        batch_mean = wide.mean(axis=0)
        batch_m2 = wide_m2s.sum(axis=0) + tokens * np.square(wide - batch_mean).sum(axis=0)
        count = self.count + new * tokens
        self.mean, self.m2 = merge((self.count, self.mean, self.m2), (new * tokens, batch_mean, batch_m2))
        self.count, self.samples = count, self.samples + new


def joined_channels(parts: Sequence[Moments]) -> Moments:
    """The moments of several groups of channels over the same windows, concatenated."""
    filled = [part for part in parts if len(part.mean)] or parts[:1]
    arrays = {
        name: np.concatenate([getattr(part, name) for part in filled])
        for name in ("mean", "m2", "released_fluctuation", "released_baseline")
    }
    return Moments(filled[0].count, filled[0].samples, **arrays)


def merge(
    a: tuple[int, np.ndarray, np.ndarray], b: tuple[int, np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and m2 of the union of two disjoint token sets, exactly up to rounding.

    a, b: count of tokens, mean and m2, float64 `[channel]`.
    Raises ShapeMismatch if channel counts differ.
    Source: Chan, Golub & LeVeque (1983), pairwise update.
    """
    (count_a, mean_a, m2_a), (count_b, mean_b, m2_b) = a, b
    if mean_a.shape != mean_b.shape:
        raise ShapeMismatch(f"moments of {mean_a.shape[0]} and of {mean_b.shape[0]} channels cannot be merged")
    share = count_b / max(count_a + count_b, 1)
    delta = mean_b - mean_a
    return mean_a + delta * share, m2_a + m2_b + np.square(delta) * (count_a * share)


def column_norms(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Squared L2 norm of every column, and mean absolute value of every column; float64 `[channel]`.

    weight: `[out, channel]`, any floating dtype, any device; reduced in float32 a block of rows at a time, the blocks
    summed in float64.
    """
    sums = torch.zeros(2, weight.shape[1], dtype=torch.float64, device=weight.device)
    for block in weight.split(_ROW_BLOCK):
        values = block.float()
        sums[0] += values.square().sum(dim=0)
        sums[1] += values.abs().sum(dim=0)
    squared, absolute = sums.cpu().numpy()
    return squared, absolute / weight.shape[0]
