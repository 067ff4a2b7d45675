"""The dense model with masks and biases instead of cuts: what a pruned checkpoint must compute."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from models import load
from torch import nn
from torch.nn import functional

from flap_stream.arithmetic.layer_shape import LayerShape, Sublayer
from flap_stream.config import EngineConfig
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.model.architecture import Family
from flap_stream.model.opening import open_checkpoint
from flap_stream.modeling.modeling_flap_stream import separate_experts

Inputs = dict[str, torch.Tensor]  # of a layer's output projections, by their names, float64 [token, channel]


def masked_model(path: Path, record: dict[str, Any], tokens: torch.Tensor | None = None) -> Any:
    """The model at `path` in float32, in which what a record says is gone contributes nothing.

    tokens: whose mean inputs of output projections the biases hold; None adds no biases.
    """
    model = load(path)
    separate(model, decoder_of(model))
    opened = streamed(path)
    layers = model.get_submodule(opened.family.layers)
    inputs = None if tokens is None else projection_inputs(model, opened.family, opened.shapes, tokens)
    mask(layers, opened.family, opened.shapes, record, inputs)
    for layer, kept in zip(layers, record["layers"], strict=True):
        if "kept_experts" in kept:
            hide_experts(mixture_of(layer), sorted(set(range(len(kept["experts"]))) - set(kept["kept_experts"])))
    return model


def streamed(path: Path) -> StreamedModel:
    """What the package makes of the model at `path`, for its family and shapes."""
    with open_checkpoint(path) as checkpoint:
        return StreamedModel(checkpoint, EngineConfig(device="cpu"))


def decoder_of(model: Any) -> Any:
    """The module of a causal language model that has the layers: not always its `base_model`."""
    return next(module for module in model.modules() if hasattr(module, "layers"))


def mixture_of(layer: Any) -> Any:
    """The module of a decoder layer that has its router and experts, or its MLP; it may be the layer itself."""
    if hasattr(layer, "experts"):
        return layer
    return next((getattr(layer, name) for name in ("mlp", "feed_forward", "mixer") if hasattr(layer, name)), None)


def hide_experts(mixture: Any, hidden: Sequence[int]) -> None:
    """Make the logits of some experts minus infinity, and what is added to their scores."""
    router = mixture.gate if hasattr(mixture, "gate") else mixture.router
    forward, linear, count = router.forward, functional.linear, len(mixture.experts.each)
    for module in (mixture, *router.modules()):
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name != "weight" and tensor.shape[-1] == count:
                tensor.data[..., hidden] = -torch.inf

    def hiding(*arguments: Any) -> torch.Tensor:
        logits = linear(*arguments)
        assert logits.shape[-1] == count
        logits[..., hidden] = -torch.inf
        return logits

    def run(*arguments: Any) -> Any:
        with mock.patch.object(functional, "linear", hiding):
            return forward(*arguments)

    router.forward = run


def separate(model: Any, decoder: Any) -> None:
    """Make fused experts, if there are any, modules of their own; logits stay. decoder: what has the layers."""
    mlps = [mixture_of(layer) for layer in decoder.layers]
    fused: list[Any] = [getattr(mlp, "experts", None) for mlp in mlps]
    if not any(hasattr(experts, "down_proj") for experts in fused):
        return
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        separate_experts(decoder)
        for mlp, dense in zip(mlps, fused, strict=True):
            for number, expert in enumerate([] if mlp is None or dense is None else mlp.experts.each):
                _copy_expert(expert, dense, number)
        assert (model(ids, use_cache=False).logits - before).abs().max() <= 1e-5


def _copy_expert(expert: Any, dense: Any, number: int) -> None:
    down = dense.down_proj[number]
    if not hasattr(dense, "gate_up_proj"):
        expert.up.weight.copy_(dense.up_proj[number])
        expert.down.weight.copy_(down)
        return
    gate_up = dense.gate_up_proj[number]
    if hasattr(expert, "gate_up"):  # which families have with input rows first
        expert.gate_up.weight.copy_(gate_up.T)
        expert.down.weight.copy_(down.T)
        if expert.gate_up.bias is not None:
            expert.gate_up.bias.copy_(dense.gate_up_proj_bias[number])
            expert.down.bias.copy_(dense.down_proj_bias[number])
        return
    expert.down.weight.copy_(down)
    for linear, weight in zip((expert.gate, expert.up), gate_up.chunk(2), strict=True):
        linear.weight.copy_(weight)


def mask(
    layers: Sequence[Any],
    family: Family,
    shapes: Sequence[LayerShape],
    record: dict[str, Any],
    inputs: Sequence[Inputs] | None = None,
) -> None:
    """Set removed columns of output projections to zero; with their inputs, add biases that make up for the mean."""
    for i, (layer, shape, kept) in enumerate(zip(layers, shapes, record["layers"], strict=True)):
        for part in family.parts(shape):
            module = _output(layer, part.kind.output.name)
            if module is None:
                continue
            kept_units = kept["kept_kv_groups" if part.kind.name is Sublayer.ATTENTION else "kept_neurons"]
            removed = torch.ones(part.units, part.kind.output.size(1, shape), dtype=torch.bool)
            removed[[unit - part.first for unit in kept_units if 0 <= unit - part.first < part.units]] = False
            with torch.no_grad():
                if inputs is not None and len(seen := inputs[i][part.kind.output.name]):
                    shift = (module.weight.double() @ (seen.mean(dim=0) * removed.flatten())).float()
                    module.bias = nn.Parameter(shift + (0 if module.bias is None else module.bias))
                module.weight[:, removed.flatten()] = 0


def projection_inputs(model: Any, family: Family, shapes: Sequence[LayerShape], tokens: torch.Tensor) -> list[Inputs]:
    """What every output projection reads."""
    found: list[dict[str, list[torch.Tensor]]] = [{} for _ in shapes]
    with _seen(model.get_submodule(family.layers), family, shapes, found), torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    return [{name: torch.cat(seen) if seen else torch.zeros(0) for name, seen in layer.items()} for layer in found]


@contextmanager
def _seen(
    layers: Sequence[Any], family: Family, shapes: Sequence[LayerShape], found: list[dict[str, list[torch.Tensor]]]
) -> Iterator[None]:
    handles = []
    for layer, shape, own in zip(layers, shapes, found, strict=True):
        for part in family.parts(shape):
            inputs = own[part.kind.output.name] = []
            module = _output(layer, part.kind.output.name)
            if module is not None:
                handles.append(
                    module.register_forward_pre_hook(
                        lambda _module, x, inputs=inputs: inputs.append(x[0].detach().double().flatten(0, -2))
                    )
                )
    yield
    for handle in handles:
        handle.remove()


def _output(layer: Any, name: str) -> Any:
    """An output projection; None if a layer has none, or only its bias is left."""
    try:
        module = layer.get_submodule(name)
    except AttributeError:
        return None
    return module if hasattr(module, "weight") else None
