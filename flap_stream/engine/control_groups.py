"""What Linux control groups still let this process take: the tightest limit from its own group up to the root.

Groups are nested (systemd, Slurm, containers), and any of them may have a limit. Both versions are read: in version 1
memory has a hierarchy of its own, in version 2 there is one for everything; a machine may have mounted both.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class _Version:
    """Names of a version's files in a group's directory.

    limits: most bytes that the group may have, or a word for no limit. cached: lines of memory.stat with what of the
    used bytes is given up when others need it, subgroups included.
    """

    limits: tuple[str, ...]
    used: str
    cached: tuple[str, ...]


_VERSIONS = {
    "cgroup": _Version(
        ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
    ),
    # Beyond memory.high nothing is refused, but the process is slowed down until it hardly runs.
    "cgroup2": _Version(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
}


def free_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take by its control groups; None if none of them has a limit.

    root: where /proc and the mounted groups are.
    """
    return min(
        (room for kind, group in groups(root) if (room := _room(_VERSIONS[kind], group)) is not None), default=None
    )


def groups(root: Path = Path("/")) -> Iterator[tuple[str, Path]]:
    """The process's groups in which memory may be counted, with their file system: the innermost of each first."""
    paths = _own_paths(root / "proc/self/cgroup")
    for kind, mounted, point in _mounts(root / "proc/self/mountinfo"):
        if kind in paths:
            top = root / point.relative_to("/")
            below = _below(paths[kind], mounted)
            yield from ((kind, top / part) for part in (below, *below.parents))


def _own_paths(cgroup: Path) -> dict[str, Path]:
    """File system to the process's path in that hierarchy."""
    paths = {}
    for line in _lines(cgroup):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            paths["cgroup2"] = Path(path)
        elif "memory" in controllers.split(","):
            paths["cgroup"] = Path(path)
    return paths


def _mounts(mountinfo: Path) -> Iterator[tuple[str, Path, Path]]:
    """File system, group that is mounted, and where, of every hierarchy that may count memory (proc(5))."""
    for line in _lines(mountinfo):
        mount, _, source = line.partition(" - ")
        kind, options = source.split()[0], source.split()[-1].split(",")
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options):
            group, point = mount.split()[3:5]
            yield kind, Path(_unescaped(group)), Path(_unescaped(point))


def _below(path: Path, mounted: Path) -> Path:
    """The process's group, relative to the one that is mounted; that one itself where it is not among its subgroups.

    In a container the path may be the host's, whereas only the container's own group is mounted.
    """
    inside = ".." not in path.parts and path.is_relative_to(mounted)
    return path.relative_to(mounted) if inside else Path()


def _room(version: _Version, group: Path) -> int | None:
    """Bytes that a group may still take, or None if it has no limit or does not say."""
    limits = []
    for name in version.limits:
        with suppress(OSError, ValueError):
            limits.append(int((group / name).read_text()))
    try:
        used = int((group / version.used).read_text())
        pages = dict(line.split() for line in _lines(group / "memory.stat"))
        reclaimable = sum(int(pages.get(name, 0)) for name in version.cached)
    except (OSError, ValueError):
        return None
    return max(0, min(limits) - used + reclaimable) if limits else None


def _lines(path: Path) -> list[str]:
    """Lines of one of the kernel's files, none if it is not there."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _unescaped(name: str) -> str:
    """A name in mountinfo, in which blanks and the like stand as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), name)
