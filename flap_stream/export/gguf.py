"""A checkpoint as a GGUF file for llama.cpp, written tensor by tensor.

Layers that compute what Llama's do become architecture `deci`, which has sizes a layer and biases, or `llama` where all
sizes are one; what a family does beside that is folded into its weights. Layers with query and key norms become
`qwen3`, which has neither.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.config import EngineConfig, ExportGgufConfig
from flap_stream.config.rules import options_of
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import InvalidInput, OutputConflict, UnsupportedModel
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.model.dtypes import stored_dtype
from flap_stream.model.opening import open_checkpoint
from flap_stream.model.safetensors_format import TensorEntry
from flap_stream.model.units import ROWS
from flap_stream.output.destination import require_space
from flap_stream.output.model_card import base_name
from flap_stream.progress import Progress
from flap_stream.storage import files, places

try:
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
    from gguf.quants import quantize
except ImportError as error:
    raise InvalidInput("export-gguf needs the package gguf; install it with pip install 'flap-stream[gguf]'") from error

from flap_stream.export.gguf_vocabulary import add_vocabulary

logger = logging.getLogger(__name__)

_LLAMA_LIKE = ("granite", "llama", "ministral", "mistral", "phi3", "qwen2", "seed_oss")
_WITH_NORMS = {"qwen3": "qwen3"}  # model_type to architecture; their layers have one size and no added biases
# Families that llama.cpp's converter was seen to take from export-stock, with other numbers of heads than the dense.
_THROUGH_STOCK = ("gemma", "gemma2", "glm4", "hunyuan_v1_dense", "smollm3")
_CHANGING_ROTARY = ("dynamic", "longrope")  # frequencies that depend on the length of the text

# Parts of a projection, in order, and norms of a layer: their names in a block of a GGUF file.
_PARTS = {
    "q_proj": ("attn_q",), "k_proj": ("attn_k",), "v_proj": ("attn_v",), "qkv_proj": ("attn_q", "attn_k", "attn_v"),
    "o_proj": ("attn_output",), "gate_proj": ("ffn_gate",), "up_proj": ("ffn_up",),
    "gate_up_proj": ("ffn_gate", "ffn_up"), "down_proj": ("ffn_down",),
}  # fmt: skip
_NORMS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
_FILE_TYPES = {
    "f32": ("F32", "ALL_F32"), "f16": ("F16", "MOSTLY_F16"), "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"), "q5_1": ("Q5_1", "MOSTLY_Q5_1"), "q5_0": ("Q5_0", "MOSTLY_Q5_0"),
    "q4_1": ("Q4_1", "MOSTLY_Q4_1"), "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
}  # fmt: skip
_OWN_TYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_QUANTISED_BLOCK = 32
_ROW_BLOCK_ELEMENTS = 1 << 22
_MOST_LINES = 10  # of progress, where there is no bar


@dataclass(frozen=True)
class ExportGgufResult:
    """A GGUF file. unquantised: matrices that stayed f16, since their rows are no multiple of a block."""

    file: Path
    architecture: str
    type: str
    tensors: int
    nbytes: int
    unquantised: int


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: rows `start` to `stop` of a checkpoint's, times a factor.

    heads: as many of them have their rotary halves interleaved, as llama.cpp wants it; 0 leaves rows as they are.
    values: float32, instead of a checkpoint's tensor.
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    entry: TensorEntry | None = None
    start: int = 0
    factor: float = 1.0
    heads: int = 0
    values: np.ndarray | None = None


def export_gguf(
    model: str | Path,
    file: str | Path,
    options: ExportGgufConfig | None = None,
    progress: Progress | bool | None = None,
    **keywords: Any,
) -> ExportGgufResult:
    """Write a pruned (or dense) checkpoint into a GGUF file.

    keywords: the fields of `ExportGgufConfig`, in place of `options`. progress: True shows it on stderr.
    Raises UnsupportedModel, naming the reason and the way out, for what llama.cpp cannot represent, OutputConflict if
    something is at `file`, InsufficientSpace if there is no room.
    """
    options = options_of(ExportGgufConfig, "export_gguf", options, keywords)
    file, progress = Path(file), Progress.of(progress)
    places.require_name(file)
    if file.exists():
        raise OutputConflict(f"{file} exists already; name another FILE or move it away")
    places.require_place(file)
    with open_checkpoint(model) as source:
        if source.wrapper is not None:
            raise UnsupportedModel(f"{model} is a multimodal model; only language models by themselves are exported")
        streamed = StreamedModel(source, EngineConfig(device="cpu"))
        architecture = _architecture(streamed)
        own = _OWN_TYPES[next(iter(streamed.layer_entries[0].values())).dtype]
        kind, file_type = _FILE_TYPES[options.type or own]
        tensors = list(_tensors(streamed, architecture, GGMLQuantizationType[kind]))
        sizes = [_raw_shape(tensor) for tensor in tensors]
        nbytes = sum(int(np.prod(size)) for size in sizes)
        require_space(file, nbytes)
        writer = GGUFWriter(None, architecture)
        _add_sizes(writer, streamed, architecture)
        writer.add_name(base_name(source.source))
        writer.add_file_type(LlamaFileType[file_type])
        writer.add_quantization_version(2)
        add_vocabulary(writer, source.directory, streamed.vocab_size, options.tokenizer_pre)
        for tensor, size in zip(tensors, sizes, strict=True):
            writer.add_tensor_info(tensor.name, size, np.dtype(np.uint8), int(np.prod(size)), tensor.kind)
        _write(writer, source, tensors, file, progress)
    wide = [tensor for tensor in tensors if len(tensor.shape) == 2 and tensor.kind.name == "F16"]
    unquantised = len(wide) if kind.startswith("Q") else 0
    if unquantised:
        logger.warning(
            "%d matrices stay f16: their rows are no multiple of %d, as --round-neurons-to would have made them",
            unquantised,
            _QUANTISED_BLOCK,
        )
    return ExportGgufResult(file, architecture, options.type or own, len(tensors), nbytes, unquantised)


def _architecture(model: StreamedModel) -> str:
    """The architecture of llama.cpp that computes what this model does."""
    where, model_type, shapes = model.checkpoint.source, model.checkpoint.config["model_type"], model.shapes
    empty = next((i for i, shape in enumerate(shapes) if not shape.kv_groups or not shape.neurons), None)
    if empty is not None:
        kind, option = ("MLP", "--min-neurons 1") if shapes[empty].kv_groups else ("attention", "--min-heads 1")
        raise UnsupportedModel(
            f"layer {empty} of {where} has no {kind} left, which llama.cpp would compute wrongly; prune with {option}"
        )
    uniform = len({(shape.kv_groups, shape.neurons) for shape in shapes}) == 1
    if model_type in _LLAMA_LIKE:
        _require_plain_rotary(model)
        return "llama" if uniform else "deci"
    if model_type not in _WITH_NORMS:
        way = (
            "prune with --structure ul-um --restore none, then export-stock makes what llama.cpp's own "
            "convert_hf_to_gguf.py takes"
        )
        reason = (
            way if model_type in _THROUGH_STOCK else "llama.cpp has no form of this one with other numbers of heads"
        )
        written = ", ".join((*_LLAMA_LIKE, *_WITH_NORMS))
        raise UnsupportedModel(f"{where} has model_type {model_type!r}; export-gguf writes {written}; {reason}")
    biases = [f"{k.output.name}.bias" for k in model.family.kinds if f"{k.output.name}.bias" in model.layer_entries[0]]
    if biases or not uniform:
        found = f"has {biases[0]}" if biases else "has layers of different sizes"
        raise UnsupportedModel(
            f"{where} {found}; llama.cpp knows no such thing beside the query and key norms of {model_type}, so prune "
            "with --structure ul-um --restore none"
        )
    _require_plain_rotary(model, only_default=True)
    return _WITH_NORMS[model_type]


def _require_plain_rotary(model: StreamedModel, only_default: bool = False) -> None:
    where, rotary = model.checkpoint.source, model.skeleton.rotary()
    if 2 * len(rotary.inverse_frequencies) != model.shapes[0].head_dim:
        raise UnsupportedModel(f"{where} rotates a part of each head only, which llama.cpp does not do here")
    if rotary.kind in _CHANGING_ROTARY or (only_default and rotary.kind != "default"):
        raise UnsupportedModel(f"{where} has {rotary.kind} rotary embeddings, which export-gguf cannot write for it")
    if (act := getattr(model.skeleton.hf_config, "hidden_act", "silu")) not in ("silu", "swish"):
        raise UnsupportedModel(f"{where} has the activation {act!r}; llama.cpp has silu in this architecture")


def _add_sizes(writer: GGUFWriter, model: StreamedModel, architecture: str) -> None:
    config, shapes = model.skeleton.hf_config, model.shapes
    length, window = config.max_position_embeddings, _window(config)
    if window is not None and window < length:
        logger.warning("llama.cpp knows no attention window here: the context is cut to its %d tokens", window)
        length = window
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(length)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(len(shapes))
    heads = [shape.kv_groups * shape.heads_per_group for shape in shapes]
    groups, neurons = [shape.kv_groups for shape in shapes], [shape.neurons for shape in shapes]
    has_lists = architecture == "deci"
    writer.add_head_count(heads if has_lists else heads[0])
    writer.add_head_count_kv(groups if has_lists else groups[0])
    writer.add_feed_forward_length(neurons if has_lists else neurons[0])
    writer.add_key_length(shapes[0].head_dim)
    writer.add_value_length(shapes[0].head_dim)
    writer.add_rope_dimension_count(shapes[0].head_dim)
    writer.add_rope_freq_base(model.skeleton.rotary().base)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _window(config: Any) -> int | None:
    """Tokens that the layers with the shortest reach attend to; None if all attend to all."""
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    return None if types and all(t == "full_attention" for t in types) else window


def _tensors(model: StreamedModel, architecture: str, kind: GGMLQuantizationType) -> Iterator[_Tensor]:
    """All tensors of the file in order."""
    factors = _factors(model)
    embedding, head, norm = model.embedding_entry, model.head_entry, next(iter(model.norm_entries.values()))
    yield _matrix("token_embd.weight", embedding, kind, factors)
    yield _vector("output_norm.weight", norm)
    if head != embedding or factors.get("token_embd", 1.0) != factors.get("output", 1.0):
        yield _matrix("output.weight", head, kind, factors)
    frequencies = _frequency_factors(model)
    if frequencies is not None:
        yield _Tensor("rope_freqs.weight", GGMLQuantizationType.F32, frequencies.shape, values=frequencies)
    for i, (entries, shape) in enumerate(zip(model.layer_entries, model.shapes, strict=True)):
        interleaves = architecture in ("llama", "deci")
        yield from _layer(f"blk.{i}.", model, entries, shape, kind, factors, interleaves)


def _factors(model: StreamedModel) -> dict[str, float]:
    """What tensors are multiplied with, for what a family does beside Llama's arithmetic: name to factor.

    Granite scales embeddings, what layers add, attention and logits; a rotary embedding may scale what it rotates.
    """
    config, head_dim = model.skeleton.hf_config, model.shapes[0].head_dim
    scores = model.skeleton.rotary().scale ** 2
    if model.checkpoint.config["model_type"] != "granite":
        return {"attn_q": scores}
    return {
        "token_embd": config.embedding_multiplier,
        "output": 1 / config.logits_scaling,
        "attn_q": scores * config.attention_multiplier * sqrt(head_dim),
        "attn_output": config.residual_multiplier,
        "ffn_down": config.residual_multiplier,
    }


def _frequency_factors(model: StreamedModel) -> np.ndarray | None:
    """What llama.cpp divides the plain rotary frequencies by, float32 `[head_dim / 2]`; None for the plain ones."""
    rotary = model.skeleton.rotary()
    exponents = np.arange(len(rotary.inverse_frequencies)) / len(rotary.inverse_frequencies)
    factors = (rotary.base**-exponents) / rotary.inverse_frequencies.double().numpy()
    return None if np.allclose(factors, 1, rtol=1e-5) else factors.astype(np.float32)


def _layer(
    prefix: str,
    model: StreamedModel,
    entries: Mapping[str, TensorEntry],
    shape: LayerShape,
    kind: GGMLQuantizationType,
    factors: Mapping[str, float],
    interleaves: bool,
) -> Iterator[_Tensor]:
    for name, target in _NORMS.items():
        if f"{name}.weight" in entries:
            yield _vector(f"{prefix}{target}.weight", entries[f"{name}.weight"])
    rotated = {"attn_q": shape.kv_groups * shape.heads_per_group, "attn_k": shape.kv_groups} if interleaves else {}
    for unit_kind in model.family.kinds:
        for projection in unit_kind.projections:
            parts = _PARTS[projection.name.rpartition(".")[2]]
            start = 0
            for target, block in zip(parts, projection.blocks, strict=True):
                rows = shape.units(unit_kind.name) * shape.block_size(block) if projection.axis == ROWS else None
                for part in ("weight", "bias"):
                    entry = entries.get(f"{projection.name}.{part}")
                    if entry is None:
                        continue
                    full = f"{prefix}{target}.{part}"
                    size = entry.shape if rows is None else (rows, *entry.shape[1:])
                    chosen = _kind_of(size, kind)
                    heads, factor = rotated.get(target, 0), factors.get(target, 1.0)
                    yield _Tensor(full, chosen, size, entry, start, factor, heads)
                start += rows or 0


def _kind_of(shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """Vectors stay float32; matrices whose rows do not fill blocks stay float16."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.F16 if kind.name.startswith("Q") and shape[1] % _QUANTISED_BLOCK else kind


