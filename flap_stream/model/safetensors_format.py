"""The safetensors format: headers are parsed and checked here, once; and written for new files."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flap_stream.errors import CorruptCheckpoint
from flap_stream.model.model_files import require_no_pointer

DTYPE_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
}
WORD_BITS = (2, 4, 8)  # of integers packed into words that can be read
FORWARD_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor's bytes are: `nbytes` bytes at `offset` of `file`, row-major.

    file: name in the checkpoint's directory, or an absolute path.
    encoding: how it is made of other tensors, if it is; dtype, shape and nbytes are then those of what is made, and
    file and offset mean nothing.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    encoding: "Encoding | None" = None

    @property
    def stored(self) -> "tuple[TensorEntry, ...]":
        """The tensors in files that it is made of."""
        return (self,) if self.encoding is None else self.encoding.parts

    @property
    def stored_bytes(self) -> int:
        """Bytes that are read for the whole of it."""
        return sum(part.nbytes for part in self.stored)

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Encoding:
    """How a matrix is made of stored tensors; `decoding.py` makes it.

    codes: the kind of the first of them, one of `decoding.KINDS`.
    parts: the codes; if they are scaled, the scales; of NVFP4 also the divisor of all scales; if `has_offsets`, what
    is subtracted before, for each scale: bytes, or packed as the codes are but by columns.
    block: rows and columns of the matrix that share a scale.
    is_transposed: whether the codes are those of the transposed matrix.
    """

    codes: str
    parts: tuple[TensorEntry, ...]
    block: tuple[int, int] = (1, 1)
    is_transposed: bool = False
    has_offsets: bool = False


class TensorLayout(Protocol):
    """What a header says of a tensor."""

    @property
    def name(self) -> str:
        """Full name in the checkpoint."""

    @property
    def dtype(self) -> str:
        """Dtype code of the format (`BF16`)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""


def read_header(path: Path) -> tuple[list[TensorEntry], str, int]:
    """Entries of a safetensors file by offset, the sha256 of its header, and the file's size in bytes.

    Raises CorruptCheckpoint unless the tensors fill the file exactly, without gaps or overlaps.
    Source: the format section of the safetensors README.
    """
    if not path.is_file():
        raise CorruptCheckpoint(f"shard {path} is missing; download the checkpoint again")
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(64)
        require_no_pointer(path, start)
        file.seek(8)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CorruptCheckpoint(
                f"{path} has {size} bytes, but claims a header of {length}; it is truncated or not a safetensors file"
            )
        raw = file.read(length)
    entries = _parsed(path, raw)
    end = 8 + length
    for entry in entries:
        if entry.offset != end:
            raise CorruptCheckpoint(
                f"tensor {entry.name} in {path} starts at byte {entry.offset}, expected {end}: the header offsets are "
                "inconsistent; download the shard again"
            )
        end += entry.nbytes
    if end != size:
        raise CorruptCheckpoint(f"{path} has {size} bytes, but its header describes {end}; download the shard again")
    return entries, hashlib.sha256(raw).hexdigest(), size


def _parsed(path: Path, raw: bytes) -> list[TensorEntry]:
    """Entries of a header, by offset. raw: its JSON, without the length in front."""
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
        if not isinstance(header, dict):
            raise ValueError("not an object")
        entries = [_entry(path, name, item, 8 + len(raw)) for name, item in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpoint(f"the header of {path} cannot be read ({error}); download the shard again") from error
    return sorted(entries, key=lambda entry: (entry.offset, entry.nbytes))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's members; a repeated key is refused, since readers disagree on which one counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _entry(path: Path, name: str, item: dict[str, Any], data_start: int) -> TensorEntry:
    dtype, shape, (start, stop) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {name} has dtype {dtype!r}, expected one of {', '.join(DTYPE_BYTES)}")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"tensor {name} has sizes or offsets that are not natural numbers")
    if stop - start != prod(shape) * DTYPE_BYTES[dtype]:
        raise ValueError(f"tensor {name} {dtype} {list(shape)} cannot take {stop - start} bytes")
    return TensorEntry(name, path.name, dtype, shape, data_start + start, stop - start)


def safetensors_header(tensors: Sequence[TensorLayout]) -> bytes:
    """Header of a safetensors file, preceded by its length and padded to 8 bytes as the safetensors library does."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    body = json.dumps(header, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body


def row_ranges(indices: np.ndarray, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Byte ranges `(start, stop)` of ascending rows, adjacent rows merged."""
    if len(indices) == 0:
        return
    breaks = np.flatnonzero(np.diff(indices) != 1)
    firsts = indices[np.concatenate(([0], breaks + 1))]
    lasts = indices[np.concatenate((breaks, [len(indices) - 1]))]
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        yield first * row_bytes, (last + 1) * row_bytes
