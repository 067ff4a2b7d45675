"""Pruned layers in vLLM, for families that compute what Llama's layers do, with or without query and key norms.

Sizes and biases come from config.json as `modeling_flap_stream.py` reads them.
"""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from flap_stream.modeling.modeling_flap_stream import LayerConfig, layer_size

_SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


class OutputBias(nn.Module):
    """A sublayer without units: returns the bias of its output projection, or zeros."""

    def __init__(self, projection: str, hidden_size: int, bias: bool) -> None:
        super().__init__()
        self.projection = projection
        self.add_module(projection, nn.Module())
        values = nn.Parameter(torch.empty(hidden_size), requires_grad=False) if bias else None
        self.get_submodule(projection).register_parameter("bias", values)

    def forward(self, hidden_states: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """`[token, hidden]`, newly allocated: the next norm writes into it."""
        bias = getattr(self, self.projection).bias
        return torch.zeros_like(hidden_states) if bias is None else bias.repeat(hidden_states.shape[0], 1)


class NormedAttention(LlamaAttention):
    """Llama's attention with norms over each query and key head."""

    def __init__(self, config: Any, **keywords: Any) -> None:
        super().__init__(config=config, **keywords)
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[token, hidden]`."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q = self.q_norm(q.view(-1, self.num_heads, self.head_dim)).view(q.shape)
        k = self.k_norm(k.view(-1, self.num_kv_heads, self.head_dim)).view(k.shape)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output


def make_attention(config: Any, **keywords: Any) -> nn.Module:
    """The attention of a layer."""
    if not config.num_key_value_heads:
        return OutputBias("o_proj", config.hidden_size, config.attention_bias)
    attention = NormedAttention if config.model_type == "qwen3" else LlamaAttention
    return attention(config=config, **keywords)


class PrunedDecoderLayer(LlamaDecoderLayer):
    """A decoder layer whose numbers of heads and neurons come from its own config."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = layer_config(vllm_config.model_config.hf_config, extract_layer_index(prefix))
        super().__init__(vllm_config, prefix, config, make_attention)
        has_bias = config.pruned_output_bias or getattr(config, "mlp_bias", False)
        if not config.intermediate_size:
            self.mlp = OutputBias("down_proj", config.hidden_size, has_bias)
        elif has_bias:
            self.mlp.down_proj = RowParallelLinear(
                config.intermediate_size,
                config.hidden_size,
                bias=True,
                quant_config=self.get_quant_config(vllm_config),
                prefix=f"{prefix}.mlp.down_proj",
            )


def layer_config(config: Any, layer: int) -> LayerConfig:
    """The config of one layer, as Llama's classes in vLLM read it.

    In vLLM `qkv_bias` is the bias of q_proj, k_proj and v_proj, `attention_bias` that of o_proj.
    """
    flag = getattr(config, "attention_bias", False)
    return LayerConfig(
        config,
        **{name: layer_size(config, layer, name) for name in _SIZES},
        qkv_bias=flag or config.model_type == "qwen2",
        attention_bias=config.pruned_output_bias or getattr(config, "attention_out_bias", flag),
    )


class PrunedForCausalLM(LlamaForCausalLM):
    """A causal language model whose layers differ in size."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=PrunedDecoderLayer)
