"""The run directory: what it is for, who may write it, and which of its files are complete.

Only files that the journal lists are trusted, and only with the digest listed there. Each kind of result has a store
of its own: tokens, statistics, plan, refits, sweeps and snapshots.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.errors import RunMismatch, UnsuitableFileSystem
from flap_stream.storage import files
from flap_stream.storage.batch_reductions import BatchReductions
from flap_stream.storage.collected import ARRAYS, StatisticsStore, TokenStore
from flap_stream.storage.differences import run_differences
from flap_stream.storage.journal import Journal
from flap_stream.storage.plan import PlanStore
from flap_stream.storage.refits import RefitStore
from flap_stream.storage.run_files import KINDS, Committed, RunFiles
from flap_stream.storage.run_lock import LOCK_NAME, acquire_lock
from flap_stream.storage.run_manifest import NAME as MANIFEST_NAME
from flap_stream.storage.run_manifest import Manifest, layer_shapes, new_manifest, read_manifest
from flap_stream.storage.snapshots import SnapshotStore
from flap_stream.storage.sweeps import SweepStore

_BLOCK_BYTES = 4096  # of most file systems
_SNAPSHOT_ITEM_BYTES = 4  # at most: hidden states are float32 or narrower
_BEFORE_MANIFEST = {MANIFEST_NAME + files.PARTIAL_SUFFIX, LOCK_NAME}  # in a directory whose run.json is not yet written


class RunDirectory:
    """An open run directory, to be used in a `with` block, which holds the lock unless `is_writer` is False.

    tokens, statistics, plan, refits, sweeps, snapshots: the stores of what it holds; snapshots are the collection's.
    Raises RunMismatch if there is no run directory of this version, RunLocked if another process is writing it.
    """

    def __init__(self, path: Path, *, is_writer: bool = True) -> None:
        self.path = path
        manifest = path / MANIFEST_NAME
        if not manifest.exists():
            raise RunMismatch(f"{path} is not a run directory (it has no run.json); make one with flap-stream collect")
        if is_writer:
            files.make_own_directory(path)
        files.require_plain_tree(path)
        self._lock = acquire_lock(path) if is_writer else None
        try:
            self.manifest: Manifest = read_manifest(manifest)
            self.layer_shapes: list[LayerShape] = layer_shapes(self.manifest)
            self.journal = Journal(path / "journal")
        except BaseException:
            self.close()
            raise
        self.files = RunFiles(path, self.journal)
        self.tokens = TokenStore(self.files, self.manifest)
        self.statistics = StatisticsStore(self.files, self.layer_shapes, self.manifest["options"]["method"])
        self.plan = PlanStore(self.files, self.layer_shapes)
        # a refitted layer may be written in a wider dtype; its header counts as any file that is read whole
        self.refits = RefitStore(self.files, 2 * self.manifest["sizes"]["weight_bytes"] + files.MAX_BYTES)
        self.sweeps = SweepStore(self.files)
        self.snapshots = SnapshotStore(self.files, "hidden")

    @classmethod
    def create(cls, path: Path, manifest: dict[str, Any]) -> "RunDirectory":
        """Open a run directory, making it if needed; one that exists must have been made for the same manifest.

        manifest: JSON values; its keys `model`, `tokens` and `options` determine the statistics.
        Raises RunMismatch, naming what differs.
        """
        if not (path / MANIFEST_NAME).exists():
            cls._make(path, new_manifest(manifest))
        run = cls(path)
        try:
            run._require_same(manifest)
        except BaseException:
            run.close()
            raise
        return run

    @staticmethod
    def _make(path: Path, manifest: bytes) -> None:
        """Make a run directory in which nothing is complete yet, unless another process is making it right now."""
        if path.is_symlink() and not path.exists():
            raise RunMismatch(
                f"{path} is a link to {path.readlink()}, which does not exist; create that or name another directory"
            )
        is_new = not path.exists()
        if not is_new and (not path.is_dir() or any(p.name not in _BEFORE_MANIFEST for p in path.iterdir())):
            raise RunMismatch(f"{path} exists and is not a run directory; name another with --run")
        files.make_own_directory(path)
        try:
            lock = acquire_lock(path)  # of two that start at once, only one may write run.json
        except UnsuitableFileSystem:
            if is_new:
                files.remove(path)
            raise
        try:
            if not (path / MANIFEST_NAME).exists():
                files.write_committed(path / MANIFEST_NAME, manifest)
        finally:
            os.close(lock)

    @staticmethod
    def recorded_batch_size(path: Path) -> int | None:
        """The batch size that a run was started with; None if there is no run, or it has none."""
        manifest = path / MANIFEST_NAME
        return read_manifest(manifest)["options"].get("batch_size") if manifest.exists() else None

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        """Delete the whole run directory.

        The journal is deleted first, run.json and the lock last: if killed in between, a run with nothing complete
        remains, which can be removed or resumed. A link to the directory, or the mount point of a disk, belongs to the
        user: it is kept, with the directory empty.
        """
        files.remove(self.path / "journal")
        for path in self.path.iterdir():
            if path.name not in (MANIFEST_NAME, LOCK_NAME):
                files.remove(path)
        files.remove(self.path / MANIFEST_NAME)
        _remove_directory(self.path)

    @classmethod
    def remove_leftover(cls, path: Path) -> None:
        """Delete the run directory of a finished job, or what an interrupted `remove` left of it."""
        if (path / MANIFEST_NAME).exists():
            with cls(path) as run:
                run.remove()
        elif path.is_dir() and all(file.name in _BEFORE_MANIFEST for file in path.iterdir()):
            _remove_directory(path)

    def record_source(self, stamps: dict[str, list[int]], embedding: str) -> None:
        """Record the stamps of the model's files, and the checksum of the embedding rows that were read."""
        self.journal.append("source", "source", stamps=stamps, embedding=embedding)

    def recorded_source(self) -> dict[str, Any] | None:
        """The `stamps` and `embedding` recorded last."""
        return self.journal.find("source", "source")

    def record_promise(self, host_bytes: int, device_bytes: int) -> None:
        """Record the most memory that a job is predicted to take, unless that was recorded last."""
        if self.promise() != (host_bytes, device_bytes):
            self.journal.append("promise", "memory", host_bytes=host_bytes, device_bytes=device_bytes)

    def promise(self) -> tuple[int, int] | None:
        """The bytes of the host and of the device promised last."""
        entry = self.journal.find("promise", "memory")
        return None if entry is None else (entry["host_bytes"], entry["device_bytes"])

    def batch_reductions(self, stage: str) -> BatchReductions:
        """Those of a stage."""
        return BatchReductions(self.journal, stage)

    def committed(self) -> list[Committed]:
        """Everything complete that is still of use."""
        found = [*self.tokens.committed(), *self.plan.committed(), *self.statistics.committed()]
        found += self.sweeps.committed()
        if self.statistics.complete_layers() < len(self.layer_shapes):
            samples, length = self.manifest["tokens"]["shape"]
            sizes = self.manifest["sizes"]
            width = sizes.get("state", sizes["hidden"])
            found += self.snapshots.committed(samples * length * width * _SNAPSHOT_ITEM_BYTES)
        # Those of an earlier plan are deleted when another one is refitted.
        return found + [item for item in self.refits.committed() if (self.path / item.name).exists()]

    def damaged(self) -> list[str]:
        """Names of committed files and directories that are no longer as written, each with what is wrong."""
        return [f"{item.name} is {damage}" for item in self.committed() if (damage := self.files.damage_of(item))]

    def _require_same(self, manifest: dict[str, Any]) -> None:
        differences = run_differences(self.manifest, json.loads(json.dumps(manifest)))
        if differences is not None:
            raise RunMismatch(
                f"{self.path} was made {differences}; name another directory with --run, or delete that one"
            )


def stored_bytes(shapes: Sequence[LayerShape], tokens: int) -> int:
    """Upper bound on the disk space of a run directory without snapshots. tokens: in all calibration windows."""
    total = _blocks(8 * tokens) + 4 * _BLOCK_BYTES
    for shape in shapes:
        channels = (shape.attention_channels, shape.neurons)
        arrays = sum(_blocks(8 * count) for count in channels) * len(ARRAYS)
        metadata = (4 * len(ARRAYS) + 6) * len(KINDS) * _BLOCK_BYTES  # zarr.json files and directories
        plan_and_journal = 12 * (shape.kv_groups + shape.neurons) + 1000
        total += arrays + metadata + plan_and_journal
    return total


def _blocks(nbytes: int) -> int:
    return (nbytes // _BLOCK_BYTES + 1) * _BLOCK_BYTES


def _remove_directory(path: Path) -> None:
    """Remove a directory, or only what is in it if a link leads to it or a disk is mounted there."""
    if path.is_symlink() or path.is_mount():
        for file in path.iterdir():
            files.remove(file)
    else:
        files.remove(path)
