"""What all stores of a run directory share: committing arrays under a name, and checking files against the journal."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flap_stream.arithmetic.layer_shape import Sublayer
from flap_stream.errors import CorruptRun, NotPlain
from flap_stream.storage import arrays, files
from flap_stream.storage.journal import Journal
from flap_stream.storage.schema import Schema

KINDS = tuple(Sublayer)
_REMEDY = "delete the run directory and collect again"


def layer_name(layer: int) -> str:
    """A layer's name in file names and journal entries."""
    return f"{layer:04d}"


@dataclass(frozen=True)
class Committed:
    """A file or directory that the journal lists as complete.

    name: its path within the run directory. digest: sha256 from its journal entry.
    max_bytes: a larger one is taken as altered without being read.
    """

    name: str
    digest: str
    max_bytes: int


@dataclass(frozen=True)
class RunFiles:
    """The files of a run directory and the journal that lists the complete ones."""

    path: Path
    journal: Journal

    def commit_group(
        self, name: str, values: Mapping[str, np.ndarray], attributes: Mapping[str, Any], groups: tuple[str, ...] = ()
    ) -> str:
        """Write a zarr group under a temporary name, make it durable, then rename it to `name`; returns its digest."""
        target, contents = self.path / name, arrays.group_files(values, attributes, groups)
        temporary = files.partial_path(target)
        files.remove(temporary)
        files.write_tree(temporary, contents)
        files.remove(target)  # not in the journal, so left over from a killed run
        files.commit_rename(temporary, target)
        return files.contents_digest(contents)

    def read_group(
        self, item: Committed, specs: Mapping[str, arrays.ArraySpec], attributes: Schema = None
    ) -> tuple[list[np.ndarray], Any]:
        """The arrays of a committed group, in the order of `specs`, and its attributes, of this schema.

        Raises CorruptRun unless it is what was committed.
        """
        path = self.path / item.name
        try:
            contents = files.tree_contents(path, item.max_bytes)
        except NotPlain as error:
            raise self._damaged(item, "altered") from error
        if files.contents_digest(contents) != item.digest:
            raise self._damaged(item, "altered" if path.exists() else "missing")
        return arrays.read_group(path, contents, specs, attributes)

    def damage_of(self, item: Committed) -> str | None:
        """`missing` or `altered`; None if the file or directory is what was committed."""
        path = self.path / item.name
        if not path.exists():
            return "missing"
        if files.tree_size(path) > item.max_bytes:
            return "altered"
        found = files.tree_digest(path) if path.is_dir() else files.file_digest(path)
        return None if item.digest == found else "altered"

    def require_intact(self, item: Committed, remedy: str = _REMEDY) -> None:
        """Raise CorruptRun, ending in the remedy, unless the file or directory is what was committed."""
        damage = self.damage_of(item)
        if damage is not None:
            raise self._damaged(item, damage, remedy)

    def _damaged(self, item: Committed, damage: str, remedy: str = _REMEDY) -> CorruptRun:
        return CorruptRun(f"{self.path / item.name} is {damage} since it was written; {remedy}")

    def incomplete(self, name: str) -> CorruptRun:
        """The error for something that the collection has not committed."""
        return CorruptRun(f"{self.path / name} is not complete; run flap-stream collect again to finish it")
