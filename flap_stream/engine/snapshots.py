"""Snapshots of the hidden states during a pass: when to take them, and how to resume from one."""

import logging
import time
from collections.abc import Sequence

from flap_stream.engine.hidden_states import HiddenStates
from flap_stream.engine.ranks import Ranks
from flap_stream.errors import CorruptRun
from flap_stream.storage import files
from flap_stream.storage.snapshots import SnapshotStore

logger = logging.getLogger(__name__)

Saved = Sequence[tuple[SnapshotStore, HiddenStates]]  # hidden states saved together, each in its own store

# A snapshot is due when the layers since the last one took this many times as long as writing it: at most 5 % of the
# time is spent on snapshots. Not measured otherwise.
_LAYER_TIME_PER_WRITE = 20.0
_FIRST_WRITE_RATE = 500e6  # bytes per second, assumed until one snapshot has been timed


def resume(saved: Saved, incomplete: int, ranks: Ranks) -> int | None:
    """Load the newest usable snapshot; returns the number of layers before it, or None if there is none.

    incomplete: the first layer without a stored result; later snapshots cannot be used.
    """
    found = ranks.from_first(lambda: [dict(store.newest()) for store, _ in saved])
    for layer in sorted(set.intersection(*(set(digests) for digests in found)), reverse=True):
        if layer > incomplete:
            continue
        try:
            for (store, hidden), digests in zip(saved, found, strict=True):
                hidden.load(store.path(layer), digests[layer], ranks)
        except CorruptRun as error:
            if ranks.is_first:
                logger.warning("%s; resuming from an earlier point", error)
            continue
        return layer
    return None


class Snapshots:
    """Saves the hidden states every `interval` layers, or whenever that costs little; rank 0 writes those of all."""

    def __init__(self, saved: Saved, interval: int | None, ranks: Ranks) -> None:
        self._saved, self._interval, self._ranks = saved, interval, ranks
        self._nbytes = sum(ranks.gathered(sum(hidden.nbytes for _, hidden in saved)))
        self._write_seconds = self._nbytes / _FIRST_WRITE_RATE
        self._since = time.monotonic()

    def layer_done(self, next_layer: int) -> None:
        """Save the hidden states, now the inputs of `next_layer`, if a snapshot is due."""
        if not self._ranks.from_first(lambda: self._is_due(next_layer)):
            return
        started = time.monotonic()
        for store, hidden in self._saved:
            if self._ranks.is_first:
                files.make_directory(store.path(next_layer).parent)
            digest = hidden.save(store.path(next_layer), self._ranks)
            if self._ranks.is_first:
                store.record(next_layer, digest)
        self._since = time.monotonic()
        self._write_seconds = self._since - started

    def _is_due(self, next_layer: int) -> bool:
        if self._interval is None:
            due = time.monotonic() - self._since >= _LAYER_TIME_PER_WRITE * self._write_seconds
        else:
            due = next_layer % self._interval == 0
        return due and files.free_bytes(self._saved[0][0].path(next_layer)) >= 2 * self._nbytes
