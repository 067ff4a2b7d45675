"""The lock of a run directory, which prevents two jobs from writing it at the same time."""

import errno
import fcntl
import os
import socket
import stat
from pathlib import Path

from flap_stream.errors import NotPlain, RunLocked, StorageFailure, UnsuitableFileSystem
from flap_stream.storage import files

LOCK_NAME = "lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK)


def acquire_lock(path: Path) -> int:
    """A file descriptor that holds the lock of the run directory `path` until it is closed or the process ends.

    Raises RunLocked, naming the process that holds it, NotPlain if the lock file is a link, UnsuitableFileSystem if the
    file system does not support locks.
    """
    file = path / LOCK_NAME
    if file.is_symlink():
        raise NotPlain(f"{file} is a link, which flap-stream never creates there; remove {path}")
    with files.failures_of(file):
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    try:
        status = os.fstat(lock)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:  # writing to it would change another file
            raise NotPlain(f"{file} is not a plain file with a single name; remove {path}, or name another directory")
        _take(lock, path)
        if not file.exists() or not os.path.samestat(status, file.stat()):
            raise RunLocked(f"{path} has just been removed by another process; run the same command again")
        with files.failures_of(file):
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _take(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
        raise RunLocked(f"{path} is in use by {holder}; wait for it or name another directory") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise StorageFailure.of(error, path / LOCK_NAME) from error
        raise UnsuitableFileSystem(
            f"the file system of {path} has no file locks ({error.strerror}), without which two jobs could write to "
            "the same run directory; put it on another disk (for prune: --run DIR)"
        ) from error
