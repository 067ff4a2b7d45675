"""How many windows run at once, which is halved wherever the device runs out of memory."""

import sys
from collections.abc import Iterable

from flap_stream.engine.ranks import Ranks
from flap_stream.storage.batch_reductions import BatchReduction


class BatchSizes:
    """Batch sizes that shrink when the device runs out of memory, at the same points when a run is resumed.

    A step is one run of a layer over all windows: the layer's place in the pass, and which run of it. A
    reduction applies to the windows that follow in the same step, up to the first window of another rank, and to all
    windows of later steps.
    reductions: earlier ones. windows: the range of all windows that run here; None if all do. Arguments and results
    count windows from the first of that range.
    """

    def __init__(self, first: int, reductions: Iterable[BatchReduction] = (), windows: range | None = None) -> None:
        self.first = first
        self._reductions = list(reductions)
        self._windows = range(sys.maxsize) if windows is None else windows
        self._new: list[BatchReduction] = []

    def at(self, step: tuple[int, int], start: int) -> int:
        """Windows that run at once from window `start` of a step on."""
        window = self._windows.start + start
        sizes = (r.size for r in self._reductions if r.step < step or (r.step == step and r.start <= window < r.stop))
        return min(sizes, default=self.first)

    def halve(self, step: tuple[int, int], start: int, failed: int) -> None:
        """From window `start` on, run half as many windows at once as have just failed."""
        self._new.append(BatchReduction(step, self._windows.start + start, self._windows.stop, failed // 2))
        self._reductions.append(self._new[-1])

    def agree(self, ranks: Ranks) -> list[BatchReduction]:
        """The new reductions of all ranks, which apply on every rank from the next step on."""
        own, self._new = self._new, []
        found = ranks.gathered(own)
        self._reductions += [one for rank, new in enumerate(found) if rank != ranks.rank for one in new]
        return [one for new in found for one in new]
