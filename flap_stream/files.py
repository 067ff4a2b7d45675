"""Every operation on files that must survive a kill or a power loss goes through here.

A file is committed by writing it under a temporary name, fsync, rename, fsync of its directory. Whatever carries the
suffix `.partial` is unfinished and may be deleted by its owner.

A failure of the operating system is raised as StorageFailure at once. Nothing is tried twice: after an fsync that
failed, the kernel may have dropped what was to be written and say that all is well.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from flap_stream.errors import StorageFailure

PARTIAL_SUFFIX = ".partial"
_READ_BYTES = 1 << 22


@contextmanager
def failures_of(path: Path) -> Iterator[None]:
    """Raise StorageFailure, naming the path if the error does not, for any OSError inside."""
    try:
        yield
    except OSError as error:
        raise StorageFailure.of(error, path) from error


def partial_path(path: Path) -> Path:
    """Where `path` is written until it is whole."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def write_committed(path: Path, chunks: bytes | Iterable[bytes | memoryview]) -> str:
    """Write a whole file, durably, replacing any older one; the sha256 of its bytes comes out."""
    digest = hashlib.sha256()
    temporary = partial_path(path)
    with (
        failures_of(temporary),
        open(temporary, "wb", buffering=0) as file,
        ThreadPoolExecutor(1, thread_name_prefix="sha256") as hasher,
    ):
        for chunk in [chunks] if isinstance(chunks, bytes) else chunks:
            hashed = hasher.submit(digest.update, chunk)
            write_all(file.fileno(), chunk)
            hashed.result()
        os.fsync(file.fileno())
    commit_rename(temporary, path)
    return digest.hexdigest()


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte, whatever the kernel takes at a time."""
    view = memoryview(data).cast("B")
    while len(view):
        view = view[os.write(descriptor, view) :]


def append_committed(path: Path, data: bytes) -> None:
    """Add bytes at the end of a file that is there, and wait until they are on the disk."""
    with failures_of(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def commit_rename(source: Path, target: Path) -> None:
    """Rename a file or directory whose contents are on the disk, and make the new name durable."""
    with failures_of(target):
        os.replace(source, target)
    sync_directory(target.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def sync_tree(path: Path) -> None:
    """Make a directory and all that it holds durable, leaves first."""
    for directory, _, names in os.walk(path, topdown=False):
        for name in names:
            _sync(Path(directory, name), os.O_RDONLY)
        sync_directory(Path(directory))


def _sync(path: Path, flags: int) -> None:
    with failures_of(path):
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory and its missing parents, and make their names durable."""
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    for directory in reversed(missing):
        with failures_of(directory):
            directory.mkdir(exist_ok=True)
        sync_directory(directory.parent)


def remove(path: Path) -> None:
    """Remove a file or a whole directory if it is there, and make that durable."""
    with failures_of(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.exists() or path.is_symlink():
            path.unlink()
        else:
            return
    sync_directory(path.parent)


def file_digest(path: Path) -> str:
    """Sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with failures_of(path), open(path, "rb", buffering=0) as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def tree_digest(path: Path) -> str:
    """Sha256 over the relative names and contents of all files in a directory, in order of name."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{file_digest(file)}\n".encode())
    return digest.hexdigest()


def free_bytes(path: Path) -> int:
    """Bytes that an ordinary user can still write where `path` is or will be."""
    return shutil.disk_usage(existing_directory(path)).free


def tree_bytes(path: Path) -> int:
    """Bytes on the disk of all files below a directory; 0 if there is none."""
    return sum(file.lstat().st_blocks * 512 for file in path.rglob("*")) if path.is_dir() else 0


def existing_directory(path: Path) -> Path:
    """The path itself or its nearest parent, whichever is a directory."""
    return next(place for place in (path, *path.parents) if place.is_dir())
