"""Which architecture of llama.cpp computes what a model does, and what it cannot represent."""

from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import UnsupportedModel
from flap_stream.model.families import COMPUTE_AS_LLAMA

# Families whose layers are written as Llama's; whatever else they compute is folded into their weights.
WRITTEN_AS_LLAMA = tuple(sorted((*COMPUTE_AS_LLAMA, "granite", "phi3")))
# model_type to architecture: layers with query and key norms, all of one size and without added biases.
WITH_QK_NORMS = {"qwen3": "qwen3"}
# Families whose export-stock checkpoints llama.cpp's converter was seen to accept with fewer heads than dense.
CONVERTIBLE_FROM_STOCK = ("gemma", "gemma2", "glm4", "hunyuan_v1_dense", "smollm3")
_CHANGING_ROTARY = ("dynamic", "longrope")  # frequencies that depend on the length of the text


def llama_cpp_architecture(model: StreamedModel) -> str:
    """`llama`, `deci` (layers of different sizes) or one with query and key norms.

    Raises UnsupportedModel, naming the reason and what to do instead, if llama.cpp cannot represent the model.
    """
    where, model_type, shapes = model.checkpoint.source, model.checkpoint.config["model_type"], model.shapes
    if model_type not in (*WRITTEN_AS_LLAMA, *WITH_QK_NORMS):
        raise _unwritten_family(where, model_type)
    empty = next((i for i, shape in enumerate(shapes) if not shape.kv_groups or not shape.neurons), None)
    if empty is not None:
        kind, option = ("MLP", "--min-neurons 1") if shapes[empty].kv_groups else ("attention", "--min-heads 1")
        raise UnsupportedModel(
            f"layer {empty} of {where} has no {kind} left, which llama.cpp would compute wrongly; prune with {option}"
        )
    has_one_size = len({(shape.kv_groups, shape.neurons) for shape in shapes}) == 1
    if model_type in WRITTEN_AS_LLAMA:
        _require_plain_layers(model)
        return "llama" if has_one_size else "deci"
    biases = [f"{k.output.name}.bias" for k in model.family.kinds if f"{k.output.name}.bias" in model.layer_entries[0]]
    if biases or not has_one_size:
        found = f"has {biases[0]}" if biases else "has layers of different sizes"
        raise UnsupportedModel(
            f"{where} {found}, which llama.cpp does not support together with the query and key norms of {model_type}; "
            "prune with --structure ul-um --restore none"
        )
    _require_plain_layers(model, only_default=True)
    return WITH_QK_NORMS[model_type]


def _unwritten_family(where: str, model_type: str) -> UnsupportedModel:
    written = ", ".join((*WRITTEN_AS_LLAMA, *WITH_QK_NORMS))
    if model_type in CONVERTIBLE_FROM_STOCK:
        instead = (
            "prune with --structure ul-um --restore none, then export-stock makes what llama.cpp's own "
            "convert_hf_to_gguf.py takes"
        )
    else:
        instead = "what llama.cpp's own converter makes of others was not tried"
    return UnsupportedModel(f"{where} has model_type {model_type!r}; export-gguf writes {written}; {instead}")


def _require_plain_layers(model: StreamedModel, only_default: bool = False) -> None:
    """Refuse rotary embeddings and activations that these architectures do not have.

    only_default: also refuse rescaled rotary frequencies.
    """
    where, rotary = model.checkpoint.source, model.skeleton.rotary()
    if 2 * len(rotary.inverse_frequencies) != model.shapes[0].head_dim:
        raise UnsupportedModel(f"{where} rotates only a part of each head, which llama.cpp does not support here")
    if rotary.kind in _CHANGING_ROTARY or (only_default and rotary.kind != "default"):
        raise UnsupportedModel(
            f"{where} has {rotary.kind} rotary embeddings, which export-gguf cannot write for this architecture"
        )
    if (act := getattr(model.skeleton.hf_config, "hidden_act", "silu")) not in ("silu", "swish"):
        raise UnsupportedModel(f"{where} has the activation {act!r}; llama.cpp has only silu in this architecture")
