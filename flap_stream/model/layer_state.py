"""What one decoder layer hands to the next: hidden states, in some models with more beside them.

Gemma 3n carries several streams of hidden states (AltUp). It and the small models of Gemma 4 feed every layer an
embedding of its own of each token, and their last layers read the keys and values of earlier ones. All of it lies side
by side in one tensor, so that streaming, snapshots and gradients need not know.
"""

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from flap_stream.errors import UnsupportedModel

_INPUT, _SHARED = "per_layer_input", "shared_kv_states"  # arguments of transformers' layers
RECOMPUTED = (_INPUT, _SHARED)  # which are found in the layer state rather than in what a layer was called with


@dataclass(frozen=True)
class LayerState:
    """How the layer state `[sample, token, width]` is laid out.

    hidden_size, streams: of the hidden states. layers, input_size: how many layers have an input of their own for each
    token, and its width; 0 without. shared: of keys and of values that later layers read, the type of layer that writes
    and reads them, the number of heads and their size. modes: whether each layer stores them, reuses them or neither.
    """

    hidden_size: int
    streams: int = 1
    layers: int = 0
    input_size: int = 0
    shared: tuple[tuple[str, int, int], ...] = ()
    modes: tuple[str | None, ...] = ()
    types: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Any, where: str) -> "LayerState":
        """That of a model. config: as transformers reads it. where: the model, named in messages.

        Raises UnsupportedModel if layers share keys and values, and transformers is too old to say which.
        """
        if getattr(config, "num_kv_shared_layers", 0) and not hasattr(config, "kv_sharing_modes"):
            raise UnsupportedModel(
                f"layers of {where} read keys and values of earlier ones, which needs transformers 5.23 or later; "
                f"{transformers.__version__} is installed: pip install 'transformers>=5.23,<6'"
            )
        modes = tuple(getattr(config, "kv_sharing_modes", ()))
        types = tuple(config.layer_types) if modes else ()
        shared = []
        for i, mode in enumerate(modes):
            if mode == "store":
                layer = getattr(config, "per_layer_config", {i: config})[i]
                shared.append((types[i], layer.num_key_value_heads, layer.head_dim))
        return cls(
            config.hidden_size,
            getattr(config, "altup_num_inputs", 1),
            config.num_hidden_layers,
            getattr(config, "hidden_size_per_layer_input", 0) or 0,
            tuple(shared),
            modes,
            types,
        )

    @property
    def is_plain(self) -> bool:
        """Whether it is one stream of hidden states and nothing else."""
        return self.streams == 1 and not self.input_size and not self.shared

    @property
    def _hidden_width(self) -> int:
        return self.streams * self.hidden_size

    @property
    def _input_width(self) -> int:
        return self.layers * self.input_size

    @property
    def width(self) -> int:
        """Elements for each token."""
        return self._hidden_width + self._input_width + sum(2 * heads * size for _, heads, size in self.shared)

    def first(self, hidden: torch.Tensor, inputs: list[torch.Tensor]) -> torch.Tensor:
        """The state before the first layer, where keys and values are still zeros.

        hidden: as that layer takes it. inputs: those of all layers, `[sample, token, input_size]`.
        """
        if self.is_plain:
            return hidden
        streams = self._joined(hidden)
        rest = streams.new_zeros(*streams.shape[:-1], self.width - self._hidden_width - self._input_width)
        return torch.cat([streams, *inputs, rest], dim=-1)

    def hidden(self, state: torch.Tensor) -> torch.Tensor:
        """The hidden states as layers take them: `[sample, token, hidden]`, or several streams as the first axis."""
        streams = state[..., : self._hidden_width]
        return streams if self.streams == 1 else streams.unflatten(-1, (self.streams, -1)).movedim(-2, 0)

    def arguments(self, index: int, state: torch.Tensor) -> dict[str, Any]:
        """What a layer takes from it besides hidden states, by the names of its forward's arguments."""
        found: dict[str, Any] = {}
        if self.input_size:
            start = self._hidden_width + index * self.input_size
            found[_INPUT] = state[..., start : start + self.input_size]
        if self.shared:
            found[_SHARED] = self._shared_states(state) if self.modes[index] == "reuse" else {}
        return found

    def after(self, index: int, state: torch.Tensor, output: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """The state after a layer. state: before it. output, arguments: the layer's, the latter as it left them."""
        if self.is_plain:
            return output
        parts = [self._joined(output), state[..., self._hidden_width : self._hidden_width + self._input_width]]
        start = self._hidden_width + self._input_width
        for kind, heads, size in self.shared:
            stop = start + 2 * heads * size
            stores = self.modes[index] == "store" and self.types[index] == kind
            both = [values.transpose(1, 2).flatten(2) for values in arguments[_SHARED][kind]] if stores else []
            parts += both or [state[..., start:stop]]
            start = stop
        return torch.cat(parts, dim=-1)

    def _joined(self, hidden: torch.Tensor) -> torch.Tensor:
        """Streams side by side, `[sample, token, stream * hidden]`."""
        return hidden if self.streams == 1 else hidden.movedim(0, -2).flatten(-2)

    def _shared_states(self, state: torch.Tensor) -> dict[str, tuple[torch.Tensor, ...]]:
        """Keys and values `[sample, head, token, size]`, by the type of layer."""
        found, start = {}, self._hidden_width + self._input_width
        for kind, heads, size in self.shared:
            both = state[..., start : start + 2 * heads * size].unflatten(-1, (2, heads, size))
            found[kind] = tuple(both.permute(2, 0, 3, 1, 4))
            start += 2 * heads * size
        return found
