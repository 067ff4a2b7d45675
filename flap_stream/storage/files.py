"""File operations whose results must survive a kill or a power loss.

A file is committed by writing it under a temporary name, fsync, rename, and fsync of its directory. Anything with the
suffix `.partial` is unfinished and may be deleted by its owner. Nothing is written through a link that someone has
put in its place.

A file that is read whole is first checked to be a plain file of limited size.

A failure of the operating system is raised as StorageFailure immediately. Nothing is retried: after a failed fsync the
kernel may have dropped the data, and a second fsync would report success.
"""

import errno
import hashlib
import logging
import os
import shutil
import stat
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from flap_stream.errors import NotPlain, OutputConflict, StorageFailure

logger = logging.getLogger(__name__)

PARTIAL_SUFFIX = ".partial"
MAX_BYTES = 1 << 28  # of a file that is read whole: eight times the largest tokenizer.json known
_READ_WHOLE = (".jinja", ".json", ".md", ".model", ".py", ".tiktoken", ".txt")  # by libraries, in a model's folder
_NOT_READ = ("trainer_state.json",)
_MAX_DEPTH = 16  # of nested directories; those created here have 6
_READ_BYTES = 1 << 22  # at a time; not measured
_WRITEBACK_BYTES = 1 << 26  # after which writing to the disk begins; not measured
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_unsynced: set[int] = set()  # devices already warned about


@contextmanager
def failures_of(path: Path) -> Iterator[None]:
    """Turn any OSError inside into a StorageFailure that names the path, unless the error names another."""
    try:
        yield
    except OSError as error:
        raise StorageFailure.of(error, path) from error


def partial_path(path: Path) -> Path:
    """Where `path` is written until it is complete."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def write_committed(path: Path, chunks: bytes | Iterable[bytes | memoryview], kept: int = 0) -> str:
    """Write a whole file durably, replacing any older one; returns the sha256 of its bytes.

    kept: how many chunks stay as they are when later ones are taken; so many may still wait to be hashed.
    """
    digest, hashed = hashlib.sha256(), deque[Future[None]]()
    temporary, started = partial_path(path), 0
    with (
        failures_of(temporary),
        open_new(temporary) as file,
        ThreadPoolExecutor(1, thread_name_prefix="sha256") as hasher,
    ):
        for chunk in [chunks] if isinstance(chunks, bytes) else chunks:
            hashed.append(hasher.submit(digest.update, chunk))
            write_all(file.fileno(), chunk)
            started = _begin_writeback(file.fileno(), started)
            while len(hashed) > kept:
                hashed.popleft().result()
        os.fsync(file.fileno())
    commit_rename(temporary, path)
    return digest.hexdigest()


def _begin_writeback(descriptor: int, start: int) -> int:
    """Have the kernel begin to write what was written to a file from `start` on, if it is much; returns where it ends.

    By default it would wait for `fsync`, and the disk meanwhile for it.
    """
    end = os.lseek(descriptor, 0, os.SEEK_CUR)
    if end - start < _WRITEBACK_BYTES:
        return start
    with suppress(OSError):  # advice that a file system may not take
        os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)
    return end


def open_new(path: Path) -> BinaryIO:
    """Open a new file for writing. Anything of that name is deleted first; of a link, not what it points to."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except FileExistsError:
        os.unlink(path)
        descriptor = os.open(path, flags, 0o666)
    return open(descriptor, "wb", buffering=0)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte, however few the kernel accepts per call."""
    view = memoryview(data).cast("B")
    while len(view):
        view = view[os.write(descriptor, view) :]


def append_committed(path: Path, data: bytes) -> None:
    """Append bytes to an existing file and wait until they are on the disk."""
    with failures_of(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def commit_rename(source: Path, target: Path) -> None:
    """Rename a file or directory whose contents are already on the disk, and make the new name durable."""
    with failures_of(target):
        os.replace(source, target)
    sync_directory(target.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable; where the file system cannot, warn once.

    Without it a kill still loses nothing, and files lost in a power cut are noticed by their digests and made again.
    """
    try:
        _sync(path, os.O_RDONLY | os.O_DIRECTORY)
    except StorageFailure as failure:
        error = failure.__cause__
        if not isinstance(error, OSError) or error.errno not in _NO_SYNC:
            raise
        device = path.stat().st_dev
        if device not in _unsynced:
            _unsynced.add(device)
            logger.warning(
                "the file system of %s cannot sync directories (%s): a kill still loses nothing, but a power cut may "
                "lose the newest files there",
                path,
                error.strerror,
            )


def sync_tree(path: Path) -> None:
    """Make a directory and everything in it durable, innermost first."""
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


def make_own_directory(path: Path) -> None:
    """Make a directory, or accept an existing one that belongs to this user.

    Raises OutputConflict if it belongs to another user, who could redirect what is written with links.
    """
    make_directory(path)
    owner = path.stat().st_uid
    if owner == os.geteuid():
        return
    with (
        suppress(OSError),
        tempfile.TemporaryFile(dir=path) as file,
    ):  # on some file systems all files have one owner
        if os.fstat(file.fileno()).st_uid == owner:
            return
    raise OutputConflict(f"{path} belongs to another user (uid {owner}); name another place, or remove it")


