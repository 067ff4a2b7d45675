"""Model families as data: which tensors share a unit, on which axis, in which blocks.

A family is a row of `FAMILIES`; its forward is transformers' own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from flap_stream.arithmetic.layer_shape import LayerShape, Sublayer
from flap_stream.errors import InvalidModel, UnsupportedModel
from flap_stream.model.units import COLUMNS, ROWS, Part, Projection, UnitKind

_LANGUAGE_HEADS = ("CausalLM", "ConditionalGeneration", "ImageTextToText", "VisionText2Text")
PRUNED_TYPE = "flap_stream_"  # before the dense model's model_type in the config.json of a pruned checkpoint
_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")

_ATTENTION = UnitKind(
    Sublayer.ATTENTION,
    (
        Projection("self_attn.q_proj", ROWS, ("query",)),
        Projection("self_attn.k_proj", ROWS, ("key_value",)),
        Projection("self_attn.v_proj", ROWS, ("key_value",)),
        Projection("self_attn.o_proj", COLUMNS, ("query",)),
    ),
    norm="input_layernorm",
)
_FUSED_ATTENTION = UnitKind(
    Sublayer.ATTENTION,
    (
        Projection("self_attn.qkv_proj", ROWS, ("query", "key_value", "key_value")),
        Projection("self_attn.o_proj", COLUMNS, ("query",)),
    ),
    norm="input_layernorm",
)
_MLP = UnitKind(
    Sublayer.MLP,
    (
        Projection("mlp.gate_proj", ROWS, ("neuron",)),
        Projection("mlp.up_proj", ROWS, ("neuron",)),
        Projection("mlp.down_proj", COLUMNS, ("neuron",)),
    ),
    norm="post_attention_layernorm",
)
_FUSED_MLP = UnitKind(
    Sublayer.MLP,
    (
        Projection("mlp.gate_up_proj", ROWS, ("neuron", "neuron")),
        Projection("mlp.down_proj", COLUMNS, ("neuron",)),
    ),
    norm="post_attention_layernorm",
)
_EXPERT = UnitKind(
    Sublayer.MLP,
    (
        Projection("mlp.experts.each.{}.gate", ROWS, ("neuron",)),
        Projection("mlp.experts.each.{}.up", ROWS, ("neuron",)),
        Projection("mlp.experts.each.{}.down", COLUMNS, ("neuron",)),
    ),
)


@dataclass(frozen=True)
class Family:
    """A model family: where its decoder layers are and what its units are made of.

    causal_class: the causal language model in transformers; base_class: the model without a head, by default of the
    same prefix. Their pruned forms in `modeling/` are named `Pruned<class>`.
    layers: module path of the decoder layers in the causal language model.
    experts: the kind of an expert's neurons, with a placeholder for its number in the names; None without experts.
    renames: pattern and replacement for tensor names that differ between dense checkpoints and the pruned class.
    norms_outputs: whether attention and MLP outputs are normalised before the residual addition.
    """

    causal_class: str
    base_class: str = ""
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens.weight"
    norm: str = "model.norm"
    head: str = "lm_head.weight"
    kinds: tuple[UnitKind, ...] = (_ATTENTION, _MLP)
    experts: UnitKind | None = None
    renames: tuple[tuple[str, str], ...] = ()
    norms_outputs: bool = False

    def parts(self, shape: LayerShape) -> list[Part]:
        """The modules of a layer that units belong to."""
        found = []
        for kind in self.kinds:
            if kind.name == Sublayer.MLP and shape.experts:
                assert self.experts is not None
                firsts = np.cumsum([0, *shape.experts]).tolist()
                found += [Part(self.experts.numbered(i), firsts[i], n) for i, n in enumerate(shape.experts)]
            else:
                found.append(Part(kind, 0, shape.units(kind.name)))
        return found

    def norm_before(self, kind: UnitKind) -> str | None:
        """Path of the norm that only this kind of units reads from, if it is known."""
        return None if self.norms_outputs else kind.norm

    def with_prefix(self, name: str) -> str:
        """The name in the causal model of a tensor that was saved from the base model."""
        base, _, layers = self.layers.rpartition(".")
        own = (layers, *(path.removeprefix(f"{base}.").partition(".")[0] for path in (self.embedding, self.norm)))
        return f"{base}.{name}" if name.partition(".")[0] in own else name

    def canonical(self, name: str) -> str:
        """The name that the pruned class has for a tensor of a checkpoint."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    @property
    def pruned_classes(self) -> dict[str, str]:
        """Auto class to the class in `modeling/`, as `auto_map` has them."""
        base = self.base_class or self.causal_class.removesuffix("ForCausalLM") + "Model"
        return {"AutoModel": f"Pruned{base}", "AutoModelForCausalLM": f"Pruned{self.causal_class}"}


