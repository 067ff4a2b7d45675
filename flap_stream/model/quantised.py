"""Quantised checkpoints, seen as if every matrix had its values: they are decoded where they are read.

The formats are those of transformers' `fp8` and `mxfp4` and of compressed-tensors: FP8 and INT8 with a scale for each
tensor, row or block; MXFP4 and NVFP4; integers packed into words. Integers may have offsets. Which one it is, a
tensor's companions tell.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from flap_stream.errors import CorruptCheckpoint, InvalidModel, UnsupportedModel
from flap_stream.model.safetensors_format import DTYPE_BYTES, FORWARD_DTYPES, WORD_BITS, Encoding, TensorEntry
from flap_stream.storage.schema import Schema, matches, within

KEYS = ("quantization_config", "compression_config")  # of config.json
METHODS = ("fp8", "mxfp4", "compressed-tensors")

_BYTE_DTYPES = ("F8_E4M3", "F8_E5M2", "I8")
_SCALES = ("_scale_inv", "_scale")  # after a matrix's name
# How names end of what belongs to matrices in these formats, and is not needed where matrices have values.
_COMPANIONS = (
    "_scale_inv", "_proj_scales", ".weight_scale", ".weight_global_scale", ".weight_shape", ".weight_zero_point",
    "activation_scale", ".input_scale", ".input_global_scale", ".input_zero_point", ".k_scale", ".q_scale", ".v_scale",
)  # fmt: skip
_BY_TRANSFORMERS = "load it with transformers, call its dequantize() and save_pretrained(), and prune what that writes"
_CONVERT = dict.fromkeys(("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"), _BY_TRANSFORMERS)
_ORIGINAL = "prune the bf16, fp16 or fp32 checkpoint it was made from; its model card names that as base_model"


def quantization_of(config: Mapping[str, Any]) -> Any:
    """What a config.json says of quantisation; None if nothing."""
    text = config.get("text_config")
    places = [config, text] if isinstance(text, Mapping) else [config]
    return next((place[key] for place in places for key in KEYS if place.get(key) is not None), None)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json as the model has it whose matrices are decoded."""
    found = {key: value for key, value in config.items() if key not in KEYS}
    if isinstance(found.get("text_config"), dict):
        found["text_config"] = {key: value for key, value in found["text_config"].items() if key not in KEYS}
    return found


