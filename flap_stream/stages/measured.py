"""What a call took, measured stage by stage."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from flap_stream.engine.memory import give_back_heap
from flap_stream.engine.placement.prediction import Placement
from flap_stream.engine.ranks import Ranks
from flap_stream.progress import peak_device_allocated_bytes, peak_device_bytes, peak_host_bytes


@dataclass
class Measured:
    """What a call took: seconds per stage, bytes read from the model and written to the output, peak memory.

    peak_device_bytes: what torch reserved. peak_device_allocated_bytes: what tensors took of it.
    device: the device the layers ran on; empty if they did not run.
    placement: how the layers ran, and the predicted peaks; None if they did not run.
    With several ranks, peaks are those of the rank with the largest and bytes are totals; node_bytes_read: bytes read
    on each machine.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    bytes_read: int = 0
    node_bytes_read: list[int] = field(default_factory=list)
    bytes_written: int = 0
    peak_host_bytes: int = 0
    peak_device_bytes: int = 0
    peak_device_allocated_bytes: int = 0
    device: str = ""
    placement: Placement | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
            self.peak_host_bytes = peak_host_bytes()
            self.peak_device_bytes = max(self.peak_device_bytes, peak_device_bytes(self.device))
            allocated = peak_device_allocated_bytes(self.device)
            self.peak_device_allocated_bytes = max(self.peak_device_allocated_bytes, allocated)
            give_back_heap()

    def of_all(self, ranks: Ranks, bytes_read: int) -> None:
        """Combine the measurements of all ranks. bytes_read: by this rank."""
        peaks = (self.peak_host_bytes, self.peak_device_bytes, self.peak_device_allocated_bytes)
        found = ranks.gathered((bytes_read, self.bytes_written, *peaks))
        read, written, *most = (list(values) for values in zip(*found, strict=True))
        self.bytes_read, self.bytes_written = sum(read), sum(written)
        self.node_bytes_read = [sum(read[rank] for rank in node) for node in ranks.nodes]
        self.peak_host_bytes, self.peak_device_bytes, self.peak_device_allocated_bytes = map(max, most)
