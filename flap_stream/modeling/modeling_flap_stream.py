"""Decoder-only models whose layers have sizes of their own, after structured pruning by flap-stream.

This file travels with the checkpoint (`auto_map` in config.json) and needs torch and transformers alone. It reads

- `per_layer_config`: for every layer its `num_attention_heads`, `num_key_value_heads` and `intermediate_size`; the
  global sizes are those of the dense model. Releases of transformers without per-layer configs keep the raw dict.
- `pruned_output_bias`: whether the output projections (o_proj, down_proj) have the bias that pruning adds.

A layer may have lost its attention or its MLP altogether; the bias of the output projection is then all that is left.
No class here is named after attention: transformers looks for such names when it switches implementations.
"""

import torch
from torch import nn
from transformers import (
    LlamaForCausalLM,
    LlamaModel,
    MistralForCausalLM,
    MistralModel,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3Model,
)


def layer_size(config, layer_idx, name):
    """A size of one layer; the global one where the layer does not say."""
    layers = config.per_layer_config
    if isinstance(layers, dict):  # no per-layer configs in this transformers
        return {int(key): value for key, value in layers.items()}.get(layer_idx, {}).get(name, getattr(config, name))
    return getattr(layers[layer_idx], name)


class OutputBias(nn.Module):
    """Stands for a sublayer without units: gives the bias of its output projection, or zeros."""

    def __init__(self, projection, hidden_size, bias):
        super().__init__()
        self.projection = projection
        self.add_module(projection, nn.Module())
        self.get_submodule(projection).register_parameter(
            "bias", nn.Parameter(torch.zeros(hidden_size)) if bias else None
        )

    def forward(self, hidden_states):
        """`[sample, token, hidden]`, the same for every token."""
        bias = self.get_submodule(self.projection).bias
        return torch.zeros_like(hidden_states) if bias is None else bias.expand_as(hidden_states)


class OutputBiasWithCache(OutputBias):
    """`OutputBias` in the place of attention: the cache goes on counting the positions that it has seen."""

    def __init__(self, projection, hidden_size, bias, layer_idx):
        super().__init__(projection, hidden_size, bias)
        self.layer_idx = layer_idx

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        """The output as of `OutputBias`, and no attention weights."""
        if past_key_values is not None:
            positions = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            past_key_values.update(positions, positions, self.layer_idx)
        return super().forward(hidden_states), None


class PrunedMixin:
    """Gives every decoder layer of the dense architecture its own sizes."""

    def __init__(self, config):
        super().__init__(config)
        for layer_idx, layer in enumerate(self.base_model.layers):
            self._resize_heads(config, layer, layer_idx)
            self._resize_mlp(config, layer, layer_idx)
        self.post_init()

    @staticmethod
    def _resize_heads(config, layer, layer_idx):
        dense, hidden_size = layer.self_attn, config.hidden_size
        key_value_size = layer_size(config, layer_idx, "num_key_value_heads") * dense.head_dim
        query_size = key_value_size * dense.num_key_value_groups
        has_bias = config.pruned_output_bias or dense.o_proj.bias is not None
        if not key_value_size:
            layer.self_attn = OutputBiasWithCache("o_proj", hidden_size, has_bias, layer_idx)
            return
        dense.q_proj = nn.Linear(hidden_size, query_size, dense.q_proj.bias is not None)
        dense.k_proj = nn.Linear(hidden_size, key_value_size, dense.k_proj.bias is not None)
        dense.v_proj = nn.Linear(hidden_size, key_value_size, dense.v_proj.bias is not None)
        dense.o_proj = nn.Linear(query_size, hidden_size, has_bias)

    @staticmethod
    def _resize_mlp(config, layer, layer_idx):
        dense, hidden_size = layer.mlp, config.hidden_size
        width = layer_size(config, layer_idx, "intermediate_size")
        has_bias = config.pruned_output_bias or dense.down_proj.bias is not None
        if not width:
            layer.mlp = OutputBias("down_proj", hidden_size, has_bias)
            return
        dense.gate_proj = nn.Linear(hidden_size, width, dense.gate_proj.bias is not None)
        dense.up_proj = nn.Linear(hidden_size, width, dense.up_proj.bias is not None)
        dense.down_proj = nn.Linear(width, hidden_size, has_bias)


class _Base(PrunedMixin):
    _auto_class = "AutoModel"


class _CausalLM(PrunedMixin):
    _auto_class = "AutoModelForCausalLM"  # save_pretrained copies this file; transformers 4 does so only if it is set


# One pair a family, named Pruned<prefix>Model and Pruned<prefix>ForCausalLM after its row in architecture.py.
class PrunedLlamaModel(_Base, LlamaModel): ...  # noqa: D101


class PrunedLlamaForCausalLM(_CausalLM, LlamaForCausalLM): ...  # noqa: D101


class PrunedMistralModel(_Base, MistralModel): ...  # noqa: D101


class PrunedMistralForCausalLM(_CausalLM, MistralForCausalLM): ...  # noqa: D101


class PrunedQwen2Model(_Base, Qwen2Model): ...  # noqa: D101


class PrunedQwen2ForCausalLM(_CausalLM, Qwen2ForCausalLM): ...  # noqa: D101


class PrunedQwen3Model(_Base, Qwen3Model): ...  # noqa: D101


class PrunedQwen3ForCausalLM(_CausalLM, Qwen3ForCausalLM): ...  # noqa: D101
