"""The refit as a pass over all layers: hidden states of the pruned and the dense model, sums over all windows."""

import torch
from torch import nn

from flap_stream.arithmetic.least_squares import MomentSums, product_windows
from flap_stream.engine.hidden_states import Feed
from flap_stream.engine.layer_pass import LayerPass
from flap_stream.model.units import Part
from flap_stream.storage.run_directory import RunDirectory


class RefitPass:
    """The pass of the hidden states through the pruned layers, together with the dense ones where they are the target.

    batches: runs the layers; its first hidden states are the pruned model's, its second, if any, the dense model's.
    samples: windows of all ranks.
    """

    def __init__(self, batches: LayerPass, run: RunDirectory, samples: int) -> None:
        self.batches, self.run, self.samples = batches, run, samples
        self.model, self.placement, self.sizes = batches.model, batches.placement, batches.sizes
        self.hidden, self.dense = batches.hidden[0], batches.hidden[1] if len(batches.hidden) > 1 else None

    @property
    def tokens(self) -> int:
        """Tokens of all windows of all ranks."""
        return self.samples * self.hidden.shape[1]

    @property
    def block_tokens(self) -> int:
        """Tokens per independent matrix product."""
        length = self.hidden.shape[1]
        return product_windows(self.sizes.first, length) * length

    def without_norm(self, part: Part) -> dict[str, nn.Module]:
        """Stand-ins that skip the norm before a part that ignores its input, to save its time."""
        path = self.model.family.norm_before(part.kind)
        return {} if path is None else {path: nn.Identity()}

    def targets(self, windows: range, batch_size: int) -> Feed:
        """The dense hidden states of some windows, read alongside the pruned ones."""
        assert self.dense is not None
        return Feed(self.dense, batch_size, windows)

    def sums(self, kept: int, squares: torch.Tensor) -> MomentSums:
        """Empty sums for all windows. squares: float64 `[channel]`, the expected sum of squares of each."""
        return MomentSums(kept, squares, self.tokens, self.block_tokens, self.model.dtype, self.model.device)

    def collected(self, sums: MomentSums) -> MomentSums:
        """The sums over the windows of all ranks, on rank 0; those of the other ranks are then undefined."""
        for part in sums.parts():
            self.model.ranks.sum_on_first(part)
        return sums
