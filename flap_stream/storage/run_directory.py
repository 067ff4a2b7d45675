"""The run directory: what is stored where, who may write it, and what of it is complete.

Only what the journal names, with the digest that the journal names, is believed.
"""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.layer_shape import LayerShape, Sublayer
from flap_stream.arithmetic.scoring import ChannelStatistics, LayerStatistics
from flap_stream.config import PlanConfig
from flap_stream.errors import CorruptRun, RunMismatch, UnsuitableFileSystem
from flap_stream.storage import arrays, files
from flap_stream.storage.differences import run_differences
from flap_stream.storage.journal import COST, Journal
from flap_stream.storage.json_form import natural, parsed
from flap_stream.storage.run_lock import LOCK_NAME, acquire_lock
from flap_stream.storage.run_manifest import NAME as MANIFEST_NAME
from flap_stream.storage.run_manifest import (
    layer_shapes,
    most_plan_bytes,
    new_manifest,
    parse_plan,
    plan_contents,
    read_manifest,
    tokens_digest,
)

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 4096  # of most file systems
_MOST_SWEEP_BYTES = 1 << 26
_KINDS = tuple(Sublayer)
_ARRAYS = ("count", "mean", "m2", "released_fluctuation", "released_baseline", "weight_squared_norm", "weight_abs_mean")
_TAKEN = {kind: {"samples": natural} for kind in _KINDS}  # attributes of a layer's statistics


@dataclass(frozen=True)
class LayerCost:
    """What pass 1 took for a layer: from the end of the one before it to its statistics, before they are written.

    tokens: that ran through it. peak_host_bytes, peak_device_bytes: of the process so far.
    """

    seconds: float
    tokens: int
    peak_host_bytes: int
    peak_device_bytes: int


