"""Reading bytes of shards with `preadv` into the caller's buffers: nothing is mapped, nothing is kept."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flap_stream.errors import CorruptCheckpoint, StorageFailure
from flap_stream.model.safetensors_format import TensorEntry

_MAX_BUFFERS = 1024  # IOV_MAX on Linux


@dataclass(frozen=True)
class Block:
    """Contiguous bytes of one file: parts `(entry, start, stop)` of tensors, one right after another."""

    file: str
    offset: int
    parts: tuple[tuple[TensorEntry, int, int], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(stop - start for _, start, stop in self.parts)


def coalesce(entries: Sequence[TensorEntry], max_bytes: int) -> list[Block]:
    """Blocks of at most `max_bytes` that cover these tensors, ordered by file and offset."""
    blocks: list[tuple[str, int, list[tuple[TensorEntry, int, int]]]] = []
    end, room = -1, 0
    for entry in sorted(entries, key=lambda e: (e.file, e.offset)):
        start = 0
        while start < entry.nbytes:
            at = entry.offset + start
            if not blocks or blocks[-1][0] != entry.file or at != end or room == 0:
                blocks.append((entry.file, at, []))
                room = max_bytes
            stop = min(entry.nbytes, start + room)
            blocks[-1][2].append((entry, start, stop))
            room -= stop - start
            start, end = stop, entry.offset + stop
    return [Block(file, offset, tuple(parts)) for file, offset, parts in blocks]


class ShardFiles:
    """Descriptors of the shards, opened on first use, shared by threads.

    checksums: crc32c of tensors that have been read, by name. drops: whether what was read leaves the page cache.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self.bytes_read = 0
        self.checksums: dict[str, int] = {}
        self.drops = False

    def read(self, file: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill buffers, one after another, with the bytes of a file from `offset` on.

        Raises CorruptCheckpoint if the file is gone or too short, StorageFailure for other errors of the disk.
        """
        with self._lock:
            if file not in self._descriptors:
                with _failures_of(self._directory / file):
                    self._descriptors[file] = os.open(self._directory / file, os.O_RDONLY)
            descriptor = self._descriptors[file]
            self.bytes_read += sum(len(buffer) for buffer in buffers)
        start, left = offset, [buffer for buffer in buffers if len(buffer)]
        while left:
            with _failures_of(self._directory / file):
                count = os.preadv(descriptor, left[:_MAX_BUFFERS], offset)
            if count == 0:
                raise CorruptCheckpoint(
                    f"{self._directory / file} ended at byte {offset}, inside its tensors; "
                    "it was changed or truncated while in use, so restore it and run again"
                )
            offset += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]
        if self.drops:
            os.posix_fadvise(descriptor, start, offset - start, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close all descriptors."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()


def stamp(path: Path) -> list[int]:
    """Size in bytes and modification time in nanoseconds; empty if the file is gone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return []
    return [status.st_size, status.st_mtime_ns]


@contextmanager
def _failures_of(path: Path) -> Iterator[None]:
    """Raise errors of the operating system as ours, naming the shard."""
    try:
        yield
    except FileNotFoundError as error:
        raise CorruptCheckpoint(
            f"{path} was removed while in use; restore it and run the same command again"
        ) from error
    except OSError as error:
        raise StorageFailure.of(error, path) from error
