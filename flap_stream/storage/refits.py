"""The refitted tensors of a run directory."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flap_stream.storage import files
from flap_stream.storage.plan import no_plan
from flap_stream.storage.run_files import Committed, RunFiles, layer_name
from flap_stream.storage.snapshots import SnapshotStore


@dataclass(frozen=True)
class RefitStore:
    """The refitted tensors of each layer, in refit/, of the current plan under the current conditions.

    max_bytes: of one layer's file.
    """

    run_files: RunFiles
    max_bytes: int

    def begin(self, conditions: dict[str, Any]) -> None:
        """Make these conditions (JSON values) and the current plan the current ones; delete refits made for others.

        Raises RunMismatch if there is no plan.
        """
        plan = self.run_files.journal.find("plan", "plan")
        if plan is None:
            raise no_plan(self.run_files.path)
        body = json.dumps({"plan": plan["digest"], **conditions}, sort_keys=True)
        job = hashlib.sha256(body.encode()).hexdigest()
        if self.job != job:
            self.run_files.journal.append("restoration", "restoration", job=job)
        if not self._entries():
            files.remove(self.run_files.path / "refit")
        for snapshots in (self.pruned_snapshots, self.dense_snapshots):
            if not snapshots.newest():
                snapshots.drop()

    @property
    def pruned_snapshots(self) -> SnapshotStore:
        """Snapshots of the hidden states of the pruned model."""
        return SnapshotStore(self.run_files, "hidden-pruned", self.job)

    @property
    def dense_snapshots(self) -> SnapshotStore:
        """Snapshots of the hidden states of the dense model, where those are the target."""
        return SnapshotStore(self.run_files, "hidden-dense", self.job)

    def complete_layers(self) -> int:
        """How many layers, counted from the first, are refitted with their files intact."""
        count, entries = 0, self._entries()
        while (entry := entries.get(layer_name(count))) and self.run_files.damage_of(self._committed(entry)) is None:
            count += 1
        return count

    def path(self, layer: int) -> Path:
        """The safetensors file with the refitted tensors of a layer."""
        return self.run_files.path / _path(layer_name(layer))

    def write(self, layer: int, contents: Iterable[bytes | memoryview]) -> None:
        """Store the refitted tensors of a layer. contents: the bytes of a safetensors file."""
        files.make_directory(self.run_files.path / "refit")
        digest = files.write_committed(self.path(layer), contents)
        self.run_files.journal.append("refit", layer_name(layer), job=self.job, digest=digest)

    def digests(self) -> list[str]:
        """Sha256 of each refitted layer's file, by layer."""
        return [item.digest for item in self.committed()]

    def committed(self) -> list[Committed]:
        """The files of all refitted layers, by layer."""
        return [self._committed(entry) for _, entry in sorted(self._entries().items())]

    @property
    def job(self) -> str:
        """Digest of the current plan and conditions; empty before the first refit."""
        entry = self.run_files.journal.find("restoration", "restoration")
        return "" if entry is None else entry["job"]

    def _entries(self) -> dict[str, dict[str, Any]]:
        """The newest journal entry of each layer, by layer name."""
        job = self.job
        return {entry["name"]: entry for entry in self.run_files.journal.of_kind("refit") if entry["job"] == job}

    def _committed(self, entry: dict[str, Any]) -> Committed:
        return Committed(_path(entry["name"]), entry["digest"], self.max_bytes)


def _path(name: str) -> str:
    return f"refit/{name}.safetensors"
