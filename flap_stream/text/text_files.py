"""Text files of every kind: which are read, unpacking and decoding."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from flap_stream.errors import InvalidText
from flap_stream.storage import files

KINDS = (".txt", ".jsonl", ".json", ".parquet")
PACKINGS = (".gz", ".bz2", ".xz", ".zst")

_SAME_KIND = {".ndjson": ".jsonl"}
_BUFFER_BYTES = 1 << 16  # not measured


def kind_of(path: Path) -> str | None:
    """One of KINDS, from the file's name without its compression suffix; None for anything else."""
    *_, kind = ["", *(_SAME_KIND.get(suffix.lower(), suffix.lower()) for suffix in _unpacked(path).suffixes)]
    packed = _unpacked(path) != path
    return kind if kind in KINDS and not (packed and kind == ".parquet") else None


def _unpacked(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in PACKINGS else path


@contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    """Open a text file, uncompressed and decoded: UTF-8, UTF-16 or UTF-32, as its first bytes tell, BOM or not.

    Raises InvalidText if it is not one or is damaged.
    """
    try:
        with open_bytes(path) as raw, io.BufferedReader(raw, _BUFFER_BYTES) as data:  # type: ignore[type-var]
            encoding = json.detect_encoding(data.peek(4)[:4])
            codecs.lookup(encoding)
            yield io.TextIOWrapper(data, encoding)
    except UnicodeDecodeError as error:
        raise InvalidText(
            f"{path} cannot be read as UTF-8 or UTF-16 text ({error.reason}: {error.object[error.start :][:1]!r}); "
            "convert it to UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InvalidText(f"{path} cannot be read: {str(error) or type(error).__name__}") from error


def open_bytes(path: Path) -> BinaryIO:
    """Open a text file, uncompressed. Raises InvalidText if it is not a regular file."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for a writer
        raise InvalidText(f"{path} is not a plain file; save the text to one first")
    packing = path.suffix.lower()
    if packing == ".zst":
        import pyarrow

        _require_whole_frames(path)
        return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    files.require_plain(path, may_have_holes=False)
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(packing, open)(path, "rb")


def _require_whole_frames(path: Path) -> None:
    """Raise EOFError for a truncated .zst, which pyarrow reads without an error (RFC 8878, section 3.1)."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise EOFError("it is empty")
        while file.tell() < size:
            magic = int.from_bytes(file.read(4), "little")
            if magic & ~0xF == 0x184D2A50:  # a skippable frame
                file.seek(int.from_bytes(file.read(4), "little"), os.SEEK_CUR)
                continue
            if magic != 0xFD2FB528:
                raise EOFError("it is not a Zstandard file")
            described = int.from_bytes(file.read(1), "little")
            is_single, has_checksum = described >> 5 & 1, described >> 2 & 1
            content_size = (is_single, 2, 4, 8)[described >> 6]
            file.seek((not is_single) + (0, 1, 2, 4)[described & 3] + content_size, os.SEEK_CUR)
            is_last = 0
            while not is_last and file.tell() < size:
                block = int.from_bytes(file.read(3), "little")
                is_last = block & 1
                file.seek(1 if block >> 1 & 3 == 1 else block >> 3, os.SEEK_CUR)
            file.seek(4 * has_checksum, os.SEEK_CUR)
            if not is_last or file.tell() > size:
                raise EOFError("it is truncated")
