"""Attention or MLP of one decoder layer, run as pruned while the rest of the layer is silent."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from flap_stream.arithmetic.surgery import removed_indices
from flap_stream.engine.layer_pass import Batch
from flap_stream.model.dtypes import stored_dtype
from flap_stream.model.units import Part
from flap_stream.restore.refit_pass import RefitPass


def size_exponents(hidden: torch.Tensor) -> torch.Tensor:
    """The power of two next above the root mean square of each token, int32 `[sample, token]`."""
    norms = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)
    return torch.frexp(norms / hidden.shape[-1] ** 0.5).exponent


@dataclass(frozen=True)
class PrunedSublayer:
    """Attention or MLP of layer `index`, of which the units `units` are kept (ascending int64).

    weights: the layer's dense tensors on the device, by relative name. silent: modules that silence the other sublayer.
    arranged: tensors that replace dense ones in the pruned model: what reads hidden states, with the rows of kept units
    first. The output projection then reads its kept channels first, and no token needs a gather.
    """

    refit: RefitPass
    index: int
    weights: Mapping[str, torch.Tensor]
    part: Part
    units: np.ndarray
    silent: Mapping[str, nn.Module]
    arranged: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype of one of the layer's tensors in the checkpoint."""
        return stored_dtype(self.refit.model.layer_entries[self.index][name])

    def with_rows_arranged(self) -> "PrunedSublayer":
        """The same with the rows of kept units first."""
        model, count = self.refit.model, self.part.units
        order = np.concatenate([self.units, removed_indices(self.units, count)])
        if np.array_equal(order, np.arange(count)):
            return self
        shape, arranged = model.shapes[self.index], {}
        for projection in self.part.kind.readers:
            rows = torch.from_numpy(projection.kept_indices(order, count, shape)).to(model.device)
            for name in (f"{projection.name}.weight", f"{projection.name}.bias"):
                if name in self.weights:
                    arranged[name] = self.weights[name][rows]
        return replace(self, arranged=arranged)

    def unchanged_output(self) -> dict[str, torch.Tensor]:
        """Weight and bias of the output projection as they are (a zero bias if it has none), as far as they exist.

        A bias without a weight is what an earlier pruning left of a sublayer that lost all its units.
        """
        name = self.part.kind.output.name
        tensors = {
            key: self.weights[key].to(self.stored_dtype(key))
            for key in (f"{name}.weight", f"{name}.bias")
            if key in self.weights
        }
        if f"{name}.weight" in tensors:
            tensors.setdefault(f"{name}.bias", torch.zeros_like(tensors[f"{name}.weight"][:, 0]))
        return tensors

    @property
    def is_before_any_cut(self) -> bool:
        """Whether it gets what it gets in the dense model."""
        return self.index < self.refit.first_cut

    def forward(self, stand_ins: Mapping[str, nn.Module], *, keep_output: bool = True) -> Iterator[Batch]:
        """Run the layer on the pruned model's hidden states, the other sublayer silent, batch by batch."""
        weights, modules = {**self.weights, **self.arranged}, {**self.silent, **stand_ins}
        return self.refit.batches.run(self.index, weights, keep_output=keep_output, stand_ins=modules)

    def run_dense(self) -> int:
        """Run it on the dense model's hidden states, which advance; returns the mean exponent of what they become."""
        refit, total, tokens = self.refit, torch.zeros((), dtype=torch.int64, device=self.refit.model.device), 0
        for _start, output in refit.batches.run(self.index, self.weights, refit.dense, stand_ins=self.silent):
            total += size_exponents(output).sum()
            tokens += output.shape[0] * output.shape[1]
            del output  # lest it live while the next batch runs
        totals, counts = zip(*refit.model.ranks.gathered((int(total), tokens)), strict=True)
        return round(sum(totals) / sum(counts))

    def run_all(self, stand_ins: Mapping[str, nn.Module]) -> None:
        """`forward`, only for the hidden states."""
        for _start, output in self.forward(stand_ins):
            del output