def _matrix(name: str, entry: TensorEntry, kind: GGMLQuantizationType, factors: Mapping[str, float]) -> _Tensor:
    factor = factors.get(name.removesuffix(".weight"), 1.0)
    return _Tensor(name, _kind_of(entry.shape, kind), entry.shape, entry, factor=factor)


def _vector(name: str, entry: TensorEntry) -> _Tensor:
    return _Tensor(name, GGMLQuantizationType.F32, entry.shape, entry)


def _raw_shape(tensor: _Tensor) -> tuple[int, ...]:
    """The shape in bytes."""
    one_row = quantize(np.zeros((1, tensor.shape[-1]), dtype=np.float32), tensor.kind)
    return (*tensor.shape[:-1], one_row.nbytes)


def _write(writer: GGUFWriter, source: Checkpoint, tensors: Sequence[_Tensor], file: Path, progress: Progress) -> None:
    temporary = files.partial_path(file)
    files.make_directory(file.absolute().parent)
    try:
        files.open_new(temporary).close()  # else a link that stands there would be followed
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress.stage("export", len(tensors), unit="tensor", most_lines=_MOST_LINES) as stage:
            for tensor in tensors:
                raw = _raw(source, tensor)
                writer.write_tensor_data(raw)
                stage.advance(bytes_moved=raw.nbytes)
        writer.flush()
        assert writer.fout is not None
        os.fsync(writer.fout[0].fileno())
        writer.close()
        files.commit_rename(temporary, file)
    except BaseException:
        files.remove(temporary)
        raise


