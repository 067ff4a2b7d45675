"""All model families, as data: a row each. What their layers compute is left to transformers."""

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from flap_stream.errors import UnsupportedModel
from flap_stream.model.architecture import Family
from flap_stream.model.quantised import require_readable
from flap_stream.model.unit_kinds import (
    ATTENTION,
    EXPERT,
    FUSED_ATTENTION,
    FUSED_MLP,
    MLP,
    NORMED_ATTENTION,
    PAIRED_EXPERT,
    UNGATED_MLP,
    mlp_kind,
)
from flap_stream.model.units import COLUMNS, Projection

_LANGUAGE_HEADS = ("CausalLM", "ConditionalGeneration", "ImageTextToText", "VisionText2Text")


def _numbered(path: str, own_path: str) -> tuple[tuple[str, str], ...]:
    """Renames of experts whose projections are w1, w3 and w2. path, own_path: of the MLP in files and pruned class."""
    names = (("w1", "gate"), ("w3", "up"), ("w2", "down"))
    return tuple(
        (rf"\.{path}\.experts\.(\d+)\.{name}\.", rf".{own_path}.experts.each.\1.{own}.") for name, own in names
    )


# Names of experts in checkpoints, which the pruned classes have under names of their own.
_SEPARATE = ((r"\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.", r".mlp.experts.each.\1.\2."),)
_BLOCK_SPARSE = (*_numbered("block_sparse_moe", "mlp"), (r"\.block_sparse_moe\.", ".mlp."))
_LFM2_MLP = mlp_kind("w1 w3", "w2", "feed_forward", norm="ffn_norm")

# Families whose layers compute exactly what Llama's do.
COMPUTE_AS_LLAMA = ("llama", "ministral", "mistral", "qwen2", "seed_oss")

