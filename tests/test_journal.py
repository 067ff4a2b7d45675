"""The journal: what is read back, and what damage is noticed."""

from pathlib import Path

import pytest

from flap_stream.errors import CorruptRun
from flap_stream.storage.journal import Journal


def _journal(path: Path, entries: int) -> Journal:
    journal = Journal(path)
    for i in range(entries):
        journal.append("statistics", f"{i:04d}", digest=f"digest {i}", weights="")
    return journal


def test_a_journal_reads_back_what_was_appended(tmp_path: Path) -> None:
    written = _journal(tmp_path / "journal", 3)
    written.append("plan", "plan", digest="first")
    written.append("plan", "plan", digest="second")
    read = Journal(tmp_path / "journal")
    assert read.entries == written.entries
    assert [entry["name"] for entry in read.of_kind("statistics")] == ["0000", "0001", "0002"]
    newest = read.find("plan", "plan")
    assert newest is not None and newest["digest"] == "second"
    assert read.find("plan", "0000") is None


def test_a_journal_without_a_file_is_empty(tmp_path: Path) -> None:
    assert Journal(tmp_path / "journal").entries == []


def test_a_last_line_torn_anywhere_is_dropped_and_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    _journal(path, 2)
    whole = path.read_bytes()
    start_of_last = whole.index(b"\n") + 1
    for cut in range(start_of_last + 1, len(whole)):
        path.write_bytes(whole[:cut])
        journal = Journal(path)
        assert [entry["name"] for entry in journal.entries] == ["0000"]
        assert path.read_bytes() == whole[:cut]  # reading repairs nothing
        journal.append("statistics", "0001", digest="digest 1", weights="")
        assert path.read_bytes() == whole


def test_a_last_line_of_zeros_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    _journal(path, 2)
    with open(path, "ab") as file:
        file.write(b"\0" * 40)
    assert len(Journal(path).entries) == 2


def test_a_damaged_line_before_the_last_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    _journal(path, 3)
    whole = path.read_bytes()
    first_line = whole.index(b"\n")
    for position in (0, 10, 16, 17, first_line - 1):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(CorruptRun, match="journal is damaged at byte 0"):
            Journal(path)