# To add a family: a row here under its model_type, naming its class in transformers and, if its layers are built
# differently from Llama's, the projections of its units. What the layers compute is left to transformers. A row in
# FAMILY_EXTRAS of tests/models.py then runs the whole suite on it.
FAMILIES: dict[str, Family] = {
    "exaone4": Family("Exaone4ForCausalLM", norms_outputs=True),
    "gemma": Family("GemmaForCausalLM"),
    "gemma2": Family("Gemma2ForCausalLM", norms_outputs=True),
    "gemma3_text": Family("Gemma3ForCausalLM", base_class="Gemma3TextModel", norms_outputs=True),
    "glm": Family("GlmForCausalLM", kinds=(_ATTENTION, _FUSED_MLP)),
    "glm4": Family("Glm4ForCausalLM", kinds=(_ATTENTION, _FUSED_MLP), norms_outputs=True),
    "granite": Family("GraniteForCausalLM"),
    "hunyuan_v1_dense": Family("HunYuanDenseV1ForCausalLM"),
    "llama": Family("LlamaForCausalLM"),
    "ministral": Family("MinistralForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "mixtral": Family(
        "MixtralForCausalLM",
        experts=_EXPERT,
        renames=(
            (r"\.block_sparse_moe\.experts\.(\d+)\.w1\.", r".mlp.experts.each.\1.gate."),
            (r"\.block_sparse_moe\.experts\.(\d+)\.w3\.", r".mlp.experts.each.\1.up."),
            (r"\.block_sparse_moe\.experts\.(\d+)\.w2\.", r".mlp.experts.each.\1.down."),
            (r"\.block_sparse_moe\.gate\.", ".mlp.gate."),
        ),
    ),
    "olmo": Family("OlmoForCausalLM"),
    "phi3": Family("Phi3ForCausalLM", kinds=(_FUSED_ATTENTION, _FUSED_MLP)),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM"),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        experts=_EXPERT,
        renames=((r"\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.", r".mlp.experts.each.\1.\2."),),
    ),
    "seed_oss": Family("SeedOssForCausalLM"),
    "smollm3": Family("SmolLM3ForCausalLM"),
}

_NORM_OVER_HEADS = "its query and key norms span all heads, so that removing one changes the others"
REFUSED = {"olmo2": _NORM_OVER_HEADS, "olmo3": _NORM_OVER_HEADS}


def require_causal(config: Mapping[str, Any], where: str) -> None:
    """Raise UnsupportedModel if config.json names a class whose head is not a language model's."""
    named = config.get("architectures")
    for name in named if isinstance(named, list) else []:
        head = str(name).partition("For")[2]
        if head and head not in _LANGUAGE_HEADS:
            raise UnsupportedModel(
                f"{where} is a {name}; only causal language models are pruned, and the head of this one would be lost, "
                "so name the language model that it was made from"
            )


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The table row for a config.json.

    Raises UnsupportedModel, naming the reason or the supported families, for any other and for quantised checkpoints.
    """
    model_type, quantization = config.get("model_type"), config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise UnsupportedModel(
            f"{where} is quantised ({method}); pruning needs the bf16, fp16 or fp32 checkpoint it was made from"
        )
    if isinstance(model_type, str) and model_type in REFUSED:
        raise UnsupportedModel(f"{where} has model_type {model_type!r}, which cannot be pruned: {REFUSED[model_type]}")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedModel(
            f"{where} has model_type {model_type!r}; supported families are {', '.join(sorted(FAMILIES))}"
        )
    require_causal(config, where)
    return FAMILIES[model_type]


def dense_type(config: dict[str, Any]) -> dict[str, Any]:
    """The contents of a config.json, its model_type replaced by the dense model's if pruning gave it one of its own."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type.startswith(PRUNED_TYPE):
        return config
    return {**config, "model_type": model_type.removeprefix(PRUNED_TYPE)}