class RunDirectory:
    """An open run directory; use it in a `with` block, which holds the lock of a writer, unless it only reads.

    Raises RunMismatch if there is no run directory of this version, RunLocked if another process is writing it.
    """

    def __init__(self, path: Path, *, is_writer: bool = True) -> None:
        self.path = path
        manifest = path / MANIFEST_NAME
        if not manifest.exists():
            raise RunMismatch(f"{path} is no run directory (it has no run.json); make one with flap-stream collect")
        if is_writer:
            files.make_own_directory(path)
        files.require_plain_tree(path)
        self._lock = acquire_lock(path) if is_writer else None
        try:
            self.manifest: dict[str, Any] = read_manifest(manifest)
            self.layer_shapes: list[LayerShape] = layer_shapes(self.manifest)
            self.journal = Journal(path / "journal")
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, path: Path, manifest: dict[str, Any]) -> "RunDirectory":
        """Open the run directory, or make it; one that exists must have been made for the same.

        manifest: JSON values; its keys `model`, `tokens` and `options` decide what the statistics are.
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
        """A run directory in which nothing is complete yet, unless another process makes it at this moment."""
        if path.is_symlink() and not path.exists():
            raise RunMismatch(f"{path} is a link to {path.readlink()}, which is not there; make that or name another")
        is_new = not path.exists()
        if not is_new and (not path.is_dir() or any(p.name not in _UNBORN for p in path.iterdir())):
            raise RunMismatch(f"{path} exists and is no run directory; name another with --run")
        files.make_own_directory(path)
        try:
            lock = acquire_lock(path)  # so that of two that start at once, one alone says what the run is for
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
        """The batch size that a run was begun with; None if there is no run, or it has none."""
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

        The journal goes first, run.json and the lock last: what a kill leaves is a run without anything complete,
        which can be removed or taken up again. A link that leads to the directory, or the place where a disk is
        mounted, is the user's: it stays, and so does the directory, empty.
        """
        files.remove(self.path / "journal")
        for path in self.path.iterdir():
            if path.name not in (MANIFEST_NAME, LOCK_NAME):
                files.remove(path)
        files.remove(self.path / MANIFEST_NAME)
        _remove_place(self.path)

    @classmethod
    def remove_leftover(cls, path: Path) -> None:
        """Delete the run directory of a job that is done, or what an interrupted `remove` left of it."""
        if (path / MANIFEST_NAME).exists():
            with cls(path) as run:
                run.remove()
        elif path.is_dir() and all(file.name in _UNBORN for file in path.iterdir()):
            _remove_place(path)

    # --- tokens ---

    def write_tokens(self, tokens: np.ndarray) -> None:
        """Store the windows, int64 `[sample, token]`."""
        self.commit_group("tokens.zarr", {"tokens": tokens}, {})
        self.journal.append("tokens", "tokens", digest=files.tree_digest(self.path / "tokens.zarr"))

    def has_tokens(self) -> bool:
        """Whether the windows are stored."""
        return self.journal.find("tokens", "tokens") is not None

    def read_tokens(self) -> np.ndarray:
        """The stored windows, int64 `[sample, token]`. Raises CorruptRun if they are altered."""
        self.verify("tokens.zarr", self.journal.find("tokens", "tokens"))
        (tokens,), _ = arrays.read_group(self.path / "tokens.zarr", self._token_forms())
        known = not tokens.size or 0 <= tokens.min() <= tokens.max() < self.manifest["sizes"]["vocabulary"]
        if not known or tokens_digest(tokens) != self.manifest["tokens"]["sha256"]:
            raise CorruptRun(
                f"{self.path / 'tokens.zarr'} holds other tokens than the run was made for; delete the run directory "
                "and collect again"
            )
        return tokens

    def _token_forms(self) -> dict[str, arrays.Form]:
        return {"tokens": ("int64", tuple(self.manifest["tokens"]["shape"]))}

    # --- statistics ---

    def complete_layers(self) -> int:
        """How many layers, from the first on, have their statistics stored."""
        done = {entry["name"] for entry in self.journal.of_kind("statistics")}
        count = 0
        while layer_name(count) in done:
            count += 1
        return count

    def write_statistics(
        self, layer: int, statistics: LayerStatistics, weights: str, cost: LayerCost | None = None
    ) -> None:
        """Store a layer's statistics: all of them or nothing. weights: checksum of what they were taken from."""
        name = f"statistics.zarr/layers/{layer_name(layer)}"
        values: dict[str, np.ndarray] = {}
        attributes: dict[str, dict[str, int]] = {}
        for kind in _KINDS:
            own = statistics.of(kind)
            values |= {f"{kind}/{array}": getattr(own, array) for array in _ARRAYS}
            attributes[kind] = {"samples": own.samples}
        if self.journal.find("statistics-root", "layers") is None:
            self.commit_group("statistics.zarr", {}, {}, groups=("layers",))
            self.journal.append("statistics-root", "layers")
        self.commit_group(name, values, attributes)
        digest = files.tree_digest(self.path / name)
        known = {} if cost is None else {"cost": asdict(cost)}
        self.journal.append("statistics", layer_name(layer), digest=digest, weights=weights, **known)

    def read_statistics(self, layer: int) -> LayerStatistics:
        """A layer's statistics. Raises CorruptRun if they are missing or altered."""
        name = f"statistics.zarr/layers/{layer_name(layer)}"
        self.verify(name, self.journal.find("statistics", layer_name(layer)))
        found, taken = arrays.read_group(self.path / name, self._statistics_forms(layer), _TAKEN)
        parts = {}
        for i, kind in enumerate(_KINDS):
            values: dict[str, Any] = dict(zip(_ARRAYS, found[i * len(_ARRAYS) :], strict=False))
            parts[kind] = ChannelStatistics(samples=taken[kind]["samples"], **values)
        return LayerStatistics(**parts)

    def _statistics_forms(self, layer: int) -> dict[str, arrays.Form]:
        shape = self.layer_shapes[layer]
        channels = {"attention": shape.kv_groups * shape.heads_per_group * shape.head_dim, "mlp": shape.neurons}
        return {
            f"{kind}/{array}": ("int64" if array == "count" else "float64", (channels[kind],))
            for kind in _KINDS
            for array in _ARRAYS
        }

    def weights_checksums(self) -> list[str]:
        """What the statistics of the complete layers were taken from, by layer."""
        entries = (self.journal.find("statistics", layer_name(i)) for i in range(self.complete_layers()))
        return [entry["weights"] for entry in entries if entry is not None]

    def layer_costs(self) -> list[LayerCost | None]:
        """What the complete layers took; None where that was not recorded."""
        entries = (self.journal.find("statistics", layer_name(i)) or {} for i in range(self.complete_layers()))
        found = (entry.get("cost") for entry in entries)
        return [None if cost is None else LayerCost(**{name: cost[name] for name in COST}) for cost in found]

    def record_source(self, stamps: dict[str, list[int]], embedding: str) -> None:
        """The model's files as they are now, and the checksum of what was read of the embedding."""
        self.journal.append("source", "source", stamps=stamps, embedding=embedding)

    def recorded_source(self) -> dict[str, Any] | None:
        """`stamps` and `embedding` as last recorded."""
        return self.journal.find("source", "source")

    def batch_reductions(self, stage: str) -> "BatchReductions":
        """Those of a stage."""
        return BatchReductions(self.journal, stage)

    # --- snapshots of the hidden states ---

    @property
    def snapshots(self) -> "SnapshotStore":
        """Those of pass 1."""
        return SnapshotStore(self, "hidden")

    # --- refitted projections ---

    def begin_refit(self, conditions: dict[str, Any]) -> None:
        """From now on refits are of the current plan under these conditions; what was refitted for others goes.

        Raises RunMismatch if there is no plan.
        """
        plan = self.journal.find("plan", "plan")
        if plan is None:
            raise RunMismatch(f"{self.path} holds no plan yet; make one with flap-stream plan {self.path} --ratio R")
        body = json.dumps({"plan": plan["digest"], **conditions}, sort_keys=True)
        job = hashlib.sha256(body.encode()).hexdigest()
        if self._refit_job() != job:
            self.journal.append("restoration", "restoration", job=job)
        if not self._refits():
            files.remove(self.path / "refit")
        for snapshots in (self.pruned_snapshots, self.dense_snapshots):
            if not snapshots.newest():
                snapshots.drop()

    @property
    def pruned_snapshots(self) -> "SnapshotStore":
        """Those of the pruned prefix in pass 2."""
        return SnapshotStore(self, "hidden-pruned", self._refit_job())

    @property
    def dense_snapshots(self) -> "SnapshotStore":
        """Those of the dense prefix in pass 2, where it is the target."""
        return SnapshotStore(self, "hidden-dense", self._refit_job())

    def complete_refits(self) -> int:
        """How many layers, from the first on, are refitted and as they were written."""
        count, entries = 0, self._refits()
        while (entry := entries.get(layer_name(count))) and self._state(_refit_name(count), entry) is None:
            count += 1
        return count

    def refit_path(self, layer: int) -> Path:
        """Where the refitted tensors of a layer are, a safetensors file."""
        return self.path / _refit_name(layer)

    def write_refit(self, layer: int, contents: Iterable[bytes | memoryview]) -> None:
        """Store the refitted tensors of a layer."""
        files.make_directory(self.path / "refit")
        digest = files.write_committed(self.refit_path(layer), contents)
        self.journal.append("refit", layer_name(layer), job=self._refit_job(), digest=digest)

    def refit_digests(self) -> list[str]:
        """Of all refitted layers of the current plan, in order."""
        return [entry["digest"] for _, entry in sorted(self._refits().items())]

    def _refit_job(self) -> str:
        entry = self.journal.find("restoration", "restoration")
        return "" if entry is None else entry["job"]

    def _refits(self) -> dict[str, dict[str, Any]]:
        """Layer name to newest journal entry of the current refit."""
        job = self._refit_job()
        return {entry["name"]: entry for entry in self.journal.of_kind("refit") if entry["job"] == job}

    # --- the plan ---

    def write_plan(self, options: PlanConfig, layers: Iterable[LayerKeep]) -> None:
        """Store the decision, replacing an older one."""
        digest = files.write_committed(self.path / "plan.json", plan_contents(options, list(layers)))
        self.journal.append("plan", "plan", digest=digest)

    def read_plan(self) -> tuple[PlanConfig, list[LayerKeep]]:
        """Options and decision of the current plan.

        Raises RunMismatch if there is none, CorruptRun if it is altered.
        """
        entry = self.journal.find("plan", "plan")
        if entry is None:
            raise RunMismatch(f"{self.path} holds no plan yet; make one with flap-stream plan {self.path} --ratio R")
        again = f"make it again with flap-stream plan {self.path} --ratio R"
        self.verify("plan.json", entry, remedy=again)
        try:
            return parse_plan(files.read_plain(self.path / "plan.json"), self.layer_shapes)
        except ValueError as error:
            raise CorruptRun(f"{self.path / 'plan.json'} is no plan for this model: {error}; {again}") from error

    # --- sweeps ---

    def write_sweep(self, name: str, body: dict[str, Any]) -> None:
        """Store what is known of one sweep, replacing what was known before. body: JSON values."""
        path = self.path / "sweeps" / f"{name}.json"
        files.make_directory(path.parent)
        self.journal.append("sweep", name, digest=files.write_committed(path, json.dumps(body).encode()))

    def read_sweep(self, name: str) -> dict[str, Any] | None:
        """What is known of a sweep; None if nothing, or what was stored is missing or altered."""
        entry, path = self.journal.find("sweep", name), self.path / "sweeps" / f"{name}.json"
        if entry is None:
            return None
        if (state := self._state(f"sweeps/{name}.json", entry)) is not None:
            logger.warning("%s is %s; what that sweep had found is not used", path, state)
            return None
        try:
            return parsed(files.read_plain(path, _MOST_SWEEP_BYTES))
        except ValueError:
            logger.warning("%s is no JSON; what that sweep had found is not used", path)
            return None

    def sweep_names(self) -> list[str]:
        """All sweeps that are stored, the oldest first."""
        return list(dict.fromkeys(entry["name"] for entry in self.journal.of_kind("sweep")))

    def sweep_snapshots(self, job: str) -> "SnapshotStore":
        """Those of one reading of the model for a sweep. job: what decides them."""
        return SnapshotStore(self, "hidden-sweep", job)

    # --- all of it ---

    def committed(self) -> list[tuple[str, dict[str, Any]]]:
        """Path within the run directory and journal entry of all that is complete and of use, from tokens to plan."""
        found = [
            ("tokens.zarr", self.journal.find("tokens", "tokens")),
            ("plan.json", self.journal.find("plan", "plan")),
        ]
        for i in range(self.complete_layers()):
            entry = self.journal.find("statistics", layer_name(i))
            found.append((f"statistics.zarr/layers/{layer_name(i)}", entry))
        found += [(f"sweeps/{name}.json", self.journal.find("sweep", name)) for name in self.sweep_names()]
        if self.complete_layers() < len(self.layer_shapes):
            found += [(f"hidden/{entry['name']}.bin", entry) for entry in self.journal.of_kind("hidden")[-2:]]
        found += [(f"refit/{name}.safetensors", entry) for name, entry in sorted(self._refits().items())]
        return [(name, entry) for name, entry in found if entry is not None]

    def damaged(self) -> list[str]:
        """Names of what is complete and not as it was written, with what is wrong."""
        return [f"{name} is {s}" for name, entry in self.committed() if (s := self._state(name, entry))]

    def _state(self, name: str, entry: dict[str, Any]) -> str | None:
        """`missing` or `altered`; None if a file or directory is what the journal says. Giants are not read for it."""
        path = self.path / name
        if not path.exists():
            return "missing"
        if files.tree_size(path) > self._most_bytes(name):
            return "altered"
        found = files.tree_digest(path) if path.is_dir() else files.file_digest(path)
        return None if entry["digest"] == found else "altered"

    def _most_bytes(self, name: str) -> int:
        """Most bytes that something in the run directory has."""
        kind, sizes = name.partition("/")[0], self.manifest["sizes"]
        if kind == "tokens.zarr":
            return arrays.most_bytes(self._token_forms())
        if kind == "statistics.zarr":
            return arrays.most_bytes(self._statistics_forms(int(name.rpartition("/")[2])))
        if kind == "plan.json":
            return most_plan_bytes(self.layer_shapes)
        if kind == "sweeps":
            return _MOST_SWEEP_BYTES
        if kind == "hidden":
            return prod(self.manifest["tokens"]["shape"]) * sizes["hidden"] * 4
        return 2 * sizes["weight_bytes"] + files.MOST_BYTES  # a layer that is refitted, and its header

    # --- how things get there ---

    def commit_group(
        self, name: str, values: dict[str, np.ndarray], attributes: dict[str, Any], groups: tuple[str, ...] = ()
    ) -> None:
        """Write a zarr group under a temporary name, then make it durable and give it its name."""
        target = self.path / name
        temporary = files.partial_path(target)
        files.remove(temporary)
        with files.failures_of(temporary):
            arrays.write_group(temporary, values, attributes, groups)
        files.sync_tree(temporary)
        files.remove(target)  # not in the journal, so it is a leftover of a killed run
        files.commit_rename(temporary, target)

    def verify(
        self,
        name: str,
        entry: dict[str, Any] | None,
        remedy: str = "delete the run directory and collect again",
    ) -> None:
        """Raise CorruptRun unless a file or directory is what its journal entry says."""
        if entry is None:
            raise CorruptRun(f"{self.path / name} is not complete; run flap-stream collect again to finish it")
        state = self._state(name, entry)
        if state is not None:
            raise CorruptRun(f"{self.path / name} is {state} since it was written; {remedy}")

    def _require_same(self, manifest: dict[str, Any]) -> None:
        differences = run_differences(self.manifest, json.loads(json.dumps(manifest)))
        if differences is not None:
            raise RunMismatch(
                f"{self.path} was made {differences}; name another directory with --run, or delete that one"
            )


