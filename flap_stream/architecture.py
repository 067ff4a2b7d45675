"""What is known of each model family, as data: which tensors share a unit, on which axis, in which blocks.

A unit is what is kept or removed as a whole: in attention one KV group (its key and value head with the query heads
that read it), in the MLP one neuron. A family is a row of `FAMILIES`; its forward is transformers' own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flap_stream.errors import InvalidModel, UnsupportedModel

ROWS, COLUMNS = 0, 1
HOLE = -1  # in the place of an index: a row or column of zeros
_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer.

    heads_per_group: query heads that read one KV head; 1 is multi-head attention.
    group_cost, neuron_cost: weights that go with one KV group, with one neuron.
    """

    kv_groups: int
    heads_per_group: int
    head_dim: int
    neurons: int
    group_cost: int
    neuron_cost: int

    @property
    def prunable(self) -> int:
        """Weights of the layer's pruned projections."""
        return self.kv_groups * self.group_cost + self.neurons * self.neuron_cost

    def units(self, kind: str) -> int:
        """How many units of a kind (`attention` or `mlp`) the layer has."""
        return self.kv_groups if kind == "attention" else self.neurons

    def block_size(self, block: str) -> int:
        """Rows or columns that one unit has in a block of a projection."""
        return {"query": self.heads_per_group * self.head_dim, "key_value": self.head_dim, "neuron": 1}[block]


@dataclass(frozen=True)
class Projection:
    """A linear whose rows (or columns) belong to units.

    name: module path inside the decoder layer.
    axis: ROWS or COLUMNS of its `[out, in]` weight.
    blocks: what stands one after another on that axis; a fused projection has several.
    """

    name: str
    axis: int
    blocks: tuple[str, ...]

    def kept_indices(self, kept_units: np.ndarray, shape: LayerShape, kind: str) -> np.ndarray:
        """Rows or columns that stay, ascending int64, for the units that stay."""
        units, offset, parts = shape.units(kind), 0, []
        for block in self.blocks:
            size = shape.block_size(block)
            parts.append((offset + kept_units[:, None] * size + np.arange(size)[None, :]).ravel())
            offset += units * size
        return np.concatenate(parts).astype(np.int64)

    def padded_indices(self, units: int, shape: LayerShape, kind: str) -> np.ndarray:
        """All rows or columns and, where further units would stand to make so many, HOLE; int64."""
        offset, parts = 0, []
        for block in self.blocks:
            size = shape.block_size(block)
            length = shape.units(kind) * size
            parts += [np.arange(offset, offset + length), np.full(units * size - length, HOLE)]
            offset += length
        return np.concatenate(parts).astype(np.int64)

    def size(self, shape: LayerShape, kind: str) -> int:
        """Length of the pruned axis."""
        return shape.units(kind) * sum(shape.block_size(block) for block in self.blocks)


@dataclass(frozen=True)
class UnitKind:
    """All projections that lose something when a unit goes. The last one's inputs are what is measured."""

    name: str
    projections: tuple[Projection, ...]

    @property
    def output(self) -> Projection:
        """The projection that reads the units' outputs (o_proj, down_proj)."""
        return self.projections[-1]

    @property
    def module(self) -> str:
        """Path, inside the decoder layer, of the module that is gone when all its units are."""
        return self.output.name.rpartition(".")[0]


_ATTENTION = UnitKind(
    "attention",
    (
        Projection("self_attn.q_proj", ROWS, ("query",)),
        Projection("self_attn.k_proj", ROWS, ("key_value",)),
        Projection("self_attn.v_proj", ROWS, ("key_value",)),
        Projection("self_attn.o_proj", COLUMNS, ("query",)),
    ),
)
_FUSED_ATTENTION = UnitKind(
    "attention",
    (
        Projection("self_attn.qkv_proj", ROWS, ("query", "key_value", "key_value")),
        Projection("self_attn.o_proj", COLUMNS, ("query",)),
    ),
)
_MLP = UnitKind(
    "mlp",
    (
        Projection("mlp.gate_proj", ROWS, ("neuron",)),
        Projection("mlp.up_proj", ROWS, ("neuron",)),
        Projection("mlp.down_proj", COLUMNS, ("neuron",)),
    ),
)
_FUSED_MLP = UnitKind(
    "mlp",
    (
        Projection("mlp.gate_up_proj", ROWS, ("neuron", "neuron")),
        Projection("mlp.down_proj", COLUMNS, ("neuron",)),
    ),
)


