"""Texts as pieces of bounded size: files, folders of them, and the Hub's texts.

A document is a whole .txt, or a row of anything else. No more than a piece of a .txt and a row of the others is in
memory at once.
"""

import bz2
import codecs
import gzip
import io
import json
import logging
import lzma
import os
import stat
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from flap_stream.errors import InvalidText
from flap_stream.storage import files

logger = logging.getLogger(__name__)

DATASETS = ("wikitext2", "c4", "ptb")
KINDS = (".txt", ".jsonl", ".json", ".parquet")
PACKINGS = (".gz", ".bz2", ".xz", ".zst")
CONVERSATIONS = ("messages", "conversations")

_SAME_KIND = {".ndjson": ".jsonl"}
_NOT_TEXT = ("readme", "license", "licence", "notice", "citation", "dataset_info", "state.json")
_TEXT_COLUMNS = ("text", "content")
_PIECE_CHARS = 1 << 16
_LONGEST_ROW = 1 << 26  # characters
_PARQUET_ROWS = 256
_C4_EVALUATION_DOCUMENTS = 1100


class _HubFile(NamedTuple):
    """A file of a data set on the Hub."""

    repository: str
    name: str
    column: str
    revision: str | None = None


# Splits for calibration and for evaluation: lib/data.py of the released code.
_WIKITEXT = "Salesforce/wikitext", "wikitext-2-raw-v1/{}-00000-of-00001.parquet", "text"
_PTB = "ptb-text-only/ptb_text_only", "penn_treebank/{}/0000.parquet", "sentence"
_HUB_FILES = {
    "wikitext2": [_HubFile(_WIKITEXT[0], _WIKITEXT[1].format(split), _WIKITEXT[2]) for split in ("train", "test")],
    "ptb": [
        _HubFile(_PTB[0], _PTB[1].format(split), _PTB[2], "refs/convert/parquet") for split in ("train", "validation")
    ],
    "c4": [
        _HubFile("allenai/c4", f"en/c4-{split}.json.gz", "text")
        for split in ("train.00000-of-01024", "validation.00000-of-00008")
    ],
}

Render = Callable[[list[dict[str, Any]]], str]
Piece = tuple[bool, str]  # whether it begins a document, and its text


@dataclass(frozen=True)
class Reading:
    """How rows become text.

    column: the one to take; None finds it. chat_template: `auto`, `always` or `never`, for conversations.
    render: a conversation as text; a row that needs it where there is none is refused.
    """

    column: str | None = None
    chat_template: str = "auto"
    render: Render | None = None


def check_sources(sources: Sequence[str], evaluation: bool) -> None:
    """Raise InvalidText for what can be seen to be unusable without reading any of it."""
    for source in sources:
        if source == "c4" and not evaluation and len(sources) > 1:
            raise InvalidText("c4 is sampled document by document; name it alone as --calibration")
        if source not in DATASETS:
            text_files(Path(source))


def fetch(sources: Sequence[str], evaluation: bool) -> None:
    """Bring what is named of the Hub's texts into its cache; they are small beside a model."""
    for source in sources:
        if source in DATASETS:
            _fetched(source, evaluation)


def joined(sources: Sequence[str], evaluation: bool, reading: Reading) -> Iterator[str]:
    """The documents of all sources in pieces, with what the released code puts between two of them."""
    separator, is_first = "\n\n" if evaluation else " ", True
    for source in sources:
        for begins, piece in _pieces(source, evaluation, reading):
            if begins and not is_first:
                yield separator
            is_first = False
            yield piece


def text_files(path: Path) -> list[Path]:
    """The text files that a path names, itself or those in a folder.

    Raises InvalidText if there is none, or something that is not a plain file.
    """
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if _is_text_of(path, file))
        if not found:
            raise InvalidText(f"directory {path} holds no {', '.join(KINDS)} file (hidden files and READMEs aside)")
        return found
    if not path.exists():
        raise InvalidText(f"no such text: {path} is neither a file, a directory, nor one of {', '.join(DATASETS)}")
    if kind_of(path) is None:
        raise InvalidText(
            f"{path} is none of {', '.join(KINDS)} (as they are or as {', '.join(PACKINGS)}), .npy or a directory; "
            "convert it to one"
        )
    if not path.is_file():
        raise InvalidText(f"{path} is not a plain file; save the text as one first")
    return [path]


def kind_of(path: Path) -> str | None:
    """One of KINDS, by the name without what it is packed with; None for anything else."""
    *_, kind = ["", *(_SAME_KIND.get(suffix.lower(), suffix.lower()) for suffix in _unpacked(path).suffixes)]
    packed = _unpacked(path) != path
    return kind if kind in KINDS and not (packed and kind == ".parquet") else None


