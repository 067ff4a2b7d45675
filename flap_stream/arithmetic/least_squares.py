"""Least-squares refit of the columns that an output projection keeps. Pure torch arithmetic.

FLAP's bias restores the mean of what removed inputs gave. What the kept inputs can predict beyond it is restored here.
With G the second moments about the mean, P what stays, R what goes, and D = damping * mean(diag(G[P, P])) * I:

    target `own`, the projection's dense output:    W_new = W[:, P] + W[:, R] G[R, P] (G[P, P] + D)^-1
                                                    b_new = b + W mean - W_new mean[P]
    target T, anything that the output should be:   W_new = (G[T, P] + W[:, P] D) (G[P, P] + D)^-1
                                                    b_new = mean(T) - W_new mean[P]

What reads hidden states has no bias in most models, so that these are brought nearer to the dense ones (the target)
with moments about zero, by a square matrix W_new that has the identity for W.

The damping draws towards the dense columns, not towards zero: a channel that calibration leaves silent keeps its
weights.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch.nn import functional

logger = logging.getLogger(__name__)

DAMPING = 1e-3
PRODUCT_TOKENS = 4096  # tokens in one float32 product: few enough to round little, many enough to add up rarely
BLOCK_CHANNELS = 512

_HARDER = 10.0
_GROWTH = 2.0**16  # by how much sums of squares may exceed what was expected and still be added up exactly
_LEAST_SHARE = 2.0**-24  # of the largest sum of squares that is expected of any channel
_ROUNDED_ROWS = 32


@dataclass(frozen=True)
class KeptMoments:
    """Second moments about the mean, or about zero, of a linear's kept inputs and between them and what is beside them.

    mean: float64 `[kept + beside]`. kept: float32 `[kept, kept]`, only its upper triangle is set.
    cross: float32 `[kept, beside]`.
    """

    mean: torch.Tensor
    kept: torch.Tensor
    cross: torch.Tensor


def product_windows(batch_size: int, tokens: int) -> int:
    """Windows of which the tokens are multiplied apart from others': whole batches, of `tokens` a window."""
    return batch_size * max(1, PRODUCT_TOKENS // (batch_size * tokens))


class MomentSums:
    """Sums over tokens from which KeptMoments come.

    kept: how many channels of a token are kept; those that are removed, or what is to be predicted, stand beside them.
    squares: float64 `[kept + beside]`, what the sums of squares over all `tokens` will roughly be. It is known before
    any token, on every rank the same, and decides only how finely sums are rounded.
    block_tokens: after so many, a new product begins. Sums of the tokens of such blocks can be taken apart, on any
    number of ranks in any order, and added up: the result is the same to the last bit.

    Products of token blocks are float32 and are added up in float64. Each is first rounded to a multiple of a step that
    is smaller than float32's own, and so large that float64 holds every sum of such multiples exactly (Demmel & Nguyen,
    Fast Reproducible Floating-Point Summation, 2013).
    Of the symmetric part only block rows from the diagonal on are held: kept * (kept / 2 + beside) numbers in all.
    """

    def __init__(
        self, kept: int, squares: torch.Tensor, tokens: int, block_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.kept, self.channels = kept, len(squares)
        self._rows = [
            torch.zeros(min(BLOCK_CHANNELS, kept - at), self.channels - at, dtype=torch.float64, device=device)
            for at in range(0, kept, BLOCK_CHANNELS)
        ]
        self._total = torch.zeros(self.channels + 1, dtype=torch.float64, device=device)  # the last counts tokens
        self._sizes = _sizes(squares.to(device))
        self._many = _sizes(squares.new_tensor([tokens])).to(device)
        self._is_bf16 = dtype == torch.bfloat16
        if device.type == "cpu":
            dtype = torch.float32  # products of bf16 would be rounded to bf16
        # Channels first: on CPUs products then take 7 % less time, which is more than the copy takes.
        self._pending = torch.empty(self.channels, PRODUCT_TOKENS, dtype=dtype, device=device)
        self._waiting, self._block_tokens, self._left = 0, block_tokens, block_tokens

    def add(self, inputs: torch.Tensor) -> None:
        """Take in tokens, `[token, kept + beside]`; the sums do not depend on the portions in which they come."""
        while len(inputs):
            part = inputs[: min(PRODUCT_TOKENS - self._waiting, self._left)]
            self._pending[:, self._waiting : self._waiting + len(part)].copy_(part.T)
            self._waiting += len(part)
            self._left -= len(part)
            inputs = inputs[len(part) :]
            if self._waiting == PRODUCT_TOKENS or not self._left:
                self._multiply()
                self._left = self._left or self._block_tokens

    def _multiply(self) -> None:
        block = self._pending[:, : self._waiting]
        self._total[-1] += self._waiting
        self._waiting = 0
        column_sums = block.sum(dim=1, dtype=torch.float32)
        _add_rounded(self._total[None, :-1], column_sums[None], self._many, self._sizes)
        with _units_for_bf16(self._is_bf16):
            for i, row in enumerate(self._rows):
                at = i * BLOCK_CHANNELS
                rows = slice(at, at + len(row))
                _add_rounded(row, _product(block[rows], block[at:]), self._sizes[rows], self._sizes[at:])

    def parts(self) -> list[torch.Tensor]:
        """All sums, once every token has been taken in: those of other ranks may be added to them, in place."""
        if self._waiting:
            self._multiply()
        return [self._total, *self._rows]

    def finish(self, about_mean: bool = True) -> KeptMoments:
        """The moments; nothing can be added any more."""
        self.parts()
        del self._pending
        count = self._total[-1]
        mean = self._total[:-1] / count.clamp(min=1)
        kept = mean.new_zeros(self.kept, self.kept, dtype=torch.float32)
        cross = mean.new_zeros(self.kept, self.channels - self.kept, dtype=torch.float32)
        for i in range(len(self._rows)):
            row, self._rows[i] = self._rows[i], mean.new_zeros(0)
            at, rows = i * BLOCK_CHANNELS, slice(i * BLOCK_CHANNELS, i * BLOCK_CHANNELS + len(row))
            if about_mean:
                row.addr_(mean[rows], mean[at:], alpha=-float(count))
            kept[rows, at:] = row[:, : self.kept - at]
            cross[rows] = row[:, self.kept - at :]
        return KeptMoments(mean, kept, cross)


def _sizes(squares: torch.Tensor) -> torch.Tensor:
    """Powers of two that the roots of sums of squares will not reach, float64 `[channel]`."""
    largest = float(squares.max()) if len(squares) else 0.0
    exponents = torch.frexp(_GROWTH * squares.clamp(min=_LEAST_SHARE * (largest or 1.0))).exponent
    return torch.pow(2.0, torch.ceil(exponents.double() / 2))


def _add_rounded(sums: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> None:
    """Add float32 values `[row, channel]` to float64 sums that stay below the product of the sizes of row and channel.

    Where all sums are below 2^e, adding 1.5 * 2^e and taking it away again rounds to multiples of 2^(e - 52).
    """
    parts = (tensor.split(_ROUNDED_ROWS) for tensor in (sums, values, rows))
    for some, new, size in zip(*parts, strict=True):
        grid = torch.outer(1.5 * size, columns)
        some += (new + grid).sub_(grid)


@contextmanager
def _units_for_bf16(may: bool) -> Iterator[None]:
    """Let float32 products use a CPU's units for bf16, which loses nothing where all factors are bf16 already."""
    products = getattr(torch.backends.mkldnn, "matmul", None)  # from torch 2.9 on
    if products is None or not may:
        yield
        return
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b.T in float32, whatever the dtype."""
    if a.dtype == torch.float32:
        return functional.linear(a, b)
    return torch.mm(a, b.T, out_dtype=torch.float32)


def refit_to_own(weight: torch.Tensor, moments: KeptMoments, damping: float = DAMPING) -> torch.Tensor:
    """The kept columns, refitted to the projection's dense output; float32 `[out, kept]`.

    weight: `[out, kept + removed]`, any floating dtype. moments: with the removed channels beside; they are used up.
    """
    kept = moments.kept.shape[0]
    dense, removed = weight[:, :kept].float(), weight[:, kept:].float()
    factor, _ = cholesky_factor(moments.kept, damping)
    if removed.shape[1] <= len(weight):
        predicts = torch.cholesky_solve(moments.cross, factor, upper=True)  # [kept, removed]
        return torch.addmm(dense, removed, predicts.T)
    shift = moments.cross @ removed.T  # [kept, out]
    return dense + torch.cholesky_solve(shift, factor, upper=True).T


def refit_to_target(kept_weight: torch.Tensor, moments: KeptMoments, damping: float = DAMPING) -> torch.Tensor:
    """The kept columns, refitted to a target of the output; float32 `[out, kept]`.

    kept_weight: `[out, kept]`, any floating dtype. moments: with the target `[out]` beside; they are used up.
    """
    factor, added = cholesky_factor(moments.kept, damping)
    wanted = moments.cross.add_(kept_weight.T.float(), alpha=added)
    return torch.cholesky_solve(wanted, factor, upper=True).T.contiguous()


def cholesky_factor(kept: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """Upper Cholesky factor of a matrix whose upper triangle is given, and what its diagonal was raised by.

    Where the damping does not suffice, it is raised, and that is logged.
    """
    diagonal = kept.diagonal()
    scale, before = float(diagonal.mean()) if len(kept) else 0.0, diagonal.clone()
    scale = scale or 1.0  # all channels are silent
    while True:
        diagonal.copy_(before + damping * scale)
        factor, info = torch.linalg.cholesky_ex(kept, upper=True)
        if int(info) == 0:
            return factor, damping * scale
        logger.warning("second moments are not positive definite with damping %.0e; raising it", damping)
        damping *= _HARDER


def product_with_mean(weight: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """weight @ mean, float64 `[out]`. weight: `[out, channel]`, any floating dtype; mean: float64 `[channel]`."""
    parts = [weight[rows].double() @ mean for rows in row_blocks(weight)]
    return torch.cat(parts)


def row_blocks(weight: torch.Tensor, elements: int = 1 << 24) -> Iterator[slice]:
    """Rows of a matrix in blocks of about so many elements."""
    rows = max(1, elements // max(1, prod(weight.shape[1:])))
    for start in range(0, len(weight), rows):
        yield slice(start, start + rows)


def workspace_bytes(
    out: int, channels: int, kept: int, item_bytes: int, has_target: bool, on_cpu: bool
) -> tuple[int, int]:
    """Most bytes that a refit of one projection `[out, channel]` takes, its weight and kept inputs aside.

    Two figures: while moments are taken, and while the refit is solved; both are largest where all channels are kept.
    """
    beside = out if has_target else channels - kept
    width = kept + beside
    blocks = range(0, kept, BLOCK_CHANNELS)
    sums = 8 * sum(min(BLOCK_CHANNELS, kept - at) * (width - at) for at in blocks)
    adding = sums + PRODUCT_TOKENS * width * (4 if on_cpu else item_bytes)
    adding += (4 * BLOCK_CHANNELS + 24 * _ROUNDED_ROWS) * width
    matrices = 4 * kept * width
    weights = out * channels * (item_bytes + 4)
    # LAPACK's factor is made in a copy of its own.
    solving = weights + matrices + 2 * 4 * kept * kept + 4 * kept * (2 * min(beside, out) + out)
    return adding, max(sums + matrices, solving)