def remove(path: Path) -> None:
    """Remove a file or a whole directory, if it exists, durably."""
    with failures_of(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.exists() or path.is_symlink():
            path.unlink()
        else:
            return
    sync_directory(path.parent)


def require_plain(path: Path, max_bytes: int | None = None, *, may_have_holes: bool = True) -> None:
    """Raise NotPlain unless `path` is, or links to, a plain file of at most `max_bytes`; nothing else is opened.

    may_have_holes: whether it may be sparse, like a huge file that takes no space on the disk.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise NotPlain(f"{path} is {_kind(status.st_mode)}, where a plain file is expected; replace it or name another")
    if max_bytes is not None and status.st_size > max_bytes:
        raise NotPlain(f"{path} has {status.st_size:,} bytes, where at most {max_bytes:,} are expected; replace it")
    if not may_have_holes and status.st_size > _READ_BYTES:
        with open(path, "rb", buffering=0) as file, suppress(OSError):  # not every file system reports holes
            if os.lseek(file.fileno(), 0, os.SEEK_HOLE) < status.st_size:
                raise NotPlain(f"{path} has holes (parts that were never written), so it cannot be text; name another")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a directory", stat.S_IFLNK: "a link"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_plain(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """All bytes of a file. Raises NotPlain like `require_plain`, OSError if it cannot be read."""
    require_plain(path, max_bytes)
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        return file.read(max_bytes)


def require_plain_folder(path: Path) -> None:
    """Raise NotPlain if a file that libraries read from a model's folder is too large or not a plain file."""
    for file in sorted(path.iterdir()):
        if file.suffix in (*_READ_WHOLE, ".safetensors") and file.exists() and not file.is_dir():
            require_plain(file, MAX_BYTES if file.suffix in _READ_WHOLE and file.name not in _NOT_READ else None)


def require_plain_tree(path: Path) -> None:
    """Raise NotPlain if a directory contains anything but plain files and directories, at any depth."""
    pending = [(path, 0)]
    while pending:
        directory, depth = pending.pop()
        with suppress(FileNotFoundError), os.scandir(directory) as entries:  # a running job may remove some
            for entry in entries:
                if entry.is_dir(follow_symlinks=False) and depth < _MAX_DEPTH:
                    pending.append((Path(entry.path), depth + 1))
                elif not entry.is_file(follow_symlinks=False):
                    raise NotPlain(
                        f"{entry.path} is {_kind(entry.stat(follow_symlinks=False).st_mode)}, which flap-stream never "
                        f"creates there; remove {path}, or name another"
                    )


def file_digest(path: Path) -> str:
    """Sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with failures_of(path), open(path, "rb", buffering=0) as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def tree_digest(path: Path) -> str:
    """Sha256 of the relative names and contents of all files in a directory, sorted by name."""
    return _named_digest({name: file_digest(file) for name, file in _files_below(path).items()})


def contents_digest(contents: Mapping[str, bytes | memoryview]) -> str:
    """The `tree_digest` of a directory with these files."""
    return _named_digest({name: hashlib.sha256(data).hexdigest() for name, data in contents.items()})


def _named_digest(digests: Mapping[str, str]) -> str:
    lines = [f"{name}\0{digests[name]}\n" for name in sorted(digests, key=lambda name: name.split("/"))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def tree_contents(path: Path, max_bytes: int) -> dict[str, bytes]:
    """All files below a directory, by their names relative to it.

    Raises NotPlain unless they are plain files of at most `max_bytes` together.
    """
    contents, left = {}, max_bytes
    for name, file in _files_below(path).items():
        contents[name] = read_plain(file, left)
        left -= len(contents[name])
    return contents


def _files_below(path: Path) -> dict[str, Path]:
    """All files at any depth, by their names relative to a directory."""
    return {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}


def write_tree(path: Path, contents: Mapping[str, bytes | memoryview]) -> None:
    """Write the files of a new directory durably. contents: by their names relative to it."""
    with failures_of(path):
        path.mkdir()  # does not follow a link
        for name, data in contents.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            with open_new(path / name) as file:
                write_all(file.fileno(), data)
    sync_tree(path)


def free_bytes(path: Path) -> int:
    """Free disk space for an ordinary user where `path` is or will be."""
    return shutil.disk_usage(existing_directory(path)).free


def tree_bytes(path: Path) -> int:
    """Disk space taken by everything below a directory; 0 if it does not exist."""
    return sum(file.lstat().st_blocks * 512 for file in path.rglob("*")) if path.is_dir() else 0


def tree_size(path: Path) -> int:
    """Size of a file, or of all files below a directory together, regardless of the disk space they take."""
    inner = path.rglob("*") if path.is_dir() else (path,)
    return sum(status.st_size for status in map(Path.lstat, inner) if not stat.S_ISDIR(status.st_mode))


def existing_directory(path: Path) -> Path:
    """The path itself or its nearest parent that is a directory."""
    return next(place for place in (path, *path.parents) if place.is_dir())
