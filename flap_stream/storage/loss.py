"""What the backward sweep needs and finds, as stored in a run directory."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flap_stream.arithmetic.layer_shape import LayerShape, Sublayer
from flap_stream.errors import RunMismatch
from flap_stream.storage import arrays, files
from flap_stream.storage.run_directory import RunDirectory, SnapshotStore, layer_name

KINDS = tuple(Sublayer)
_INPUTS, _SCORES = "loss-inputs", "loss"


@dataclass(frozen=True)
class LossScores:
    """F of the units of one layer, in nats squared: float64 `[group]` and `[neuron]`."""

    attention: np.ndarray
    mlp: np.ndarray


@dataclass(frozen=True)
class LossStore:
    """The layer inputs and the scores of the first `windows` calibration windows."""

    run: RunDirectory
    windows: int

    @property
    def job(self) -> str:
        """What decides the scores besides the statistics."""
        return str(self.windows)

    @property
    def snapshots(self) -> SnapshotStore:
        """Those of the gradient on its way down."""
        return SnapshotStore(self.run, "hidden-loss", self.job)

    def begin(self, batch_size: int) -> int:
        """The batch size of the sweep: what it began with, else this one from now on."""
        entry = self.run.journal.find("loss-job", self.job)
        if entry is None:
            self.run.journal.append("loss-job", self.job, job=self.job, batch_size=batch_size)
            return batch_size
        return int(entry["batch_size"])

    def recorded_batch_size(self) -> int | None:
        """What a sweep that was interrupted began with."""
        entry = self.run.journal.find("loss-job", self.job)
        return None if entry is None else int(entry["batch_size"])

    # --- hidden states that enter each layer, and at the end those that leave the last ---

    def inputs_path(self, layer: int) -> Path:
        """Where the hidden states that enter a layer are, raw."""
        return self.run.path / _INPUTS / f"{layer_name(layer)}.bin"

    def inputs_digest(self, layer: int) -> str | None:
        """Their sha256; None if they are not stored."""
        entry = self.run.journal.find(_INPUTS, layer_name(layer))
        return entry["digest"] if entry is not None and entry["job"] == self.job else None

    def record_inputs(self, layer: int, digest: str) -> None:
        """They are on the disk."""
        self.run.journal.append(_INPUTS, layer_name(layer), job=self.job, digest=digest)

    def drop_inputs(self) -> None:
        """Delete them: all scores are stored."""
        files.remove(self.run.path / _INPUTS)

    # --- scores ---

    def complete(self) -> int:
        """How many layers, from the last on, have their scores stored."""
        layers = len(self.run.layer_shapes)
        done = {entry["name"] for entry in self.run.journal.of_kind(_SCORES) if entry["job"] == self.job}
        count = 0
        while count < layers and layer_name(layers - 1 - count) in done:
            count += 1
        return count

    def write(self, layer: int, scores: LossScores) -> None:
        """Store a layer's scores: all of them or nothing."""
        name = f"loss.zarr/{layer_name(layer)}"
        files.make_directory(self.run.path / "loss.zarr")
        self.run.commit_group(name, {kind: getattr(scores, kind) for kind in KINDS}, {})
        digest = files.tree_digest(self.run.path / name)
        self.run.journal.append(_SCORES, layer_name(layer), job=self.job, digest=digest)

    @classmethod
    def of(cls, run: RunDirectory) -> "LossStore":
        """The newest whose scores are complete.

        Raises RunMismatch if there is none.
        """
        jobs = [entry["job"] for entry in run.journal.of_kind(_SCORES)]
        for job in dict.fromkeys(reversed(jobs)):
            store = cls(run, int(job))
            if store.complete() == len(run.layer_shapes):
                return store
        raise RunMismatch(
            f"{run.path} holds no scores by the loss; collect them with flap-stream collect MODEL {run.path} "
            "--loss-windows 256"
        )

    def read(self, layer: int) -> LossScores:
        """A layer's scores. Raises CorruptRun if they are missing or altered."""
        name = f"loss.zarr/{layer_name(layer)}"
        self.run.verify(name, self.run.journal.find(_SCORES, layer_name(layer)))
        found, _ = arrays.read_group(self.run.path / name, _forms(self.run.layer_shapes[layer]))
        return LossScores(*found)


def _forms(shape: LayerShape) -> dict[str, arrays.Form]:
    return {kind: ("float64", (shape.units(kind),)) for kind in KINDS}
