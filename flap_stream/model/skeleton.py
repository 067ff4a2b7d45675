"""The model without weights, of which one decoder layer runs at a time, with transformers' own code."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.errors import InvalidModel
from flap_stream.model.architecture import Family, is_pruned, layer_shape, require_sizes
from flap_stream.model.families import family_of
from flap_stream.model.layer_state import LayerState
from flap_stream.model.mixture import Mixture
from flap_stream.model.model_code import model_class
from flap_stream.model.outer_model import LayerCall, OuterModel, replaced
from flap_stream.modeling import modeling_flap_stream

_LARGE = 1 << 28  # elements of a tensor that is never made in memory, 1 GiB in float32


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

    layers: the decoder layer modules. tied: whether the head is the embedding. state: what layers hand
    on. outer: what is around them.
    Raises UnsupportedModel or InvalidModel for a config that cannot be pruned.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config, self.where = config, where
        self.family = family_of(config, where)
        require_sizes(config, where)
        self._model = _build(config, self.family, where)
        self._base = self._model.get_submodule(self.family.base_path)
        self._embedding = self._model.get_submodule(self.family.embedding.rpartition(".")[0])
        setattr(self._embedding, "padding_idx", None)  # noqa: B010 (it may lie outside the rows that are loaded)
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
                self._shapes[index] = replace(shape, neuron_cost=0)
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


def _build(config: Mapping[str, Any], family: Family, where: str) -> PreTrainedModel:
    """The causal language model of a config.json, its parameters on the meta device, its buffers real.

    A pruned checkpoint gets the classes of `modeling/`, which give every layer its own size.
    """
    try:
        kind, hf_config = model_class(config)
        with _LargeOnMeta(), init_empty_weights(include_buffers=False), no_init_weights():
            if is_pruned(config):
                skeleton = kind._from_config(hf_config)
            else:
                skeleton = kind.from_config(hf_config)
                if family.experts is not None:
                    modeling_flap_stream.separate_experts(skeleton.get_submodule(family.base_path))
    except Exception as error:  # a wrong value makes transformers raise anything, ZeroDivisionError included
        reason = " ".join(str(error).split())
        raise InvalidModel(f"transformers cannot build a model from {where}/config.json: {reason}") from error
    skeleton.tie_weights()
    return skeleton.eval().requires_grad_(False)


class _LargeOnMeta(TorchFunctionMode):
    """Makes large empty tensors on the meta device at once: those of all experts may be more than a machine has."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.empty and kwargs.get("device") is None and _elements(args) >= _LARGE:
            kwargs = {**kwargs, "device": "meta"}
        return function(*args, **kwargs)


def _elements(sizes: Sequence[Any]) -> int:
    """Of a tensor of these sizes, given one by one or as one argument."""
    return prod(sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes)


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
