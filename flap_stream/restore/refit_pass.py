"""The refit as a pass over all layers: hidden states of the pruned and the dense model, sums over all windows."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from flap_stream.arithmetic.least_squares import MomentSums, product_windows, row_blocks, solve_for_target
from flap_stream.config import ALIGNING_TARGETS
from flap_stream.engine.hidden_states import Feed
from flap_stream.engine.layer_pass import LayerPass
from flap_stream.errors import NonFinite
from flap_stream.model.units import Part
from flap_stream.storage.run_directory import RunDirectory


class RefitPass:
    """The pass of the hidden states through the pruned layers, together with the dense ones where they are the target.

    batches: runs the layers; its first hidden states are the pruned model's, its second, if any, the dense model's.
    samples: windows of all ranks. target: one of config.REFIT_TARGETS.
    """

    def __init__(self, batches: LayerPass, run: RunDirectory, samples: int, target: str) -> None:
        self.batches, self.run, self.samples = batches, run, samples
        self.model, self.placement, self.sizes = batches.model, batches.placement, batches.sizes
        self.hidden, self.dense = batches.hidden[0], batches.hidden[1] if len(batches.hidden) > 1 else None
        self.aligns, self.is_joint = target in ALIGNING_TARGETS, target == "joint"

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

    def skip_runs(self, count: int) -> None:
        """Count runs of the layer that an earlier call made, so that later ones keep their numbers."""
        layer, run = self.batches.step
        self.batches.step = (layer, run + count)

    @contextmanager
    def runs_counted_as(self, count: int) -> Iterator[None]:
        """Count the runs of the layer in this block as `count`, however many there are."""
        layer, run = self.batches.step
        yield
        self.batches.step = (layer, run + count)

    def targets(self, windows: range | None = None, batch_size: int | None = None) -> Feed:
        """The dense hidden states, read alongside the pruned ones. batch_size: None is the largest of this pass."""
        assert self.dense is not None
        return Feed(self.dense, batch_size or self.sizes.first, windows)

    def sums(self, kept: int, squares: torch.Tensor) -> MomentSums:
        """Empty sums for all windows. squares: float64 `[channel]`, the expected sum of squares of each."""
        return MomentSums(kept, squares, self.tokens, self.block_tokens, self.model.dtype, self.model.device)

    def collected(self, sums: MomentSums) -> MomentSums:
        """The sums over the windows of all ranks, on rank 0; those of the other ranks are then undefined."""
        for part in sums.parts():
            self.model.ranks.sum_on_first(part)
        return sums

    def alignment_sums(self) -> MomentSums:
        """Empty sums for what is read in the pruned model and in the dense one; norms output values around 1."""
        width = self.model.hidden_size
        return self.sums(width, torch.full((2 * width,), float(self.tokens), dtype=torch.float64))

    def alignment(self, sums: MomentSums, where: str) -> torch.Tensor:
        """The matrix that maps what is read in the pruned model closest to what the dense one reads.

        Returns float32 `[hidden, hidden]` on the model's device, the same on every rank.
        Raises NonFinite, naming `where`, if the moments hold NaN or infinity.
        """
        summed = self.collected(sums)
        return self.model.ranks.tensor_from_first(lambda: _solve_alignment(summed, where), self.model.device)


def _solve_alignment(sums: MomentSums, where: str) -> torch.Tensor:
    moments = sums.finish(about_mean=False)
    if not torch.isfinite(moments.kept.diagonal()).all():
        raise NonFinite(f"the inputs of {where}, or their squares, hold NaN or infinity; try --dtype float32")
    identity = torch.eye(moments.kept.shape[0], device=moments.kept.device)
    return solve_for_target(identity, moments)


def aligned_rows(weight: torch.Tensor, matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight @ matrix, in host memory, computed in float32 and rounded to `dtype`."""
    result = torch.empty(weight.shape, dtype=dtype)
    for rows in row_blocks(weight):
        result[rows] = (weight[rows].float() @ matrix).to(dtype)
    return result