@dataclass(frozen=True)
class BatchReduction:
    """From window `start` of a step on, `size` windows ran at once: there was no memory for more.

    step: the layer, and which run of it. stop: the window where another rank's begin, in this step.
    """

    step: tuple[int, int]
    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class BatchReductions:
    """Where a stage had to run smaller batches, for a resumed run to repeat at the same points."""

    journal: Journal
    stage: str

    def add(self, reduction: BatchReduction) -> None:
        """Record one."""
        layer, run = reduction.step
        where = {"stage": self.stage, "layer": layer, "run": run, "start": reduction.start}
        name = "/".join(map(str, where.values()))
        self.journal.append("batch", name, **where, stop=reduction.stop, size=reduction.size)

    def read(self) -> list[BatchReduction]:
        """All of them."""
        return [
            BatchReduction((e["layer"], e["run"]), e["start"], e.get("stop", sys.maxsize), e["size"])
            for e in self.journal.of_kind("batch")
            if e["stage"] == self.stage
        ]


@dataclass(frozen=True)
class SnapshotStore:
    """The two newest snapshots of the hidden states of one pass.

    kind: of its journal entries, and the name of its directory. job: what decides them; None is the collection itself.
    """

    run: RunDirectory
    kind: str
    job: str | None = None

    @property
    def directory(self) -> Path:
        """Where they are."""
        return self.run.path / self.kind

    def path(self, layer: int) -> Path:
        """Where the hidden states that enter a layer are saved."""
        return self.directory / f"{layer_name(layer)}.bin"

    def record(self, layer: int, digest: str) -> None:
        """The hidden states that enter a layer are on the disk; all but the two newest snapshots go."""
        job = {} if self.job is None else {"job": self.job}
        self.run.journal.append(self.kind, layer_name(layer), layer=layer, digest=digest, **job)
        self._drop(keep={self.path(entry["layer"]).name for entry in self._recent()})

    def newest(self) -> list[tuple[int, str]]:
        """Layer and sha256 of the snapshots that should be there, the newest first."""
        return [(e["layer"], e["digest"]) for e in reversed(self._recent()) if self.path(e["layer"]).exists()]

    def drop(self) -> None:
        """Delete all: no layer is left to run."""
        self._drop(keep=set())

    def _recent(self) -> list[dict[str, Any]]:
        return [entry for entry in self.run.journal.of_kind(self.kind) if entry.get("job") == self.job][-2:]

    def _drop(self, keep: set[str]) -> None:
        for file in self.directory.iterdir() if self.directory.exists() else ():
            if file.name not in keep:
                files.remove(file)


