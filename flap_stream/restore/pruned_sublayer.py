"""Attention or MLP of one decoder layer, run as pruned while the rest of the layer is silent."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from flap_stream.arithmetic.surgery import removed_indices
from flap_stream.engine.hidden_states import Feed, HiddenStates
from flap_stream.engine.layer_pass import Batch
from flap_stream.model.dtypes import stored_dtype
from flap_stream.model.units import Part
from flap_stream.restore.refit_pass import RefitPass


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

    @property
    def where(self) -> str:
        """The sublayer's name in messages."""
        return f"{self.part.kind.module} in layer {self.index}"

    def kept_rows(self) -> dict[str, torch.Tensor]:
        """Kept rows, int64 `[row]`, of the weights that read hidden states, by name."""
        shape = self.refit.model.shapes[self.index]
        return {
            f"{projection.name}.weight": torch.from_numpy(projection.kept_indices(self.units, self.part.units, shape))
            for projection in self.part.kind.readers
        }

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype of one of the layer's tensors in the checkpoint."""
        return stored_dtype(self.refit.model.layer_entries[self.index][name])

    def arranged_with(self, readers: Mapping[str, torch.Tensor]) -> "PrunedSublayer":
        """The same with the rows of kept units first. readers: refitted weights of these rows, by name, if any."""
        model, count, kept = self.refit.model, self.part.units, len(self.units)
        order = np.concatenate([self.units, removed_indices(self.units, count)])
        if not readers and np.array_equal(order, np.arange(count)):
            return self
        shape, arranged = model.shapes[self.index], {}
        for projection in self.part.kind.readers:
            rows, first = (
                torch.from_numpy(projection.kept_indices(units, count, shape)).to(model.device)
                for units in (order, np.arange(kept))
            )
            for name in (f"{projection.name}.weight", f"{projection.name}.bias"):
                if name in self.weights:
                    arranged[name] = self.weights[name][rows]
                if name in readers:
                    arranged[name].index_copy_(0, first, readers[name].to(model.device, model.dtype))
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

    def residual(self, targets: Feed, start: int, output: torch.Tensor) -> torch.Tensor:
        """What the sublayer should add to the hidden states to reach the targets, `[sample, token, hidden]`.

        output: of the layer with both sublayers silent, so what enters it; of the windows from `start` on.
        """
        multiplier = getattr(self.refit.model.skeleton.hf_config, "residual_multiplier", 1.0)
        return (targets.take(start, len(output)) - output) / multiplier

    def forward(
        self,
        hidden: HiddenStates,
        stand_ins: Mapping[str, nn.Module],
        *,
        keep_output: bool = True,
        windows: range | None = None,
    ) -> Iterator[Batch]:
        """Run the layer, the other sublayer silent, batch by batch: dense for dense hidden states, else as pruned."""
        weights = self.weights if hidden is self.refit.dense else {**self.weights, **self.arranged}
        modules = {**self.silent, **stand_ins}
        return self.refit.batches.run(
            self.index, weights, hidden, windows=windows, keep_output=keep_output, stand_ins=modules
        )

    def run_all(self, hidden: HiddenStates, stand_ins: Mapping[str, nn.Module] | None = None) -> None:
        """`forward`, only for the hidden states."""
        for _start, output in self.forward(hidden, stand_ins or {}):
            del output
