"""Where results go: places that can take one are told from those that cannot before any long work."""

import os
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flap_stream.errors import OutputConflict, StorageFailure
from flap_stream.storage import files

MARK = ".flap-stream-job"  # in a directory that a job has begun to write: which job
_MOUNTS = Path("/proc/self/mountinfo")
_LONGEST_NAME = 255 - len(files.PARTIAL_SUFFIX)  # bytes


def require_name(place: Path) -> None:
    """Raise OutputConflict unless a path ends in a name that has room for the suffix of what is unfinished."""
    if place.name in ("", ".."):
        raise OutputConflict(
            f"{place} has no name of its own for a result to take; name a place in it: {place / 'out'}"
        )
    if not has_room(place.name):
        raise OutputConflict(f"the name {place.name} is too long; give one of at most {_LONGEST_NAME} bytes")


def has_room(name: str) -> bool:
    """Whether a name may be followed by the suffix of what is unfinished."""
    return len(os.fsencode(name)) <= _LONGEST_NAME


def require_place(place: Path) -> None:
    """Raise OutputConflict unless a finished file or directory can be renamed to `place`.

    StorageFailure if the directory that it goes into may not be written.
    """
    require_name(place)
    if _is_mount(place):
        raise OutputConflict(
            f"{place} is a mount point; a finished result is renamed into its place, which cannot be one, so name a "
            f"place in it: {place / 'out'}"
        )
    parent = files.existing_directory(place.absolute().parent)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise StorageFailure(f"{parent} may not be written; give access to it or name another place, then run again")


def _is_mount(place: Path) -> bool:
    """Whether something is mounted there, also a directory of the same file system."""
    if not place.is_dir():
        return False
    if place.is_mount():
        return True
    lines = _MOUNTS.read_text(errors="surrogateescape").splitlines() if _MOUNTS.exists() else []
    mounts = {re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), line.split()[4]) for line in lines}
    return str(place.resolve()) in mounts


def require_apart(out: Path, run: Path) -> None:
    """Raise OutputConflict if the run directory is where the output, or the beginnings of it, will be."""
    place = run.resolve()
    for taken in (out.resolve(), files.partial_path(out).resolve()):
        if place == taken or taken in place.parents:
            raise OutputConflict(f"the run directory {run} lies where the output {out} goes; name another with --run")


def new_mark() -> str:
    """What tells a directory that is being written from all others."""
    return secrets.token_hex(16)


def entries_of(entries: Iterable[Mapping[str, Any]], staging: Path) -> list[dict[str, Any]]:
    """Journal entries of the jobs that began a staging directory, oldest first, wherever it is now.

    The mark that it carries decides; before and after it has one, the place.
    """
    mark = staging / MARK
    if mark.is_file() and not mark.is_symlink():
        own = mark.read_bytes()[:64].decode(errors="replace")
        return [dict(entry) for entry in entries if entry.get("mark") == own]
    places = {str(staging.absolute()), str(staging.resolve())}
    return [dict(entry) for entry in entries if {entry["place"], os.path.realpath(entry["place"])} & places]
