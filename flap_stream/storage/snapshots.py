"""Snapshots of the hidden states, from which an interrupted pass over the layers resumes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flap_stream.storage import files
from flap_stream.storage.run_files import Committed, RunFiles, layer_name


@dataclass(frozen=True)
class SnapshotStore:
    """The two newest snapshots of the hidden states of one pass over the layers.

    kind: of their journal entries, and the name of their directory.
    job: identifies the pass that they belong to, so that those of another are ignored; None for the collection, of
        which a run directory has only one.
    """

    run_files: RunFiles
    kind: str
    job: str | None = None

    @property
    def directory(self) -> Path:
        """The directory that holds them."""
        return self.run_files.path / self.kind

    def path(self, layer: int) -> Path:
        """Where the hidden states that enter a layer are saved."""
        return self.directory / f"{layer_name(layer)}.bin"

    def record(self, layer: int, digest: str) -> None:
        """Record that the hidden states that enter a layer are on the disk; delete all but the two newest snapshots."""
        job = {} if self.job is None else {"job": self.job}
        self.run_files.journal.append(self.kind, layer_name(layer), layer=layer, digest=digest, **job)
        self._delete(keep={self.path(entry["layer"]).name for entry in self._recent()})

    def newest(self) -> list[tuple[int, str]]:
        """Layer and sha256 of the recorded snapshots whose files exist, newest first."""
        return [(e["layer"], e["digest"]) for e in reversed(self._recent()) if self.path(e["layer"]).exists()]

    def drop(self) -> None:
        """Delete all: no layer is left to run."""
        self._delete(keep=set())

    def committed(self, max_bytes: int) -> list[Committed]:
        """The recorded snapshots, oldest first. max_bytes: of each."""
        return [Committed(f"{self.kind}/{e['name']}.bin", e["digest"], max_bytes) for e in self._recent()]

    def _recent(self) -> list[dict[str, Any]]:
        return [entry for entry in self.run_files.journal.of_kind(self.kind) if entry.get("job") == self.job][-2:]

    def _delete(self, keep: set[str]) -> None:
        for file in self.directory.iterdir() if self.directory.exists() else ():
            if file.name not in keep:
                files.remove(file)