def _unpacked(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in PACKINGS else path


def _is_text_of(folder: Path, file: Path) -> bool:
    inner = file.relative_to(folder).parts
    is_hidden = any(part.startswith(".") for part in inner)
    is_about = file.name.lower().startswith(_NOT_TEXT)
    return kind_of(file) is not None and not is_hidden and not is_about and file.is_file()


def _pieces(source: str, evaluation: bool, reading: Reading) -> Iterator[Piece]:
    if source not in DATASETS:
        for path in text_files(Path(source)):
            yield from _file_pieces(path, reading)
        return
    path, column = _fetched(source, evaluation)
    rows = _file_pieces(path, Reading(column))
    yield from islice(rows, _C4_EVALUATION_DOCUMENTS) if source == "c4" else rows


def _fetched(source: str, evaluation: bool) -> tuple[Path, str]:
    """A Hub text's file and its column."""
    from huggingface_hub import hf_hub_download

    file = _HUB_FILES[source][evaluation]
    try:
        found = hf_hub_download(file.repository, file.name, repo_type="dataset", revision=file.revision)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidText(f"{source} cannot be had from the Hub ({reason}); give a local text file instead") from error
    return Path(found), file.column


def _file_pieces(path: Path, reading: Reading) -> Iterator[Piece]:
    kind = kind_of(path)
    if kind == ".txt":
        with _opened(path) as file:
            begins = True
            while (piece := file.read(_PIECE_CHARS)) or begins:
                yield begins, piece
                begins = False
        return
    for document in _documents(path, kind, reading):
        yield True, document


def _documents(path: Path, kind: str | None, reading: Reading) -> Iterator[str]:
    """A row is a document; one without a value is left out, of a list of strings each is one."""
    left_out = 0
    for where, value in _parquet_values(path, reading) if kind == ".parquet" else _json_values(path, kind, reading):
        found = _texts_of(value, where, reading)
        left_out += not found
        yield from found
    if left_out:
        logger.warning("%s: %d rows without a text are left out", path, left_out)


def _texts_of(value: Any, where: str, reading: Reading) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise InvalidText(f"{where} holds bytes that are not UTF-8 text; convert that column") from error
    if isinstance(value, str):
        return [_without_lone_surrogates(value)]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return [_without_lone_surrogates(item) for item in value]
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return [_conversation(value, where, reading)]
    raise InvalidText(f"{where} is {type(value).__name__}, expected a string; name another with --text-column")


def _without_lone_surrogates(text: str) -> str:
    """JSON can hold halves of a pair, no encoding of Unicode can."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _conversation(turns: list[dict[str, Any]], where: str, reading: Reading) -> str:
    if reading.chat_template == "never" or reading.render is None:
        raise InvalidText(f"{where} is a conversation, which --chat-template {reading.chat_template} leaves out")
    roles = {"human": "user", "gpt": "assistant"}  # of ShareGPT, which calls its turns `from` and `value`
    own = [
        {"role": roles.get(turn["from"], turn["from"]), "content": turn.get("value")}
        if isinstance(turn.get("from"), str)
        else turn
        for turn in turns
    ]
    try:
        return reading.render(own)
    except InvalidText as error:
        raise InvalidText(f"{where}: {error}") from error


def _column(names: dict[str, bool], where: str, path: Path, reading: Reading) -> str:
    """The column to take. names: all there are, and whether each holds strings."""
    strings = [name for name, is_string in names.items() if is_string]
    chats = [name for name in CONVERSATIONS if name in names]
    if reading.column is not None:
        choices = [reading.column]
    elif reading.chat_template == "always":
        choices = chats
    else:
        alone = strings if len(strings) == 1 else []
        choices = [*_TEXT_COLUMNS, *(() if reading.chat_template == "never" else chats), *alone]
    for name in choices:
        if name in names:
            if name != "text":
                logger.info("%s: the text is the column %s", path, name)
            return name
    wanted = reading.column or (CONVERSATIONS[0] if reading.chat_template == "always" else "text")
    there = ", ".join(names) or "nothing"
    raise InvalidText(f'{where} has no "{wanted}" field, but {there}; name the one to take with --text-column')


def _json_values(path: Path, kind: str | None, reading: Reading) -> Iterator[tuple[str, Any]]:
    """Where each row is, and its text column's value; a row that is a string is that value itself."""
    column = None
    with _opened(path) as file:
        for number, row in _json_lines(file, path) if kind == ".jsonl" else _json_rows(file, path):
            where = f"{path} {'line' if kind == '.jsonl' else 'row'} {number}"
            if isinstance(row, str):
                yield where, row
                continue
            if not isinstance(row, dict):
                raise InvalidText(f'{where} is no JSON object with a "text" field')
            if column is None:
                column = _column({name: isinstance(row[name], str) for name in row}, where, path, reading)
            if column not in row:
                raise InvalidText(f'{where} has no "{column}" field, which rows before it have')
            yield f'{where}: "{column}"', row[column]


def _json_lines(file: TextIO, path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    while line := file.readline(_LONGEST_ROW):
        number += 1
        if len(line) == _LONGEST_ROW:
            raise InvalidText(f"{path} line {number} is longer than {_LONGEST_ROW:,} characters; divide it")
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InvalidText(f'{path} line {number} is no JSON object with a "text" field') from error


def _json_rows(file: TextIO, path: Path) -> Iterator[tuple[int, Any]]:
    """Elements of an array, or values one after another, each read by itself."""
    decoder, buffer, number, in_array = json.JSONDecoder(), "", 0, False
    size = _PIECE_CHARS
    while True:
        buffer = buffer.lstrip(" \t\r\n,") if in_array or not number else buffer.lstrip(" \t\r\n")
        if not number and not in_array and buffer.startswith("["):
            in_array, buffer = True, buffer[1:]
            continue
        if in_array and buffer.startswith("]"):
            return
        try:
            value, end = decoder.raw_decode(buffer) if buffer else (None, 0)
        except (ValueError, RecursionError):
            value, end = None, 0
        if end:
            number, buffer, size = number + 1, buffer[end:], _PIECE_CHARS
            yield number, value
            continue
        more = file.read(size)
        if not more and not buffer and not in_array:
            return
        if not more or len(buffer) > _LONGEST_ROW:
            raise InvalidText(f'{path} row {number + 1} is no JSON object with a "text" field, or is cut short')
        buffer, size = buffer + more, 2 * size  # a long row is not decoded anew for every piece of it


def _parquet_values(path: Path, reading: Reading) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = {field.name: _is_string(pyarrow, field.type) for field in file.schema_arrow}
            column, number = _column(names, str(path), path, reading), 0
            for batch in file.iter_batches(_PARQUET_ROWS, columns=[column], use_threads=False):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield f'{path} row {number}: "{column}"', value
    except (OSError, KeyError, ValueError, pyarrow.ArrowException) as error:
        raise InvalidText(f"{path} cannot be read as parquet: {error}") from error


def _is_string(pyarrow: Any, kind: Any) -> bool:
    inner = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return any(getattr(pyarrow.types, f"is_{name}")(inner) for name in ("string", "large_string", "string_view"))


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """A text file, unpacked and decoded: UTF-8, or UTF-16 or 32 by its beginning, with or without a byte order mark.

    Raises InvalidText for what is not, or no longer, one.
    """
    try:
        with _open_bytes(path) as raw, io.BufferedReader(raw, _PIECE_CHARS) as data:  # type: ignore[type-var]
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


def _open_bytes(path: Path) -> BinaryIO:
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for a writer
        raise InvalidText(f"{path} is not a plain file; save the text as one first")
    packing = path.suffix.lower()
    if packing == ".zst":
        import pyarrow

        _require_whole_frames(path)
        return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    files.require_plain(path, may_have_holes=False)
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(packing, open)(path, "rb")


def _require_whole_frames(path: Path) -> None:
    """Raise EOFError for a .zst that is cut short, which pyarrow reads without a word (RFC 8878, section 3.1)."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise EOFError("it is empty")
        while file.tell() < size:
            magic = int.from_bytes(file.read(4), "little")
            if magic & ~0xF == 0x184D2A50:  # to be skipped
                file.seek(int.from_bytes(file.read(4), "little"), os.SEEK_CUR)
                continue
            if magic != 0xFD2FB528:
                raise EOFError("it is no Zstandard file")
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
                raise EOFError("it is cut short")


class C4Documents(Sequence[str]):
    """The documents of the C4 file that the released code samples, any of them at hand.

    They lie unpacked in a nameless file beside the Hub's cache, about 0.8 GB.
    """

    def __init__(self) -> None:
        from huggingface_hub.constants import HF_HUB_CACHE

        path, _ = _fetched("c4", evaluation=False)
        self._file = tempfile.TemporaryFile(dir=HF_HUB_CACHE)  # noqa: SIM115
        self._starts = array("q", [0])
        with _open_bytes(path) as packed:
            for line in packed:
                self._file.write(line)
                self._starts.append(self._starts[-1] + len(line))

    def __enter__(self) -> "C4Documents":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: Any) -> str:
        self._file.seek(self._starts[index])
        return json.loads(self._file.readline())["text"]
