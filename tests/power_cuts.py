"""What a disk may hold after a power cut: what was synced, and any choice of the rest."""

import os
import random
import resource
import stat
from collections.abc import Callable, Iterator
from pathlib import Path


class Disk:
    """What a disk surely holds: of a file the bytes at its last fsync, of a directory the names at its last fsync.

    Files and directories go by inode, which are kept open so that no number is given twice.
    """

    def __init__(self, root: Path) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
        self._open: dict[int, int] = {}
        self._bytes: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._root = self._hold(root)
        self._names[self._root] = self._current_names(self._root)

    def sync(self, descriptor: int) -> None:
        """A file's bytes or a directory's names are on the disk now."""
        inode = self._hold(Path(f"/proc/self/fd/{descriptor}"))
        if self._is_directory(inode):
            self._names[inode] = self._current_names(inode)
        else:
            self._bytes[inode] = self._current_bytes(inode)

    def states(self, draws: int, seed: int) -> Iterator[tuple[str, dict[str, bytes | None]]]:
        """What may be found after a power cut now: relative path to bytes, None for a directory.

        Of what was not synced: nothing; everything; names without bytes; names with half of the bytes; any choice.
        """
        yield "lost", self._tree(lambda: False, lambda old, new: old)
        yield "written", self._tree(lambda: True, lambda old, new: new)
        yield "zeros", self._tree(lambda: True, _zeroed)
        yield "torn", self._tree(lambda: True, lambda old, new: new[: (len(old) + len(new)) // 2])
        draw = random.Random(seed)
        forms: list[Callable[[bytes, bytes], bytes]] = [
            lambda old, new: old,
            lambda old, new: new,
            lambda old, new: new[: draw.randrange(len(new) + 1)],
            _zeroed,
        ]
        for _ in range(draws):
            yield "any", self._tree(lambda: draw.random() < 0.5, lambda old, new: draw.choice(forms)(old, new))

    def _tree(
        self, keeps: Callable[[], bool], mixed: Callable[[bytes, bytes], bytes], inode: int | None = None, at: str = ""
    ) -> dict[str, bytes | None]:
        tree: dict[str, bytes | None] = {}
        inode = self._root if inode is None else inode
        for name, child in sorted(self._mixed_names(inode, keeps).items()):
            path = f"{at}/{name}" if at else name
            if self._is_directory(child):
                tree[path] = None
                tree |= self._tree(keeps, mixed, child, path)
            else:
                old, new = self._bytes.get(child, b""), self._current_bytes(child)
                tree[path] = new if old == new else mixed(old, new)
        return tree

    def _mixed_names(self, inode: int, keeps: Callable[[], bool]) -> dict[str, int]:
        """The synced names with some of the changes since, a renaming as a whole."""
        old, new = self._names.get(inode, {}), self._current_names(inode)
        names, open_changes = dict(old), {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
        while open_changes:
            change = {open_changes.pop()}
            while True:
                inodes = {tree[name] for tree in (old, new) for name in change if name in tree}
                more = {n for n in open_changes if {old.get(n), new.get(n)} & inodes}
                if not more:
                    break
                change |= more
                open_changes -= more
            if keeps():
                for name in change:
                    names.pop(name, None)
                    names |= {name: new[name]} if name in new else {}
        return names

    def _hold(self, path: Path) -> int:
        descriptor = os.open(path, os.O_PATH)
        inode = os.fstat(descriptor).st_ino
        if inode in self._open:
            os.close(descriptor)
        else:
            self._open[inode] = descriptor
        return inode

    def _is_directory(self, inode: int) -> bool:
        return stat.S_ISDIR(os.fstat(self._open[inode]).st_mode)

    def _current_names(self, inode: int) -> dict[str, int]:
        place = Path(f"/proc/self/fd/{self._open[inode]}")
        return {name: self._hold(place / name) for name in os.listdir(place)}

    def _current_bytes(self, inode: int) -> bytes:
        with open(f"/proc/self/fd/{self._open[inode]}", "rb") as file:
            return file.read()


def _zeroed(old: bytes, new: bytes) -> bytes:
    """The length is known to the file system, what was written since the last fsync is not."""
    kept = old if new.startswith(old) else b""
    return kept + bytes(len(new) - len(kept))


class PowerCuts:
    """Keeps every state of the disk that a power cut at an fsync could leave, each once.

    forgets_files: as if no file were ever synced, to see that this is found out.
    """

    def __init__(self, place: Path, states: Path, stride: int, draws: int, forgets_files: bool) -> None:
        self._disk, self._states, self._stride, self._draws = Disk(place), states, stride, draws
        self._forgets_files = forgets_files
        self._seen: set[int] = set()
        self._count = 0

    def sync(self, descriptor: int) -> None:
        self.cut()
        if not self._forgets_files or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            self._disk.sync(descriptor)

    def cut(self) -> None:
        """Write down the states of this moment."""
        self._count += 1
        if self._count % self._stride:
            return
        for i, (kind, tree) in enumerate(self._disk.states(self._draws, seed=self._count)):
            key = hash(tuple(sorted((path, hash(body)) for path, body in tree.items())))
            if key not in self._seen:
                self._seen.add(key)
                write_tree(self._states / f"{self._count:05d}-{i}-{kind}", tree)


def write_tree(directory: Path, tree: dict[str, bytes | None]) -> None:
    directory.mkdir(parents=True)
    for path, body in tree.items():
        if body is None:
            (directory / path).mkdir()
        else:
            (directory / path).write_bytes(body)