# To add a family: a row here under its model_type, naming its class in transformers and, if its layers are built
# differently from Llama's, the projections of its units. A row in FAMILY_EXTRAS of tests/models.py then runs the whole
# suite on it.
FAMILIES: dict[str, Family] = {
    "afmoe": Family("AfmoeForCausalLM", attention=None, experts=EXPERT, renames=_SEPARATE, norms_outputs=True),
    "apertus": Family(
        "ApertusForCausalLM",
        attention=replace(ATTENTION, norm="attention_layernorm"),
        mlp=replace(UNGATED_MLP, norm="feedforward_layernorm"),
    ),
    "arcee": Family("ArceeForCausalLM", mlp=UNGATED_MLP),
    "cohere": Family("CohereForCausalLM", attention=NORMED_ATTENTION, is_parallel=True),
    "cohere2": Family("Cohere2ForCausalLM", is_parallel=True),
    "cohere2_moe": Family("Cohere2MoeForCausalLM", experts=EXPERT, renames=_SEPARATE, is_parallel=True),
    "cwm": Family("CwmForCausalLM"),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", attention=None, experts=EXPERT, renames=_SEPARATE),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", attention=None, experts=EXPERT, renames=_SEPARATE),
    "deepseek_v32": Family("DeepseekV32ForCausalLM", attention=None, experts=EXPERT, renames=_SEPARATE),
    "diffllama": Family("DiffLlamaForCausalLM", attention=None),
    "dots1": Family("Dots1ForCausalLM", experts=EXPERT, renames=_SEPARATE),
    "ernie4_5": Family("Ernie4_5ForCausalLM"),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeForCausalLM",
        experts=EXPERT,
        renames=(*_SEPARATE, (r"\.mlp\.moe_statics\.", ".mlp.gate.moe_statics.")),
    ),
    "exaone4": Family("Exaone4ForCausalLM", norms_outputs=True),
    "exaone_moe": Family(
        "ExaoneMoeForCausalLM",
        experts=EXPERT,
        renames=(*_SEPARATE, (r"\.mlp\.e_score_correction_bias", ".mlp.gate.e_score_correction_bias")),
    ),
    "flex_olmo": Family("FlexOlmoForCausalLM", attention=None, experts=EXPERT, renames=_SEPARATE, norms_outputs=True),
    "flint": Family(
        "FlintForCausalLM",
        attention=None,
        experts=EXPERT,
        renames=(*_SEPARATE, (r"\.self_attn\.softmax_offset", ".self_attn.sinks")),
    ),
    "gemma": Family("GemmaForCausalLM"),
    "gemma2": Family("Gemma2ForCausalLM", norms_outputs=True),
    "gemma3_text": Family("Gemma3ForCausalLM", base_class="Gemma3TextModel", norms_outputs=True),
    "gemma3n_text": Family(
        "Gemma3nForCausalLM",
        base_class="Gemma3nTextModel",
        attention=None,
        norms_outputs=True,
        keeps_neurons="activation_sparsity_pattern",
        varies_sizes=True,
    ),
    "gemma4_text": Family(
        "Gemma4ForCausalLM",
        base_class="Gemma4TextModel",
        attention=None,
        norms_outputs=True,
        varies_sizes=True,
    ),
    "glm": Family("GlmForCausalLM", mlp=FUSED_MLP),
    "glm4": Family("Glm4ForCausalLM", mlp=FUSED_MLP, norms_outputs=True),
    "glm4_moe": Family("Glm4MoeForCausalLM", experts=EXPERT, renames=_SEPARATE),
    "glm4_moe_lite": Family("Glm4MoeLiteForCausalLM", attention=None, experts=EXPERT, renames=_SEPARATE),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        attention=None,
        mlp=mlp_kind("dense_h_to_4h", "dense_4h_to_h"),
        layers="gpt_neox.layers",
        embedding="gpt_neox.embed_in.weight",
        norm="gpt_neox.final_layer_norm",
        renames=((r"^embed_out\.", "lm_head."),),
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        attention=None,
        experts=PAIRED_EXPERT,
        transposed_experts=True,
        mixture_returns_scores=True,
    ),
    "granite": Family("GraniteForCausalLM"),
    "granite_swa": Family("GraniteSWAForCausalLM", attention=None),
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        attention=None,
        mlp=mlp_kind("input_linear", "output_linear", "shared_mlp", fused=2),
        width="shared_intermediate_size",
    ),
    "helium": Family("HeliumForCausalLM"),
    "hunyuan_v1_dense": Family("HunYuanDenseV1ForCausalLM"),
    "hunyuan_v1_moe": Family("HunYuanMoEV1ForCausalLM", experts=EXPERT, renames=_SEPARATE),
    "hyperclovax": Family("HyperCLOVAXForCausalLM"),
    "jais2": Family("Jais2ForCausalLM", mlp=UNGATED_MLP),
    "laguna": Family(
        "LagunaForCausalLM",
        attention=None,
        experts=EXPERT,
        renames=(
            *_SEPARATE,
            (r"\.mlp\.experts\.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),
            (r"\.mlp\.shared_expert\.", ".mlp.shared_experts."),
        ),
    ),
    "lfm2": Family(
        "Lfm2ForCausalLM",
        attention=None,
        mlp=_LFM2_MLP,
        norm="model.embedding_norm",
    ),
    "lfm2_moe": Family(
        "Lfm2MoeForCausalLM",
        attention=None,
        mlp=_LFM2_MLP,
        experts=mlp_kind("gate up", "down", "feed_forward.experts.each.{}", norm=None),
        renames=_numbered("feed_forward", "feed_forward"),
        norm="model.embedding_norm",
    ),
    "llama": Family("LlamaForCausalLM"),
    "llama4_text": Family(
        "Llama4ForCausalLM",
        base_class="Llama4TextModel",
        mlp=mlp_kind("gate_proj up_proj", "down_proj", "feed_forward"),
        experts=mlp_kind("gate_up", "down", "feed_forward.experts.each.{}", fused=2, norm=None),
        transposed_experts=True,
        mixture_returns_scores=True,
        width="intermediate_size_mlp",
    ),
    "mellum": Family("MellumForCausalLM", experts=EXPERT, renames=_SEPARATE),
    "mimo_v2_flash": Family(
        "MiMoV2FlashForCausalLM",
        attention=None,
        experts=EXPERT,
        renames=(*_SEPARATE, (r"\.self_attn\.attention_sink_bias", ".self_attn.sinks")),
    ),
    "minicpm3": Family("MiniCPM3ForCausalLM", attention=None),
    "minimax": Family("MiniMaxForCausalLM", attention=None, experts=EXPERT, renames=_BLOCK_SPARSE),
    "minimax_m2": Family("MiniMaxM2ForCausalLM", attention=None, experts=EXPERT, renames=_BLOCK_SPARSE),
    "ministral": Family("MinistralForCausalLM"),
    "ministral3": Family("Ministral3ForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "mixtral": Family("MixtralForCausalLM", experts=EXPERT, renames=_BLOCK_SPARSE),
    "nanochat": Family("NanoChatForCausalLM", mlp=replace(mlp_kind("fc1", "fc2"), norm=None)),
    "nemotron": Family("NemotronForCausalLM", mlp=UNGATED_MLP),
    "nemotron_h": Family(
        "NemotronHForCausalLM",
        attention=None,
        mlp=mlp_kind("up_proj", "down_proj", "mixer", norm=None),  # its layers ask what dtype the norm has
        experts=mlp_kind("up", "down", "mixer.experts.each.{}", norm=None),
        renames=(
            (r"^backbone\.", "model."),
            (r"\.mixer\.experts\.(\d+)\.(up|down)_proj\.", r".mixer.experts.each.\1.\2."),
        ),
        embedding="model.embeddings.weight",
        norm="model.norm_f",
    ),
    "olmo": Family("OlmoForCausalLM"),
    "olmo2": Family("Olmo2ForCausalLM", attention=None, norms_outputs=True),
    "olmo3": Family("Olmo3ForCausalLM", attention=None, norms_outputs=True),
    "olmoe": Family("OlmoeForCausalLM", attention=None, experts=EXPERT, renames=_SEPARATE),
    "persimmon": Family(
        "PersimmonForCausalLM",
        attention=None,
        mlp=mlp_kind("dense_h_to_4h", "dense_4h_to_h"),
        norm="model.final_layernorm",
    ),
    "phi": Family(
        "PhiForCausalLM",
        attention=replace(
            ATTENTION, projections=(*ATTENTION.readers, Projection("self_attn.dense", COLUMNS, ("query",)))
        ),
        mlp=mlp_kind("fc1", "fc2"),
        norm="model.final_layernorm",
        is_parallel=True,
    ),
    "phi3": Family("Phi3ForCausalLM", attention=FUSED_ATTENTION, mlp=FUSED_MLP),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", experts=EXPERT, renames=_SEPARATE),
    "qwen3": Family("Qwen3ForCausalLM"),
    "qwen3_5_moe_text": Family(
        "Qwen3_5MoeForCausalLM", base_class="Qwen3_5MoeTextModel", attention=None, experts=EXPERT, renames=_SEPARATE
    ),
    "qwen3_5_text": Family("Qwen3_5ForCausalLM", base_class="Qwen3_5TextModel", attention=None),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", experts=EXPERT, renames=_SEPARATE),
    "qwen3_next": Family("Qwen3NextForCausalLM", attention=None, experts=EXPERT, renames=_SEPARATE),
    "seed_oss": Family("SeedOssForCausalLM"),
    "smollm3": Family("SmolLM3ForCausalLM"),
    "solar_open": Family("SolarOpenForCausalLM", experts=EXPERT, renames=_SEPARATE),
    "stablelm": Family("StableLmForCausalLM", attention=None),
    "starcoder2": Family("Starcoder2ForCausalLM", mlp=mlp_kind("c_fc", "c_proj")),
    "vaultgemma": Family("VaultGemmaForCausalLM", mlp=replace(MLP, norm="pre_feedforward_layernorm")),
    "youtu": Family("YoutuForCausalLM", attention=None),
}


# Families whose models have experts, too, where a key of config.json says so.
_WITH_EXPERTS = {
    "gemma4_text": (
        "enable_moe_block",
        replace(FAMILIES["gemma4_text"], experts=mlp_kind("gate up", "down", "experts.each.{}", norm=None)),
    )
}


def row_of(config: Mapping[str, Any]) -> Family | None:
    """The table row for a config.json; None for a family that is not there."""
    model_type = str(config.get("model_type"))
    key, with_experts = _WITH_EXPERTS.get(model_type, ("", None))
    return with_experts if config.get(key) else FAMILIES.get(model_type)


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

    Raises UnsupportedModel, naming the reason or the supported families, for any other, and for a checkpoint whose
    quantisation cannot be decoded.
    """
    require_readable(config, where)
    model_type, row = config.get("model_type"), row_of(config)
    if row is None:
        similar = ", ".join(get_close_matches(str(model_type), FAMILIES, n=5))
        raise UnsupportedModel(
            f"{where} has model_type {model_type!r}, which is none of the {len(FAMILIES)} supported families "
            f"({f'of similar names: {similar}; ' if similar else ''}the project's README lists all)"
        )
    require_causal(config, where)
    return row
