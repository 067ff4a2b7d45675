"""How much a decoder layer changes the hidden states, for ShortGPT: angles between what enters it and what leaves it.

The block influence of a layer is 1 - the mean over tokens of the cosine of that angle (Men et al. 2024, arXiv
2403.03853, equation 1).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from flap_stream.arithmetic.scoring import BlockStatistics
from flap_stream.engine.streamed_model import StreamedModel

_LEAST_NORM = 1e-8  # of the norms by which a product of hidden states is divided, at least


class BlockSimilarity:
    """Sums over each window's tokens, of the batches that have run.

    Sums are taken window by window, so that neither batches nor ranks change them. Nothing that outlives a batch is
    made while it runs: as small as it is, glibc would place the next batch around it, in 100 MiB more of heap.
    """

    def __init__(self, model: StreamedModel, windows: int) -> None:
        """windows: that run here."""
        self._ranks, self._tokens = model.ranks, 0
        self._in_batch = self._done = 0  # windows
        self._sums = torch.zeros(windows, dtype=torch.float64, device=model.device)

    def see(self, _module: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        """A forward hook of the layer; what a batch that failed has left is replaced."""
        after = output[0] if isinstance(output, tuple) else output
        self._in_batch, self._tokens = after.shape[:2]
        for window, states in enumerate(zip(inputs[0], after, strict=True), self._done):
            self._sums[window] = _cosines(*states).sum()

    def take_batch(self) -> None:
        """Keep the sums of the batch that has just run."""
        self._done += self._in_batch

    def finish(self) -> BlockStatistics:
        """The mean over the windows of all ranks."""
        sums = np.concatenate(self._ranks.gathered(self._sums.cpu().numpy()))
        count = len(sums) * max(self._ranks.gathered(self._tokens))
        return BlockStatistics(np.array([count]), np.array([sums.sum() / max(count, 1)]))


def _cosines(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Of the angles between rows, float64 `[token]`. before, after: `[token, hidden]`."""
    before, after = before.double(), after.double()
    norms = (torch.linalg.vector_norm(x, dim=-1).clamp_min(_LEAST_NORM) for x in (before, after))
    return (before * after).sum(dim=-1) / torch.stack(list(norms)).prod(dim=0)


@contextmanager
def block_similarity(model: StreamedModel, index: int, windows: int) -> Iterator[BlockSimilarity]:
    """How similar a layer's outputs are to its inputs while it runs in the block. windows: that run here."""
    found = BlockSimilarity(model, windows)
    handle = model.layers[index].register_forward_hook(found.see)
    try:
        yield found
    finally:
        handle.remove()
