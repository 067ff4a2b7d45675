"""Where a stage ran out of memory and continued with smaller batches, which a resumed run repeats for the same bits."""

import sys
from dataclasses import dataclass

from flap_stream.storage.journal import Journal


@dataclass(frozen=True)
class BatchReduction:
    """From window `start` of a step on, batches had only `size` windows: larger ones did not fit in memory.

    step: the layer's place in the pass, and which run of it. stop: first window of the next rank in this step.
    """

    step: tuple[int, int]
    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class BatchReductions:
    """The batch reductions of one stage, which a resumed run repeats at the same points."""

    journal: Journal
    stage: str

    def add(self, reduction: BatchReduction) -> None:
        """Record one."""
        layer, run = reduction.step
        where = {"stage": self.stage, "layer": layer, "run": run, "start": reduction.start}
        name = "/".join(map(str, where.values()))
        self.journal.append("batch", name, **where, stop=reduction.stop, size=reduction.size)

    def read(self) -> list[BatchReduction]:
        """All of them, oldest first."""
        return [
            BatchReduction((e["layer"], e["run"]), e["start"], e.get("stop", sys.maxsize), e["size"])
            for e in self.journal.of_kind("batch")
            if e["stage"] == self.stage
        ]
