"""What ranks share: windows, moments of channels, and halved batches."""

import numpy as np
import pytest

from flap_stream.arithmetic.moments import Moments, joined_channels
from flap_stream.engine.batch_sizes import BatchSizes
from flap_stream.engine.ranks import ALONE, window_shares
from flap_stream.storage.batch_reductions import BatchReduction


@pytest.mark.parametrize("samples", [0, 1, 5, 12, 13])
@pytest.mark.parametrize("batch_size", [1, 3, 20])
@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
def test_ranks_share_whole_batches_in_order(samples: int, batch_size: int, ranks: int) -> None:
    shares = window_shares(samples, batch_size, ranks)
    assert [window for share in shares for window in share] == list(range(samples))
    assert all(share.start % batch_size == 0 or not share for share in shares)
    batches = [-(-len(share) // batch_size) for share in shares]
    assert max(batches) - min(batches) <= 1 and (shares[0] or not samples)


@pytest.mark.parametrize("cut", [16, 48, 64])
def test_moments_of_channels_apart_are_bit_for_bit_those_of_all(cut: int) -> None:
    draw = np.random.default_rng(0)
    whole, parts = Moments.empty(80), [Moments.empty(cut), Moments.empty(80 - cut), Moments.empty(0)]
    for windows in (9, 1, 20):
        means, m2s = draw.normal(size=(2, windows, 80)).astype(np.float32)
        whole.add_windows(means, m2s, 16)
        for part, columns in zip(parts, (slice(0, cut), slice(cut, 80), slice(80, 80)), strict=True):
            part.add_windows(np.ascontiguousarray(means[:, columns]), np.ascontiguousarray(m2s[:, columns]), 16)
    joined = joined_channels(parts)
    assert (joined.count, joined.samples) == (whole.count, whole.samples)
    for name in ("mean", "m2", "released_fluctuation", "released_baseline"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))


def test_a_halved_batch_concerns_the_windows_of_its_rank_and_then_all() -> None:
    theirs = BatchSizes(8, windows=range(16, 32))
    theirs.halve(step=(2, 1), start=4, failed=8)
    (reduction,) = theirs.agree(ALONE)
    assert reduction == BatchReduction((2, 1), 20, 32, 4)
    sizes = BatchSizes(8, [reduction])
    assert [sizes.at((2, 1), window) for window in (0, 19, 20, 31, 32)] == [8, 8, 4, 4, 8]
    assert sizes.at((2, 0), 40) == 8 and sizes.at((3, 0), 0) == 4
