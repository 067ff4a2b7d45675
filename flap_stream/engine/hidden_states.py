"""Hidden states between two decoder layers, in device memory, host memory or on disk, and their snapshot files."""

import errno
import hashlib
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch

from flap_stream.engine.device import HostCopy, current_stream, lock_pages, new_event, synchronize, unlock_pages
from flap_stream.engine.memory import host_buffer
from flap_stream.engine.ranks import ALONE, Ranks
from flap_stream.errors import CorruptRun, InsufficientSpace
from flap_stream.storage import files

PLACES = ("device", "host", "disk")

_BLOCK_BYTES = 1 << 22  # of snapshots, as read, written and sent between ranks; not measured


def batches(windows: range, batch_size: int) -> Iterator[tuple[int, int]]:
    """Ranges `(start, stop)` of consecutive windows, each of `batch_size` except the last."""
    for start in range(windows.start, windows.stop, batch_size):
        yield start, min(start + batch_size, windows.stop)


@dataclass(eq=False)
class HiddenStates(ABC):
    """Hidden states of all windows, `[sample, token, hidden]`: the inputs of the next decoder layer.

    A layer's inputs are read with `stream` and its outputs written with `put`; `advance` turns outputs into inputs.
    """

    samples: int
    tokens: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def shape(self) -> tuple[int, int, int]:
        """Windows, tokens per window, hidden size."""
        return self.samples, self.tokens, self.hidden_size

    @property
    def nbytes(self) -> int:
        """Bytes of all hidden states."""
        return prod(self.shape) * self.dtype.itemsize

    @abstractmethod
    def stored(self, batch_size: int, windows: range | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the first window and the inputs `[sample, token, hidden]` where they are kept, batch by batch.

        Inputs are valid until the next batch, for copies to the device that are queued until then, too.
        windows: consecutive ones; None is all.
        """

    def stream(self, batch_size: int, windows: range | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """The same, on the device."""
        for start, values in self.stored(batch_size, windows):
            yield start, values.to(self.device, non_blocking=True)

    @abstractmethod
    def put(self, start: int, values: torch.Tensor) -> None:
        """Store the outputs of the windows from `start` on, whose inputs are no longer needed.

        On a CPU, values are read when they are written to a disk, and must stay as they are until then.
        """

    @abstractmethod
    def advance(self) -> None:
        """Make the outputs, all of which have been put, the next layer's inputs."""

    def save(self, path: Path, ranks: Ranks = ALONE, samples: int | None = None) -> str:
        """Write the raw bytes of the inputs of all ranks, in order of ranks, durably to a file; returns their sha256.

        samples: only that many of this rank's windows. Rank 0 writes; the other ranks return an empty string.
        """
        nbytes = self.nbytes if samples is None else self.nbytes // max(self.samples, 1) * samples
        blocks = ranks.in_order(self._blocks(nbytes), _BLOCK_BYTES)
        if ranks.is_first:
            return files.write_committed(path, blocks)
        for _ in blocks:
            raise AssertionError("only rank 0 gets blocks")
        return ""

    def load(self, path: Path, digest: str, ranks: Ranks = ALONE) -> None:
        """Read this rank's inputs from a file that `save` wrote.

        Raises CorruptRun on all ranks if the file's size or sha256 is not the recorded one.
        """
        sizes = ranks.gathered(self.nbytes)
        size = path.stat().st_size if path.is_file() else None
        is_whole = size == sum(sizes) and self._load(path, sum(sizes[: ranks.rank]), ranks.is_first) in (digest, None)
        if not all(ranks.gathered(is_whole)):
            raise CorruptRun(f"snapshot {path} is missing or altered; delete it to resume from an earlier one")

    def _load(self, path: Path, offset: int, reads_all: bool) -> str | None:
        """Read the inputs from byte `offset` of a file on.

        reads_all: read to the end of the file and return the sha256 of what was read.
        """
        digest, at = hashlib.sha256(), 0
        buffer = memoryview(bytearray(_BLOCK_BYTES))
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            while (reads_all or at < self.nbytes) and (count := file.readinto(buffer)):
                if reads_all:
                    digest.update(buffer[:count])
                if at < self.nbytes:
                    self._store(at, buffer[: min(count, self.nbytes - at)])
                at += count
        return digest.hexdigest() if reads_all else None

    @abstractmethod
    def _blocks(self, nbytes: int) -> Iterator[memoryview]:
        """The first `nbytes` raw bytes of the inputs, in blocks valid until the next."""

    @abstractmethod
    def _store(self, offset: int, block: memoryview) -> None:
        """Overwrite the inputs' raw bytes from `offset` on."""

    @abstractmethod
    def close(self) -> None:
        """Free memory and files."""

    def __enter__(self) -> "HiddenStates":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_hidden_states(
    place: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    directory: Path | None = None,
) -> HiddenStates:
    """Hidden states `[sample, token, hidden]` in one of PLACES, without values yet.

    device: where layers run. directory: for files on disk; None is the system's temporary directory.
    Raises InsufficientSpace if they do not fit on the disk.
    """
    if place == "disk" and shape[0]:
        return DiskHiddenStates(*shape, dtype, device, directory)
    memory = device if place == "device" else torch.device("cpu")
    return ResidentHiddenStates(*shape, dtype, device, memory)


@dataclass(eq=False)
class ResidentHiddenStates(HiddenStates):
    """Hidden states in one buffer in device or host memory, overwritten in place."""

    memory: torch.device

    def __post_init__(self) -> None:
        """Allocate the buffer."""
        if self.memory.type == "cpu":
            self.values = host_buffer(self.shape, self.dtype)
            lock_pages(self.device, self.values)
        else:
            self.values = torch.empty(self.shape, dtype=self.dtype, device=self.memory)

    def stored(self, batch_size: int, windows: range | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield batches of the buffer."""
        for start, stop in batches(range(self.samples) if windows is None else windows, batch_size):
            yield start, self.values[start:stop]

    def put(self, start: int, values: torch.Tensor) -> None:
        """Overwrite windows from `start` on; on an accelerator, after what is queued already."""
        self.values[start : start + len(values)].copy_(values, non_blocking=True)

    def advance(self) -> None:
        """Do nothing: outputs have overwritten the inputs."""

    def _bytes(self) -> torch.Tensor:
        synchronize(self.device)  # copies to and from host memory may be queued
        return self.values.view(torch.uint8).view(-1)

    def _blocks(self, nbytes: int) -> Iterator[memoryview]:
        raw = self._bytes()
        for start in range(0, nbytes, _BLOCK_BYTES):
            yield memoryview(raw[start : min(start + _BLOCK_BYTES, nbytes)].cpu().numpy())

    def _store(self, offset: int, block: memoryview) -> None:
        self._bytes()[offset : offset + len(block)].copy_(torch.frombuffer(block, dtype=torch.uint8))

    def close(self) -> None:
        """Free the buffer."""
        if self.memory.type == "cpu":
            synchronize(self.device)
            unlock_pages(self.device, self.values)
        del self.values


@dataclass(eq=False)
class DiskHiddenStates(HiddenStates):
    """Hidden states in two nameless files, inputs and outputs, which are swapped after every layer.

    One batch is read ahead, and a batch is written while the next is computed. The kernel frees the files when the
    process ends, however it ends.
    """

    directory: Path | None

    def __post_init__(self) -> None:
        """Create the files and allocate their space."""
        self._window_bytes = self.nbytes // self.samples
        place = Path(self.directory or tempfile.gettempdir())
        if 2 * self.nbytes > files.free_bytes(place):  # ext4 fills the disk before posix_fallocate fails
            raise self._no_room(place)
        self._files = [tempfile.TemporaryFile(buffering=0, dir=self.directory) for _ in range(2)]  # noqa: SIM115
        self._inputs, self._outputs = (file.fileno() for file in self._files)
        self._buffers: list[torch.Tensor] = []  # two of a batch for inputs, and for an accelerator two for outputs
        self._used: list[_Used] = []  # of those for inputs: copies of the last pass may still be queued
        self._turn = 0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="hidden-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="hidden-write")
        self._written: Future[None] | None = None
        try:
            for file in self._files:
                os.posix_fallocate(file.fileno(), 0, self.nbytes)
        except OSError as error:
            self.close()
            if error.errno != errno.ENOSPC:
                raise
            raise self._no_room(place) from error

    def _no_room(self, place: Path) -> InsufficientSpace:
        return InsufficientSpace(
            f"hidden states on disk need {2 * self.nbytes:,} bytes in {place}, which has less free; free some space, "
            "or allow more memory with --host-memory"
        )

    def stored(self, batch_size: int, windows: range | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield batches of the input file, reading one ahead."""
        self._make_buffers(min(batch_size, self.samples))
        used = self._used
        ranges = list(batches(range(self.samples) if windows is None else windows, batch_size))
        reads = [self._reader.submit(self._read, *each, self._buffers[0], used[0]) for each in ranges[:1]]
        for i, (start, _) in enumerate(ranges):
            values = reads.pop().result()
            if i + 1 < len(ranges):
                following = (i + 1) % 2
                reads.append(self._reader.submit(self._read, *ranges[i + 1], self._buffers[following], used[following]))
            yield start, values
            used[i % 2].mark()

    def _make_buffers(self, windows: int) -> None:
        """Have buffers for batches of so many windows."""
        if self._buffers and len(self._buffers[0]) >= windows:
            return
        self._wait()
        self._drop_buffers()
        count = 2 if self.device.type == "cpu" else 4
        self._buffers = [host_buffer((windows, *self.shape[1:]), self.dtype) for _ in range(count)]
        for buffer in self._buffers:
            lock_pages(self.device, buffer)
        self._used = [_Used(self.device) for _ in range(2)]

    def _drop_buffers(self) -> None:
        synchronize(self.device)
        for buffer in self._buffers:
            unlock_pages(self.device, buffer)
        self._buffers = []

    def _read(self, start: int, stop: int, buffer: torch.Tensor, used: "_Used") -> torch.Tensor:
        used.wait()
        values = buffer[: stop - start]
        self._fill(_raw(values), start * self._window_bytes)
        return values

    def _fill(self, left: memoryview, at: int) -> None:
        """Read from byte `at` of the input file on."""
        while left:
            count = os.preadv(self._inputs, [left], at)
            left, at = left[count:], at + count

    def put(self, start: int, values: torch.Tensor) -> None:
        """Hand windows from `start` on to the writer, once it has written the previous ones."""
        into = None
        if self.device.type != "cpu":
            self._make_buffers(len(values))
            self._turn = 1 - self._turn  # the other one's values may not be on disk yet
            into = self._buffers[2 + self._turn][: len(values)]
        host = HostCopy(values.contiguous(), into)
        self._wait()
        self._written = self._writer.submit(self._write_copy, self._outputs, start * self._window_bytes, host)

    @staticmethod
    def _write_copy(descriptor: int, offset: int, values: HostCopy) -> None:
        DiskHiddenStates._write(descriptor, offset, _raw(values.result()))

    @staticmethod
    def _write(descriptor: int, offset: int, left: memoryview) -> None:
        while left:
            count = os.pwrite(descriptor, left, offset)
            left, offset = left[count:], offset + count

    def _wait(self) -> None:
        if self._written is not None:
            self._written.result()
            self._written = None

    def advance(self) -> None:
        """Swap the files."""
        self._wait()
        self._inputs, self._outputs = self._outputs, self._inputs

    def _blocks(self, nbytes: int) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(_BLOCK_BYTES, nbytes)))
        for start in range(0, nbytes, _BLOCK_BYTES):
            block = buffer[: nbytes - start]
            self._fill(block, start)
            yield block

    def _store(self, offset: int, block: memoryview) -> None:
        self._write(self._inputs, offset, block)

    def close(self) -> None:
        """Stop the threads and free the files."""
        self._reader.shutdown(cancel_futures=True)
        self._writer.shutdown()
        self._drop_buffers()
        for file in self._files:
            file.close()


