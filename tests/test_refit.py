"""Arithmetic of refits: sums that do not depend on who adds what first."""

import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from flap_stream.arithmetic.least_squares import (
    BLOCK_CHANNELS,
    DAMPING,
    EXPERT_DAMPING,
    PRODUCT_TOKENS,
    MomentSums,
    groups,
    product_windows,
    solve_for_dense_output,
    sum_bytes,
)

pytestmark = pytest.mark.slow

KEPT, BESIDE, BLOCK = BLOCK_CHANNELS + 30, 20, PRODUCT_TOKENS + 100


def tokens_of(blocks: int) -> torch.Tensor:
    """Channels and tokens of very different sizes, about a mean."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(blocks * BLOCK - 50, KEPT + BESIDE, generator=draw) + torch.rand(KEPT + BESIDE, generator=draw)
    sizes = 10.0 ** (3 * torch.rand(KEPT + BESIDE, generator=draw) - 1.5)
    return values * sizes * torch.rand(len(values), 1, generator=draw)


def sums_of(values: torch.Tensor, parts: list[torch.Tensor], guess: float = 1.0) -> list[torch.Tensor]:
    """Sums of token blocks, one part of them after another added to the first."""
    squares = guess * values.double().square().sum(0)
    total: list[torch.Tensor] = []
    for part in parts:
        sums = MomentSums(KEPT, squares, len(values), BLOCK, values.dtype, values.device)
        for portion in part.split(777):
            sums.add(portion)
        total = [a + b for a, b in zip(total, sums.parts(), strict=True)] if total else sums.parts()
    return total


@pytest.mark.parametrize("guess", [1e-4, 1.0, 1e4])
def test_blocks_taken_apart_in_any_order_add_up_to_the_same_bits(guess: float) -> None:
    values = tokens_of(5)
    blocks = list(values.split(BLOCK))
    values[:, 0] *= torch.linspace(0, 1, len(values)) ** 20  # of which float64 would not hold every sum unrounded
    whole = sums_of(values, [values], guess)
    for order in ([[0, 1], [2, 3, 4]], [[3, 4], [0], [1, 2]], [[4], [2], [3], [1], [0]]):
        apart = sums_of(values, [torch.cat([blocks[i] for i in some]) for some in order], guess)
        assert all(torch.equal(a, b) for a, b in zip(whole, apart, strict=True))
    wide = values.double()
    norms = wide.square().sum(0).sqrt()
    products = (wide.T @ wide) / norms / norms[:, None]  # 1 on the diagonal
    found = torch.cat([torch.zeros(0), (whole[1] / norms / norms[:BLOCK_CHANNELS, None]).flatten()])
    assert float((found - products[:BLOCK_CHANNELS].flatten()).abs().max()) < 5e-6
    assert float(whole[0][-1]) == len(values)


def test_tokens_count_by_their_weight_and_add_up_to_the_same_bits() -> None:
    values = tokens_of(3)
    scales = torch.pow(2.0, torch.arange(len(values)) % 12 - 9.0)
    squares = (values * scales[:, None]).double().square().sum(0)
    totals: list[list[torch.Tensor]] = []
    for portion in (777, BLOCK):
        blocks = []
        for part, own in zip(values.split(BLOCK), scales.split(BLOCK), strict=True):
            sums = MomentSums(KEPT, squares, len(values), BLOCK, values.dtype, values.device)
            for some, weights in zip(part.split(portion), own.split(portion), strict=True):
                sums.add(some[:, :KEPT], some[:, KEPT:], scales=weights)
            blocks.append(sums)
        moments = blocks[0]
        for sums in reversed(blocks[1:]):
            for total, more in zip(moments.parts(), sums.parts(), strict=True):
                total += more
        totals.append(moments.parts())
    assert all(torch.equal(a, b) for a, b in zip(*totals, strict=True))
    found, weights = moments.finish(), scales.double().square()[:, None]
    mean = (weights * values).sum(0) / weights.sum()
    about_mean = (values - mean) * weights.sqrt()
    wanted = about_mean[:, :KEPT].T @ about_mean[:, KEPT:]
    assert torch.allclose(found.mean, mean, rtol=1e-5, atol=1e-9)
    assert float((found.cross - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def fitted(values: torch.Tensor, weight: torch.Tensor, kept: int, damping: float) -> torch.Tensor:
    """The kept columns, fitted to `[token, channel]` as those of an expert are."""
    sums = MomentSums(kept, values.double().square().sum(0), len(values), None, values.dtype, values.device)
    for block in values.split(50):
        sums.add_block(block)
    moments = sums.finish()
    assert moments.count == len(values)
    return solve_for_dense_output(weight, moments, damping)


def test_blocks_of_any_number_of_tokens_add_up_to_the_same_bits() -> None:
    values = tokens_of(1)
    blocks = list(values.split([3, 500, 1, len(values) - 504]))
    totals = []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        squares = values.double().square().sum(0)
        sums = MomentSums(KEPT, squares, len(values), None, values.dtype, values.device)
        for number in order:
            sums.add_block(blocks[number])
        totals.append(sums.parts())
    assert all(torch.equal(a, b) for a, b in zip(*totals, strict=True))


@pytest.mark.parametrize("tokens", [2, 5, 30, 300])
@pytest.mark.parametrize("damping", [DAMPING, 1.0])
def test_it_is_never_worse_than_a_bias_on_what_it_was_fitted_to(tokens: int, damping: float) -> None:
    draw = torch.Generator().manual_seed(tokens)
    mixed = torch.randn(40, 40, generator=draw)
    values, weight = torch.randn(tokens, 40, generator=draw) @ mixed + 3, torch.randn(16, 40, generator=draw)
    found = fitted(values, weight, 25, max(damping, EXPERT_DAMPING * 25 / tokens))
    about_mean = (values - values.mean(0)).double()
    before, after = (
        (about_mean[:, :25] @ w.double().T - about_mean @ weight.double().T).norm() for w in (weight[:, :25], found)
    )
    assert after < before


@pytest.mark.parametrize("tokens", [1, 2, 7, 1000])
def test_tokens_that_are_all_alike_leave_the_weights_as_they_are(tokens: int) -> None:
    draw = torch.Generator().manual_seed(tokens)
    values, weight = torch.randn(1, 300, generator=draw).expand(tokens, 300), torch.randn(16, 300, generator=draw)
    assert torch.equal(fitted(values, weight, 200, DAMPING), weight[:, :200])


def test_experts_are_fitted_together_as_far_as_their_sums_may_take_memory() -> None:
    assert groups([]) == [] and groups([(100, 50)] * 3) == [range(3)]
    large = 1 << 14
    assert sum_bytes(large, large) > 1 << 30
    assert groups([(large, large)] * 2 + [(100, 50)] * 2) == [range(1), range(1, 2), range(2, 4)]


@pytest.mark.parametrize(("batch_size", "tokens", "windows"), [(16, 128, 32), (3, 512, 6), (4, 2048, 4), (1, 9000, 1)])
def test_products_are_of_whole_batches(batch_size: int, tokens: int, windows: int) -> None:
    assert product_windows(batch_size, tokens) == windows


def test_no_torch_is_allowed_that_cannot_multiply_into_float32() -> None:
    """The argument out_dtype of torch.mm came with 2.8."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    needs = next(found for found in map(Requirement, project["dependencies"]) if found.name == "torch")
    assert "2.8.0" in needs.specifier and "2.7.1" not in needs.specifier
