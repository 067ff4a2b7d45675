"""How much memory Linux control groups still allow this process: the tightest limit from its group up to the root.

Groups are nested (systemd, Slurm, containers), and any of them may have a limit. Both versions are read: version 1 has
a separate hierarchy for memory, version 2 one for everything; a machine may have both mounted.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class _Version:
    """Names of a version's files in a group's directory.

    limits: most bytes that the group may use, or a word for no limit. cached: lines of memory.stat that count bytes
    reclaimed when others need them, subgroups included.
    """

    limits: tuple[str, ...]
    used: str
    cached: tuple[str, ...]


_VERSIONS = {
    "cgroup": _Version(
        ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
    ),
    # Beyond memory.high nothing is refused, but the process is throttled until it hardly runs.
    "cgroup2": _Version(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
}


def free_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still use within its control groups; None if none of them has a limit.

    root: the directory that contains /proc and the mounted groups.
    """
    return min(
        (room for kind, group in groups(root) if (room := _room(_VERSIONS[kind], group)) is not None), default=None
    )


def groups(root: Path = Path("/")) -> Iterator[tuple[str, Path]]:
    """Yield the process's groups that may count memory, with their file system type, innermost first."""
    paths = _own_paths(root / "proc/self/cgroup")
    for kind, mounted, point in _mounts(root / "proc/self/mountinfo"):
        if kind in paths:
            top = root / point.relative_to("/")
            below = _below(paths[kind], mounted)
            yield from ((kind, top / part) for part in (below, *below.parents))


def _own_paths(cgroup: Path) -> dict[str, Path]:
    """The process's path in each hierarchy, by file system type."""
    paths = {}
    for line in _lines(cgroup):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            paths["cgroup2"] = Path(path)
        elif "memory" in controllers.split(","):
            paths["cgroup"] = Path(path)
    return paths


def _mounts(mountinfo: Path) -> Iterator[tuple[str, Path, Path]]:
    """Yield file system type, mounted group and mount point of every hierarchy that may count memory (proc(5))."""
    for line in _lines(mountinfo):
        mount, _, source = line.partition(" - ")
        kind, options = source.split()[0], source.split()[-1].split(",")
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options):
            group, point = mount.split()[3:5]
            yield kind, Path(_unescaped(group)), Path(_unescaped(point))


def _below(path: Path, mounted: Path) -> Path:
    """The process's group relative to the mounted one; the mounted one itself if it does not contain it.

    In a container the path may be the host's, while only the container's own group is mounted.
    """
    inside = ".." not in path.parts and path.is_relative_to(mounted)
    return path.relative_to(mounted) if inside else Path()


def _room(version: _Version, group: Path) -> int | None:
    """Bytes that a group may still use, or None if it has no limit or cannot be read."""
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
    """Lines of one of the kernel's files; empty if it does not exist."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _unescaped(name: str) -> str:
    """A name in mountinfo, in which blanks and the like are octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), name)
