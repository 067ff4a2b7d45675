"""The texts that options name, files and folders and data sets on the Hub, as one stream of pieces of text.

Files are unpacked and decoded. At most a piece of a .txt file, or one row of another kind, is in memory at once (of
.parquet, a batch of rows).
"""

import bz2
import gzip
import io
import json
import lzma
import os
import stat
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from flap_stream.errors import InvalidText
from flap_stream.storage import files
from flap_stream.text.hub_datasets import DATASETS, fetched
from flap_stream.text.rows import Reading, json_documents, parquet_documents

KINDS = (".txt", ".jsonl", ".json", ".parquet")
PACKINGS = (".gz", ".bz2", ".xz", ".zst")

_SAME_KIND = {".ndjson": ".jsonl"}
_NOT_TEXT = ("readme", "license", "licence", "notice", "citation", "dataset_info", "state.json")
_C4_EVALUATION_DOCUMENTS = 1100  # as in the released code
_PIECE_CHARS = 1 << 16  # not measured
_BUFFER_BYTES = 1 << 16  # not measured

Piece = tuple[bool, str]  # whether it begins a document; its text


def check_sources(sources: Sequence[str], evaluation: bool) -> None:
    """Raise InvalidText for sources that are unusable, as far as can be told without reading them."""
    for source in sources:
        if source == "c4" and not evaluation and len(sources) > 1:
            raise InvalidText(
                "c4 is sampled document by document; give it as the only --calibration text, or give every text a "
                "share, as in c4:0.5 code.txt:0.5"
            )
        if source not in DATASETS:
            text_files(Path(source))


def joined(sources: Sequence[str], evaluation: bool, reading: Reading) -> Iterator[str]:
    """Yield the documents of all sources in pieces, with the separators of the released code between documents."""
    separator, is_first = "\n\n" if evaluation and list(sources) != ["c4"] else " ", True
    for source in sources:
        for begins, piece in _pieces(source, evaluation, reading):
            if begins and not is_first:
                yield separator
            is_first = False
            yield piece


def text_files(path: Path) -> list[Path]:
    """The text files that a path names: itself, or those in a folder.

    Raises InvalidText if there is none, or it is not a plain file.
    """
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if _is_text_of(path, file))
        if not found:
            raise InvalidText(
                f"directory {path} holds no {', '.join(KINDS)} file (not counting hidden files and READMEs)"
            )
        return found
    if not path.exists():
        raise InvalidText(f"no such text: {path} is neither a file, a directory, nor one of {', '.join(DATASETS)}")
    if _kind_of(path) is None:
        raise InvalidText(
            f"{path} is not a {', '.join(KINDS)} file (plain or {', '.join(PACKINGS)}), .npy file or directory; "
            "convert it to one"
        )
    if not path.is_file():
        raise InvalidText(f"{path} is not a plain file; save the text to one first")
    return [path]


def _is_text_of(folder: Path, file: Path) -> bool:
    inner = file.relative_to(folder).parts
    is_hidden = any(part.startswith(".") for part in inner)
    is_about = file.name.lower().startswith(_NOT_TEXT)
    return _kind_of(file) is not None and not is_hidden and not is_about and file.is_file()


def _pieces(source: str, evaluation: bool, reading: Reading) -> Iterator[Piece]:
    if source not in DATASETS:
        for path in text_files(Path(source)):
            yield from _file_pieces(path, reading)
        return
    path, column = fetched(source, evaluation)
    rows = _file_pieces(path, Reading(column))
    yield from islice(rows, _C4_EVALUATION_DOCUMENTS) if source == "c4" else rows


def _file_pieces(path: Path, reading: Reading) -> Iterator[Piece]:
    """Yield the documents of a file in pieces. Raises InvalidText if the file cannot be read as text."""
    kind = _kind_of(path)
    if kind == ".parquet":
        yield from ((True, document) for document in parquet_documents(path, reading))
        return
    with _opened(path) as file:
        if kind != ".txt":
            yield from ((True, document) for document in json_documents(file, path, kind == ".jsonl", reading))
            return
        begins = True
        while (piece := file.read(_PIECE_CHARS)) or begins:
            yield begins, piece
            begins = False


def _kind_of(path: Path) -> str | None:
    """One of KINDS, from the file's name without its compression suffix; None for anything else."""
    *_, kind = ["", *(_SAME_KIND.get(suffix.lower(), suffix.lower()) for suffix in _unpacked(path).suffixes)]
    packed = _unpacked(path) != path
    return kind if kind in KINDS and not (packed and kind == ".parquet") else None


def _unpacked(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in PACKINGS else path


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """Open a text file, uncompressed and decoded: UTF-8, UTF-16 or UTF-32, as its first bytes tell, BOM or not.

    Raises InvalidText if it is not one or is damaged.
    """
    with _readable(path), _open_bytes(path) as raw, io.BufferedReader(raw, _BUFFER_BYTES) as data:  # type: ignore[type-var]
        yield io.TextIOWrapper(data, json.detect_encoding(data.peek(4)[:4]))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise InvalidText in the block if a file is damaged or is no text."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InvalidText(
            f"{path} cannot be read as UTF-8 or UTF-16 text ({error.reason}: {error.object[error.start :][:1]!r}); "
            "convert it to UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InvalidText(f"{path} cannot be read: {str(error) or type(error).__name__}") from error


def _open_bytes(path: Path) -> BinaryIO:
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


class C4Documents(Sequence[str]):
    """Random access to the documents of the C4 file that the released code samples.

    They are unpacked to a nameless file in the Hub's cache directory, about 0.8 GB.
    """

    def __init__(self) -> None:
        from huggingface_hub.constants import HF_HUB_CACHE

        path, _ = fetched("c4", evaluation=False)
        self._starts = array("q", [0])
        self._file = tempfile.TemporaryFile(dir=HF_HUB_CACHE)  # noqa: SIM115
        try:
            with _readable(path), _open_bytes(path) as packed:
                for line in packed:
                    self._file.write(line)
                    self._starts.append(self._starts[-1] + len(line))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "C4Documents":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: Any) -> str:
        self._file.seek(self._starts[index])
        return json.loads(self._file.readline())["text"]
