"""Where the hidden states between two decoder layers live, and their snapshots on disk."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from flap_stream import files
from flap_stream.errors import CorruptRun

_BLOCK_BYTES = 1 << 26


class HiddenStates:
    """Hidden states of all windows in one host buffer, `[sample, token, hidden]`, overwritten layer by layer."""

    def __init__(self, samples: int, tokens: int, hidden_size: int, dtype: torch.dtype) -> None:
        self.values = torch.empty(samples, tokens, hidden_size, dtype=dtype)

    def get(self, start: int, stop: int, device: torch.device) -> torch.Tensor:
        """Windows `start:stop` on the device."""
        return self.values[start:stop].to(device)

    def put(self, start: int, values: torch.Tensor) -> None:
        """Overwrite windows from `start` on."""
        self.values[start : start + len(values)].copy_(values)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.values.nbytes

    def save(self, path: Path) -> str:
        """Write the raw bytes to a file, durably; their sha256 comes out."""
        return files.write_committed(path, self._blocks())

    def load(self, path: Path, digest: str) -> None:
        """Fill the buffer from a file.

        Raises CorruptRun if its size or sha256 is not what was recorded.
        """
        if not path.is_file() or path.stat().st_size != self.nbytes or self._fill(path) != digest:
            raise CorruptRun(f"snapshot {path} is missing or altered; delete it to go on from an earlier one")

    def _fill(self, path: Path) -> str:
        """Read a file into the buffer, as far as it goes; the sha256 of what was read comes out."""
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            for block in self._blocks():
                filled = 0
                while filled < len(block) and (count := file.readinto(block[filled:])):
                    filled += count
                digest.update(block[:filled])
        return digest.hexdigest()

    def _blocks(self) -> Iterator[memoryview]:
        raw: np.ndarray = self.values.view(torch.uint8).numpy().reshape(-1)
        for start in range(0, len(raw), _BLOCK_BYTES):
            yield memoryview(raw[start : start + _BLOCK_BYTES])
