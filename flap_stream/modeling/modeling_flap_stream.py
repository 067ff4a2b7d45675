"""Structurally pruned decoder: per-layer KV groups and MLP width, a bias on o_proj and down_proj.
Sizes: config.per_layer_config = {"0": {"num_attention_heads", "num_key_value_heads", "intermediate_size"}, ...}
(the transformers heterogeneous-config schema; releases without it keep the raw dict, which works too)."""

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


def layer_size(config, i, name):
    layers = config.per_layer_config
    if isinstance(layers, dict):  # no heterogeneous configs in this transformers
        return {int(k): v for k, v in layers.items()}.get(i, {}).get(name, getattr(config, name))
    return getattr(layers[i], name)


class PrunedMixin:
    def __init__(self, config):
        super().__init__(config)
        for i, layer in enumerate(self.base_model.layers):
            attn, mlp, hidden = layer.self_attn, layer.mlp, config.hidden_size
            kv = layer_size(config, i, "num_key_value_heads") * attn.head_dim
            q, width = kv * attn.num_key_value_groups, layer_size(config, i, "intermediate_size")
            attn.q_proj = nn.Linear(hidden, q, attn.q_proj.bias is not None)
            attn.k_proj = nn.Linear(hidden, kv, attn.k_proj.bias is not None)
            attn.v_proj = nn.Linear(hidden, kv, attn.v_proj.bias is not None)
            attn.o_proj = nn.Linear(q, hidden, config.pruned_output_bias or attn.o_proj.bias is not None)
            mlp.gate_proj = nn.Linear(hidden, width, bias=False)
            mlp.up_proj = nn.Linear(hidden, width, bias=False)
            mlp.down_proj = nn.Linear(width, hidden, config.pruned_output_bias or mlp.down_proj.bias is not None)
        self.post_init()


class Base(PrunedMixin):
    _auto_class = "AutoModel"


class CausalLM(PrunedMixin):
    _auto_class = "AutoModelForCausalLM"  # save_pretrained copies this file (needed on transformers 4)


class PrunedLlamaModel(Base, LlamaModel): ...


class PrunedLlamaForCausalLM(CausalLM, LlamaForCausalLM): ...


class PrunedMistralModel(Base, MistralModel): ...


class PrunedMistralForCausalLM(CausalLM, MistralForCausalLM): ...


class PrunedQwen2Model(Base, Qwen2Model): ...


class PrunedQwen2ForCausalLM(CausalLM, Qwen2ForCausalLM): ...


class PrunedQwen3Model(Base, Qwen3Model): ...


class PrunedQwen3ForCausalLM(CausalLM, Qwen3ForCausalLM): ...
