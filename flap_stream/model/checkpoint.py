"""An open checkpoint: its config and tensor entries, reading its tensors, and their checksums."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import google_crc32c
import numpy as np

from flap_stream.errors import CorruptCheckpoint, UnsupportedModel
from flap_stream.model.model_files import SINGLE_NAME
from flap_stream.model.multimodal import Wrapper
from flap_stream.model.safetensors_format import DTYPE_BYTES, FORWARD_DTYPES, TensorEntry
from flap_stream.model.shard_files import Block, ShardFiles, coalesce, stamp

_READ_THREADS = 2  # not measured
_READ_BYTES = 1 << 25  # of one read; not measured
_GAP_BYTES = 1 << 16  # read in vain rather than in two reads; not measured


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers have been read and checked; its tensors are read on request.

    source: the directory or Hub id that the user named.
    config: of the language model; in a multimodal model, of its text decoder.
    tensors: name to entry, in the order of files and offsets.
    header_digests: shard file to sha256 of its header.
    stamps: shard file to its size in bytes and modification time in nanoseconds when it was opened.
    wrapper: the multimodal model, if there is one; decoder tensors then have a text model's names.
    misplaced: tensors that the index names but no shard holds, to the shard that it names.
    """

    source: str
    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    header_digests: dict[str, str]
    shard_bytes: dict[str, int]
    stamps: dict[str, list[int]]
    _files: ShardFiles = field(repr=False, compare=False)
    wrapper: Wrapper | None = None
    misplaced: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the model: digests of its config and headers, sizes of its shards."""
        whole = self.config if self.wrapper is None else self.wrapper.config
        config = json.dumps(whole, sort_keys=True).encode()
        return {
            "config": hashlib.sha256(config).hexdigest(),
            "headers": self.header_digests,
            "shard_bytes": self.shard_bytes,
        }

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(prod(entry.shape) for entry in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, decoded."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in files."""
        return sum(entry.stored_bytes for entry in self.tensors.values())

    def read_into(self, entry: TensorEntry, buffer: memoryview, start: int = 0) -> None:
        """Fill `buffer` with the tensor's bytes, decoded, from byte `start` on."""
        self.read_ranges(entry, [(start, start + len(buffer))], buffer)

    def read_all(self, requests: Sequence[tuple[TensorEntry, memoryview]], share: tuple[int, int] = (0, 1)) -> None:
        """Fill every buffer with its whole stored tensor; adjacent ones are read together, by several threads.

        share: (i, n) reads every n-th block of bytes, starting with the i-th: about one n-th of all.
        """
        buffers = {entry.name: buffer for entry, buffer in requests}

        def read(block: Block) -> None:
            self.read_block(block, [buffers[entry.name][start:stop] for entry, start, stop in block.parts])

        own, readers = share
        total = sum(entry.nbytes for entry, _ in requests)
        blocks = coalesce([entry for entry, _ in requests], max(1, min(_READ_BYTES, -(-total // readers))))
        with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="pread") as threads:
            list(threads.map(read, blocks[own::readers]))

    def note_checksums(self, requests: Sequence[tuple[TensorEntry, memoryview]]) -> None:
        """Compute the crc32c of whole stored tensors that are in these buffers."""
        for entry, buffer in requests:
            self.note_checksum(entry, 0, buffer)

    def read_block(self, block: Block, buffers: Sequence[memoryview]) -> None:
        """Fill buffers, which together have the size of the block, with its bytes."""
        self._files.read(block.file, block.offset, buffers)

    def note_checksum(self, entry: TensorEntry, start: int, data: memoryview) -> None:
        """Add bytes of a tensor, from byte `start` on, to its crc32c; to be called in order, from byte 0."""
        before = 0 if start == 0 else self._files.checksums[entry.name]
        self._files.checksums[entry.name] = google_crc32c.extend(before, np.frombuffer(data, np.uint8))

    def checksum(self, entries: Sequence[TensorEntry]) -> str:
        """One checksum of tensors, as they are stored, that have been read completely."""
        stored = [part for entry in entries for part in entry.stored]
        lines = sorted(f"{part.name} {self._files.checksums[part.name]:08x}" for part in stored if part.nbytes)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def read_checksum(self, entries: Sequence[TensorEntry]) -> str:
        """Read tensors only to compute their checksum."""
        stored = [part for entry in entries for part in entry.stored]
        buffer = memoryview(bytearray(min(_READ_BYTES, max((part.nbytes for part in stored), default=0))))
        for block in coalesce(stored, len(buffer)) if len(buffer) else ():
            self.read_block(block, [buffer[: block.nbytes]])
            at = 0
            for entry, start, stop in block.parts:
                self.note_checksum(entry, start, buffer[at : at + stop - start])
                at += stop - start
        return self.checksum(entries)

    def require_unchanged(self) -> None:
        """Raise CorruptCheckpoint if a shard is no longer the file that was opened."""
        for file, known in self.stamps.items():
            if stamp(self.directory / file) != known:
                raise CorruptCheckpoint(
                    f"{self.directory / file} was changed or removed while in use; restore it and run the same "
                    "command again, or delete the run directory"
                )

    def drop_from_page_cache(self) -> None:
        """From now on drop what was read from the page cache: for models larger than the memory available for it."""
        self._files.drops = True

    def read_ranges(self, entry: TensorEntry, ranges: Sequence[tuple[int, int]], buffer: memoryview) -> None:
        """Fill `buffer` with byte ranges `(start, stop)` of the tensor, decoded, in ascending order, one after another.

        Ranges with little between them are read together with it: another read would take longer.
        """
        if entry.encoding is not None:
            from flap_stream.model.decoding import read_decoded  # which needs torch

            read_decoded(self._files, entry, ranges, buffer)
            return
        between = memoryview(bytearray(_GAP_BYTES))
        first = at = end = 0
        buffers = list[memoryview]()
        for start, stop in ranges:
            if buffers and start - end > _GAP_BYTES:
                self._files.read(entry.file, entry.offset + first, buffers)
                buffers = []
            if not buffers:
                first = start
            elif start > end:
                buffers.append(between[: start - end])
            buffers.append(buffer[at : at + stop - start])
            at, end = at + stop - start, stop
        if buffers:
            self._files.read(entry.file, entry.offset + first, buffers)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read so far."""
        return self._files.bytes_read

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()


def describe(
    source: str, directory: Path, config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], dtype: str
) -> Checkpoint:
    """A checkpoint of these tensors, all of one dtype, without files: nothing of it can be read."""
    code = next((code for code, name in FORWARD_DTYPES.items() if name == dtype.removeprefix("torch.")), None)
    if code is None:
        raise UnsupportedModel(
            f"{source}/config.json has dtype {dtype}; pruning needs {', '.join(FORWARD_DTYPES.values())}"
        )
    tensors, at = {}, 0
    for name, shape in shapes.items():
        tensors[name] = TensorEntry(name, SINGLE_NAME, code, shape, at, prod(shape) * DTYPE_BYTES[code])
        at += tensors[name].nbytes
    return Checkpoint(source, directory, config, tensors, {}, {}, {}, ShardFiles(directory))
