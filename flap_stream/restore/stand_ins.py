"""Modules that stand in for a decoder layer's own while it is refitted."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from flap_stream.arithmetic.layer_shape import Sublayer
from flap_stream.engine.layer_pass import StandIn
from flap_stream.model.units import UnitKind


class Captures(StandIn):
    """Stands in for an output projection: keeps its inputs, outputs zeros."""

    inputs: torch.Tensor
    seen = ("inputs",)

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self._hidden_size = hidden_size

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[sample, token, channel]` to zeros `[sample, token, hidden]`."""
        self.inputs = inputs
        return inputs.new_zeros(1).expand(*inputs.shape[:-1], self._hidden_size)


class Supplies(StandIn):
    """Stands in for attention or an MLP: outputs the refitted projection of inputs captured earlier.

    weight: `[hidden, kept]`, or None for zeros. bias: `[hidden]` or None. inputs: called with the first window of a
    batch and their number; returns the projection's inputs, `[sample, token, kept]`. read: the last hidden states that
    the module was called with.
    """

    read: torch.Tensor
    seen = ("read",)

    def __init__(
        self,
        kind: Sublayer,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        inputs: Callable[[int, int], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._is_attention, self._weight, self._bias, self._inputs = kind is Sublayer.ATTENTION, weight, bias, inputs

    def forward(self, *args: torch.Tensor, **kwargs: Any) -> Any:
        """In the return form of the module: attention returns a pair."""
        self.read = hidden = args[0] if args else kwargs["hidden_states"]
        if self._weight is not None:
            assert self._inputs is not None
            output = functional.linear(self._inputs(self.start, len(hidden)), self._weight, self._bias)
        else:
            output = (hidden.new_zeros(1) if self._bias is None else self._bias).expand_as(hidden)
        return (output, None) if self._is_attention else output


class _Preset(nn.Module):
    """Stands in for a linear layer: outputs values that were set before."""

    values: torch.Tensor

    def forward(self, _inputs: torch.Tensor) -> torch.Tensor:
        return self.values


class LinearisedMlp(StandIn):
    """Stands in for a pruned MLP: keeps what a step needs, outputs zeros.

    mlp: the module of transformers. kind: its units.

    Of the last call: inputs `[token, hidden]`, outputs `[token, neuron]` (of the neurons, before down_proj) and slopes
    `[token, row]`, the derivative of a neuron's output with respect to the output of each of its rows. Rows come in
    blocks, gate before up, with one row per neuron in each.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    slopes: torch.Tensor
    seen = ("inputs", "outputs", "slopes")

    def __init__(self, mlp: nn.Module, kind: UnitKind, hidden_size: int) -> None:
        super().__init__()
        self._mlp, self._captures = copy.deepcopy(mlp), Captures(hidden_size)
        self._presets = {projection.name: _Preset() for projection in kind.readers}
        self._tensors: Mapping[str, torch.Tensor] = {}
        for path, module in (*self._presets.items(), (kind.output.name, self._captures)):
            setattr(self._mlp, path.removeprefix(f"{kind.module}."), module)

    def use(self, readers: Mapping[str, torch.Tensor]) -> None:
        """Set weights, and biases if any, of what reads hidden states, by name: the rows of the neurons left."""
        self._tensors = readers

    def forget(self) -> None:
        """Drop the tensors of the last batch, those of the MLP's own modules, too."""
        super().forget()
        self._captures.forget()
        for preset in self._presets.values():
            vars(preset).pop("values", None)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[sample, token, hidden]` to zeros of that shape."""
        self.inputs = hidden_states.flatten(0, -2)
        with torch.inference_mode(False), torch.enable_grad():
            for path, preset in self._presets.items():
                weight, bias = self._tensors[f"{path}.weight"], self._tensors.get(f"{path}.bias")
                preset.values = functional.linear(self.inputs, weight, bias).requires_grad_()
            self._mlp(self.inputs)
            outputs = self._captures.inputs
            slopes = torch.autograd.grad(outputs.sum(), [preset.values for preset in self._presets.values()])
        for preset in self._presets.values():
            del preset.values
        self.outputs, self.slopes = outputs.detach(), torch.cat(slopes, dim=-1)
        return torch.zeros_like(hidden_states)

    def pushed(self, weights: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """J weights, the change of the MLP's output, `[token, hidden]`. weights: changes of rows, `[row, hidden]`."""
        changes = self.slopes * functional.linear(self.inputs, weights)
        return functional.linear(changes.unflatten(-1, (-1, down.shape[1])).sum(dim=-2), down)

    def pulled(self, errors: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """The factor, `[token, row]`, that multiplied by the inputs and summed over tokens is J^T errors.

        errors: `[token, hidden]`.
        """
        back = (errors @ down).unsqueeze(-2)
        return (self.slopes.unflatten(-1, (-1, down.shape[1])) * back).flatten(-2)
