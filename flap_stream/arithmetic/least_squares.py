"""Least-squares refit of the columns that an output projection keeps. Pure torch arithmetic.

FLAP's bias restores the mean contribution of removed inputs. This also recovers whatever the kept inputs can predict of
the remainder. With G the second moments about the mean, P the kept inputs, R the removed ones, and
D = damping * mean(diag(G[P, P])) * I, what comes nearest to

    the projection's dense output:  W_new = W[:, P] + W[:, R] G[R, P] (G[P, P] + D)^-1
                                    b_new = b + W mean - W_new mean[P]
    any other target T:             W_new = (G[T, P] + W[:, P] D) (G[P, P] + D)^-1
                                    b_new = mean[T] - W_new mean[P]

The damping pulls towards the dense columns, not towards zero: a channel that calibration leaves silent keeps its
weights, and no fit is worse than a bias on the tokens that it was made of. An expert is fitted to the tokens that are
routed to it; it may have fewer than it keeps inputs, so its damping grows with their number for each token.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch.nn import functional

logger = logging.getLogger(__name__)

DAMPING = 1e-3  # of the mean second moment; other values were not measured
EXPERT_DAMPING = 0.1  # the same, times kept inputs for each token, of an expert, where that is more; see restore/
# How far to follow what earlier layers have left of an error, of which fits to few tokens know little: this share times
# n / (n + inputs * FOLLOW_TOKENS), for n tokens and so many kept inputs. See restore/README.md.
FOLLOW_SHARE, FOLLOW_TOKENS = 0.8, 16
PRODUCT_TOKENS = 4096  # tokens in one float32 product: few enough to round little, many enough to add up rarely
BLOCK_CHANNELS = 512  # rows of the symmetric part that are held and multiplied together; not measured
GROUP_BYTES = 1 << 30  # of the sums of experts that are accumulated together; not measured

_CONSTANT = 2.0**-14  # of a channel's squares about zero: its moments below that may be what float32 rounded
_HARDER = 10.0  # factor on a damping that did not suffice; rarely needed, so not measured
_GROWTH = 2.0**16  # how far sums of squares may exceed the expected ones and still be exact; ample, not measured
_LEAST_SHARE = 2.0**-24  # of the largest expected sum of squares, float32's rounding; smaller ones are rounded like it
# Rows rounded at once: few, so that the temporary grid stays in cache; on an accelerator more,
# since each group of them takes four kernels. Not measured.
_ROUNDED_ROWS = (32, 256)  # on a CPU, on an accelerator


@dataclass(frozen=True)
class KeptMoments:
    """Second moments about the mean of a linear's kept inputs, and between them and the other channels.

    Those of a kept channel that is the same for all tokens, as far as the sums tell, are zero.

    count: tokens, or their weight. mean: float64 `[kept + other]`. kept: float32 `[kept, kept]`, only its upper
    triangle is set. cross: float32 `[kept, other]`.
    """

    count: int
    mean: torch.Tensor
    kept: torch.Tensor
    cross: torch.Tensor


def product_windows(batch_size: int, tokens: int) -> int:
    """Number of windows per independent matrix product: whole batches, of `tokens` tokens a window."""
    return batch_size * max(1, PRODUCT_TOKENS // (batch_size * tokens))


class MomentSums:
    """Sums over tokens from which `KeptMoments` are computed.

    kept: how many channels are kept; the others, removed inputs or a target, follow them.
    squares: float64 `[kept + other]`, rough sums of squares over all `tokens`. They are known before any token, are the
    same on every rank, and decide only how finely sums are rounded.
    block_tokens: after this many, a new product begins; None for blocks of any number of tokens, see `add_block`.
    Blocks can be summed separately, on any number of ranks and in any order, and added up: the result is the same to
    the last bit.

    Products of token blocks are float32 and are summed in float64. Each is first rounded to a multiple of a step that
    is finer than float32's own, yet coarse enough for float64 to hold every sum of such multiples exactly (Demmel &
    Nguyen, Fast Reproducible Floating-Point Summation, 2013).
    Of the symmetric part only block rows from the diagonal on are held: kept * (kept / 2 + other) numbers in all.
    """

    def __init__(
        self,
        kept: int,
        squares: torch.Tensor,
        tokens: int,
        block_tokens: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.kept, self.channels = kept, len(squares)
        self._rows = [
            torch.zeros(min(BLOCK_CHANNELS, kept - at), self.channels - at, dtype=torch.float64, device=device)
            for at in range(0, kept, BLOCK_CHANNELS)
        ]
        self._total = torch.zeros(self.channels + 1, dtype=torch.float64, device=device)  # the last entry counts tokens
        self._sizes = _sizes(squares.to(device))
        self._many = _sizes(squares.new_tensor([tokens])).to(device)
        self._is_bf16 = dtype == torch.bfloat16
        self._dtype = torch.float32 if device.type == "cpu" else dtype  # products of bf16 would be rounded to bf16
        # Channels first: CPU products are then 7 % faster, which more than pays for the copy.
        width = 0 if block_tokens is None else PRODUCT_TOKENS
        self._pending = torch.empty(self.channels, width, dtype=self._dtype, device=device)
        self._scales: torch.Tensor | None = None
        self._waiting, self._block_tokens, self._left = 0, block_tokens or 0, block_tokens or 0

    def add(self, *channels: torch.Tensor, scales: torch.Tensor | None = None) -> None:
        """Add tokens; the sums do not depend on how they are split over calls.

        channels: the kept ones and the others side by side, `[token, channel]` each. scales: the roots of the tokens'
        weights, float32 `[token]`, powers of two; None in all calls counts every token once.
        """
        done = 0
        while done < len(channels[0]):
            count = min(PRODUCT_TOKENS - self._waiting, self._left, len(channels[0]) - done)
            window, tokens, at = slice(self._waiting, self._waiting + count), slice(done, done + count), 0
            for part in channels:
                self._pending[at : at + part.shape[1], window].copy_(part[tokens].T)
                at += part.shape[1]
            if scales is not None:
                self._scales = self._pending.new_empty(PRODUCT_TOKENS) if self._scales is None else self._scales
                self._scales[window].copy_(scales[tokens])
                self._pending[:, window].mul_(self._scales[window])
            self._waiting += count
            self._left -= count
            done += count
            if self._waiting == PRODUCT_TOKENS or not self._left:
                self._multiply_waiting()
                self._left = self._left or self._block_tokens

    def add_block(self, inputs: torch.Tensor) -> None:
        """Add a block of tokens, `[token, kept + other]`, in products of its own."""
        for part in inputs.split(PRODUCT_TOKENS):
            self._multiply(part.T.to(self._dtype).contiguous())

    def _multiply_waiting(self) -> None:
        scales = None if self._scales is None else self._scales[: self._waiting]
        self._multiply(self._pending[:, : self._waiting], scales)
        self._waiting = 0

    def _multiply(self, block: torch.Tensor, scales: torch.Tensor | None = None) -> None:
        """Add the products of `[channel, token]`, which have been scaled."""
        if scales is None:
            self._total[-1] += block.shape[1]
            column_sums = block.sum(dim=1, dtype=torch.float32)
        else:
            self._total[-1] += scales.double().square().sum()
            column_sums = _product(block, scales[None])[:, 0]
        _add_rounded(self._total[None, :-1], column_sums[None], self._many, self._sizes)
        with _units_for_bf16(self._is_bf16):
            for i, row in enumerate(self._rows):
                at = i * BLOCK_CHANNELS
                rows = slice(at, at + len(row))
                _add_rounded(row, _product(block[rows], block[at:]), self._sizes[rows], self._sizes[at:])

    def parts(self) -> list[torch.Tensor]:
        """All sums, once every token has been added: those of other ranks may be added to them, in place."""
        if self._waiting:
            self._multiply_waiting()
        return [self._total, *self._rows]

    def finish(self) -> KeptMoments:
        """The moments; the sums are used up."""
        self.parts()
        del self._pending
        count = self._total[-1]
        mean = self._total[:-1] / count.clamp(min=1)
        kept = mean.new_zeros(self.kept, self.kept, dtype=torch.float32)
        cross = mean.new_zeros(self.kept, self.channels - self.kept, dtype=torch.float32)
        for i in range(len(self._rows)):
            row, self._rows[i] = self._rows[i], mean.new_zeros(0)
            at, rows = i * BLOCK_CHANNELS, slice(i * BLOCK_CHANNELS, i * BLOCK_CHANNELS + len(row))
            row.addr_(mean[rows], mean[at:], alpha=-float(count))
            kept[rows, at:] = row[:, : self.kept - at]
            cross[rows] = row[:, self.kept - at :]
        constant = kept.diagonal() <= _CONSTANT * count * mean[: self.kept].square()
        if constant.any():
            kept[constant], kept[:, constant], cross[constant] = 0, 0, 0
        return KeptMoments(int(count), mean, kept, cross)


def _sizes(squares: torch.Tensor) -> torch.Tensor:
    """Powers of two above the square roots of the sums of squares, float64 `[channel]`."""
    largest = float(squares.max()) if len(squares) else 0.0
    exponents = torch.frexp(_GROWTH * squares.clamp(min=_LEAST_SHARE * (largest or 1.0))).exponent
    return torch.pow(2.0, torch.ceil(exponents.double() / 2))


def _add_rounded(sums: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> None:
    """Add float32 values `[row, channel]` to float64 sums that stay below the product of the sizes of row and channel.

    Where all sums are below 2^e, adding 1.5 * 2^e and taking it away again rounds to multiples of 2^(e - 52).
    """
    parts = (tensor.split(_ROUNDED_ROWS[sums.device.type != "cpu"]) for tensor in (sums, values, rows))
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


def solve_for_dense_output(weight: torch.Tensor, moments: KeptMoments, damping: float = DAMPING) -> torch.Tensor:
    """The kept columns that best reproduce the projection's dense output; float32 `[out, kept]`.

    weight: `[out, kept + removed]`, any floating dtype. moments: their other channels are the removed ones; used up.
    """
    kept = moments.kept.shape[0]
    dense, removed = weight[:, :kept].float(), weight[:, kept:].float()
    factor, _ = _cholesky_factor(moments.kept, damping)
    if removed.shape[1] <= len(weight):
        predicts = torch.cholesky_solve(moments.cross, factor, upper=True)  # [kept, removed]
        return torch.addmm(dense, removed, predicts.T)
    shift = moments.cross @ removed.T  # [kept, out]
    return dense + torch.cholesky_solve(shift, factor, upper=True).T


def solve_for_target(kept_weight: torch.Tensor, moments: KeptMoments, damping: float = DAMPING) -> torch.Tensor:
    """The kept columns whose output comes nearest to a target; float32 `[out, kept]`.

    kept_weight: `[out, kept]`, any floating dtype. moments: their other channels are the target `[out]`; used up.
    """
    factor, added = _cholesky_factor(moments.kept, damping)
    wanted = moments.cross.add_(kept_weight.T.float(), alpha=added)
    return torch.cholesky_solve(wanted, factor, upper=True).T


def _cholesky_factor(kept: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """Upper Cholesky factor of a matrix whose upper triangle is given, and what was added to its diagonal.

    A damping that does not suffice is raised, with a warning.
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
    """Rows of a matrix in blocks of about `elements` elements."""
    rows = max(1, elements // max(1, prod(weight.shape[1:])))
    for start in range(0, len(weight), rows):
        yield slice(start, start + rows)


def sum_bytes(channels: int, kept: int) -> int:
    """Bytes of the sums of one projection's inputs."""
    return 8 * sum(min(BLOCK_CHANNELS, kept - at) * (channels - at) for at in range(0, kept, BLOCK_CHANNELS))


def groups(sizes: Sequence[tuple[int, int]]) -> list[range]:
    """Experts in order, divided into those whose sums are accumulated together, in at most GROUP_BYTES or one alone.

    sizes: channels, and how many of them are kept, of each expert.
    """
    starts, held = [0], 0
    for number, (channels, kept) in enumerate(sizes):
        own = sum_bytes(channels, kept)
        if held and held + own > GROUP_BYTES:
            starts.append(number)
            held = 0
        held += own
    return [range(*ends) for ends in zip(starts, [*starts[1:], len(sizes)], strict=True) if ends[0] < ends[1]]


def workspace_bytes(
    sizes: tuple[int, int, int], item_bytes: int, on_cpu: bool, has_target: bool = False
) -> tuple[int, int]:
    """Upper bound on the bytes that fitting one projection `[out, channel]` takes, besides its weight and kept inputs.

    sizes: outputs, channels, and how many of these are kept. has_target: whether it is fitted to something else than
    its dense output.
    Returns two figures: while moments are summed, and while the fit is solved. Both are largest if all are kept.
    """
    out, channels, kept = sizes
    other = out if has_target else channels - kept
    width = kept + other
    sums = sum_bytes(width, kept)
    adding = sums + PRODUCT_TOKENS * width * (4 if on_cpu else item_bytes) + has_target * out * channels * item_bytes
    adding += (4 * BLOCK_CHANNELS + 24 * _ROUNDED_ROWS[not on_cpu]) * width
    matrices = 4 * kept * width
    weights = out * channels * (item_bytes + 4)
    # LAPACK factors into a separate copy, and cuSOLVER takes up to as much again.
    copies = 2 if on_cpu else 3
    solving = weights + matrices + copies * 4 * kept * kept + 4 * kept * (2 * min(other, out) + out)
    return adding, max(sums + matrices, solving)


def experts_workspace_bytes(
    experts: Sequence[tuple[int, int, int]], tokens: int, choices: int, item_bytes: int, on_cpu: bool
) -> tuple[int, int]:
    """The same for all experts of a layer, which are fitted group by group, together with what they are fitted to.

    experts: `(out, channels, kept)` of each. tokens: of a block, whose end they wait for. choices: how many experts
    each goes to.
    """
    refitted = item_bytes * sum(out * kept for out, _, kept in experts)
    adding = solving = 0
    for group in groups([sizes[1:] for sizes in experts]):
        own = experts[group.start : group.stop]
        sums = sum(sum_bytes(*sizes[1:]) for sizes in own)
        alone = [workspace_bytes(sizes, item_bytes, on_cpu) for sizes in own]
        product = max(added - sum_bytes(*sizes[1:]) for (added, _), sizes in zip(alone, own, strict=True))
        # One expert's inputs are put together, then in order, before they are multiplied.
        copies = min(choices, len(own)) + 2
        waiting = item_bytes * tokens * copies * max(channels for _, channels, _ in own)
        adding, solving = max(adding, sums + product + waiting), max(solving, sums + max(solved for _, solved in alone))
    if on_cpu:
        return adding + refitted, solving + refitted
    return max(adding, refitted), solving  # the last step runs the layer with what was refitted
