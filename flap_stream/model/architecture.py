"""Model families as data: which tensors share a unit, on which axis, in which blocks.

A family is a row of `FAMILIES`; its forward is transformers' own.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
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
_NORMED_ATTENTION = replace(  # whose queries and keys have norms with weights of each head's own
    _ATTENTION,
    projections=(
        Projection("self_attn.q_norm", ROWS, ("query_head",)),
        Projection("self_attn.k_norm", ROWS, ("key_value_head",)),
        *_ATTENTION.projections,
    ),
)
_FUSED_ATTENTION = UnitKind(
    Sublayer.ATTENTION,
    (
        Projection("self_attn.qkv_proj", ROWS, ("query", "key_value", "key_value")),
        Projection("self_attn.o_proj", COLUMNS, ("query",)),
    ),
    norm="input_layernorm",
)


def _mlp(
    rows: str, output: str, module: str = "mlp", fused: int = 1, norm: str = "post_attention_layernorm"
) -> UnitKind:
    """The neurons of an MLP. rows: the linears that have rows for them, `fused` in each."""
    readers = tuple(Projection(f"{module}.{name}", ROWS, ("neuron",) * fused) for name in rows.split())
    return UnitKind(Sublayer.MLP, (*readers, Projection(f"{module}.{output}", COLUMNS, ("neuron",))), norm=norm)


_MLP = _mlp("gate_proj up_proj", "down_proj")
_FUSED_MLP = _mlp("gate_up_proj", "down_proj", fused=2)
_UNGATED_MLP = _mlp("up_proj", "down_proj")
_FEED_FORWARD = _mlp("gate_proj up_proj", "down_proj", "feed_forward")
_EXPERT = UnitKind(
    Sublayer.MLP,
    (
        Projection("mlp.experts.each.{}.gate", ROWS, ("neuron",)),
        Projection("mlp.experts.each.{}.up", ROWS, ("neuron",)),
        Projection("mlp.experts.each.{}.down", COLUMNS, ("neuron",)),
    ),
)
# Names of experts in checkpoints, which the pruned classes have under names of their own.
_SEPARATE = ((r"\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.", r".mlp.experts.each.\1.\2."),)
_BLOCK_SPARSE = (
    (r"\.block_sparse_moe\.experts\.(\d+)\.w1\.", r".mlp.experts.each.\1.gate."),
    (r"\.block_sparse_moe\.experts\.(\d+)\.w3\.", r".mlp.experts.each.\1.up."),
    (r"\.block_sparse_moe\.experts\.(\d+)\.w2\.", r".mlp.experts.each.\1.down."),
    (r"\.block_sparse_moe\.", ".mlp."),
)


@dataclass(frozen=True)
class Family:
    """A model family: where its decoder layers are and what its units are made of.

    causal_class: the causal language model in transformers; base_class: the model without a head, by default of the
    same prefix. Their pruned forms in `modeling/` are named `Pruned<class>`.
    layers: module path of the decoder layers in the causal language model.
    attention: its KV groups; None where it stays whole, as everything must that no group can be cut out of: norms over
    all heads, latent attention, linear attention, state spaces.
    mlp: the neurons of its MLP, where a layer has one without experts.
    experts: the kind of an expert's neurons, with a placeholder for its number in the names; None without experts.
    renames: pattern and replacement for tensor names that differ between dense checkpoints and the pruned class.
    norms_outputs: whether attention and MLP outputs are normalised before the residual addition.
    width: the key of config.json for the neurons of its MLP.
    is_parallel: whether the MLP reads what attention reads, and not its output.
    """

    causal_class: str
    base_class: str = ""
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens.weight"
    norm: str = "model.norm"
    head: str = "lm_head.weight"
    attention: UnitKind | None = _ATTENTION
    mlp: UnitKind = _MLP
    experts: UnitKind | None = None
    renames: tuple[tuple[str, str], ...] = ()
    norms_outputs: bool = False
    is_parallel: bool = False
    width: str = "intermediate_size"

    @property
    def kinds(self) -> tuple[UnitKind, ...]:
        """The kinds of its units, in the order in which layers run them."""
        return (self.mlp,) if self.attention is None else (self.attention, self.mlp)

    def prunes(self, sublayer: Sublayer) -> bool:
        """Whether it has units in this half of a layer."""
        return sublayer is Sublayer.MLP or self.attention is not None

    def left_whole(self, names: Iterable[str]) -> list[str]:
        """What of its layers loses nothing, in the words of messages. names: of a model's tensors."""
        whole = [] if self.attention is not None else ["attention"]
        return [*whole, "shared experts"] if any(".shared_expert" in name for name in names) else whole

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
        return None if self.norms_outputs or self.is_parallel else kind.norm

    def with_prefix(self, name: str) -> str:
        """The name in the causal model of a tensor that was saved from the base model."""
        base, _, layers = self.layers.rpartition(".")
        own = (layers, *(path.removeprefix(f"{base}.").partition(".")[0] for path in (self.embedding, self.norm)))
        return f"{base}.{name}" if name.partition(".")[0] in own else name

    def layer_of(self, name: str) -> int | None:
        """The number of the decoder layer that a tensor belongs to; None for any other tensor."""
        found = re.match(rf"{re.escape(self.layers)}\.(\d+)\.", name)
        return None if found is None else int(found[1])

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
    "afmoe": Family("AfmoeForCausalLM", attention=None, experts=_EXPERT, renames=_SEPARATE, norms_outputs=True),
    "apertus": Family(
        "ApertusForCausalLM",
        attention=replace(_ATTENTION, norm="attention_layernorm"),
        mlp=replace(_UNGATED_MLP, norm="feedforward_layernorm"),
    ),
    "arcee": Family("ArceeForCausalLM", mlp=_UNGATED_MLP),
    "cohere": Family("CohereForCausalLM", attention=_NORMED_ATTENTION, is_parallel=True),
    "cohere2": Family("Cohere2ForCausalLM", is_parallel=True),
    "cohere2_moe": Family("Cohere2MoeForCausalLM", experts=_EXPERT, renames=_SEPARATE, is_parallel=True),
    "cwm": Family("CwmForCausalLM"),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", attention=None, experts=_EXPERT, renames=_SEPARATE),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", attention=None, experts=_EXPERT, renames=_SEPARATE),
    "deepseek_v32": Family("DeepseekV32ForCausalLM", attention=None, experts=_EXPERT, renames=_SEPARATE),
    "diffllama": Family("DiffLlamaForCausalLM", attention=None),
    "dots1": Family("Dots1ForCausalLM", experts=_EXPERT, renames=_SEPARATE),
    "ernie4_5": Family("Ernie4_5ForCausalLM"),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeForCausalLM",
        experts=_EXPERT,
        renames=(*_SEPARATE, (r"\.mlp\.moe_statics\.", ".mlp.gate.moe_statics.")),
    ),
    "exaone4": Family("Exaone4ForCausalLM", norms_outputs=True),
    "exaone_moe": Family(
        "ExaoneMoeForCausalLM",
        experts=_EXPERT,
        renames=(*_SEPARATE, (r"\.mlp\.e_score_correction_bias", ".mlp.gate.e_score_correction_bias")),
    ),
    "flex_olmo": Family("FlexOlmoForCausalLM", attention=None, experts=_EXPERT, renames=_SEPARATE, norms_outputs=True),
    "flint": Family(
        "FlintForCausalLM",
        attention=None,
        experts=_EXPERT,
        renames=(
            *_SEPARATE,
            (r"\.self_attn\.softmax_offset", ".self_attn.sinks"),
        ),
    ),
    "gemma": Family("GemmaForCausalLM"),
    "gemma2": Family("Gemma2ForCausalLM", norms_outputs=True),
    "gemma3_text": Family("Gemma3ForCausalLM", base_class="Gemma3TextModel", norms_outputs=True),
    "glm": Family("GlmForCausalLM", mlp=_FUSED_MLP),
    "glm4": Family("Glm4ForCausalLM", mlp=_FUSED_MLP, norms_outputs=True),
    "glm4_moe": Family("Glm4MoeForCausalLM", experts=_EXPERT, renames=_SEPARATE),
    "glm4_moe_lite": Family("Glm4MoeLiteForCausalLM", attention=None, experts=_EXPERT, renames=_SEPARATE),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        attention=None,
        mlp=_mlp("dense_h_to_4h", "dense_4h_to_h"),
        layers="gpt_neox.layers",
        embedding="gpt_neox.embed_in.weight",
        norm="gpt_neox.final_layer_norm",
        renames=((r"^embed_out\.", "lm_head."),),
    ),
    "granite": Family("GraniteForCausalLM"),
    "granite_swa": Family("GraniteSWAForCausalLM", attention=None),
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        attention=None,
        mlp=_mlp("input_linear", "output_linear", "shared_mlp", fused=2),
        width="shared_intermediate_size",
    ),
    "helium": Family("HeliumForCausalLM"),
    "hunyuan_v1_dense": Family("HunYuanDenseV1ForCausalLM"),
    "hunyuan_v1_moe": Family("HunYuanMoEV1ForCausalLM", experts=_EXPERT, renames=_SEPARATE),
    "hyperclovax": Family("HyperCLOVAXForCausalLM"),
    "jais2": Family("Jais2ForCausalLM", mlp=_UNGATED_MLP),
    "laguna": Family(
        "LagunaForCausalLM",
        attention=None,
        experts=_EXPERT,
        renames=(
            *_SEPARATE,
            (r"\.mlp\.experts\.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),
            (r"\.mlp\.shared_expert\.", ".mlp.shared_experts."),
        ),
    ),
    "lfm2": Family(
        "Lfm2ForCausalLM",
        attention=None,
        mlp=_mlp("w1 w3", "w2", "feed_forward", norm="ffn_norm"),
        norm="model.embedding_norm",
    ),
    "llama": Family("LlamaForCausalLM"),
    "mellum": Family("MellumForCausalLM", experts=_EXPERT, renames=_SEPARATE),
    "mimo_v2_flash": Family(
        "MiMoV2FlashForCausalLM",
        attention=None,
        experts=_EXPERT,
        renames=(*_SEPARATE, (r"\.self_attn\.attention_sink_bias", ".self_attn.sinks")),
    ),
    "minicpm3": Family("MiniCPM3ForCausalLM", attention=None),
    "minimax": Family("MiniMaxForCausalLM", attention=None, experts=_EXPERT, renames=_BLOCK_SPARSE),
    "minimax_m2": Family("MiniMaxM2ForCausalLM", attention=None, experts=_EXPERT, renames=_BLOCK_SPARSE),
    "ministral": Family("MinistralForCausalLM"),
    "ministral3": Family("Ministral3ForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "mixtral": Family(
        "MixtralForCausalLM",
        experts=_EXPERT,
        renames=_BLOCK_SPARSE,
    ),
    "nanochat": Family("NanoChatForCausalLM", mlp=replace(_mlp("fc1", "fc2"), norm=None)),
    "nemotron": Family("NemotronForCausalLM", mlp=_UNGATED_MLP),
    "olmo": Family("OlmoForCausalLM"),
    "olmo2": Family("Olmo2ForCausalLM", attention=None, norms_outputs=True),
    "olmo3": Family("Olmo3ForCausalLM", attention=None, norms_outputs=True),
    "olmoe": Family("OlmoeForCausalLM", attention=None, experts=_EXPERT, renames=_SEPARATE),
    "persimmon": Family(
        "PersimmonForCausalLM",
        attention=None,
        mlp=_mlp("dense_h_to_4h", "dense_4h_to_h"),
        norm="model.final_layernorm",
    ),
    "phi3": Family("Phi3ForCausalLM", attention=_FUSED_ATTENTION, mlp=_FUSED_MLP),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", experts=_EXPERT, renames=_SEPARATE),
    "qwen3": Family("Qwen3ForCausalLM"),
    "qwen3_5_moe_text": Family(
        "Qwen3_5MoeForCausalLM", base_class="Qwen3_5MoeTextModel", attention=None, experts=_EXPERT, renames=_SEPARATE
    ),
    "qwen3_5_text": Family("Qwen3_5ForCausalLM", base_class="Qwen3_5TextModel", attention=None),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", experts=_EXPERT, renames=_SEPARATE),
    "qwen3_next": Family("Qwen3NextForCausalLM", attention=None, experts=_EXPERT, renames=_SEPARATE),
    "seed_oss": Family("SeedOssForCausalLM"),
    "smollm3": Family("SmolLM3ForCausalLM"),
    "solar_open": Family("SolarOpenForCausalLM", experts=_EXPERT, renames=_SEPARATE),
    "stablelm": Family("StableLmForCausalLM", attention=None),
    "starcoder2": Family("Starcoder2ForCausalLM", mlp=_mlp("c_fc", "c_proj")),
    "vaultgemma": Family("VaultGemmaForCausalLM", mlp=replace(_MLP, norm="pre_feedforward_layernorm")),
    "youtu": Family("YoutuForCausalLM", attention=None),
}


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


