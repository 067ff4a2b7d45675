"""The sweeps of a run directory: perplexities measured over a range of pruning ratios."""

import json
import logging
from dataclasses import dataclass
from typing import Any

from flap_stream.storage import files
from flap_stream.storage.run_files import Committed, RunFiles
from flap_stream.storage.schema import finite, matches, natural, parse_json
from flap_stream.storage.snapshots import SnapshotStore

logger = logging.getLogger(__name__)

POINT = {"ratio": finite, "decoder_ratio": finite, "model_ratio": finite, "parameters": natural, "perplexity": float}
_CURVE = {
    **{"options": dict, "restore": str, "text": {"sources": [str], "sha256": str, "shape": (natural, natural)}},
    **{"dtype": str, "device": str, "loss?": str, "dense_perplexity": float, "points": [POINT]},
    "loss_windows?": natural,  # of earlier versions
}
_MAX_BYTES = 1 << 26  # of one sweep: far more than any has; not measured


@dataclass(frozen=True)
class SweepStore:
    """The results of each sweep so far, as JSON in sweeps/."""

    run_files: RunFiles

    def write(self, name: str, body: dict[str, Any]) -> None:
        """Store a sweep's results so far, replacing earlier ones. body: JSON values."""
        path = self.run_files.path / _path(name)
        files.make_directory(path.parent)
        self.run_files.journal.append("sweep", name, digest=files.write_committed(path, json.dumps(body).encode()))

    def read(self, name: str) -> dict[str, Any] | None:
        """A sweep's results so far; None if there are none, or, with a warning, if they are damaged.

        It has `options` (all of a plan's except the ratio), `restore`, `text` (sources, sha256 and shape of its
        windows), `dtype`, `device`, `dense_perplexity` and `points` in order of ratio, each with the values of `POINT`.
        """
        entry, path = self.run_files.journal.find("sweep", name), self.run_files.path / _path(name)
        if entry is None:
            return None
        if (damage := self.run_files.damage_of(_committed(name, entry))) is not None:
            logger.warning("%s is %s; what that sweep had found is not used", path, damage)
            return None
        try:
            found = parse_json(files.read_plain(path, _MAX_BYTES))
        except ValueError:
            logger.warning("%s is not JSON; what that sweep had found is not used", path)
            return None
        return found if matches(found, _CURVE) else None

    def curves(self) -> list[dict[str, Any]]:
        """The results of all sweeps, as from `read`, oldest first."""
        names = dict.fromkeys(entry["name"] for entry in self.run_files.journal.of_kind("sweep"))
        return [found for found in map(self.read, names) if found is not None]

    def snapshots(self, job: str) -> SnapshotStore:
        """Snapshots of the hidden states of one pass over the model. job: identifies that pass."""
        return SnapshotStore(self.run_files, "hidden-sweep", job)

    def committed(self) -> list[Committed]:
        """The files of all sweeps, oldest first."""
        newest = {entry["name"]: entry for entry in self.run_files.journal.of_kind("sweep")}
        return [_committed(name, entry) for name, entry in newest.items()]


def _path(name: str) -> str:
    return f"sweeps/{name}.json"


def _committed(name: str, entry: dict[str, Any]) -> Committed:
    return Committed(_path(name), entry["digest"], _MAX_BYTES)
