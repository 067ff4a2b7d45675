"""Cutting rows and columns out of tensors, and the bias that compensates for them. Pure torch arithmetic."""

import numpy as np
import torch


def removed_indices(kept: np.ndarray, size: int) -> np.ndarray:
    """Indices in `range(size)` that are not in `kept`, ascending int64."""
    mask = np.ones(size, dtype=bool)
    mask[kept] = False
    return np.flatnonzero(mask)


def select_columns(rows: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The kept columns of a block of rows. rows: `[row, column]`, any dtype; kept: int64 `[kept column]`."""
    return rows.index_select(1, kept)


def baseline_shift(rows: torch.Tensor, removed: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """The mean contribution of the removed columns, float64 `[row]`: W[:, R] @ mean[R].

    rows: a block of the dense weight `[row, column]`; removed: int64 `[removed column]`; mean: float64 `[column]`.
    Source: the bias compensation of FLAP, arXiv 2312.11983, section 3.4; accumulated in float64.
    """
    return rows.index_select(1, removed).double() @ mean.index_select(0, removed)