@dataclass(frozen=True)
class Family:
    """A model family: where its decoder layers are and what its units are made of.

    causal_class: the causal language model in transformers; base_class: the model without a head, by default of the
    same prefix. Their pruned forms in `modeling/` are named `Pruned<class>`.
    layers: module path of the decoder layers in the causal language model.
    """

    causal_class: str
    base_class: str = ""
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens.weight"
    norm: str = "model.norm"
    head: str = "lm_head.weight"
    kinds: tuple[UnitKind, ...] = (_ATTENTION, _MLP)

    @property
    def pruned_classes(self) -> dict[str, str]:
        """Auto class to the class in `modeling/`, as `auto_map` has them."""
        base = self.base_class or self.causal_class.removesuffix("ForCausalLM") + "Model"
        return {"AutoModel": f"Pruned{base}", "AutoModelForCausalLM": f"Pruned{self.causal_class}"}


# To add a family: a row here under its model_type, naming its class in transformers and, if its layers are built
# otherwise than Llama's, the projections of its units. What the layers compute is transformers' business. A row in
# FAMILY_EXTRAS of tests/models.py then puts it through the whole suite.
FAMILIES: dict[str, Family] = {
    "exaone4": Family("Exaone4ForCausalLM"),
    "gemma": Family("GemmaForCausalLM"),
    "gemma2": Family("Gemma2ForCausalLM"),
    "gemma3_text": Family("Gemma3ForCausalLM", base_class="Gemma3TextModel"),
    "glm": Family("GlmForCausalLM", kinds=(_ATTENTION, _FUSED_MLP)),
    "glm4": Family("Glm4ForCausalLM", kinds=(_ATTENTION, _FUSED_MLP)),
    "granite": Family("GraniteForCausalLM"),
    "hunyuan_v1_dense": Family("HunYuanDenseV1ForCausalLM"),
    "llama": Family("LlamaForCausalLM"),
    "ministral": Family("MinistralForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "olmo": Family("OlmoForCausalLM"),
    "phi3": Family("Phi3ForCausalLM", kinds=(_FUSED_ATTENTION, _FUSED_MLP)),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM"),
    "seed_oss": Family("SeedOssForCausalLM"),
    "smollm3": Family("SmolLM3ForCausalLM"),
}

_NORM_OVER_HEADS = "its query and key norms span all heads, so that removing one changes the others"
REFUSED = {"olmo2": _NORM_OVER_HEADS, "olmo3": _NORM_OVER_HEADS}


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
    return FAMILIES[model_type]


def require_sizes(config: Mapping[str, Any], where: str) -> None:
    """Raise InvalidModel unless the sizes in a config.json are positive whole numbers that go together."""
    optional = [name for name in ("num_key_value_heads", "head_dim") if config.get(name) is not None]
    for name in (*_SIZES, *optional):
        value = config.get(name)
        if type(value) is not int or value < 1:
            raise InvalidModel(f"{where}/config.json has {name} {value!r}; expected a whole number of at least 1")
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    if heads % kv_heads:
        raise InvalidModel(f"{where}/config.json has {heads} heads for {kv_heads} KV heads; expected a multiple")


def layer_shape(family: Family, config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> LayerShape:
    """Sizes of one decoder layer, the unit counts and costs taken from its tensors.

    tensors: relative name (`self_attn.q_proj.weight`) to shape, already checked against the architecture.
    """
    heads = config["num_attention_heads"]
    heads_per_group = heads // (config.get("num_key_value_heads") or heads)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    sizes = {"query": heads_per_group * head_dim, "key_value": head_dim, "neuron": 1}
    units, costs = {}, {}
    for kind in family.kinds:
        weight = tensors.get(f"{kind.output.name}.weight")
        per_unit = sum(sizes[block] for block in kind.output.blocks)
        units[kind.name] = 0 if weight is None else weight[COLUMNS] // per_unit
        costs[kind.name] = sum(
            sum(sizes[block] for block in projection.blocks) * tensors[f"{projection.name}.weight"][1 - projection.axis]
            for projection in kind.projections
            if weight is not None
        )
    return LayerShape(
        kv_groups=units["attention"],
        heads_per_group=heads_per_group,
        head_dim=head_dim,
        neurons=units["mlp"],
        group_cost=costs["attention"],
        neuron_cost=costs["mlp"],
    )