def stored_bytes(shapes: Sequence[LayerShape], tokens: int) -> int:
    """Most bytes that a run directory takes on a disk besides snapshots. tokens: of all calibration windows."""
    total = _blocks(8 * tokens) + 4 * _BLOCK_BYTES
    for shape in shapes:
        channels = (shape.kv_groups * shape.heads_per_group * shape.head_dim, shape.neurons)
        arrays = sum(_blocks(8 * count) for count in channels) * len(_ARRAYS)
        metadata = (4 * len(_ARRAYS) + 6) * len(_KINDS) * _BLOCK_BYTES  # zarr.json and directories
        plan_and_journal = 12 * (shape.kv_groups + shape.neurons) + 1000
        total += arrays + metadata + plan_and_journal
    return total


def _blocks(nbytes: int) -> int:
    return (nbytes // _BLOCK_BYTES + 1) * _BLOCK_BYTES


def _remove_place(path: Path) -> None:
    if path.is_symlink() or path.is_mount():
        for file in path.iterdir():
            files.remove(file)
    else:
        files.remove(path)


_UNBORN = {MANIFEST_NAME + files.PARTIAL_SUFFIX, LOCK_NAME}


def layer_name(layer: int) -> str:
    """A layer in names of files and journal entries."""
    return f"{layer:04d}"


def _refit_name(layer: int) -> str:
    return f"refit/{layer_name(layer)}.safetensors"
