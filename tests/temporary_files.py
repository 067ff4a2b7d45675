"""Where tests have their files: in memory, where there is room for them.

They are small, many and soon removed, of which a disk's journal made a fifth of the time of a tiny job. What a killed
process has written stays in memory as it does in the kernel's cache of a disk. Another place is named by TMPDIR.
"""

import os
import shutil
import tempfile
from multiprocessing.util import Finalize
from pathlib import Path

MEMORY, ROOM = Path("/dev/shm"), 8 << 30


def _takes_files(place: Path) -> bool:
    """Whether there is room at a place, for programs too."""
    if not os.access(place, os.W_OK):
        return False
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize > ROOM and not found.f_flag & os.ST_NOEXEC


def remove_at_exit() -> None:
    """Give the memory back when this process ends, if it was the one that took it."""
    if FOLDER is not None:  # after multiprocessing has removed what it had there
        Finalize(None, shutil.rmtree, (FOLDER,), {"ignore_errors": True}, exitpriority=-200)


FOLDER: str | None = None
if "TMPDIR" not in os.environ and _takes_files(MEMORY):
    FOLDER = tempfile.mkdtemp(prefix="flap-stream-tests-", dir=MEMORY)
    os.environ["TMPDIR"] = tempfile.tempdir = FOLDER  # workers and commands find it in the environment