def _raw(source: Checkpoint, tensor: _Tensor) -> np.ndarray:
    """The tensor's bytes in the file; only these and a block of rows are in memory."""
    if tensor.values is not None:
        return tensor.values.view(np.uint8)
    assert tensor.entry is not None
    rows = tensor.shape[0] if len(tensor.shape) == 2 else 1
    columns = tensor.shape[-1]
    raw = np.empty((rows, _raw_shape(tensor)[-1]), dtype=np.uint8)
    places = np.arange(rows)
    if tensor.heads and len(tensor.shape) == 2:
        places = np.argsort(_interleaved(rows, tensor.heads))
    step = max(1, _ROW_BLOCK_ELEMENTS // columns)
    row_bytes = columns * tensor.entry.item_bytes
    first_byte = tensor.start * (row_bytes if len(tensor.shape) == 2 else tensor.entry.item_bytes)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        block = torch.empty(count * row_bytes, dtype=torch.uint8)
        source.read_into(tensor.entry, memoryview(block.numpy()), first_byte + start * row_bytes)
        values = block.view(stored_dtype(tensor.entry)).view(count, columns)
        wide = values.float().mul_(tensor.factor).numpy() if tensor.factor != 1 else values.float().numpy()
        if tensor.heads and len(tensor.shape) == 1:
            wide = wide[:, _interleaved(columns, tensor.heads)]
        raw[places[start : start + count]] = quantize(np.ascontiguousarray(wide), tensor.kind).view(np.uint8)
    return raw.reshape(_raw_shape(tensor))


def _interleaved(rows: int, heads: int) -> np.ndarray:
    """Which row comes where when the halves of each head take turns: llama.cpp rotates neighbours, not halves.

    Source: LlamaModel.permute of llama.cpp's converter.
    """
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)
