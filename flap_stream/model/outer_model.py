"""What is around the decoder layers: embeddings before them, the final norm and the head after them.

All of it runs by the real model's own `forward`, with its layers replaced by recorders: so what layers are called with
(masks, rotary embeddings) is found, and no family's forward is reimplemented here.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from flap_stream.model.architecture import Family
from flap_stream.model.layer_state import RECOMPUTED, LayerState

LayerCall = tuple[tuple[Any, ...], dict[str, Any]]


class _Recorder(nn.Module):
    """Stands in for a decoder layer: records its arguments and returns its input, or what it was given."""

    def __init__(self, layer: nn.Module, output: torch.Tensor | None = None) -> None:
        super().__init__()
        self.__dict__.update(settings(layer))  # such as the type of attention, by which a model chooses the arguments
        self.hidden_states: torch.Tensor | None = None
        self._output = output
        self.call: LayerCall = ((), {})

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.hidden_states, self.call = hidden_states, (args, kwargs)
        return hidden_states if self._output is None else self._output


def settings(module: nn.Module) -> dict[str, Any]:
    """A module's attributes that are text or numbers."""
    return {name: value for name, value in vars(module).items() if isinstance(value, str | int | float)}


class _Output(MoeModelOutputWithPast):
    """The base model's output: of what some models ask for besides, nothing."""

    def __getattr__(self, name: str) -> None:
        return None


class _Returns(nn.Module):
    """Stands in for the base model where only the head is run."""

    def __init__(self, base: nn.Module, last_hidden_state: torch.Tensor) -> None:
        super().__init__()
        self.__dict__.update(settings(base))  # such as a factor of the logits
        self._output = _Output(last_hidden_state=last_hidden_state)

    def forward(self, *args: Any, **kwargs: Any) -> MoeModelOutputWithPast:
        return self._output


