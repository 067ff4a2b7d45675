"""The model without weights: one decoder layer at a time, and what is around them, run with transformers' own code.

What is around the layers, embeddings before them and the final norm and the head after them, runs by the real model's
own `forward`, its layers replaced by recorders: so what layers are called with (masks, rotary embeddings) is found, and
no family's forward is reimplemented here.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.model.architecture import Family, layer_shape, require_sizes
from flap_stream.model.construction import built
from flap_stream.model.families import family_of
from flap_stream.model.layer_state import RECOMPUTED, LayerState
from flap_stream.model.mixture import Mixture

LOGIT_BYTES = 1 << 26  # of a chunk of logits in float32, at most; not measured

LayerCall = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments of a decoder layer


@dataclass(frozen=True)
class Rotary:
    """A model's rotary embedding.

    kind: rope_type. inverse_frequencies: float32 `[rotated pair]`, base ** -(2 i / rotated) for kind `default`.
    scale: factor of cosines and sines.
    """

    kind: str
    base: float
    inverse_frequencies: torch.Tensor
    scale: float


class Skeleton:
    """The causal language model of a config.json, its parameters on the meta device, its buffers real.

    layers: the decoder layer modules. tied: whether the head is the embedding. state: what layers hand on.
    outer: what is around them.
    Raises UnsupportedModel or InvalidModel for a config that cannot be pruned.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config, self.where = config, where
        self.family = family_of(config, where)
        require_sizes(config, where)
        self._model = built(config, self.family, where)
        self._base = self._model.get_submodule(self.family.base_path)
        self.layers = list(self._model.get_submodule(self.family.layers).children())
        self.tied: bool = self._model.config.tie_word_embeddings
        self.state = LayerState.of(self._model.config, where)
        self.outer = OuterModel(self._model, self.family, self.layers, self.state)
        self._only: dict[int, tuple[Mixture, Sequence[int]]] = {}
        self._shapes: dict[int, LayerShape] = {}

    def move_buffers(self, device: torch.device) -> None:
        """Move the buffers (rotary frequencies) to a device."""
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Full name to shape of all tensors of a checkpoint."""
        tensors = {name: tuple(tensor.shape) for name, tensor in self._model.state_dict().items()}
        if self.tied:
            del tensors[self.family.head]
        return tensors

    def layer_tensors(self, index: int) -> dict[str, tuple[int, ...]]:
        """Relative name to shape of one decoder layer's tensors."""
        return {name: tuple(tensor.shape) for name, tensor in self.layers[index].state_dict().items()}

    def dtypes(self, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
        """The dtype of a layer's tensor, by its relative name, where the model runs in `dtype`: as in transformers."""
        kept = set(self._model._keep_in_fp32_modules_strict or ()) if dtype != torch.float32 else set()
        if dtype == torch.float16:
            kept |= set(self._model._keep_in_fp32_modules or ())
        return lambda name: torch.float32 if ".each." not in name and any(part in name for part in kept) else dtype

    def layer_shape(self, index: int) -> LayerShape:
        """Sizes of one decoder layer."""
        if index not in self._shapes:  # of many experts it takes long
            shape = layer_shape(self.family, self.config, self.layer_tensors(index))
            needs = self.mixture(index).needs if shape.experts else 0
            self._shapes[index] = replace(shape, router_needs=needs)
            if self._keeps_neurons(index):
                self._shapes[index] = replace(self._shapes[index], neuron_cost=0)
        return self._shapes[index]

    def mixture(self, index: int) -> Mixture:
        """The mixture of experts of one decoder layer that has one."""
        return Mixture(self.layers[index], self.family)

    @contextmanager
    def only_experts(self, index: int, kept: Sequence[int]) -> Iterator[None]:
        """In the block, a layer's router chooses among these of its experts only, ascending."""
        mixture = self.mixture(index)
        with mixture.only(kept):
            self._only[index] = mixture, kept
            try:
                yield
            finally:
                del self._only[index]

    def _keeps_neurons(self, index: int) -> bool:
        key = self.family.keeps_neurons
        return bool(key and getattr(self._model.config, key)[index])

    @property
    def hf_config(self) -> PreTrainedConfig:
        """The config as transformers reads it, with its defaults."""
        return self._model.config

    def rotary(self) -> Rotary:
        """The rotary embedding of a model whose layers all have the same one."""
        module, parameters = self._base.get_submodule("rotary_emb"), self._model.config.rope_parameters
        frequencies = module.get_buffer("inv_freq").float().cpu()
        scale = float(getattr(module, "attention_scaling", 1.0))
        return Rotary(parameters.get("rope_type", "default"), parameters["rope_theta"], frequencies, scale)

    def ignore_values(self) -> None:
        """From now on nothing depends on values, so that a forward can be run just to measure its workspace.

        All tokens are routed to the largest expert of a layer only; frequencies are the same for windows of any length.
        """
        mixtures: list[Any] = [module for module in self._model.modules() if hasattr(module, "each")]
        for experts in mixtures:
            largest = max(experts.each, key=lambda expert: expert.down.in_features)
            experts.forward = partial(_all_to_one, largest, len(experts.each))
        for module in self._model.modules():
            kind = getattr(module, "rope_type", None)  # one for all layers, or one for each type of layer
            if kind is not None:
                setattr(module, "rope_type", "default" if isinstance(kind, str) else dict.fromkeys(kind, "default"))  # noqa: B010

    def run_layer(
        self,
        index: int,
        weights: Mapping[str, torch.Tensor],
        hidden: torch.Tensor,
        call: LayerCall,
        stand_ins: Mapping[str, nn.Module] | None = None,
    ) -> torch.Tensor:
        """The layer state `[sample, token, width]` after one decoder layer, by transformers' own code.

        hidden: the state before it, of most models the hidden states alone.
        stand_ins: modules that replace some of the layer's, by path.
        """
        args, keywords = call
        state, own = self.state, self.state.arguments(index, hidden)
        stand_ins, layer = stand_ins or {}, self.layers[index]
        used = {name: w for name, w in weights.items() if not name.startswith(tuple(f"{path}." for path in stand_ins))}
        with ExitStack() as stack:
            for path, module in stand_ins.items():
                parent, _, name = path.rpartition(".")
                stack.enter_context(replaced(layer.get_submodule(parent), name, module))
            if index in self._only:
                mixture, kept = self._only[index]
                used = mixture.cut(used, kept)
            output = functional_call(layer, used, (state.hidden(hidden), *args), {**keywords, **own})
        return state.after(index, hidden, output[0] if isinstance(output, tuple) else output, own)


def _all_to_one(
    expert: nn.Module,
    count: int,
    hidden: torch.Tensor,
    _index: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The part of `SeparateExperts` that runs one expert, as if it were every token's first choice."""
    token = torch.arange(len(hidden) if weights is not None else len(hidden) // count)
    output = expert(hidden[token])
    if weights is not None:
        output = output * weights[token, torch.zeros_like(token), None]
    return torch.zeros_like(hidden).index_add_(0, token, output.to(hidden.dtype))


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
