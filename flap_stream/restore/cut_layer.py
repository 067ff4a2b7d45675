"""What a pruned layer keeps of its tensors, and the same in the dense sizes, as the layer runs."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.surgery import baseline_shift
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.model.dtypes import stored_dtype
from flap_stream.model.units import COLUMNS, ROWS, Part


@dataclass(frozen=True)
class CutLayer:
    """Layer `index` of which `keep` is kept.

    weights: its dense tensors on the device, by relative name.

    Removed columns of output projections are zeros in the dense sizes, so removed rows have no effect. Removed experts
    have none as long as the layer runs in `rerouted`.
    """

    model: StreamedModel
    index: int
    weights: Mapping[str, torch.Tensor]
    keep: LayerKeep

    def with_bias(self, means: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """The tensors that may be fitted, as FLAP's bias leaves them: float32, in the dense sizes, on the device.

        They are those of projections and, of the others, vectors such as the weights of norms. A router is not fitted.
        means: by kind of unit, mean inputs of output projections, float64 `[channel]`.
        """
        model, shape = self.model, self.model.shapes[self.index]
        dtypes = model.skeleton.dtypes(torch.bfloat16)  # what is kept in float32 decides where tokens go
        router = model.family.router_axes({n: tuple(w.shape) for n, w in self.weights.items()}) if shape.experts else {}
        vectors = {n: w for n, w in self.weights.items() if w.ndim == 1 and n not in router}
        found = {n: w.float() for n, w in vectors.items() if dtypes(n) != torch.float32}
        for part, units in self._parts():
            for projection in part.kind.projections:
                if (name := f"{projection.name}.weight") in self.weights:
                    found[name] = self.weights[name].float()
            name = part.kind.output.name
            weight = found.get(f"{name}.weight")
            if weight is None:
                continue
            removed = torch.from_numpy(part.removed_channels(units, shape)).to(model.device)
            mean = torch.from_numpy(means[part.kind.name][part.channels(shape)]).to(model.device)
            bias = found.get(f"{name}.bias", torch.zeros(len(weight), device=model.device))
            found[f"{name}.bias"] = bias + baseline_shift(weight, removed, mean).float()
            weight = weight.clone()
            weight[:, removed] = 0
            found[f"{name}.weight"] = weight
        return found

    def masks(self) -> dict[str, torch.Tensor]:
        """1 for the kept columns of each output projection's weight and 0 for the others, float32, by name."""
        masks = {}
        for part, units in self._parts():
            for name, axis, kept in self._places(part, units):
                if axis == COLUMNS and name in self.weights:
                    masks[name] = torch.zeros(self.weights[name].shape[1], device=self.model.device)
                    masks[name][kept] = 1
        return masks

    def cut(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is kept of tensors in the dense sizes, in the dtypes of the checkpoint, in host memory."""
        found = {name: tensor.to(self.stored_dtype(name)) for name, tensor in tensors.items()}
        for part, units in self._parts():
            output = part.kind.output.name
            if len(units) == 0:  # only the bias is left of such a module, and of an expert nothing
                left = f"{output}.bias" if part.kind.expert is None else ""
                found = {
                    name: tensor
                    for name, tensor in found.items()
                    if not name.startswith(f"{part.kind.module}.") or name == left
                }
            for name, axis, kept in self._places(part, units):
                if name in found:
                    found[name] = found[name].index_select(axis, kept)
        return {name: tensor.cpu() for name, tensor in found.items()}

    def rerouted(self) -> AbstractContextManager[None]:
        """In the block, the router chooses among the experts that are kept."""
        return self.model.rerouted(self.index, self.keep.neurons)

    def whole(self, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All tensors of the layer in the dense sizes, with these in the place of those that `cut` returned.

        In the dtype that the layer runs in, on the device.
        """
        model = self.model
        given = {name: tensor.to(model.device, model.dtype) for name, tensor in stored.items()}
        found = {**self.weights, **given}
        for part, units in self._parts():
            output = f"{part.kind.output.name}.weight"
            if output in self.weights:
                found[output] = torch.zeros_like(self.weights[output])
            for name, axis, kept in self._places(part, units):
                if name in given:
                    dense = found[output] if name == output else self.weights[name].clone()
                    found[name] = dense.index_copy_(axis, kept, given[name])
        return found

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor in the checkpoint; a bias that pruning adds has its weight's."""
        entries = self.model.layer_entries[self.index]
        return stored_dtype(entries[name] if name in entries else entries[f"{name.removesuffix('bias')}weight"])

    def _parts(self) -> Iterator[tuple[Part, np.ndarray]]:
        """The parts of the layer, each with its kept units."""
        return self.model.family.kept_parts(self.model.shapes[self.index], self.keep)

    def _places(self, part: Part, units: np.ndarray) -> Iterator[tuple[str, int, torch.Tensor]]:
        """Names of the tensors that lose rows or columns, which axis, and what is kept of it, int64 on the device."""
        shape = self.model.shapes[self.index]
        for projection in part.kind.projections:
            kept = torch.from_numpy(projection.kept_indices(units, part.units, shape)).to(self.model.device)
            for suffix in ("weight", "bias") if projection.axis == ROWS else ("weight",):
                yield f"{projection.name}.{suffix}", projection.axis, kept
