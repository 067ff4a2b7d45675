"""The calibration tokens of a run directory."""

from dataclasses import dataclass

import numpy as np

from flap_stream.errors import CorruptRun
from flap_stream.storage import arrays
from flap_stream.storage.run_files import Committed, RunFiles
from flap_stream.storage.run_manifest import Manifest, tokens_digest

_NAME = "tokens.zarr"


@dataclass(frozen=True)
class TokenStore:
    """The calibration windows, in tokens.zarr."""

    run_files: RunFiles
    manifest: Manifest

    def write(self, tokens: np.ndarray) -> None:
        """Store the windows, int64 `[sample, token]`."""
        digest = self.run_files.commit_group(_NAME, {"tokens": tokens}, {})
        self.run_files.journal.append("tokens", "tokens", digest=digest)

    def exists(self) -> bool:
        """Whether the windows are stored."""
        return self.run_files.journal.find("tokens", "tokens") is not None

    def read(self) -> np.ndarray:
        """The stored windows, int64 `[sample, token]`.

        Raises CorruptRun if they are missing, altered, or not those the run was made for.
        """
        found = self.committed()
        if not found:
            raise self.run_files.incomplete(_NAME)
        (tokens,), _ = self.run_files.read_group(found[0], self._array_specs())
        in_vocabulary = not tokens.size or 0 <= tokens.min() <= tokens.max() < self.manifest["sizes"]["vocabulary"]
        if not in_vocabulary or tokens_digest(tokens) != self.manifest["tokens"]["sha256"]:
            raise CorruptRun(
                f"{self.run_files.path / _NAME} holds other tokens than the run was made for; delete the run directory "
                "and collect again"
            )
        return tokens

    def committed(self) -> list[Committed]:
        """The windows, if they are stored."""
        entry = self.run_files.journal.find("tokens", "tokens")
        return [] if entry is None else [Committed(_NAME, entry["digest"], arrays.max_bytes(self._array_specs()))]

    def _array_specs(self) -> dict[str, arrays.ArraySpec]:
        samples, length = self.manifest["tokens"]["shape"]
        return {"tokens": ("int64", (samples, length))}
