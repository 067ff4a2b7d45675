"""Tiny random models of every family, made on the spot: real transformers models in real safetensors files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import flap_stream
from flap_stream.model.families import FAMILIES

_MIXED = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_MIXED_BUT_LAST = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
# Of one with experts beside the MLP of each layer.
GEMMA4_EXPERTS: dict[str, Any] = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 40,
}
LAYER_INPUTS = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 90, "num_kv_shared_layers": 1}
_HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "head_dim": 16}
_LINEAR = {
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4
}  # fmt: skip
_LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}
_NUMBERED = {"num_experts": 4, **_EXPERTS}
_ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, **_EXPERTS}
_FIRST_DENSE = {"first_k_dense_replace": 1, **_ROUTED}
_INDEXED = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 16}
_STATE_SPACE = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8
}  # fmt: skip
FAMILY_EXTRAS: dict[str, dict[str, Any]] = {
    "afmoe": {
        "head_dim": 16,
        "sliding_window": 7,
        "num_dense_layers": 1,
        "num_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        **_NUMBERED,
    },
    "apertus": {},
    "arcee": {},
    "cohere": {},
    "cohere2": _MIXED,
    "cohere2_moe": {"head_dim": 16, **_NUMBERED},
    "cwm": {"head_dim": 16},
    "deepseek_v2": {**_LATENT, **_FIRST_DENSE, "q_lora_rank": None, "topk_method": "greedy"},
    "deepseek_v3": {**_LATENT, **_FIRST_DENSE},
    "deepseek_v32": {**_LATENT, **_FIRST_DENSE, **_INDEXED},
    "diffllama": {},
    "dots1": {"head_dim": 16, "n_shared_experts": 1, **_FIRST_DENSE},
    "ernie4_5": {"head_dim": 16},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 40,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
    "exaone4": {"head_dim": 16, **_MIXED},
    "exaone_moe": {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "sliding_window": 7, **_NUMBERED},
    "flex_olmo": _NUMBERED,
    "flint": {"head_dim": 16, **_NUMBERED},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, **_MIXED},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, **_MIXED},
    "gemma3n_text": {
        "head_dim": 16,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0],
        "altup_num_inputs": 3,
        "laurel_rank": 8,
        **LAYER_INPUTS,
        **_MIXED_BUT_LAST,
    },
    "gemma4_text": {"head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 0, **_MIXED_BUT_LAST},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "glm4_moe": {"head_dim": 16, **_FIRST_DENSE},
    "glm4_moe_lite": {**_LATENT, **_ROUTED, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "gpt_neox": {"num_key_value_heads": 4},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **_MIXED},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7},
    "granite_swa": {},
    "granitemoehybrid": {
        "num_local_experts": 0,
        "shared_intermediate_size": 96,
        "layer_types": ["mamba", "attention", "mamba"],
        **_STATE_SPACE,
    },
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": [2, 2, 2], "moe_intermediate_size": 40},
    "hyperclovax": {},
    "jais2": {},
    "laguna": {"head_dim": 16, "shared_expert_intermediate_size": 40, **_NUMBERED},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv"],
        "num_dense_layers": 1,
        **_NUMBERED,
    },
    "llama": {},
    "llama4_text": {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size": 40,
        "intermediate_size_mlp": 96,
        "moe_layers": [0, 2],
        "no_rope_layers": [1, 0, 1],
    },
    "mellum": {"head_dim": 16, **_NUMBERED},
    "mimo_v2_flash": {"head_dim": 16, "v_head_dim": 16, **_ROUTED},
    "minicpm3": _LATENT,
    "minimax": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 8},
    "minimax_m2": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "ministral": {"head_dim": 16, **_MIXED},
    "ministral3": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {
        "layers_block_type": ["moe", "mamba", "mlp", "attention", "moe"],
        "head_dim": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 48,
        **_ROUTED,
    },
    "olmo": {"clip_qkv": 2.0},
    "olmo2": {},
    "olmo3": _MIXED,
    "olmoe": _NUMBERED,
    "persimmon": {"num_key_value_heads": 4},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 48, "mlp_only_layers": [1], **_NUMBERED},
    "qwen3": {"head_dim": 16},
    "qwen3_5_moe_text": {**_HYBRID, **_LINEAR, **_NUMBERED, "shared_expert_intermediate_size": 40},
    "qwen3_5_text": {**_HYBRID, **_LINEAR},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "qwen3_next": {**_HYBRID, **_LINEAR, **_NUMBERED, "shared_expert_intermediate_size": 40},
    "seed_oss": {"head_dim": 16, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "solar_open": {"head_dim": 16, **_ROUTED},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "youtu": _LATENT,
}
DENSE = [family for family in FAMILY_EXTRAS if FAMILIES[family].experts is None]
# One family for each form of attention and MLP, for what depends on nothing else.
FORMS = list(
    {
        (row.attention, row.mlp, row.norms_outputs, row.is_parallel, row.keeps_neurons): family
        for family, row in reversed(FAMILIES.items())
        if family in DENSE
    }.values()
)
VOCABULARY = 97
DEMO = Path(flap_stream.__file__).parent / "demo"  # a small model, trained on real text, and that text


def tiny_config(family: str = "llama", kv_heads: int = 2, tied: bool = False, layers: int = 3, **changes: Any) -> Any:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return CONFIG_MAPPING[family](**{**sizes, **FAMILY_EXTRAS.get(family, {}), **changes})


def tiny_model(config: Any, seed: int = 0, kind: Any = AutoModelForCausalLM) -> Any:
    """A float32 model in which nothing is trivially zero or one, with channels of very different scales."""
    torch.manual_seed(seed)
    model = kind.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.1)
                parameter.mul_(torch.rand(*parameter.shape[:-1], 1).add_(0.3))
    return model


def save(model: Any, path: Path, shard_size: str = "60KB", dtype: torch.dtype | None = None) -> Path:
    model = model if dtype is None else model.to(dtype)
    model.save_pretrained(path, max_shard_size=shard_size)
    return path


def load(path: Path, kind: Any = AutoModelForCausalLM, trust: bool = True, **options: Any) -> Any:
    return kind.from_pretrained(path, trust_remote_code=trust, dtype=torch.float32, **options).eval()


def fisher_draw(logits: torch.Tensor) -> torch.Tensor:
    """The slopes at all logits that a backward pass begins with, `[window, token, word]`; 0 for the last token."""
    p, found = logits[:, :-1].detach().double().softmax(dim=-1), torch.zeros_like(logits)
    for window, own in enumerate(p):
        size = len(own), -(-own.shape[1] // 8)
        packed = np.frombuffer(np.random.default_rng(window).bytes(size[0] * size[1]), np.uint8).reshape(size)
        signs = np.unpackbits(packed, axis=1, bitorder="little", count=own.shape[1]) * 2.0 - 1
        e = own.sqrt() * torch.from_numpy(signs)
        found[window, :-1] = e - own * e.sum(dim=-1, keepdim=True)
    return found


def random_tokens(samples: int, length: int, seed: int = 0) -> np.ndarray:
    """Tokens int64 `[sample, token]`, some of them far more frequent than others."""
    draw = np.random.default_rng(seed)
    weights = 1 / np.arange(1, VOCABULARY - 2)
    return 3 + draw.choice(VOCABULARY - 3, size=(samples, length), p=weights / weights.sum()).astype(np.int64)


def save_tokens(path: Path, tokens: np.ndarray) -> str:
    np.save(path, tokens)
    return str(path)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files, by name."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def contents(directory: Path) -> dict[str, bytes]:
    """The bytes of all files of a directory, by relative path."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def put_bos_before_texts(model: Path) -> None:
    """Have the demo model's tokenizer, in a copy of the model, put `<s>`, which is 0, before every text."""
    body = json.loads((model / "tokenizer.json").read_text())
    sequence = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
    body["post_processor"] |= {"single": sequence, "special_tokens": special}
    (model / "tokenizer.json").write_text(json.dumps(body))