def is_decodable(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that weights are quantised, in a format that can be decoded."""
    quantization = quantization_of(config)
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") not in METHODS:
        return False
    sparsity = quantization.get("sparsity_config")
    return not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") == "dense"


def require_readable(config: Mapping[str, Any], where: str) -> None:
    """Raise UnsupportedModel for a quantised checkpoint in a format that cannot be decoded."""
    quantization = quantization_of(config)
    if quantization is None or is_decodable(config):
        return
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    kind = f"{method}, sparse" if method in METHODS else method
    raise UnsupportedModel(
        f"{where} is quantised ({kind}); {', '.join(METHODS)} can be read, so {_CONVERT.get(str(method), _ORIGINAL)}"
    )


def with_values(tensors: Mapping[str, TensorEntry], config: Mapping[str, Any], where: str) -> dict[str, TensorEntry]:
    """The tensors of a quantised checkpoint by name: matrices instead of codes, nothing of what scales them."""
    formats = _Formats(tensors, config, where)
    return {entry.name: entry for entry in map(formats.of, tensors.values()) if entry is not None}


def _without_nulls(form: Schema) -> Callable[[Any], bool]:
    """Schema of an object of this form, in which null is as good as nothing; or of null itself."""

    def check(value: Any) -> bool:
        kept = {key: part for key, part in value.items() if part is not None} if isinstance(value, dict) else value
        return kept is None or matches(kept, form)

    return check


_BLOCK = (within(1, 1 << 31), within(1, 1 << 31))
_WEIGHTS = _without_nulls({"num_bits?": int, "symmetric?": bool, "block_structure?": _BLOCK})
_CONFIG = _without_nulls(
    {"config_groups?": {str: _without_nulls({"weights?": _WEIGHTS})}, "weight_block_size?": _BLOCK}
)


class _Formats:
    """The tensors of one quantised checkpoint, and what its config.json says of all of them."""

    def __init__(self, tensors: Mapping[str, TensorEntry], config: Mapping[str, Any], where: str) -> None:
        self._tensors, self._where = tensors, where
        dtypes = {name: code for code, name in FORWARD_DTYPES.items()}
        self._dtype = dtypes.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")
        quantization = quantization_of(config)
        if not isinstance(quantization, dict) or not matches(quantization, _CONFIG):
            raise InvalidModel(
                f"the quantization_config of {where}/config.json does not have the form of transformers or "
                "compressed-tensors; download it again"
            )
        self._weights = [
            (group or {}).get("weights") or {} for group in (quantization.get("config_groups") or {}).values()
        ]
        self._have_offsets = {not weights.get("symmetric", True) for weights in self._weights}
        self._block = quantization.get("weight_block_size") or self._block_of_groups()

    def _block_of_groups(self) -> list[int] | None:
        """The size of blocks that compressed-tensors has scales for; None if its scales are of anything else."""
        blocks = [weights.get("block_structure") for weights in self._weights]
        if not any(blocks):
            return None
        if any(block != blocks[0] for block in blocks):
            raise UnsupportedModel(f"{self._where} has scales for blocks of several sizes, so {_ORIGINAL}")
        return blocks[0]

    def of(self, entry: TensorEntry) -> TensorEntry | None:
        """A tensor as it is without quantisation; None for what only belongs to another."""
        stem, _, last = entry.name.rpartition(".")
        if last == "weight_zero_point" and True in self._have_offsets and not self._has_integers(stem):
            raise UnsupportedModel(f"{self._where} has {entry.name}; offsets are readable of integers only")
        if entry.name.endswith(_COMPANIONS):
            return None
        if entry.name.endswith("_blocks") and entry.dtype == "U8":
            return self._microscaled(entry)
        if last == "weight_packed":
            return self._packed(entry, stem)
        if last == "weight_g_idx":
            raise UnsupportedModel(f"{self._where} has {entry.name}; scales with an order are not readable")
        scales = [self._tensors[name] for each in _SCALES if (name := entry.name + each) in self._tensors]
        if entry.dtype in _BYTE_DTYPES and len(entry.shape) >= 2 and scales:
            offsets = self._offsets(entry, f"{entry.name}_zero_point") if entry.dtype == "I8" else []
            if offsets and offsets[0].shape != scales[0].shape:
                raise self._of_another(entry, offsets[0])
            return self._made(entry, entry.name, entry.shape, "values", scales[:1], offsets)
        return entry

    def _microscaled(self, entry: TensorEntry) -> TensorEntry:
        """Matrices `[..., row, column]` in MXFP4 as gpt-oss has them, `[..., row, block, byte]`."""
        stem = entry.name.removesuffix("_blocks")
        scales = self._companion(f"{stem}_scales", entry)
        shape = (*entry.shape[:-2], 2 * prod(entry.shape[-2:]))
        return self._made(entry, stem, shape, "nibbles", [scales])

    def _packed(self, entry: TensorEntry, stem: str) -> TensorEntry:
        """A matrix in bytes of two E2M1 values each, or in words of integers."""
        name = f"{stem}.weight"
        scales = [self._companion(f"{stem}.weight_scale", entry)]
        if entry.dtype == "U8":
            if f"{stem}.weight_global_scale" in self._tensors:
                scales.append(self._tensors[f"{stem}.weight_global_scale"])
            return self._made(entry, name, (*entry.shape[:-1], 2 * entry.shape[-1]), "nibbles", scales)
        bits = sorted({weights.get("num_bits", 0) for weights in self._weights})
        if len(bits) != 1 or bits[0] not in WORD_BITS:
            raise UnsupportedModel(
                f"{self._where} packs weights of {', '.join(map(str, bits))} bits; readable are those of 2, 4 or 8 "
                f"bits, the same for all, so {_ORIGINAL}"
            )
        shape = (*entry.shape[:-1], entry.shape[-1] * 32 // bits[0])
        offsets = self._offsets(entry, f"{stem}.weight_zero_point")
        if offsets and offsets[0].shape != (-(-shape[0] * bits[0] // 32), scales[0].shape[-1]):
            raise self._of_another(entry, offsets[0])
        return self._made(entry, name, shape, f"words of {bits[0]} bits", scales, offsets)

    def _offsets(self, entry: TensorEntry, name: str) -> list[TensorEntry]:
        """What is subtracted from integers before they are scaled, if config.json says that there is any."""
        if True not in self._have_offsets or (False in self._have_offsets and name not in self._tensors):
            return []
        return [self._companion(name, entry)]

    def _has_integers(self, stem: str) -> bool:
        """Whether a module's codes are integers, packed or not."""
        codes = (self._tensors.get(f"{stem}.{last}") for last in ("weight_packed", "weight"))
        return any(entry is not None and entry.dtype in ("I8", "I32") for entry in codes)

    def _of_another(self, codes: TensorEntry, companion: TensorEntry) -> CorruptCheckpoint:
        return CorruptCheckpoint(
            f"tensor {codes.name} of {self._where} has shape {list(codes.shape)}, but {companion.name} has "
            f"{list(companion.shape)}; download it again"
        )

    def _companion(self, name: str, entry: TensorEntry) -> TensorEntry:
        if name not in self._tensors:
            raise CorruptCheckpoint(
                f"tensor {name}, which scales {entry.name}, is missing from {self._where}; download it again"
            )
        return self._tensors[name]

    def _made(
        self,
        codes: TensorEntry,
        name: str,
        shape: tuple[int, ...],
        kind: str,
        scales: list[TensorEntry],
        offsets: Sequence[TensorEntry] = (),
    ) -> TensorEntry:
        """The matrix, or several of them, of these codes, scales and offsets."""
        whole = scales[0].shape
        if len(shape) > 2 and prod(whole) > 1 and len(whole) < len(shape):
            raise UnsupportedModel(
                f"{self._where} has scales of shape {list(whole)} for {codes.name}, {list(shape)}; readable are "
                f"those of as many dimensions, so {_ORIGINAL}"
            )
        grid = (1, 1) if prod(whole) == 1 else whole[-2:] if len(whole) >= 2 else (*whole, 1)
        block = shape[-2] // max(grid[0], 1), shape[-1] // max(grid[1], 1)
        if self._block is not None and grid != (1, 1):
            block = (self._block[0], self._block[1])  # the last ones may not fill the matrix
        if tuple(-(-size // max(each, 1)) for size, each in zip(shape[-2:], block, strict=True)) != grid:
            raise CorruptCheckpoint(
                f"tensor {codes.name} of {self._where} has shape {list(codes.shape)}, but scales of shape "
                f"{list(scales[0].shape)}; download it again"
            )
        return replace(
            codes,
            name=name,
            dtype=self._dtype,
            shape=shape,
            nbytes=prod(shape) * DTYPE_BYTES[self._dtype],
            encoding=Encoding(kind, (codes, *scales, *offsets), block, has_offsets=bool(offsets)),
        )
