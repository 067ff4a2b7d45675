"""What all stores of a run directory share: committing arrays under a name, and checking files against the journal."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flap_stream.arithmetic.layer_shape import Sublayer
from flap_stream.errors import CorruptRun
from flap_stream.storage import arrays, files
from flap_stream.storage.journal import Journal

KINDS = tuple(Sublayer)


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
    ) -> None:
        """Write a zarr group under a temporary name, make it durable, then rename it to `name`."""
        target = self.path / name
        temporary = files.partial_path(target)
        files.remove(temporary)
        with files.failures_of(temporary):
            arrays.write_group(temporary, values, attributes, groups)
        files.sync_tree(temporary)
        files.remove(target)  # not in the journal, so left over from a killed run
        files.commit_rename(temporary, target)

    def damage_of(self, item: Committed) -> str | None:
        """`missing` or `altered`; None if the file or directory is what was committed."""
        path = self.path / item.name
        if not path.exists():
            return "missing"
        if files.tree_size(path) > item.max_bytes:
            return "altered"
        found = files.tree_digest(path) if path.is_dir() else files.file_digest(path)
        return None if item.digest == found else "altered"

    def require_intact(self, item: Committed, remedy: str = "delete the run directory and collect again") -> None:
        """Raise CorruptRun, ending in the remedy, unless the file or directory is what was committed."""
        damage = self.damage_of(item)
        if damage is not None:
            raise CorruptRun(f"{self.path / item.name} is {damage} since it was written; {remedy}")

    def incomplete(self, name: str) -> CorruptRun:
        """The error for something that the collection has not committed."""
        return CorruptRun(f"{self.path / name} is not complete; run flap-stream collect again to finish it")
