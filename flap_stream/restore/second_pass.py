"""Pass 2 as a whole: hidden states on their way through the pruned layers, and what is summed over all windows."""

import torch
from torch import nn

from flap_stream.arithmetic.least_squares import MomentSums, product_windows, refit_to_target, row_blocks
from flap_stream.config import ALIGNING_TARGETS
from flap_stream.engine.hidden_states import Feed
from flap_stream.engine.layer_pass import LayerPass
from flap_stream.errors import NonFinite
from flap_stream.model.units import Part
from flap_stream.storage.run_directory import RunDirectory


class SecondPass:
    """The hidden states on their way through the pruned layers; beside them, as the target, the dense ones.

    batches: whose hidden states they are. samples: windows of all ranks. target: one of config.REFIT_TARGETS.
    """

    def __init__(self, batches: LayerPass, run: RunDirectory, samples: int, target: str) -> None:
        self.batches, self.store, self.samples = batches, run, samples
        self.model, self.placement, self.sizes = batches.model, batches.placement, batches.sizes
        self.hidden, self.dense = batches.hidden[0], batches.hidden[1] if len(batches.hidden) > 1 else None
        self.aligns, self.is_joint = target in ALIGNING_TARGETS, target == "joint"

    @property
    def block_tokens(self) -> int:
        """Tokens that are multiplied apart from others'."""
        length = self.hidden.shape[1]
        return product_windows(self.sizes.first, length) * length

    def without_norm(self, part: Part) -> dict[str, nn.Module]:
        """What saves the time of norming for a part that does not look at it."""
        path = self.model.family.norm_before(part.kind)
        return {} if path is None else {path: nn.Identity()}

    def skip_runs(self, count: int) -> None:
        """Count runs of the layer that were made by an earlier call, so that later ones keep their numbers."""
        layer, run = self.batches.step
        self.batches.step = (layer, run + count)

    def collected(self, sums: MomentSums) -> MomentSums:
        """On rank 0 the sums over the windows of all ranks; nothing on the others."""
        for part in sums.parts():
            self.model.ranks.sum_on_first(part)
        return sums

    def targets(self, windows: range | None = None) -> Feed:
        """The dense hidden states beside the pruned ones."""
        assert self.dense is not None
        return Feed(self.dense, self.sizes.first, windows)

    @property
    def tokens(self) -> int:
        """Of all windows of all ranks."""
        return self.samples * self.hidden.shape[1]

    def sums(self, kept: int, squares: torch.Tensor) -> MomentSums:
        """Sums over all windows. squares: for each channel roughly that of its squares."""
        return MomentSums(kept, squares, self.tokens, self.block_tokens, self.model.dtype, self.model.device)

    def alignment_sums(self) -> MomentSums:
        """Of what is read in the pruned model, and in the dense one; norms give values around 1."""
        width = self.model.hidden_size
        return self.sums(width, torch.full((2 * width,), float(self.tokens), dtype=torch.float64))

    def alignment(self, sums: MomentSums, where: str) -> torch.Tensor:
        """The matrix, float32 `[hidden, hidden]`, that brings what is read nearest to what the dense model reads."""
        summed = self.collected(sums)

        def solve() -> torch.Tensor:
            moments = summed.finish(about_mean=False)
            if not torch.isfinite(moments.kept.diagonal()).all():
                raise NonFinite(f"what enters {where} holds NaN or infinity, or its squares do; try --dtype float32")
            identity = torch.eye(moments.kept.shape[0], device=moments.kept.device)
            return refit_to_target(identity, moments).cpu()

        return self.model.ranks.from_first(solve).to(self.model.device)


def aligned_rows(weight: torch.Tensor, matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight @ matrix, in host memory."""
    result = torch.empty(weight.shape, dtype=dtype)
    for rows in row_blocks(weight):
        result[rows] = (weight[rows].float() @ matrix).to(dtype)
    return result
