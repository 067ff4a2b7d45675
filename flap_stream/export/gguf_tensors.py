"""The tensors of a GGUF file: which there are, in what order and type, and their bytes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod, sqrt

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.model.dtypes import stored_dtype
from flap_stream.model.safetensors_format import TensorEntry
from flap_stream.model.units import ROWS

QUANTISED_BLOCK = 32  # values that share a scale in q8_0 to q4_0
_ROW_BLOCK_ELEMENTS = 1 << 22  # of a tensor, in memory at once; 16 MiB in float32, not measured

# Names in a block of a GGUF file: of each projection's parts, in order, and of a layer's norms.
_PARTS = {
    "q_proj": ("attn_q",), "k_proj": ("attn_k",), "v_proj": ("attn_v",), "qkv_proj": ("attn_q", "attn_k", "attn_v"),
    "o_proj": ("attn_output",), "gate_proj": ("ffn_gate",), "up_proj": ("ffn_up",),
    "gate_up_proj": ("ffn_gate", "ffn_up"), "down_proj": ("ffn_down",),
}  # fmt: skip
_NORMS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file: rows of a checkpoint's tensor from `start` on, times a factor.

    shape: in elements. heads: how many of them have the halves that are rotated interleaved, as llama.cpp expects; 0
    leaves the rows in order. values: float32, instead of a checkpoint's tensor.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    entry: TensorEntry | None = None
    start: int = 0
    factor: float = 1.0
    heads: int = 0
    values: np.ndarray | None = None

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """The shape in bytes: that of the rows, then the bytes of one row."""
        one_row = quantize(np.zeros((1, self.shape[-1]), dtype=np.float32), self.type)
        return (*self.shape[:-1], one_row.nbytes)

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return prod(self.raw_shape)


@dataclass(frozen=True)
class _Form:
    """How a model's matrices are written.

    type: of those whose rows fill whole blocks. factors: name of a tensor in the file to what it is multiplied by.
    interleaves: whether query and key heads have their rotary halves interleaved.
    """

    type: GGMLQuantizationType
    factors: Mapping[str, float]
    interleaves: bool

    def type_of(self, shape: tuple[int, ...]) -> GGMLQuantizationType:
        """Vectors stay float32; matrices whose rows do not fill whole blocks stay float16."""
        if len(shape) == 1:
            return GGMLQuantizationType.F32
        is_quantised = self.type.name.startswith("Q")
        return GGMLQuantizationType.F16 if is_quantised and shape[1] % QUANTISED_BLOCK else self.type

    def whole(self, name: str, entry: TensorEntry) -> GgufTensor:
        """A tensor of the checkpoint that is written as a whole."""
        factor = self.factors.get(name.removesuffix(".weight"), 1.0)
        return GgufTensor(name, self.type_of(entry.shape), entry.shape, entry, factor=factor)


def gguf_tensors(model: StreamedModel, architecture: str, matrix_type: GGMLQuantizationType) -> Iterator[GgufTensor]:
    """All tensors of the file, in order."""
    form = _Form(matrix_type, _factors(model), architecture in ("llama", "deci"))
    embedding, head, (norm, *_) = model.embedding_entry, model.head_entries["weight"], model.outer_entries.values()
    yield form.whole("token_embd.weight", embedding)
    yield form.whole("output_norm.weight", norm)
    if head != embedding or form.factors.get("token_embd", 1.0) != form.factors.get("output", 1.0):
        yield form.whole("output.weight", head)
    frequencies = _frequency_factors(model)
    if frequencies is not None:
        yield GgufTensor("rope_freqs.weight", GGMLQuantizationType.F32, frequencies.shape, values=frequencies)
    for i in range(len(model.shapes)):
        yield from _layer_tensors(model, i, form)


def _factors(model: StreamedModel) -> dict[str, float]:
    """Factors for scalings that Llama's layers do not have: name of a tensor in the file to factor.

    Granite scales embeddings, residual additions, attention scores and logits; a rotary embedding may scale what it
    rotates.
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
    """What llama.cpp divides default rotary frequencies by, float32 `[head_dim / 2]`; None if these are the default."""
    rotary = model.skeleton.rotary()
    exponents = np.arange(len(rotary.inverse_frequencies)) / len(rotary.inverse_frequencies)
    factors = (rotary.base**-exponents) / rotary.inverse_frequencies.double().numpy()
    return None if np.allclose(factors, 1, rtol=1e-5) else factors.astype(np.float32)


def _layer_tensors(model: StreamedModel, layer: int, form: _Form) -> Iterator[GgufTensor]:
    entries, shape, prefix = model.layer_entries[layer], model.shapes[layer], f"blk.{layer}."
    for name, target in _NORMS.items():
        if f"{name}.weight" in entries:
            yield form.whole(f"{prefix}{target}.weight", entries[f"{name}.weight"])
    heads = {"attn_q": shape.kv_groups * shape.heads_per_group, "attn_k": shape.kv_groups} if form.interleaves else {}
    for kind in model.family.kinds:
        for projection in kind.projections:
            start = 0
            for target, block in zip(_PARTS[projection.name.rpartition(".")[2]], projection.blocks, strict=True):
                rows = shape.units(kind.name) * shape.block_size(block) if projection.axis == ROWS else None
                for part in ("weight", "bias"):
                    entry = entries.get(f"{projection.name}.{part}")
                    if entry is None:
                        continue
                    size = entry.shape if rows is None else (rows, *entry.shape[1:])
                    yield GgufTensor(
                        name=f"{prefix}{target}.{part}",
                        type=form.type_of(size),
                        shape=size,
                        entry=entry,
                        start=start,
                        factor=form.factors.get(target, 1.0),
                        heads=heads.get(target, 0),
                    )
                start += rows or 0


def raw_bytes(source: Checkpoint, tensor: GgufTensor) -> np.ndarray:
    """The tensor's bytes in the file, uint8 of its `raw_shape`; beyond these only a block of rows is in memory."""
    if tensor.values is not None:
        return tensor.values.view(np.uint8)
    assert tensor.entry is not None
    rows = tensor.shape[0] if len(tensor.shape) == 2 else 1
    columns = tensor.shape[-1]
    raw = np.empty((rows, tensor.raw_shape[-1]), dtype=np.uint8)
    targets = np.arange(rows)
    if tensor.heads and len(tensor.shape) == 2:
        targets = np.argsort(_interleaved(rows, tensor.heads))
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
        raw[targets[start : start + count]] = quantize(np.ascontiguousarray(wide), tensor.type).view(np.uint8)
    return raw.reshape(tensor.raw_shape)


def _interleaved(rows: int, heads: int) -> np.ndarray:
    """The order of rows in which the two halves of each head alternate: llama.cpp rotates neighbours, not halves.

    Source: LlamaModel.permute of llama.cpp's converter.
    """
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)
