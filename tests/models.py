"""Tiny random models of every family, made on the spot: real transformers models in real safetensors files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import flap_stream
from flap_stream.model.architecture import FAMILIES

_MIXED = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILY_EXTRAS: dict[str, dict[str, Any]] = {
    "exaone4": {"head_dim": 16, **_MIXED},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, **_MIXED},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, **_MIXED},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7},
    "hunyuan_v1_dense": {"head_dim": 16},
    "llama": {},
    "ministral": {"head_dim": 16, **_MIXED},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo": {"clip_qkv": 2.0},
    "phi3": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "seed_oss": {"head_dim": 16, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}
DENSE = [family for family in FAMILY_EXTRAS if FAMILIES[family].experts is None]
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


def random_tokens(samples: int, length: int, seed: int = 0) -> np.ndarray:
    """Tokens int64 `[sample, token]`, some of them far more frequent than others."""
    draw = np.random.default_rng(seed)
    weights = 1 / np.arange(1, VOCABULARY - 2)
    return 3 + draw.choice(VOCABULARY - 3, size=(samples, length), p=weights / weights.sum()).astype(np.int64)


def save_tokens(path: Path, tokens: np.ndarray) -> str:
    np.save(path, tokens)
    return str(path)


def put_bos_before_texts(model: Path) -> None:
    """Have the demo model's tokenizer, in a copy of the model, put `<s>`, which is 0, before every text."""
    body = json.loads((model / "tokenizer.json").read_text())
    sequence = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
    body["post_processor"] |= {"single": sequence, "special_tokens": special}
    (model / "tokenizer.json").write_text(json.dumps(body))
