"""The documents in the rows of JSON Lines, JSON and Parquet files."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from flap_stream.errors import InvalidText

logger = logging.getLogger(__name__)

CONVERSATIONS = ("messages", "conversations")

_TEXT_COLUMNS = ("text", "content")
_READ_CHARS = 1 << 16  # not measured
_LONGEST_ROW = 1 << 26  # characters; far beyond any document, so that a file without line ends is refused early
_PARQUET_ROWS = 256  # per batch; not measured

Render = Callable[[list[dict[str, Any]]], str]


@dataclass(frozen=True)
class Reading:
    """How rows become text.

    column: the one to read; None detects it. chat_template: `auto`, `always` or `never`, for conversations.
    render: turns a conversation into text; None refuses conversations.
    """

    column: str | None = None
    chat_template: str = "auto"
    render: Render | None = None


def json_documents(file: TextIO, path: Path, is_lines: bool, reading: Reading) -> Iterator[str]:
    """Yield the documents of an open JSON file. is_lines: whether each line holds a row. path: for messages.

    Raises InvalidText if rows are not JSON objects or strings, or have no text where it is looked for.
    """
    rows = _json_lines(file, path) if is_lines else _json_rows(file, path)
    return _documents(_json_values(rows, path, "line" if is_lines else "row", reading), path, reading)


def parquet_documents(path: Path, reading: Reading) -> Iterator[str]:
    """Yield the documents of a Parquet file. Raises InvalidText as `json_documents` does."""
    return _documents(_parquet_values(path, reading), path, reading)


def _documents(values: Iterable[tuple[str, Any]], path: Path, reading: Reading) -> Iterator[str]:
    """Yield a document for each row, or for each string of a row that is a list; rows without a value are skipped.

    values: where each row is, and what its text column holds.
    """
    left_out = 0
    for where, value in values:
        found = _texts_of(value, where, reading)
        left_out += not found
        yield from found
    if left_out:
        logger.warning("%s: skipped %d rows without text", path, left_out)


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
    raise InvalidText(f"{where} is {type(value).__name__}, expected a string; name another column with --text-column")


def _without_lone_surrogates(text: str) -> str:
    """Replace lone surrogates, which JSON can hold but no encoding of Unicode can."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _conversation(turns: list[dict[str, Any]], where: str, reading: Reading) -> str:
    if reading.chat_template == "never" or reading.render is None:
        raise InvalidText(f"{where} is a conversation, which --chat-template {reading.chat_template} does not render")
    roles = {"human": "user", "gpt": "assistant"}  # ShareGPT's format has `from` and `value` in each turn
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
    """The column to read. names: all columns, and whether each holds strings."""
    strings = [name for name, is_string in names.items() if is_string]
    chats = [name for name in CONVERSATIONS if name in names]
    if reading.column is not None:
        choices = [reading.column]
    elif reading.chat_template == "always":
        choices = chats
    else:
        only = strings if len(strings) == 1 else []
        choices = [*_TEXT_COLUMNS, *(() if reading.chat_template == "never" else chats), *only]
    for name in choices:
        if name in names:
            if name != "text":
                logger.info("%s: reading the text from column %s", path, name)
            return name
    wanted = reading.column or (CONVERSATIONS[0] if reading.chat_template == "always" else "text")
    there = ", ".join(names) or "nothing"
    raise InvalidText(f'{where} has no "{wanted}" field, but {there}; name the column to read with --text-column')


def _json_values(rows: Iterable[tuple[int, Any]], path: Path, unit: str, reading: Reading) -> Iterator[tuple[str, Any]]:
    """Yield where each row is, and the value of its text column, or the row itself if it is a string."""
    column = None
    for number, row in rows:
        where = f"{path} {unit} {number}"
        if isinstance(row, str):
            yield where, row
            continue
        if not isinstance(row, dict):
            raise InvalidText(f"{where} is neither a JSON object nor a string")
        if column is None:
            column = _column({name: isinstance(row[name], str) for name in row}, where, path, reading)
        if column not in row:
            raise InvalidText(f'{where} has no "{column}" field, which earlier rows have')
        yield f'{where}: "{column}"', row[column]


def _json_lines(file: TextIO, path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    while line := file.readline(_LONGEST_ROW):
        number += 1
        if len(line) == _LONGEST_ROW:
            raise InvalidText(f"{path} line {number} is longer than {_LONGEST_ROW:,} characters; split it")
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InvalidText(f"{path} line {number} is not valid JSON ({error})") from error


def _json_rows(file: TextIO, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the elements of an array, or consecutive values, decoding one at a time."""
    decoder, buffer, number, in_array = json.JSONDecoder(), "", 0, False
    size = _READ_CHARS
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
            number, buffer, size = number + 1, buffer[end:], _READ_CHARS
            yield number, value
            continue
        more = file.read(size)
        if not more and not buffer and not in_array:
            return
        if not more or len(buffer) > _LONGEST_ROW:
            raise InvalidText(f"{path} row {number + 1} is not valid JSON, or is truncated")
        buffer, size = buffer + more, 2 * size  # doubling, so that a long row is not decoded again for each piece


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
