import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flap_stream.errors import StorageFailure
from flap_stream.storage import files


def test_write_committed_returns_the_digest_of_what_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "file"
    digest = files.write_committed(path, [b"one ", memoryview(b"two"), b""])
    assert path.read_bytes() == b"one two"
    assert digest == hashlib.sha256(b"one two").hexdigest() == files.file_digest(path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_chunks_that_are_kept_may_be_hashed_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to the disk early, and what is hashed late, is the same file."""
    monkeypatch.setattr(files, "_WRITEBACK_BYTES", 1000)
    chunks = [os.urandom(700) for _ in range(20)]
    digest = files.write_committed(tmp_path / "file", iter(chunks), kept=4)
    assert (tmp_path / "file").read_bytes() == b"".join(chunks)
    assert digest == hashlib.sha256(b"".join(chunks)).hexdigest()


def test_a_chunk_that_is_not_kept_is_hashed_before_the_next_is_made(tmp_path: Path) -> None:
    buffer = bytearray(1 << 22)

    def chunks() -> Iterator[memoryview]:
        for value in range(4):
            buffer[:] = bytes([value]) * len(buffer)
            yield memoryview(buffer)

    digest = files.write_committed(tmp_path / "file", chunks())
    assert digest == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()


def test_write_committed_takes_views_of_wide_elements(tmp_path: Path) -> None:
    numbers = memoryview(b"12345678").cast("I")
    digest = files.write_committed(tmp_path / "file", [numbers])
    assert (tmp_path / "file").read_bytes() == b"12345678"
    assert digest == hashlib.sha256(b"12345678").hexdigest()


def test_an_older_file_stays_whole_until_the_new_one_is(tmp_path: Path) -> None:
    path, seen = tmp_path / "file", []
    path.write_bytes(b"old")

    def chunks() -> Iterator[bytes]:
        for _ in range(3):
            seen.append(path.read_bytes())
            yield b"new"

    files.write_committed(path, chunks())
    assert seen == [b"old"] * 3
    assert path.read_bytes() == b"new" * 3


def test_a_write_that_fails_leaves_the_older_file_and_can_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def failing() -> Iterator[bytes]:
        yield b"a long beginning"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_committed(path, failing())
    assert path.read_bytes() == b"old"
    assert files.partial_path(path).exists()
    files.write_committed(path, b"new")
    assert path.read_bytes() == b"new"
    assert not files.partial_path(path).exists()


def test_a_file_has_its_name_only_after_its_bytes_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recorded_rename(source: Path, target: Path) -> None:
        events.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_rename)
    path = tmp_path / "file"
    files.write_committed(path, b"bytes")
    assert events == [("fsync", f"{path}.partial"), ("rename", str(path)), ("fsync", str(tmp_path))]


def test_short_writes_of_the_kernel_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    digest = files.write_committed(tmp_path / "file", b"ten bytes!")
    assert (tmp_path / "file").read_bytes() == b"ten bytes!"
    assert digest == hashlib.sha256(b"ten bytes!").hexdigest()


def test_append_adds_at_the_end_of_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(StorageFailure, match="No such file"):
        files.append_committed(path, b"one")
    files.write_committed(path, b"one")
    files.append_committed(path, b"two")
    assert path.read_bytes() == b"onetwo"


def test_commit_rename_replaces_a_file_and_moves_a_directory(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "b").write_bytes(b"old")
    files.commit_rename(tmp_path / "a", tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d").write_bytes(b"inside")
    files.commit_rename(tmp_path / "c", tmp_path / "e")
    assert (tmp_path / "b").read_bytes() == b"new"
    assert (tmp_path / "e" / "d").read_bytes() == b"inside"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "e"]


def test_make_directory_makes_parents_and_takes_one_that_is_there(tmp_path: Path) -> None:
    files.make_directory(tmp_path / "a" / "b" / "c")
    (tmp_path / "a" / "b" / "c" / "file").write_bytes(b"stays")
    files.make_directory(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c" / "file").read_bytes() == b"stays"


def test_make_directory_takes_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files.make_directory(Path("a/b"))
    assert (tmp_path / "a" / "b").is_dir()


def test_sync_tree_reaches_every_file_and_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"1")
    (tmp_path / "d").write_bytes(b"2")
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    files.sync_tree(tmp_path)
    assert sorted(synced) == sorted(str(p) for p in (tmp_path, *tmp_path.rglob("*")))
    assert synced.index(str(tmp_path / "a" / "b" / "c")) < synced.index(str(tmp_path / "a" / "b")) < len(synced) - 1


def test_remove_takes_files_directories_and_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "directory" / "inner").mkdir(parents=True)
    for name in ("file", "directory", "nothing"):
        files.remove(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_remove_takes_a_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_bytes(b"1")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    files.remove(tmp_path / "link")
    files.remove(tmp_path / "dangling")
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "file").exists()


def _tree(path: Path) -> Path:
    (path / "a").mkdir(parents=True)
    (path / "a" / "one").write_bytes(b"1")
    (path / "two").write_bytes(b"22")
    return path


def test_tree_digest_depends_on_names_and_bytes_alone(tmp_path: Path) -> None:
    first, second = _tree(tmp_path / "x"), _tree(tmp_path / "y")
    os.utime(second / "two", (0, 0))
    assert files.tree_digest(first) == files.tree_digest(second)


def test_tree_digest_changes_with_any_byte_or_name(tmp_path: Path) -> None:
    def digest_after(name: str, change: str) -> str:
        tree = _tree(tmp_path / name)
        if change == "byte":
            (tree / "two").write_bytes(b"23")
        elif change == "inner byte":
            (tree / "a" / "one").write_bytes(b"2")
        elif change == "length":
            (tree / "two").write_bytes(b"22\0")
        elif change == "name":
            (tree / "two").rename(tree / "three")
        elif change == "place":
            (tree / "two").rename(tree / "a" / "two")
        elif change == "new":
            (tree / "a" / "empty").touch()
        elif change == "gone":
            (tree / "two").unlink()
        return files.tree_digest(tree)

    changes = ("nothing", "byte", "inner byte", "length", "name", "place", "new", "gone")
    assert len({digest_after(f"tree-{i}", change) for i, change in enumerate(changes)}) == len(changes)


def test_free_bytes_asks_the_nearest_directory_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.free_bytes(tmp_path / "not" / "yet") > 0
    monkeypatch.chdir(tmp_path)
    assert files.free_bytes(Path("not/yet")) > 0
