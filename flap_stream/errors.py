"""Every error that this package raises on purpose.

    FlapStreamError                 exit code 1: a failure that a rerun may pass
    ├── RunLocked                   another process is writing the run directory
    ├── CorruptRun                  a committed file is not what the journal says
    ├── StorageFailure              the disk or the file system failed, or is full
    ├── RankLost                    another process of the same job has ended
    ├── HubFailure                  the Hub cannot be reached, or fails
    └── InvalidInput                exit code 2: wrong use, or an input that cannot be pruned
        ├── InvalidOption           an option's value is out of its range or contradicts another
        ├── InvalidModel            no such model, or not one that can be read
        │   ├── UnsupportedModel    a readable model that this package does not prune
        │   └── CorruptCheckpoint   missing, truncated or lying tensors
        ├── InvalidText             text or tokens that cannot serve
        ├── NotPlain                a FIFO, a device, a link or a giant where a plain file belongs
        ├── NonFinite               NaN or infinity in weights or hidden states
        ├── ShapeMismatch           statistics or plans of different sizes meet
        ├── RunMismatch             the run directory belongs to another model, text or options
        ├── OutputConflict          something that is not ours stands where the output goes
        ├── UnsuitableFileSystem    a file system that lacks what a run directory needs
        ├── InsufficientSpace       not enough room on a disk
        └── InsufficientMemory      no way to run the job within the memory allowed

A message says what was found, what was expected, where, and what to do next.
"""

import errno


class FlapStreamError(Exception):
    """Base of all errors raised on purpose; the command line prints it as one line."""

    exit_code = 1
    goes_on = False  # whether a job that saves what it has done goes on when it is run again


class RunLocked(FlapStreamError):
    """Another process holds the run directory's lock."""


class CorruptRun(FlapStreamError):
    """A committed file of the run directory is missing or altered."""


class RankLost(FlapStreamError):
    """Another rank of the job has ended without saying why."""

    goes_on = True


class HubFailure(FlapStreamError):
    """The Hub cannot be reached or answers with a failure of its own, and its cache does not serve."""


class StorageFailure(FlapStreamError):
    """The operating system failed or refused an operation on a file; its OSError is the cause."""

    goes_on = True

    @classmethod
    def of(cls, error: OSError, path: object = None) -> "StorageFailure":
        """The failure in a sentence. path: what was worked on, where the error itself does not say."""
        where, reason = error.filename or path or "a file", error.strerror or str(error) or type(error).__name__
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return cls(f"the disk of {where} is full ({reason}); make room and run the same command again")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return cls(f"{where} is out of bounds ({reason}); give access to it or name another place, then run again")
        return cls(f"{where} failed ({reason}); see to the disk, then run the same command again")


class InvalidInput(FlapStreamError):
    """Wrong use, or an input that cannot be pruned."""

    exit_code = 2


class InvalidOption(InvalidInput):
    """An option's value is out of its range or contradicts another option."""


class InvalidModel(InvalidInput):
    """The model does not exist or cannot be read."""


class UnsupportedModel(InvalidModel):
    """The model can be read, but not pruned by this package."""


class CorruptCheckpoint(InvalidModel):
    """A shard or a tensor of the checkpoint is missing, truncated or of the wrong form."""


class InvalidText(InvalidInput):
    """Calibration or evaluation text, or tokens, that cannot serve."""


class NotPlain(InvalidInput):
    """A FIFO, a device, a link or a giant stands where a plain file belongs."""


class NonFinite(InvalidInput):
    """NaN or infinity in weights or hidden states."""


class ShapeMismatch(InvalidInput):
    """Statistics, plans or tensors of different sizes were put together."""


class RunMismatch(InvalidInput):
    """The run directory was made for another model, text or options."""


class OutputConflict(InvalidInput):
    """Something that this run did not make stands where its output goes."""


class UnsuitableFileSystem(InvalidInput):
    """The file system lacks what a run directory needs."""


class InsufficientSpace(InvalidInput):
    """What has to be written does not fit on the disk."""


class InsufficientMemory(InvalidInput):
    """No way to run the job keeps within the memory allowed."""