class OuterModel:
    """A causal language model around its decoder layers, its parameters on the meta device."""

    def __init__(self, model: PreTrainedModel, family: Family, layers: Sequence[nn.Module], state: LayerState) -> None:
        self._model, self._family, self._layers, self._state = model, family, layers, state
        self._base = model.get_submodule(family.base_path)
        self._embedding = model.get_submodule(family.embedding.rpartition(".")[0])
        self._input_path = "embed_tokens_per_layer"
        self._input_table = self._base.get_submodule(self._input_path) if state.input_size else None
        for table in filter(None, (self._embedding, self._input_table)):
            setattr(table, "padding_idx", None)  # noqa: B010 (it may lie outside the rows that are loaded)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of the base model's tensors outside its layers and embeddings: of most, the final norm's."""
        paths = [self._within_base(self._family.norm)]
        if not self._state.is_plain:
            embedding = self._within_base(self._family.embedding.rpartition(".")[0])
            inside = (self._within_base(self._family.layers), embedding, self._input_path)
            paths = [name for name, _ in self._base.named_children() if name not in inside]
        return {  # without a look at the layers, of which mixtures have many tensors
            f"{path}.{name}": tuple(tensor.shape)
            for path in paths
            for name, tensor in self._base.get_submodule(path).state_dict().items()
        }

    def input_embedding(self) -> tuple[str, tuple[int, int]] | None:
        """Name and shape of the table of the layers' own inputs, `[word, layer * size]`; None without."""
        if self._input_table is None:
            return None
        rows, width = self._input_table.get_parameter("weight").shape
        return f"{self._family.base_path}.{self._input_path}.weight", (rows, width)

    def _within_base(self, path: str) -> str:
        return path.removeprefix(f"{self._family.base_path}.")

    def head_tensors(self) -> dict[str, tuple[int, ...]]:
        """Relative name to shape of the head's tensors: the weight `[vocabulary, hidden]`, of some families a bias."""
        head = self._model.get_submodule(self._family.head_path)
        return {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}

    def embed(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `[sample, token, hidden]`. rows: a part of the table; ids: int64 `[sample, token]` into it."""
        return functional_call(self._embedding, {"weight": rows}, (ids,))

    def embed_inputs(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The layers' own inputs `[sample, token, layer, size]`. rows: a part of their table; ids: as of `embed`."""
        assert self._input_table is not None
        return functional_call(self._input_table, {"weight": rows}, (ids,)).unflatten(-1, (self._state.layers, -1))

    def record(
        self, embeds: torch.Tensor, outer: Mapping[str, torch.Tensor] | None = None, inputs: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[LayerCall]]:
        """The state before the first layer for these embeddings `[sample, token, hidden]`; each layer's arguments.

        outer, inputs: where layers hand on more than hidden states, `tensors` and what `embed_inputs` returns.
        Without them only the arguments mean anything.
        """
        recorders = [_Recorder(layer) for layer in self._layers]
        norm_name = self._within_base(self._family.norm)
        with ExitStack() as stack:
            stack.enter_context(replaced(self._base, self._layers_name, nn.ModuleList(recorders)))
            if self._state.is_plain:
                if self.tensors():  # a norm without weights may also be put before the first layer
                    stack.enter_context(replaced(self._base, norm_name, nn.Identity()))
                self._base(inputs_embeds=embeds, use_cache=False)
            else:
                self._run_base(embeds, self._zeros(embeds) if outer is None else outer, inputs)
        hidden = recorders[0].hidden_states
        assert hidden is not None, "the model's forward did not call its first layer"
        if self._state.is_plain:
            return hidden, [recorder.call for recorder in recorders]
        calls = [self._named(layer, recorder.call) for layer, recorder in zip(self._layers, recorders, strict=True)]
        inputs_of = [call["per_layer_input"] for call in calls if call.get("per_layer_input") is not None]
        first = self._state.first(hidden, inputs_of)
        return first, [((), {n: value for n, value in call.items() if n not in RECOMPUTED}) for call in calls]

    @property
    def _layers_name(self) -> str:
        return self._family.layers.rpartition(".")[2]

    def _run_base(
        self, embeds: torch.Tensor, outer: Mapping[str, torch.Tensor], inputs: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The last hidden states of the base model, whose layers are replaced."""
        keywords: dict[str, Any] = {"inputs_embeds": embeds, "use_cache": False}
        if self._state.input_size:
            none = embeds.new_zeros(()).expand(*embeds.shape[:2], self._state.layers, self._state.input_size)
            keywords["per_layer_inputs"] = none if inputs is None else inputs
        return functional_call(self._base, dict(outer), kwargs=keywords).last_hidden_state

    def _zeros(self, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outer tensors of zeros that take no memory."""
        return {name: like.new_zeros(()).expand(shape) for name, shape in self.tensors().items()}

    @staticmethod
    def _named(layer: nn.Module, call: LayerCall) -> dict[str, Any]:
        """A layer's arguments besides the hidden states, by name."""
        bound = inspect.signature(type(layer).forward).bind(layer, None, *call[0], **call[1])
        _self, _hidden, *names = bound.arguments
        named = {name: bound.arguments[name] for name in names if name != "kwargs"}
        return {**named, **bound.arguments.get("kwargs", {})}

    def norm(self, outer: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """The final norm's output `[token, hidden]`, which the head reads, for states `[token, width]` after layers.

        outer: `tensors`.
        """
        if self._state.is_plain:
            path = self._within_base(self._family.norm)
            weights = {name.removeprefix(f"{path}."): tensor for name, tensor in outer.items()}
            return functional_call(self._base.get_submodule(path), weights, (hidden,))
        last = _Recorder(self._layers[-1], self._state.hidden(hidden[:, None]))
        layers = [_Recorder(layer) for layer in self._layers[:-1]]
        with replaced(self._base, self._layers_name, nn.ModuleList([*layers, last])):
            embeds = hidden.new_zeros(len(hidden), 1, self._state.hidden_size)
            return self._run_base(embeds, outer)[:, 0]

    def logits(self, head_weights: Mapping[str, torch.Tensor], normed: torch.Tensor) -> torch.Tensor:
        """Logits `[token, vocabulary]` for outputs of the final norm, `[token, hidden]`.

        head_weights: by relative name.
        """
        weights = {f"{self._family.head_path}.{name}": tensor for name, tensor in head_weights.items()}
        with replaced(self._model, self._family.base_path, _Returns(self._base, normed[None])):
            output = functional_call(self._model, weights, kwargs={"inputs_embeds": normed[None], "use_cache": False})
        return output.logits[0]


@contextmanager
def replaced(parent: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """Replace a submodule within the `with` block."""
    original = getattr(parent, name)
    setattr(parent, name, module)
    try:
        yield
    finally:
        setattr(parent, name, original)
