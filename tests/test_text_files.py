"""Texts in the forms that people have them in."""

import bz2
import gzip
import json
import logging
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from flap_stream.errors import InvalidText
from flap_stream.text.rows import Reading
from flap_stream.text.sources import joined
from flap_stream.text.sources import text_files as files_of


def read(*paths: Path, **reading: Any) -> str:
    return "".join(joined([str(path) for path in paths], True, Reading(**reading)))


def documents(*paths: Path, **reading: Any) -> list[str]:
    return read(*paths, **reading).split("\n\n")


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def table(path: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\u0085", "\x0c", "\x1c", "\x0b"])
def test_a_line_ends_at_a_line_feed_alone(tmp_path: Path, sign: str) -> None:
    text = f"one{sign}two"
    path = tmp_path / "a.jsonl"
    body = json.dumps({"text": text}, ensure_ascii=False)  # JSON wants control characters escaped, not the others
    path.write_text(f'{body}\r\n\n{{"text": "three"}}', encoding="utf-8")
    assert documents(path) == [text, "three"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_unicode_is_read_in_its_usual_encodings(tmp_path: Path, encoding: str, name: str) -> None:
    text = "Grüße, 世界 🙂"
    body = text if name == "a.txt" else json.dumps({"text": text}, ensure_ascii=False)
    (tmp_path / name).write_bytes(body.encode(encoding))
    assert read(tmp_path / name) == text


def zst(data: bytes) -> bytes:
    return pyarrow.compress(data, "zstd", asbytes=True)


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zst)],
)
def test_packed_files_are_read(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    for name, data in (
        ("a.txt", b"one"),
        ("a.jsonl", b'{"text": "one"}'),
        ("a.ndjson", b'{"text": "one"}'),
        ("a.json", b'[{"text": "one"}]'),
        ("A.TXT", b"one"),
    ):
        path = tmp_path / (name + suffix)
        path.write_bytes(pack(data))
        assert read(path) == "one"
        for rest in (1, 6, 20):
            path.write_bytes(pack(data * 2000)[:-rest])
            with pytest.raises(InvalidText, match=r"cannot be read: "):
                read(path)
        path.write_bytes(b"what is this")
        with pytest.raises(InvalidText, match="cannot be read"):
            read(path)


@pytest.mark.parametrize(
    "body",
    [
        '[{"text": "one"}, {"text": "two"}]',
        '[\n {"text":\n "one"}\n,{"text": "two"} ]\n',
        '{"text": "one"}\n{"text": "two"}\n',  # lines, as C4 has them
        '{"text": "one"}{\n"text": "two"\n}',
        '["one", "two"]',
        '[{"text": ["one", "two"]}]',
        '[{"text": "one", "n": [1, {"a": "]"}]}, {"text": null}, {"text": "two"}]',
    ],
)
def test_json_is_read_as_rows(tmp_path: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text(body)
    assert documents(tmp_path / "a.json") == ["one", "two"]
    monkeypatch.setattr("flap_stream.text.rows._READ_CHARS", 3)  # whatever comes at once
    assert documents(tmp_path / "a.json") == ["one", "two"]


@pytest.mark.parametrize("body", ['[{"text": "one"}', '{"text": "one"}\n{"te', '[{"text": "one"}, oh]', "[1, 2]", "7"])
def test_json_that_is_none_is_refused(tmp_path: Path, body: str) -> None:
    (tmp_path / "a.json").write_text(body)
    with pytest.raises(InvalidText, match=r"a.json row [12] is (not valid JSON, or is|neither a JSON object nor a)"):
        read(tmp_path / "a.json")


def test_parquet_may_have_nulls_lists_bytes_and_dictionaries(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "flap_stream")
    assert documents(table(tmp_path / "n.parquet", text=["one", None, "two"])) == ["one", "two"]
    assert "skipped 1 rows without text" in caplog.text
    assert documents(table(tmp_path / "l.parquet", text=[["one", "two"], [], ["three"]])) == ["one", "two", "three"]
    assert documents(table(tmp_path / "b.parquet", text=[b"one", "zwölf".encode()])) == ["one", "zwölf"]
    words = pyarrow.array(["one", "two", "one"]).dictionary_encode()
    assert documents(table(tmp_path / "d.parquet", other=words, id=[1, 2, 3])) == ["one", "two", "one"]
    with pytest.raises(InvalidText, match=r'b.parquet row 1: "text" holds bytes that are not UTF-8'):
        read(table(tmp_path / "b.parquet", text=[b"\xff\xfe"]))
    with pytest.raises(InvalidText, match=r'i.parquet row 1: "text" is int, expected a string; .* --text-column'):
        read(table(tmp_path / "i.parquet", text=[1, 2]))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_the_column_is_found_or_named(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flap_stream")

    def made(**row: object) -> Path:
        path = tmp_path / f"a{suffix}"
        return lines(path, row) if suffix != ".parquet" else table(path, **{name: [row[name]] for name in row})

    assert read(made(id=1, content="b", text="a")) == "a" and "column" not in caplog.text
    assert read(made(id=1, content="b", title="c")) == "b" and "from column content" in caplog.text
    assert read(made(id=1, body="d")) == "d" and "from column body" in caplog.text
    assert read(made(text="a", body="d"), column="body") == "d"
    with pytest.raises(InvalidText, match=r'has no "text" field, but title, body; name the column .* --text-column'):
        read(made(title="c", body="d"))
    with pytest.raises(InvalidText, match=r'has no "bdy" field, but text, body'):
        read(made(text="a", body="d"), column="bdy")


def test_messages_are_taken_where_there_is_no_text(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hello"}]
    rows = [
        lines(tmp_path / "a.jsonl", {"id": "x", "messages": turns}),
        table(tmp_path / "a.parquet", id=["x"], messages=[turns]),
    ]
    for path in rows:
        assert read(path, render=lambda found: f"<{found[0]['role']}>{found[0]['content']}") == "<user>hello"
    both = lines(tmp_path / "b.jsonl", {"text": "a", "messages": turns})
    assert read(both, render=lambda found: "rendered") == "a"
    assert read(both, render=lambda found: "rendered", chat_template="always") == "rendered"


def test_half_a_pair_of_surrogates_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "\ud83d\ude42 \ud83d half"}')
    assert read(tmp_path / "a.jsonl") == "🙂 \ufffd half"


def test_a_folder_gives_its_texts_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for name in (
        *("b.txt", "deep/a.jsonl", "README.txt", "README.md", "LICENSE.txt", "dataset_info.json", ".hidden.txt"),
        *(".cache/x.txt", "deep/.y/z.txt", "notes.md"),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    os.mkfifo(folder / "pipe.txt")
    assert [str(path.relative_to(folder)) for path in files_of(folder)] == ["b.txt", "deep/a.jsonl"]
    assert documents(folder) == ["b.txt", "deep/a.jsonl"]
    assert read(folder / "README.txt") == "README.txt"  # by its own name it is one


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(InvalidText, match=r"pipe.txt is not a plain file"):
        read(tmp_path / "pipe.txt")


def test_an_empty_text_file_is_a_document_as_before(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("b")
    assert read(tmp_path / "a.txt", tmp_path / "b.txt") == "\n\nb"
    assert "".join(joined([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], False, Reading())) == " b"


def test_a_long_text_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flap_stream.text.sources._PIECE_CHARS", 10)
    (tmp_path / "a.txt").write_text("äöü\r\n" * 50)
    pieces = list(joined([str(tmp_path / "a.txt")] * 2, True, Reading()))
    assert max(map(len, pieces)) <= 10 and "".join(pieces) == "äöü\n" * 50 + "\n\n" + "äöü\n" * 50
