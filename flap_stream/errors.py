"""Every error that this package raises on purpose.

    FlapStreamError                 exit code 1: a rerun may succeed
    ├── RunLocked                   another process is writing the run directory
    ├── CorruptRun                  a committed file differs from what the journal recorded
    ├── StorageFailure              the disk or the file system failed, or is full
    ├── RankLost                    another process of the same job exited unexpectedly
    ├── HubFailure                  the Hub cannot be reached, or reports a failure
    └── InvalidInput                exit code 2: wrong use, or an input that cannot be pruned
        ├── InvalidOption           an option is out of range or contradicts another
        ├── InvalidModel            the model does not exist or cannot be read
        │   ├── UnsupportedModel    the model can be read, but this package does not prune it
        │   └── CorruptCheckpoint   missing, truncated or inconsistent tensors
        ├── InvalidText             text or tokens that cannot be used
        ├── NotPlain                not a regular file (a FIFO, device or link), or far too large
        ├── NonFinite               NaN or infinity in weights or hidden states
        ├── ShapeMismatch           statistics, plans or tensors of different sizes were combined
        ├── RunMismatch             the run directory belongs to another model, text or options
        ├── OutputConflict          the output path holds something that this run did not write
        ├── UnsuitableFileSystem    the file system lacks what a run directory needs
        ├── InsufficientSpace       not enough disk space
        └── InsufficientMemory      the job cannot run within the allowed memory

A message says what was found, what was expected, where, and what to do next.
"""

import errno


class FlapStreamError(Exception):
    """Base of all errors raised on purpose; the command line prints it as one line."""

    exit_code = 1
    resumes = False  # whether rerunning a resumable job continues it after this error


class RunLocked(FlapStreamError):
    """Another process holds the run directory's lock."""


class CorruptRun(FlapStreamError):
    """A committed file of the run directory is missing or altered."""


class RankLost(FlapStreamError):
    """Another rank of the job exited unexpectedly."""

    resumes = True


class HubFailure(FlapStreamError):
    """The Hub cannot be reached or reports a failure, and its local cache does not hold what is needed."""


class StorageFailure(FlapStreamError):
    """The operating system failed or refused an operation on a file; its OSError is the cause."""

    resumes = True

    @classmethod
    def of(cls, error: OSError, path: object = None) -> "StorageFailure":
        """The failure in a sentence. path: the file, if the error does not name it."""
        where, reason = error.filename or path or "a file", error.strerror or str(error) or type(error).__name__
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return cls(f"the disk of {where} is full ({reason}); make room and run the same command again")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return cls(f"{where} is not accessible ({reason}); grant access or name another place, then run again")
        return cls(f"{where} failed ({reason}); check the disk, then run the same command again")


class InvalidInput(FlapStreamError):
    """Wrong use, or an input that cannot be pruned."""

    exit_code = 2


class InvalidOption(InvalidInput):
    """An option's value is out of range or contradicts another option."""


class InvalidModel(InvalidInput):
    """The model does not exist or cannot be read."""


class UnsupportedModel(InvalidModel):
    """The model can be read, but not pruned by this package."""


class CorruptCheckpoint(InvalidModel):
    """A shard or a tensor of the checkpoint is missing, truncated or inconsistent."""


class InvalidText(InvalidInput):
    """Calibration or evaluation text, or tokens, that cannot be used."""


class NotPlain(InvalidInput):
    """A FIFO, device, link or far too large file stands where a regular file is expected."""


class NonFinite(InvalidInput):
    """NaN or infinity in weights or hidden states."""


class ShapeMismatch(InvalidInput):
    """Statistics, plans or tensors of different sizes were combined."""


class RunMismatch(InvalidInput):
    """The run directory was made for another model, text or options."""


class OutputConflict(InvalidInput):
    """The output path holds something that this run did not write."""


class UnsuitableFileSystem(InvalidInput):
    """The file system lacks what a run directory needs."""


class InsufficientSpace(InvalidInput):
    """What must be written does not fit on the disk."""


class InsufficientMemory(InvalidInput):
    """The job cannot run within the allowed memory."""


def first_line(error: Exception) -> str:
    """The first line of what a library's error says, for a message; its class if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