def require_sizes(config: Mapping[str, Any], where: str) -> None:
    """Raise InvalidModel unless the sizes in a config.json are positive whole numbers that are consistent."""
    optional = [name for name in ("num_key_value_heads", "head_dim") if config.get(name) is not None]
    for name in (*_SIZES, *optional):
        value = config.get(name)
        if type(value) is not int or value < 1:
            raise InvalidModel(f"{where}/config.json has {name} {value!r}; expected a whole number of at least 1")
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    if heads % kv_heads:
        raise InvalidModel(f"{where}/config.json has {heads} heads for {kv_heads} KV heads; expected a multiple")


def layer_shape(family: Family, config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> LayerShape:
    """Sizes of one decoder layer; unit counts and costs are derived from its tensors.

    tensors: relative name (`self_attn.q_proj.weight`) to shape, already checked against the architecture.
    """
    heads = config["num_attention_heads"]
    heads_per_group = heads // (config.get("num_key_value_heads") or heads)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    sizes = {"query": heads_per_group * head_dim, "key_value": head_dim, "neuron": 1}

    def units_of(kind: UnitKind) -> int:
        weight = tensors.get(f"{kind.output.name}.weight")
        return 0 if weight is None else weight[COLUMNS] // sum(sizes[block] for block in kind.output.blocks)

    def cost_of(kind: UnitKind) -> int:
        weights = [(p, tensors.get(f"{p.name}.weight")) for p in kind.projections]
        return sum(sum(sizes[block] for block in p.blocks) * w[1 - p.axis] for p, w in weights if w is not None)

    def biases_of(kind: UnitKind) -> int:
        return sum(sizes[block] for p in kind.readers if f"{p.name}.bias" in tensors for block in p.blocks)

    attention, mlp = family.kinds
    rest = [_rest(kind, tensors) for kind in family.kinds]
    experts: tuple[int, ...] = ()
    if family.experts is not None and any(name.startswith("mlp.experts.") for name in tensors):
        mlp, count = family.experts.numbered(0), 0
        while any(name.startswith(f"{family.experts.numbered(count).output.name}.") for name in tensors):
            experts += (units_of(family.experts.numbered(count)),)
            count += 1
        rest[1] = 0  # each expert keeps at least one neuron
    outputs = [attention.output.name, *([f.output.name for f in _experts_of(family, experts)] or [mlp.output.name])]
    unbiased = [tensors[f"{n}.weight"] for n in outputs if f"{n}.weight" in tensors and f"{n}.bias" not in tensors]
    return LayerShape(
        kv_groups=units_of(attention),
        heads_per_group=heads_per_group,
        head_dim=head_dim,
        neurons=sum(experts) if experts else units_of(mlp),
        group_cost=cost_of(attention),
        neuron_cost=cost_of(mlp),
        experts=experts,
        group_biases=biases_of(attention),
        neuron_biases=biases_of(mlp),
        attention_rest=rest[0],
        mlp_rest=rest[1],
        added_biases=sum(weight[ROWS] for weight in unbiased),
    )


def _experts_of(family: Family, sizes: tuple[int, ...]) -> list[UnitKind]:
    return [] if family.experts is None else [family.experts.numbered(i) for i in range(len(sizes))]


def _rest(kind: UnitKind, tensors: Mapping[str, tuple[int, ...]]) -> int:
    """Elements of a module's tensors that belong to no unit, except the output's bias, which is kept."""
    cut = {f"{p.name}.weight" for p in kind.projections} | {f"{p.name}.bias" for p in kind.projections}
    return sum(prod(shape) for name, shape in tensors.items() if name.startswith(f"{kind.module}.") and name not in cut)
