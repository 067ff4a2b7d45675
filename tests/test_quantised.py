"""Quantised checkpoints are pruned as what their own libraries make of them, and read packed."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import load, random_tokens, save_tokens, tensors_of, tiny_config, tiny_model
from quantised_models import COMPRESSED, FP8, write_microscaled, write_quantised
from safetensors.torch import load_file, save_file
from simulated_device import simulated
from simulated_jobs import differ, measured, use_small_blocks

import flap_stream
from flap_stream.config import PruneConfig, RewriteConfig
from flap_stream.errors import CorruptCheckpoint, InvalidModel, UnsupportedModel
from flap_stream.model.opening import open_checkpoint


def dense_model(place: Path, family: str = "llama", **changes: Any) -> Path:
    tiny_model(tiny_config(family, **changes)).bfloat16().save_pretrained(place)
    return place


def options_of(place: Path) -> PruneConfig:
    tokens = save_tokens(place / "tokens.npy", random_tokens(8, 24))
    return PruneConfig(ratio=0.3, calibration=(tokens,), round_neurons_to=1, max_shard_bytes=60_000)


def pruned(model: Path, out: Path, options: PruneConfig) -> tuple[dict[str, torch.Tensor], list[dict[str, object]]]:
    record = flap_stream.prune(model, out, options).record
    return tensors_of(out), record["layers"]


def require_the_same(place: Path, options: PruneConfig) -> None:
    """Prune the quantised model and the decoded one, and compare every tensor."""
    ours, layers = pruned(place / "quantised", place / "out", options)
    expected, expected_layers = pruned(place / "decoded", place / "expected", options)
    assert layers == expected_layers
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*FP8, *COMPRESSED])
def test_the_pruned_model_is_that_of_the_decoded_one(kind: str, tmp_path: Path) -> None:
    write_quantised(kind, dense_model(tmp_path / "dense"), tmp_path / "quantised", tmp_path / "decoded")
    require_the_same(tmp_path, options_of(tmp_path))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert load(tmp_path / "out")(torch.from_numpy(random_tokens(1, 8))).logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("restore", ["least-squares", "reconstruct"])
def test_a_refit_is_that_of_the_decoded_model(restore: str, tmp_path: Path) -> None:
    write_quantised("FP8 by block", dense_model(tmp_path / "dense"), tmp_path / "quantised", tmp_path / "decoded")
    require_the_same(tmp_path, replace(options_of(tmp_path), restore=restore))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "policy"), [("FP8 by block", "lazy"), ("NVFP4", "random"), ("INT4 with offsets", "random")]
)
def test_a_device_decodes_whatever_runs_when(
    kind: str, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_small_blocks(monkeypatch)
    write_quantised(kind, dense_model(tmp_path / "dense"), tmp_path / "model", tmp_path / "decoded")
    with simulated(policy, 1):
        expected = measured(tmp_path / "decoded", "cuda")
        assert not differ(measured(tmp_path / "model", "cuda"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_moe_text"])  # experts apart, and in one tensor
@pytest.mark.parametrize("kind", ["FP8 by block", "FP8 by matrix"])
def test_experts_are_decoded_too(family: str, kind: str, tmp_path: Path) -> None:
    dense = dense_model(tmp_path / "dense", family, moe_intermediate_size=64, shared_expert_intermediate_size=64)
    write_quantised(kind, dense, tmp_path / "quantised", tmp_path / "decoded")
    require_the_same(tmp_path, options_of(tmp_path))


@pytest.mark.slow
def test_gpt_oss_in_mxfp4_is_pruned_as_what_transformers_makes_of_it(tmp_path: Path) -> None:
    write_microscaled(dense_model(tmp_path / "dense", "gpt_oss"), tmp_path / "quantised", tmp_path / "decoded")
    require_the_same(tmp_path, options_of(tmp_path))


def test_packed_bytes_are_what_is_read(tmp_path: Path) -> None:
    write_quantised("INT4", dense_model(tmp_path / "dense"), tmp_path / "quantised", tmp_path / "decoded")
    with open_checkpoint(tmp_path / "quantised") as packed, open_checkpoint(tmp_path / "decoded") as decoded:
        assert packed.nbytes == decoded.nbytes == decoded.stored_bytes
        in_layers = [entry for name, entry in packed.tensors.items() if "_proj" in name]
        assert sum(e.stored_bytes for e in in_layers) < 0.3 * sum(e.nbytes for e in in_layers)
        assert packed.read_checksum(in_layers) and packed.bytes_read == sum(e.stored_bytes for e in in_layers)


def test_a_run_goes_on_only_with_the_same_codes_and_scales(tmp_path: Path) -> None:
    write_quantised("FP8 by block", dense_model(tmp_path / "dense"), tmp_path / "model", tmp_path / "decoded")
    options = options_of(tmp_path)
    flap_stream.prune(tmp_path / "model", tmp_path / "out", replace(options, keep_run=True))
    run, again = tmp_path / "out.run", tmp_path / "again"
    flap_stream.rewrite(run, again, RewriteConfig(max_shard_bytes=60_000))
    assert (again / "SHA256SUMS").read_bytes() == (tmp_path / "out" / "SHA256SUMS").read_bytes()
    stored = load_file(tmp_path / "model" / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight_scale_inv"][0, 0] *= 2
    save_file(stored, tmp_path / "model" / "model.safetensors")
    with pytest.raises(flap_stream.FlapStreamError, match="layer 1"):
        flap_stream.rewrite(run, tmp_path / "third", RewriteConfig())


def test_blocks_that_do_not_fill_a_matrix(tmp_path: Path) -> None:
    write_quantised("FP8 by block", dense_model(tmp_path / "dense"), tmp_path / "model", tmp_path / "decoded")
    whole = load_file(tmp_path / "decoded" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"  # 96 rows, as if the last of its blocks were cut
    codes = load_file(tmp_path / "model" / "model.safetensors")[name]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for config_rows in (64, 128):
        scales = torch.tensor([[2.0], [0.5]])[: -(-96 // config_rows)]  # [block of rows, block of columns]
        save_file({**whole, name: codes, f"{name}_scale_inv": scales}, tmp_path / "model" / "model.safetensors")
        config["quantization_config"]["weight_block_size"] = [config_rows, 128]
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        with open_checkpoint(tmp_path / "model") as source:
            entry = source.tensors[name]
            raw = bytearray(entry.nbytes)
            source.read_into(entry, memoryview(raw))
        rows = scales.repeat_interleave(config_rows, dim=0)[:96]
        expected = (codes.float() * rows).bfloat16()
        assert torch.equal(torch.frombuffer(raw, dtype=torch.bfloat16).view(whole[name].shape), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"config_groups": [1]},
        {"config_groups": {"g": 5}},
        {"config_groups": {"g": {"weights": [1]}}},
        {"weight_block_size": 128},
        {"weight_block_size": [0, 128]},
    ],
)
def test_a_config_of_another_form_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    write_quantised("FP8 by block", dense_model(tmp_path / "dense"), tmp_path / "model", tmp_path / "decoded")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] |= changes
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidModel, match=r"quantization_config of .*config.json does not have the form"):
        flap_stream.prune(tmp_path / "model", tmp_path / "out", options_of(tmp_path))


def test_one_scale_of_all_experts_and_one_of_each(tmp_path: Path) -> None:
    place = dense_model(tmp_path / "model", "gpt_oss")
    stored = load_file(place / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stored[name] = stored[name].to(torch.float8_e4m3fn)
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (place / "config.json").write_text(json.dumps(config))
    save_file({**stored, f"{name}_scale": torch.tensor([0.5])}, place / "model.safetensors")
    with open_checkpoint(place) as source:
        assert any(entry.encoding is not None for entry in source.tensors.values())
    save_file({**stored, f"{name}_scale": torch.ones(len(stored[name]))}, place / "model.safetensors")
    with pytest.raises(UnsupportedModel, match="readable are those of as many dimensions"):
        open_checkpoint(place)


def test_what_cannot_be_decoded_is_refused(tmp_path: Path) -> None:
    write_quantised("INT4", dense_model(tmp_path / "dense"), tmp_path / "model", tmp_path / "decoded")
    config = json.loads((tmp_path / "model" / "config.json").read_text())

    def refused(changes: dict[str, object], words: str, **weights: object) -> None:
        place = tmp_path / "changed"
        shutil.copytree(tmp_path / "model", place)
        quantization = {**config["quantization_config"], **changes}
        quantization["config_groups"] = {"group_0": {"weights": {"num_bits": 4, **weights}}}
        (place / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
        with pytest.raises(UnsupportedModel, match=words):
            flap_stream.prune(place, tmp_path / "out", options_of(tmp_path))
        shutil.rmtree(place)

    refused({"quant_method": "bitsandbytes"}, r"quantised \(bitsandbytes\).* call its dequantize\(\)")
    refused({"quant_method": "gptq"}, r"quantised \(gptq\).* base_model")
    refused({"sparsity_config": {"format": "sparse-24-bitmask"}}, "compressed-tensors, sparse")
    refused({}, "weights of 3 bits", num_bits=3)


@pytest.mark.parametrize(
    ("kind", "companion", "altered", "words"),
    [
        ("INT4", "scale", lambda scales: scales[:, :1].repeat(1, 7), r"weight_packed .* scales of shape \[96, 7\]"),
        ("INT4 with offsets", "zero_point", lambda offsets: offsets[:-1], r"weight_packed .*zero_point has \[11, "),
        ("INT8 by row with offsets", "zero_point", lambda offsets: offsets[:-1], r"weight .*zero_point has \[95, "),
    ],
)
def test_companions_that_are_missing_or_of_another_matrix_are_refused(
    kind: str, companion: str, altered: Callable[[torch.Tensor], torch.Tensor], words: str, tmp_path: Path
) -> None:
    write_quantised(kind, dense_model(tmp_path / "dense"), tmp_path / "model", tmp_path / "decoded")
    file, name = tmp_path / "model" / "model.safetensors", f"model.layers.0.mlp.up_proj.weight_{companion}"
    stored = load_file(file)
    found = stored.pop(name)
    save_file(stored, file)
    with pytest.raises(CorruptCheckpoint, match=f"{name}, which scales .* is missing"):
        open_checkpoint(tmp_path / "model")
    save_file({**stored, name: altered(found).contiguous()}, file)
    with pytest.raises(CorruptCheckpoint, match=rf"up_proj\.{words}"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("kind", ["FP8 by row", "MXFP4"])
def test_offsets_of_others_than_integers_are_refused(kind: str, tmp_path: Path) -> None:
    write_quantised(kind, dense_model(tmp_path / "dense"), tmp_path / "model", tmp_path / "decoded")
    file, name = tmp_path / "model" / "model.safetensors", "model.layers.0.mlp.up_proj.weight_zero_point"
    save_file({**load_file(file), name: torch.zeros(96, 1, dtype=torch.int8)}, file)
    with open_checkpoint(tmp_path / "model"):  # whose config.json says that there are none: they are not used
        pass
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=f"{name}; offsets are readable of integers only"):
        open_checkpoint(tmp_path / "model")
