"""The refit as a pass over all layers: hidden states of the pruned and the dense model, sums over all windows."""

import torch
from torch import nn

from flap_stream.arithmetic.layer_shape import LayerShape, Sublayer
from flap_stream.arithmetic.least_squares import MomentSums, product_windows
from flap_stream.engine.hidden_states import Feed
from flap_stream.engine.layer_pass import LayerPass
from flap_stream.model.units import Part
from flap_stream.restore.stand_ins import SilentMixture, Supplies
from flap_stream.storage.run_directory import RunDirectory


class RefitPass:
    """The pass of the hidden states through the pruned layers, together with the dense ones where they are the target.

    batches: runs the layers; its first hidden states are the pruned model's, its second, if any, the dense model's.
    samples: windows of all ranks. first_cut: the first layer that loses anything.
    """

    def __init__(self, batches: LayerPass, run: RunDirectory, samples: int, first_cut: int) -> None:
        self.batches, self.run, self.samples, self.first_cut = batches, run, samples, first_cut
        self.model, self.placement, self.sizes = batches.model, batches.placement, batches.sizes
        self.hidden, self.dense = batches.hidden[0], batches.hidden[1] if len(batches.hidden) > 1 else None

    @property
    def tokens(self) -> int:
        """Tokens of all windows of all ranks."""
        return self.samples * self.hidden.shape[1]

    @property
    def block_windows(self) -> int:
        """Windows per independent matrix product."""
        return product_windows(self.sizes.first, self.hidden.shape[1])

    def without_norm(self, part: Part) -> dict[str, nn.Module]:
        """Stand-ins that skip the norm before a part that ignores its input, to save its time."""
        path = self.model.family.norm_before(part.kind)
        return {} if path is None else {path: nn.Identity()}

    def silenced(self, half: Sublayer, shape: LayerShape) -> dict[str, nn.Module]:
        """Stand-ins that silence attention or MLP of a layer of that shape; none if it stays whole in this family."""
        family = self.model.family
        if half is Sublayer.MLP and shape.experts:
            return {family.mixture_path: SilentMixture() if family.mixture_returns_scores else Supplies(half)}
        found: dict[str, nn.Module] = {}
        for part in family.parts(shape):
            if part.kind.name is half:
                found |= {part.kind.module: Supplies(half), **self.without_norm(part)}
        return found

    def targets(self, windows: range | None = None, batch_size: int | None = None) -> Feed:
        """The dense hidden states, of some windows or all, read alongside the pruned ones.

        batch_size: None is the largest of this pass.
        """
        assert self.dense is not None
        return Feed(self.dense, batch_size or self.sizes.first, windows)

    def sums(self, kept: int, squares: torch.Tensor, of_expert: bool) -> MomentSums:
        """Empty sums for all windows. squares: float64 `[channel]`, the expected sum of squares of each.

        of_expert: whether windows have as many tokens as are routed to it.
        """
        block_tokens = None if of_expert else self.block_windows * self.hidden.shape[1]
        return MomentSums(kept, squares, self.tokens, block_tokens, self.model.dtype, self.model.device)

    def collected(self, sums: MomentSums) -> MomentSums:
        """The sums over the windows of all ranks, on rank 0; those of the other ranks are then undefined."""
        for part in sums.parts():
            self.model.ranks.sum_on_first(part)
        return sums
