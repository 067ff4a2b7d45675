"""Make a LLaMA- or Mixtral-shaped checkpoint of random weights, of any size, one layer in memory at a time.

For measurements only: nothing about it is a language model but its shapes.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, MixtralConfig


def make(
    path: Path, config: LlamaConfig | MixtralConfig, dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> None:
    """Write config.json, an index and one shard a layer (and one for embedding, norm and head) into `path`.

    device: where the numbers are drawn; another draws others.
    """
    path.mkdir(parents=True, exist_ok=True)
    config.dtype = dtype
    config.architectures = [type(config).__name__.removesuffix("Config") + "ForCausalLM"]
    config.save_pretrained(path)
    generator = torch.Generator(device).manual_seed(seed)
    hidden, head_dim = config.hidden_size, config.head_dim
    assert head_dim is not None and config.num_key_value_heads is not None
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim

    def matrix(rows: int, columns: int) -> torch.Tensor:
        scale = torch.rand(rows, 1, generator=generator, device=device).add_(0.5).div_(columns**0.5)
        values = torch.empty(rows, columns, device=device).normal_(generator=generator)
        return values.mul_(scale).to(dtype).cpu()

    ends = {"model.embed_tokens.weight": matrix(config.vocab_size, hidden)}
    ends |= {"model.norm.weight": torch.ones(hidden, dtype=dtype), "lm_head.weight": matrix(config.vocab_size, hidden)}
    weight_map: dict[str, str] = {}
    count = config.num_hidden_layers + 1
    for i in range(count):
        tensors = ends
        if i < config.num_hidden_layers:
            shapes = {"self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden)}
            shapes |= {"self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries)}
            shapes |= _mlp_shapes(config)
            tensors = {f"model.layers.{i}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{i}.{norm}.weight"] = torch.ones(hidden, dtype=dtype)
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": sum(f.stat().st_size for f in path.glob("*.safetensors"))}}
    (path / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": weight_map}))


def _mlp_shapes(config: LlamaConfig | MixtralConfig) -> dict[str, tuple[int, int]]:
    """Names of a layer's MLP or experts, and shapes of their weights."""
    hidden, inner = config.hidden_size, config.intermediate_size
    if isinstance(config, LlamaConfig):
        return {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    shapes = {"block_sparse_moe.gate": (config.num_local_experts, hidden)}
    for expert in range(config.num_local_experts):
        prefix = f"block_sparse_moe.experts.{expert}"
        shapes |= {f"{prefix}.w1": (inner, hidden), f"{prefix}.w3": (inner, hidden), f"{prefix}.w2": (hidden, inner)}
    return shapes


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of the model, by default those of TinyLlama 1.1B without grouped heads."""
    for name, default in (("layers", 22), ("hidden", 2048), ("intermediate", 5632), ("heads", 32), ("kv-heads", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--experts", type=int, default=0, help="in every layer; 0 is one MLP")
    parser.add_argument("--experts-per-token", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))


def config_of(options: argparse.Namespace, layers: int) -> LlamaConfig | MixtralConfig:
    """The config of the sizes asked for, with that many layers."""
    sizes = {
        "hidden_size": options.hidden,
        "intermediate_size": options.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
        "head_dim": options.hidden // options.heads,
        "vocab_size": options.vocabulary,
    }
    if not options.experts:
        return LlamaConfig(**sizes)
    experts = {"num_local_experts": options.experts, "num_experts_per_tok": options.experts_per_token}
    return MixtralConfig(**sizes, **experts)


def main() -> None:
    """Make one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    add_shape_arguments(parser)
    options = parser.parse_args()
    make(options.path, config_of(options, options.layers), getattr(torch, options.dtype))


if __name__ == "__main__":
    main()