def further_layers(config: Mapping[str, Any]) -> range:
    """Numbers of the layers after the last that predict tokens further ahead; nothing else reads them."""
    sizes = (config.get(name) for name in ("num_hidden_layers", "num_nextn_predict_layers"))
    count, further = (size if isinstance(size, int) else 0 for size in sizes)
    return range(count, count + further)


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
    block_size = LayerShape(0, heads_per_group, head_dim, 0, 0, 0).block_size

    def units_of(kind: UnitKind) -> int:
        weight = tensors.get(f"{kind.output.name}.weight")
        return 0 if weight is None else weight[COLUMNS] // sum(map(block_size, kind.output.blocks))

    def cost_of(kind: UnitKind) -> int:
        weights = [(p, tensors.get(f"{p.name}.weight")) for p in kind.projections]
        return sum(sum(map(block_size, p.blocks)) * w[1 - p.axis] for p, w in weights if w is not None)

    def biases_of(kind: UnitKind) -> int:
        return sum(block_size(block) for p in kind.readers if f"{p.name}.bias" in tensors for block in p.blocks)

    attention, mlp = family.attention, family.mlp
    attention_rest, mlp_rest = 0 if attention is None else _rest(attention, tensors), _rest(mlp, tensors)
    experts: tuple[int, ...] = ()
    if family.experts is not None and any(name.startswith("mlp.experts.") for name in tensors):
        mlp, count = family.experts.numbered(0), 0
        while any(name.startswith(f"{family.experts.numbered(count).output.name}.") for name in tensors):
            experts += (units_of(family.experts.numbered(count)),)
            count += 1
        mlp_rest = 0  # each expert keeps at least one neuron
    outputs = [] if attention is None else [attention.output.name]
    outputs += [kind.output.name for kind in _experts_of(family, experts)] or [mlp.output.name]
    unbiased = [tensors[f"{n}.weight"] for n in outputs if f"{n}.weight" in tensors and f"{n}.bias" not in tensors]
    return LayerShape(
        kv_groups=0 if attention is None else units_of(attention),
        heads_per_group=heads_per_group,
        head_dim=head_dim,
        neurons=sum(experts) if experts else units_of(mlp),
        group_cost=0 if attention is None else cost_of(attention),
        neuron_cost=cost_of(mlp),
        experts=experts,
        group_biases=0 if attention is None else biases_of(attention),
        neuron_biases=biases_of(mlp),
        attention_rest=attention_rest,
        mlp_rest=mlp_rest,
        added_biases=sum(weight[ROWS] for weight in unbiased),
    )


def _experts_of(family: Family, sizes: tuple[int, ...]) -> list[UnitKind]:
    return [] if family.experts is None else [family.experts.numbered(i) for i in range(len(sizes))]


def _rest(kind: UnitKind, tensors: Mapping[str, tuple[int, ...]]) -> int:
    """Elements of a module's tensors that belong to no unit, except the output's bias, which is kept."""
    cut = {f"{p.name}.weight" for p in kind.projections} | {f"{p.name}.bias" for p in kind.projections}
    return sum(prod(shape) for name, shape in tensors.items() if name.startswith(f"{kind.module}.") and name not in cut)
