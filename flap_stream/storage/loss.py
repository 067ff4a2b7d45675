"""The loss scores of a run directory, and the layer inputs that computing them needs."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flap_stream.errors import RunMismatch
from flap_stream.storage import arrays, files
from flap_stream.storage.journal import Journal
from flap_stream.storage.run_directory import RunDirectory
from flap_stream.storage.run_files import KINDS, Committed, layer_name
from flap_stream.storage.snapshots import SnapshotStore

__all__ = ["KINDS", "LossScores", "LossStore"]

_INPUTS, _SCORES = "loss-inputs", "loss"
# Names of earlier versions lack `drawn` (scores of the text's own tokens) or `whole` (nothing of experts together).
_JOB = re.compile(r"(\d+)-drawn(-with-whole-experts)?(-with-layers)?")


@dataclass(frozen=True)
class LossScores:
    """Loss score F of each unit of one layer, in nats squared: float64 `[group]` and `[neuron]`.

    experts: of its experts as a whole, float64 `[expert]`, infinite for those that no token reached; None if they
    were not scored. together: of all neurons of all experts at once, float64 `[1]`; None likewise. layer: of the
    layer as a whole, float64 `[1]`; None likewise.
    """

    attention: np.ndarray
    mlp: np.ndarray
    experts: np.ndarray | None = None
    together: np.ndarray | None = None
    layer: np.ndarray | None = None


@dataclass(frozen=True)
class LossStore:
    """The layer inputs and the scores computed from the first `windows` calibration windows, in loss.zarr.

    of_experts, of_layers: whether there are scores of whole experts, and of whole layers, too.
    """

    run: RunDirectory
    windows: int
    of_experts: bool = False
    of_layers: bool = False

    @classmethod
    def of(cls, run: RunDirectory) -> "LossStore":
        """The newest one whose scores are complete.

        Raises RunMismatch if there is none.
        """
        jobs = [entry["job"] for entry in run.journal.of_kind(_SCORES)]
        for job in dict.fromkeys(reversed(jobs)):
            found = cls._of_job(run, job)
            if found is not None and found.complete() == len(run.layer_shapes) and not found._is_being_replaced():
                return found
        raise RunMismatch(
            f"{run.path} holds no loss scores; collect them with flap-stream collect MODEL {run.path} "
            "--loss-windows 256"
        )

    @classmethod
    def damaged(cls, run: RunDirectory) -> list[str]:
        """As `RunDirectory.damaged`, of the scores that a run directory holds."""
        jobs = dict.fromkeys(entry["job"] for entry in run.journal.of_kind(_SCORES))
        stores = [found for job in jobs if (found := cls._of_job(run, job)) is not None]
        items = [item for store in stores if not store._is_being_replaced() for item in store.committed()]
        return [f"{item.name} is {damage}" for item in items if (damage := run.files.damage_of(item))]

    @classmethod
    def begun(cls, run: RunDirectory) -> "LossStore | None":
        """The one whose backward pass began last; None if none did."""
        jobs = run.journal.of_kind("loss-job")
        return cls._of_job(run, jobs[-1]["job"]) if jobs else None

    @classmethod
    def _of_job(cls, run: RunDirectory, job: str) -> "LossStore | None":
        found = _JOB.fullmatch(job)
        return None if found is None else cls(run, int(found[1]), found[2] is not None, found[3] is not None)

    def _is_being_replaced(self) -> bool:
        """Whether another job began later and was killed once it had removed a layer's scores of this one."""
        begun = self.run.journal.of_kind("loss-job")
        if not begun or begun[-1]["job"] == self.job:
            return False
        return any(self.run.files.damage_of(item) for item in self.committed())

    def committed(self) -> list[Committed]:
        """The scores of this job that are stored, by layer."""
        newest = {entry["name"]: entry for entry in self.run.journal.of_kind(_SCORES)}
        return [
            Committed(_path(layer), entry["digest"], arrays.max_bytes(self._array_specs(layer)))
            for layer in range(len(self.run.layer_shapes))
            if (entry := newest.get(layer_name(layer))) and entry["job"] == self.job
        ]

    @property
    def job(self) -> str:
        """What determines the scores, besides what determines the statistics."""
        return loss_job(self.windows, self.of_experts, self.of_layers)

    @property
    def snapshots(self) -> SnapshotStore:
        """Snapshots of the gradient as it passes from the last layer to the first."""
        return SnapshotStore(self.run.files, "hidden-loss", self.job)

    def begin(self, batch_size: int) -> None:
        """Record the batch size of the backward pass, which begins."""
        self.run.journal.append("loss-job", self.job, job=self.job, batch_size=batch_size)

    def recorded_batch_size(self) -> int | None:
        """The batch size that the backward pass was started with; None if it was not started."""
        entry = self.run.journal.find("loss-job", self.job)
        return None if entry is None else int(entry["batch_size"])

    # --- hidden states that enter each layer, and at the end those that leave the last ---

    def inputs_path(self, layer: int) -> Path:
        """The raw file with the hidden states that enter a layer."""
        return self.run.path / _INPUTS / f"{layer_name(layer)}.bin"

    def inputs_digest(self, layer: int) -> str | None:
        """Sha256 of a layer's inputs; None if they are not stored."""
        entry = self.run.journal.find(_INPUTS, layer_name(layer))
        return entry["digest"] if entry is not None and entry["job"] == self.job else None

    def record_inputs(self, layer: int, digest: str) -> None:
        """Record that a layer's inputs are on the disk."""
        self.run.journal.append(_INPUTS, layer_name(layer), job=self.job, digest=digest)

    @staticmethod
    def has_all_scores(run: Path, job: str, layers: int) -> bool:
        """Whether a run directory, which need not exist, holds the scores of all layers. job: see `loss_job`."""
        return len(_layers_of(Journal(run / "journal"), job)) == layers

    def drop_inputs(self) -> None:
        """Delete the inputs of all layers: all scores are stored."""
        files.remove(self.run.path / _INPUTS)

    # --- scores ---

    def complete(self) -> int:
        """How many layers, counted from the last, have their scores stored."""
        layers = len(self.run.layer_shapes)
        done, count = _layers_of(self.run.journal, self.job), 0
        while count < layers and layer_name(layers - 1 - count) in done:
            count += 1
        return count

    def write(self, layer: int, scores: LossScores) -> None:
        """Store a layer's scores, all or nothing."""
        name = _path(layer)
        files.make_directory((self.run.path / name).parent)
        digest = self.run.files.commit_group(name, {n: getattr(scores, n) for n in self._array_specs(layer)}, {})
        self.run.journal.append(_SCORES, layer_name(layer), job=self.job, digest=digest)

    def read(self, layer: int) -> LossScores:
        """A layer's scores. Raises CorruptRun if they are missing or altered."""
        name = _path(layer)
        entry = self.run.journal.find(_SCORES, layer_name(layer))
        if entry is None:
            raise self.run.files.incomplete(name)
        specs = self._array_specs(layer)
        found, _ = self.run.files.read_group(Committed(name, entry["digest"], arrays.max_bytes(specs)), specs)
        return LossScores(**dict(zip(specs, found, strict=True)))

    def _array_specs(self, layer: int) -> dict[str, arrays.ArraySpec]:
        shape = self.run.layer_shapes[layer]
        specs: dict[str, arrays.ArraySpec] = {kind: ("float64", (shape.units(kind),)) for kind in KINDS}
        if self.of_experts:
            specs |= {"experts": ("float64", (len(shape.experts),)), "together": ("float64", (1,))}
        return {**specs, **({"layer": ("float64", (1,))} if self.of_layers else {})}


def loss_job(windows: int, of_experts: bool, of_layers: bool) -> str:
    """What tells scores from others of the same run."""
    return f"{windows}-drawn{'-with-whole-experts' if of_experts else ''}{'-with-layers' if of_layers else ''}"


def _layers_of(journal: Journal, job: str) -> set[str]:
    """Names of the layers whose scores are of this job; a later job replaces them layer by layer."""
    newest = {entry["name"]: entry["job"] for entry in journal.of_kind(_SCORES)}
    return {name for name, found in newest.items() if found == job}


def _path(layer: int) -> str:
    return f"loss.zarr/{layer_name(layer)}"
