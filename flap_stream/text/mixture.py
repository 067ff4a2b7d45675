"""Calibration texts with shares, `prose.txt:0.7 code.txt:0.3`: how many windows each gives, and in which order."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flap_stream.config.values import read_share
from flap_stream.errors import InvalidText


def parts_of(sources: Sequence[str], samples: int) -> list[tuple[str, int]] | None:
    """Each text and its number of windows, by largest remainder; None if no text has a share.

    Raises InvalidText if only some have one, they do not add up to 1, or one is too small for a window.
    """
    named = [_divided(source) for source in sources]
    shares = [share for _, share in named if share is not None]
    if not shares:
        return None
    if len(shares) < len(named):
        bare = next(name for name, share in named if share is None)
        raise InvalidText(
            f"{bare} has no share, but other calibration texts do; write it as {bare}:0.5, or remove all shares"
        )
    if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise InvalidText(
            f"the shares of {', '.join(sources)} are {' + '.join(f'{s:g}' for s in shares)} = {sum(shares):g}; "
            "they must be positive and add up to 1"
        )
    counts = [int(share * samples) for share in shares]
    rest = sorted(range(len(counts)), key=lambda i: (counts[i] - shares[i] * samples, i))
    for i in rest[: samples - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        raise InvalidText(
            f"{sources[counts.index(0)]} gets none of {samples} windows; raise its share or --samples, or leave it out"
        )
    return [(name, count) for (name, _), count in zip(named, counts, strict=True)]


def spread(counts: Sequence[int]) -> np.ndarray:
    """The order, int64 `[window]`, that spreads each text's windows evenly; which are given text by text."""
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return np.argsort(places, kind="stable")


def _divided(source: str) -> tuple[str, float | None]:
    """The name of a text and its share, if it has one; a file that is named like that has none."""
    name, colon, share = source.rpartition(":")
    if not (colon and name) or Path(source).exists():
        return source, None
    found = read_share(share)
    return (source, None) if found is None else (name, found)
