"""The dense model with masks and biases instead of cuts: what a pruned checkpoint must compute."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def masked_model(
    model: Any,
    kept_groups: Sequence[Sequence[int]],
    kept_neurons: Sequence[Sequence[int]],
    biases: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]],
) -> Any:
    """A copy whose removed channels contribute nothing and whose output projections have the given biases.

    biases: a layer's bias of o_proj and of down_proj, the dense model's own included; None leaves it.
    """
    masked = copy.deepcopy(model)
    head_dim = masked.model.layers[0].self_attn.head_dim
    repeats = masked.config.num_attention_heads // masked.config.num_key_value_heads
    with torch.no_grad():
        for layer, groups, neurons, (o_bias, down_bias) in zip(
            masked.model.layers, kept_groups, kept_neurons, biases, strict=True
        ):
            channels = torch.zeros(masked.config.num_key_value_heads)
            channels[list(groups)] = 1
            layer.self_attn.o_proj.weight.mul_(channels.repeat_interleave(repeats * head_dim))
            units = torch.zeros(masked.config.intermediate_size)
            units[list(neurons)] = 1
            layer.mlp.down_proj.weight.mul_(units)
            if o_bias is not None:
                layer.self_attn.o_proj.bias = nn.Parameter(o_bias)
            if down_bias is not None:
                layer.mlp.down_proj.bias = nn.Parameter(down_bias)
    return masked


def layer_inputs(model: Any, tokens: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Inputs of o_proj (`attention`) and down_proj (`mlp`) of every layer, float64 [token, channel]."""
    inputs: list[dict[str, torch.Tensor]] = [{} for _ in model.model.layers]

    def keep(i: int, kind: str) -> Any:
        def hook(_module: Any, arguments: Any) -> Any:
            inputs[i][kind] = arguments[0].detach().double().flatten(0, 1)

        return hook

    handles = []
    for i, layer in enumerate(model.model.layers):
        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(keep(i, "attention")))
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(keep(i, "mlp")))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return inputs
