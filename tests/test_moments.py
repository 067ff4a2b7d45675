import numpy as np
import pytest
import torch

from flap_stream.arithmetic import moments
from flap_stream.arithmetic.moments import Moments, column_norms, merge, window_moments
from flap_stream.errors import ShapeMismatch


@pytest.fixture
def inputs() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(11, 7, 5) * torch.tensor([1.0, 10.0, 0.01, 3.0, 1.0]) + torch.tensor([0.0, 50.0, 1.0, -2.0, 0.0])


def whole(inputs: torch.Tensor) -> np.ndarray:
    return inputs.double().numpy().reshape(-1, inputs.shape[-1])


def moments_in_batches(inputs: torch.Tensor, batch_size: int) -> Moments:
    found = Moments.empty(inputs.shape[-1])
    for batch in inputs.split(batch_size):
        means, m2s = window_moments(batch)
        found.add_windows(means.numpy(), m2s.numpy(), inputs.shape[1])
    return found


@pytest.mark.parametrize("batch_size", range(1, 12))
def test_moments_equal_the_whole_array_for_every_batch_size(inputs: torch.Tensor, batch_size: int) -> None:
    found = moments_in_batches(inputs, batch_size)
    assert found.count == 77 and found.samples == 11
    np.testing.assert_allclose(found.mean, whole(inputs).mean(axis=0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.m2 / 76, whole(inputs).var(axis=0, ddof=1), rtol=1e-5)


def test_a_window_too_long_for_the_cache_is_taken_in_blocks(
    monkeypatch: pytest.MonkeyPatch, inputs: torch.Tensor
) -> None:
    at_once = window_moments(inputs)
    monkeypatch.setattr(moments, "_BLOCK_ELEMENTS", (10, 10))  # two tokens of five channels
    in_blocks = window_moments(inputs)
    for blocks, whole_window in zip(in_blocks, at_once, strict=True):
        torch.testing.assert_close(blocks, whole_window, rtol=1e-5, atol=1e-6)


def test_merge_is_order_independent(inputs: torch.Tensor) -> None:
    halves = []
    for part in (whole(inputs)[:30], whole(inputs)[30:]):
        mean = part.mean(axis=0)
        halves.append((len(part), mean, np.square(part - mean).sum(axis=0)))
    there, back = merge(*halves), merge(*reversed(halves))
    np.testing.assert_allclose(there, back, rtol=1e-13)
    np.testing.assert_allclose(there[0], whole(inputs).mean(axis=0), rtol=1e-12)


def test_merge_with_nothing_changes_nothing(inputs: torch.Tensor) -> None:
    nothing, mean = np.zeros(5), np.arange(5.0)
    np.testing.assert_array_equal(merge((0, nothing, nothing), (7, mean, mean)), (mean, mean))


def test_channel_counts_must_agree() -> None:
    with pytest.raises(ShapeMismatch):
        merge((1, np.zeros(2), np.zeros(2)), (1, np.zeros(3), np.zeros(3)))
    with pytest.raises(ShapeMismatch):
        Moments.empty(2).add_windows(np.zeros((1, 3), np.float32), np.zeros((1, 3), np.float32), 4)


def test_variance_survives_a_mean_that_dwarfs_it() -> None:
    values = torch.tensor([[[4096.0], [4096.5], [4097.0]]])
    means, m2s = window_moments(values)
    assert means.item() == 4096.5 and m2s.item() == 0.5


@pytest.mark.parametrize("batch_size", [1, 4, 11])
def test_released_fluctuation_equals_its_sequential_recurrence(inputs: torch.Tensor, batch_size: int) -> None:
    fluctuation, baseline = np.zeros(5), np.zeros(5)
    for n, window in enumerate(inputs.double().numpy()):  # lib/layerwrapper.py:70-81, `old_baseline_inp` an alias
        baseline = baseline * n / (n + 1) + window.mean(axis=0) / (n + 1)
        if n:
            fluctuation = fluctuation * (n - 1) / n + np.square(window - baseline).sum(axis=0) / (n + 1)
    found = moments_in_batches(inputs, batch_size)
    np.testing.assert_allclose(found.released_fluctuation / 10, fluctuation, rtol=1e-5)
    np.testing.assert_allclose(found.released_baseline, baseline, rtol=1e-5, atol=1e-6)


def test_column_norms_of_many_row_blocks() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1000, 6)
    squared, absolute = column_norms(weight)
    np.testing.assert_allclose(squared, weight.double().square().sum(dim=0).numpy(), rtol=1e-6)
    np.testing.assert_allclose(absolute, weight.double().abs().mean(dim=0).numpy(), rtol=1e-6)


def test_column_norms_leave_the_weight_as_it_is() -> None:
    weight = torch.tensor([[-1.0, 2.0], [3.0, -4.0]])
    column_norms(weight)
    assert weight.tolist() == [[-1.0, 2.0], [3.0, -4.0]]