class _Used:
    """When copies from a buffer are done: marked once they are all queued."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = None if device.type == "cpu" else new_event(device)

    def mark(self) -> None:
        """Say that no more copies will be queued."""
        if self._event is not None:
            self._event.record(current_stream(self._device))

    def wait(self) -> None:
        """Wait for the copies queued before the last mark."""
        if self._event is not None:
            self._event.synchronize()


class Feed:
    """Reads hidden states window by window in parallel with others that run through a layer."""

    def __init__(self, hidden: HiddenStates, batch_size: int, windows: range | None = None) -> None:
        self._device, self._batches = hidden.device, hidden.stored(batch_size, windows)
        self._first, self._stored = next(self._batches, (0, torch.empty(0)))  # a rank may have no windows
        self._values: torch.Tensor | None = None

    def take(self, start: int, count: int) -> torch.Tensor:
        """`count` windows from `start` on, within one batch; must be called in ascending order.

        May be called again for the same windows after the device ran out of memory.
        """
        while start >= self._first + len(self._stored):
            self._values = None
            self._first, self._stored = next(self._batches)
        if self._values is None:
            self._values = self._stored.to(self._device, non_blocking=True)
        return self._values[start - self._first : start - self._first + count]


def _raw(values: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory."""
    return memoryview(values.view(torch.uint8).view(-1).numpy())
