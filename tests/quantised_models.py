"""Quantised checkpoints of a dense one, written by the libraries of the formats, and what those read from them."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

# Formats of compressed-tensors, with what its quantisation is told.
COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "FP8 by tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "FP8 by row": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "FP8 by block of groups": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [48, 40]},
    ),
    "INT8 by row": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "INT4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
    "INT4 with offsets": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "INT8 by row with offsets": (
        "int-quantized",
        {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False},
    ),
    "INT8 packed": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "MXFP4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
    "NVFP4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
}
FP8: dict[str, dict[str, Any]] = {
    "FP8 by matrix": {"weight_block_size": None},
    "FP8 by block": {"weight_block_size": (32, 32)},
    "FP8 by block, exponents": {"weight_block_size": (32, 32), "scale_fmt": "ue8m0"},
}
Tensors = dict[str, torch.Tensor]


def write_quantised(kind: str, dense: Path, path: Path, place: Path) -> None:
    """Write the quantised model of a dense one to `path`, and what its library makes of it again to `place`."""
    tensors = load_file(dense / "model.safetensors")
    quantise, config = _fp8(FP8[kind]) if kind in FP8 else _compressed(*COMPRESSED[kind])
    stored, values = Tensors(), Tensors()
    for name, tensor in tensors.items():
        is_matrix = "_proj." in name or name.endswith(("gate_up_proj", "down_proj"))  # of one expert or of all
        written, read = quantise(name, tensor) if is_matrix else ({name: tensor}, tensor)
        stored |= written
        values[name] = read
    _write(dense, path, stored, {"quantization_config": config})
    _write(dense, place, values, {})


def write_microscaled(dense: Path, path: Path, place: Path) -> None:
    """As `write_quantised`, of gpt-oss, whose experts are in MXFP4."""
    arguments = QuantizationArgs(**COMPRESSED["MXFP4"][1])
    compressor = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    stored, values = Tensors(), Tensors()
    for name, tensor in load_file(dense / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = values[name] = tensor
            continue
        matrices = [expert.T.contiguous() for expert in tensor]  # [row, column]
        written = [compressor.compress({"weight": w, **_scales(w, arguments)}, scheme) for w in matrices]
        blocks = torch.stack([each["weight_packed"] for each in written]).unflatten(-1, (-1, 16))
        scales = torch.stack([each["weight_scale"] for each in written])
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values[name] = convert_moe_packed_tensors(blocks, scales)
    _write(dense, path, stored, {"quantization_config": {"quant_method": "mxfp4"}})
    _write(dense, place, values, {})


def _write(dense: Path, place: Path, tensors: Tensors, extra: dict[str, Any]) -> None:
    place.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place / "model.safetensors")
    whole = json.loads((dense / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**whole, **extra}))


def _fp8(options: dict[str, Any]) -> tuple[Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]], dict[str, Any]]:
    config = FineGrainedFP8Config(modules_to_not_convert=["lm_head"], **options)
    quantizer = SimpleNamespace(quantization_config=config)

    def quantise(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        written = Fp8Quantize(quantizer).convert({name: weight})  # type: ignore[arg-type]
        scale = next(tensor for key, tensor in written.items() if key.endswith("_scale_inv"))
        return written, Fp8Dequantize(quantizer)._dequantize_one(written[name], scale, weight.dtype)

    return quantise, config.to_dict()


def _compressed(
    kind: str, settings: dict[str, Any]
) -> tuple[Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]], dict[str, Any]]:
    arguments = QuantizationArgs(**settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry(kind)

    def quantise(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        stem = name.removesuffix("weight")
        state = {"weight": weight, **_scales(weight, arguments)}
        written = compressor.compress(state, scheme)
        return {stem + key: tensor for key, tensor in written.items()}, compressor.decompress(written, scheme)["weight"]

    group = {"targets": ["Linear"], "weights": arguments.model_dump(mode="json"), "input_activations": None}
    return quantise, {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def _scales(weight: torch.Tensor, arguments: QuantizationArgs) -> Tensors:
    """Scales as the library's observers choose them: by the smallest and largest value that share one."""
    size = arguments.group_size or weight.shape[1]
    groups = weight.float().reshape(weight.shape[0], -1, size)
    if arguments.strategy == "block" and arguments.block_structure is not None:  # the last may not fill the matrix
        rows, columns = arguments.block_structure
        filled = pad(weight.float(), (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
        groups = filled.unflatten(0, (-1, rows)).unflatten(-1, (-1, columns)).transpose(1, 2).flatten(2)
    if arguments.strategy == "tensor":
        groups = groups.reshape(1, 1, -1)
    found = Tensors()
    if arguments.strategy == "tensor_group":
        found["weight_global_scale"] = generate_gparam(weight.float().min(), weight.float().max()).reshape(1)
    scale, zero_point = calculate_qparams(
        groups.amin(-1), groups.amax(-1), arguments, global_scale=found.get("weight_global_scale")
    )
    return {
        "weight_scale": scale if arguments.num_bits == 4 and arguments.type == "float" else scale.to(weight.dtype),
        **({} if arguments.symmetric else {"weight_zero_point": zero_point.to(torch.int8)}),
        **found,
    }
