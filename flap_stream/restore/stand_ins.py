"""Modules that stand in for a decoder layer's own while it is refitted."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from flap_stream.arithmetic.layer_shape import Sublayer
from flap_stream.engine.layer_pass import StandIn


class Captures(StandIn):
    """Stands in for an output projection: keeps its inputs, outputs zeros."""

    inputs: torch.Tensor
    seen = ("inputs",)

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self._hidden_size = hidden_size

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[sample, token, channel]`, of an expert `[token, channel]`, to zeros of the hidden size."""
        self.inputs = inputs
        return inputs.new_zeros(1).expand(*inputs.shape[:-1], self._hidden_size)

    def taken(self) -> list[torch.Tensor]:
        """The inputs of the last batch, now forgotten; none if no token of it came to the projection."""
        inputs = [vars(self)["inputs"]] if "inputs" in vars(self) else []
        self.forget()
        return inputs


class ReadsKept(StandIn):
    """Stands in for an expert's output projection: the refitted one, of the inputs that are kept.

    weight: `[hidden, kept]`. bias: `[hidden]`. kept: int64 `[kept]`.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, kept: torch.Tensor) -> None:
        super().__init__()
        self._weight, self._bias, self._kept = weight, bias, kept

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[token, channel]` to `[token, hidden]`."""
        return functional.linear(inputs.index_select(-1, self._kept), self._weight, self._bias)


class SilentMixture(StandIn):
    """Stands in for a mixture of experts that returns its router's scores beside its output: outputs zeros."""

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        """`[sample, token, hidden]`."""
        return hidden.new_zeros(1).expand_as(hidden), None


class Supplies(StandIn):
    """Stands in for attention or an MLP: outputs the refitted projection of inputs captured earlier.

    weight: `[hidden, kept]`, or None for zeros. bias: `[hidden]` or None. inputs: called with the first window of a
    batch and their number; returns the projection's inputs, `[sample, token, kept]`.
    """

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
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._weight is not None:
            assert self._inputs is not None
            output = functional.linear(self._inputs(self.start, len(hidden)), self._weight, self._bias)
        else:
            output = (hidden.new_zeros(1) if self._bias is None else self._bias).expand_as(hidden)
        return (output, None) if self._is_attention else output
