"""Checks, before any long work, that a result can be written where it is wanted."""

import os
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flap_stream.errors import OutputConflict, StorageFailure
from flap_stream.storage import files

MARK = ".flap-stream-job"  # names the job that is writing a directory
_MOUNTS = Path("/proc/self/mountinfo")
_LONGEST_NAME = 255 - len(files.PARTIAL_SUFFIX)  # bytes


def require_name(place: Path) -> None:
    """Raise OutputConflict unless a path ends in a name that leaves room for the suffix of unfinished files."""
    if place.name in ("", ".."):
        raise OutputConflict(f"{place} does not end in a name; name a place in it: {place / 'out'}")
    if not has_room(place.name):
        raise OutputConflict(f"the name {place.name} is too long; choose one of at most {_LONGEST_NAME} bytes")


def has_room(name: str) -> bool:
    """Whether a name leaves room for the suffix of unfinished files."""
    return len(os.fsencode(name)) <= _LONGEST_NAME


def require_place(place: Path) -> None:
    """Raise OutputConflict unless a finished file or directory can be renamed to `place`.

    Raises StorageFailure if its parent directory is not writable.
    """
    require_name(place)
    if _is_mount(place):
        raise OutputConflict(
            f"{place} is a mount point, to which a finished result cannot be renamed; name a place in it: "
            f"{place / 'out'}"
        )
    parent = files.existing_directory(place.absolute().parent)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise StorageFailure(f"{parent} is not writable; grant access or name another place, then run again")


def _is_mount(place: Path) -> bool:
    """Whether something is mounted there, including another directory of the same file system."""
    if not place.is_dir():
        return False
    if place.is_mount():
        return True
    lines = _MOUNTS.read_text(errors="surrogateescape").splitlines() if _MOUNTS.exists() else []
    mounts = {re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), line.split()[4]) for line in lines}
    return str(place.resolve()) in mounts


def require_apart(out: Path, run: Path) -> None:
    """Raise OutputConflict if the run directory is at or inside the output or its unfinished version."""
    place = run.resolve()
    for taken in (out.resolve(), files.partial_path(out).resolve()):
        if place == taken or taken in place.parents:
            raise OutputConflict(f"the run directory {run} is at or inside the output {out}; name another with --run")


def new_mark() -> str:
    """A random mark that identifies a directory that is being written."""
    return secrets.token_hex(16)


def entries_of(entries: Iterable[Mapping[str, Any]], staging: Path) -> list[dict[str, Any]]:
    """Journal entries of the jobs that started a staging directory, oldest first, even if it has been moved.

    Jobs are recognised by the mark in the directory or, where there is none, by its path.
    """
    mark = staging / MARK
    if mark.is_file() and not mark.is_symlink():
        own = mark.read_bytes()[:64].decode(errors="replace")
        return [dict(entry) for entry in entries if entry.get("mark") == own]
    places = {str(staging.absolute()), str(staging.resolve())}
    return [dict(entry) for entry in entries if {entry["place"], os.path.realpath(entry["place"])} & places]
