"""Checkpoints written in FP8 hold what transformers makes of the values, and are read as it reads them."""

import json
import logging
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from killed_jobs import require_same_after_a_kill
from models import load, random_tokens, save, save_tokens, tensors_of, tiny_config, tiny_model
from quantised_models import write_quantised
from rank_jobs import RankJob
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    FineGrainedFP8Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

import flap_stream
from flap_stream.arithmetic.fp8 import fp8_blocks
from flap_stream.cli import main
from flap_stream.config import PruneConfig
from flap_stream.errors import InvalidOption, OutputConflict, RunMismatch
from flap_stream.export.gguf import export_gguf
from flap_stream.export.stock import export_stock
from flap_stream.model.opening import open_checkpoint
from flap_stream.output.digests import DIGESTS_NAME
from flap_stream.stages.forecast import forecast
from flap_stream.storage.run_manifest import manifest_digest

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 128},
    "phi3": {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 2},  # fused projections
    "qwen3_moe": {"head_dim": 128, "moe_intermediate_size": 384},
    "mixtral": {"head_dim": 128},
    "gpt_oss": {"head_dim": 128},  # biases of experts
}
Tensors = dict[str, torch.Tensor]
QUANTIZER: Any = SimpleNamespace(quantization_config=FineGrainedFP8Config())


def model_of(place: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    place.mkdir(exist_ok=True)
    save_tokens(place / "tokens.npy", random_tokens(8, 24))
    config = tiny_config(family, **{**SIZES, **FAMILIES.get(family, {}), **changes})
    return save(tiny_model(config, seed=3), place / "model", dtype=dtype)


def options_of(place: Path, **changes: Any) -> PruneConfig:
    aim = {} if "target_size" in changes else {"ratio": 0.3}
    given = {**aim, "calibration": (str(place / "tokens.npy"),), "max_shard_bytes": 200_000, "batch_size": 3}
    return PruneConfig(**{**given, "output_dtype": "fp8", **changes})


def plain(options: PruneConfig) -> PruneConfig:
    return replace(options, output_dtype="auto")


def decoded(place: Path) -> Tensors:
    """What this package reads."""
    found = Tensors()
    with open_checkpoint(place) as source:
        for name, entry in source.tensors.items():
            raw = bytearray(entry.nbytes)
            source.read_into(entry, memoryview(raw))
            dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[entry.dtype]
            found[name] = torch.frombuffer(raw, dtype=dtype).view(entry.shape)
    return found


# --- values ---


@pytest.mark.parametrize("family", FAMILIES)
def test_codes_are_transformers_own_and_decode_to_the_values(family: str, tmp_path: Path) -> None:
    path, options = model_of(tmp_path, family), options_of(tmp_path)
    record = flap_stream.prune(path, tmp_path / "out", options).record
    assert flap_stream.prune(path, tmp_path / "plain", plain(options)).record == {
        key: value for key, value in record.items() if key != "output_dtype"
    }
    stored, values = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "plain")
    packed = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    assert len(packed) >= 12
    assert packed == {n for n in values if n.endswith("weight") and ("_proj." in n or ".each." in n)}
    assert stored.keys() == values.keys() | {f"{name}_scale_inv" for name in packed}
    with torch.no_grad():
        ours = load_in_bf16(tmp_path / "out").state_dict()
    read = decoded(tmp_path / "out")
    for name, value in values.items():
        assert torch.equal(ours[name], read[name])
        if name not in packed:
            assert torch.equal(read[name], value)
            continue
        expected = Fp8Quantize(QUANTIZER).convert({name: value})  # type: ignore[arg-type]
        scales = expected[f"{name}_scale_inv"]
        assert stored[f"{name}_scale_inv"].dtype == torch.float32 and torch.equal(stored[f"{name}_scale_inv"], scales)
        assert torch.equal(stored[name].view(torch.uint8), expected[name].view(torch.uint8))
        assert torch.equal(read[name], Fp8Dequantize(QUANTIZER)._dequantize_one(stored[name], scales, torch.bfloat16))
        step = scales.repeat_interleave(128, dim=0).repeat_interleave(128, dim=1) * 2.0**-10  # half a subnormal
        allowed = torch.maximum(value.float().abs() * 2.0**-4, step) * (1 + 2.0**-4)  # and what bf16 rounds
        assert bool(((read[name].float() - value.float()).abs() <= allowed).all())


def load_in_bf16(place: Path, **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True, dtype=torch.bfloat16, **how).eval()


def as_on_a_gpu(model: Any, place: Path) -> None:
    """Give a model on the meta device the modules of transformers that run FP8, for which no GPU is needed yet."""
    config = json.loads((place / "config.json").read_text())["quantization_config"]
    quantizer = FineGrainedFP8HfQuantizer(FineGrainedFP8Config(**config), pre_quantized=True)
    quantizer._process_model_before_weight_loading(model)


def test_blocks_of_zeros_and_of_the_smallest_numbers() -> None:
    rows = torch.zeros(128, 128 * 70)
    rows[3, 128:256], rows[:, 256:384] = 1e-42, torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    rows[5, 128 * 66] = -3e38
    codes, scales = fp8_blocks(rows)
    assert codes.float().isfinite().all() and scales.isfinite().all() and scales[[0, 69]].tolist() == [1, 1]
    read = codes.float() * scales.repeat_interleave(128)
    assert read[5, 128 * 66] == pytest.approx(-3e38) and torch.count_nonzero(read[:, :128]) == 0
    assert (read - rows)[:, 256:384].abs().max() <= rows[:, 256:384].abs().max() / 28
    assert torch.equal(fp8_blocks(rows.bfloat16())[0].float(), fp8_blocks(rows.bfloat16().float())[0].float())


def test_shards_ranks_and_kills_change_no_value(tmp_path: Path) -> None:
    path, options = model_of(tmp_path), options_of(tmp_path)
    flap_stream.prune(path, tmp_path / "out", options)
    whole = tensors_of(tmp_path / "out")
    flap_stream.prune(path, tmp_path / "apart", replace(options, max_shard_bytes=1))  # scales apart from their codes
    apart = tensors_of(tmp_path / "apart")
    assert apart.keys() == whole.keys() and len(list((tmp_path / "apart").glob("*.safetensors"))) == len(whole)
    assert all(torch.equal(apart[name].view(torch.uint8), whole[name].view(torch.uint8)) for name in whole)
    require_same_after_a_kill(path, tmp_path / "out", options, tmp_path / "killed")
    job = RankJob(tmp_path / "ranks", tiny_config("llama", layers=2, **SIZES, head_dim=128), output_dtype="fp8")
    assert job.trouble("two", 2) is None


@pytest.mark.slow
@pytest.mark.parametrize("restore", ["none", "least-squares", "reconstruct"])
def test_any_restoration_is_written_in_fp8(restore: str, tmp_path: Path) -> None:
    path, options = model_of(tmp_path), options_of(tmp_path, restore=restore)
    for name, own in (("out", options), ("plain", plain(options))):
        flap_stream.prune(path, tmp_path / name, own)
    stored, values = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "plain")
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        expected = Fp8Quantize(QUANTIZER).convert({name: values[name]})  # type: ignore[arg-type]
        assert torch.equal(stored[name].view(torch.uint8), expected[name].view(torch.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"method": "reap"}, {"metric": "fisher", "whole_experts": True, "ratio": 0.7}])
def test_experts_that_are_numbered_anew_keep_their_scales(changes: dict[str, Any], tmp_path: Path) -> None:
    path, options = model_of(tmp_path, "qwen3_moe"), options_of(tmp_path, **changes)
    kept = flap_stream.prune(path, tmp_path / "out", options).record["experts"]
    flap_stream.prune(path, tmp_path / "plain", plain(options))
    values, read = tensors_of(tmp_path / "plain"), decoded(tmp_path / "out")
    assert kept["after"] < kept["before"] and values.keys() == read.keys()
    for name, value in values.items():
        assert (read[name].float() - value.float()).abs().max() <= value.float().abs().max() * 2.0**-4
    limit = 8 * sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) // 10
    aim = {name: own for name, own in changes.items() if name != "ratio"}
    target = flap_stream.prune(path, tmp_path / "aimed", options_of(tmp_path, target_size=limit, **aim)).record[
        "target"
    ]
    found = sum(file.stat().st_size for file in (tmp_path / "aimed").glob("*.safetensors"))
    assert found <= target["reached"] <= limit


# --- who reads it ---


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_transformers_finds_every_code_and_scale(family: str, tmp_path: Path) -> None:
    path, options = model_of(tmp_path, family), options_of(tmp_path, ratio=0.4)
    flap_stream.prune(path, tmp_path / "out", options)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["quantization_config"]["weight_block_size"] == [128, 128]
    model = load_in_bf16(tmp_path / "out").to("meta")
    as_on_a_gpu(model, tmp_path / "out")
    found = [
        {name: (tuple(tensor.shape), tensor.dtype == torch.float8_e4m3fn) for name, tensor in tensors.items()}
        for tensors in (model.state_dict(), tensors_of(tmp_path / "out"))
    ]
    assert found[0] == found[1]


def test_it_is_evaluated_and_pruned_again_and_exported(tmp_path: Path) -> None:
    path, options = model_of(tmp_path), options_of(tmp_path, structure="ul-um", restore="none")
    record = flap_stream.prune(path, tmp_path / "out", options).record
    assert record["output_dtype"] == "fp8"
    with open_checkpoint(tmp_path / "out") as opened:
        assert opened.parameters == record["parameters"]["after"]
    text, ids = str(tmp_path / "tokens.npy"), torch.from_numpy(random_tokens(8, 24))
    flap_stream.prune(path, tmp_path / "plain", plain(options))
    ours, dequantise = load(tmp_path / "plain"), FineGrainedFP8Config(dequantize=True)
    ours.load_state_dict(load(tmp_path / "out", quantization_config=dequantise).state_dict())  # decoded in float32
    with torch.no_grad():
        loss = ours(ids, labels=ids).loss
    streamed = flap_stream.evaluate(tmp_path / "out", text=text, dtype="float32").perplexity
    assert streamed == pytest.approx(loss.exp().item(), rel=1e-5)
    again = replace(options_of(tmp_path, ratio=0.2), output_dtype="auto")
    assert flap_stream.prune(tmp_path / "out", tmp_path / "again", again).record["realised_ratio"]["decoder"] > 0.1
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    export_stock(tmp_path / "out", tmp_path / "stock")
    stock = load(tmp_path / "stock", trust=False)
    ours.load_state_dict(load_in_bf16(tmp_path / "out").state_dict())
    with torch.no_grad():
        assert (stock(ids).logits - ours(ids).logits).abs().max() <= 1e-5
    assert export_gguf(tmp_path / "out", tmp_path / "out.gguf", type="f32").tensors > 20


def test_an_fp8_model_stays_one_on_request(tmp_path: Path) -> None:
    model_of(tmp_path)
    dense = tmp_path / "dense"
    tiny_model(tiny_config("llama", **SIZES, head_dim=128), seed=3).bfloat16().save_pretrained(dense)
    write_quantised("FP8 by block", dense, tmp_path / "model8", tmp_path / "decoded")
    for name, options in (("out", options_of(tmp_path)), ("plain", plain(options_of(tmp_path)))):
        flap_stream.prune(tmp_path / "model8", tmp_path / name, options)
    stored, values = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "plain")
    name = "model.layers.0.mlp.down_proj.weight"
    expected = Fp8Quantize(QUANTIZER).convert({name: values[name]})  # type: ignore[arg-type]
    assert torch.equal(stored[name].view(torch.uint8), expected[name].view(torch.uint8))
    assert not any(tensor.dtype == torch.float8_e4m3fn for tensor in values.values())


def test_of_a_multimodal_model_the_text_decoder_is_in_fp8(tmp_path: Path) -> None:
    vision = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config=tiny_config("llama", **SIZES, head_dim=128).to_dict(), image_token_index=96,
        vision_config={
            "model_type": "clip_vision_model", "projection_dim": 32, "image_size": 16, "patch_size": 8, **vision
        },
    )  # fmt: skip
    save_tokens(tmp_path / "tokens.npy", random_tokens(8, 24) % 90)
    path = save(tiny_model(config, kind=SimpleNamespace(from_config=LlavaForConditionalGeneration)), tmp_path / "model")
    flap_stream.prune(path, tmp_path / "out", options_of(tmp_path))
    packed = {name for name, tensor in tensors_of(tmp_path / "out").items() if tensor.dtype == torch.float8_e4m3fn}
    assert len(packed) == 21 and all("language_model." in name for name in packed)
    model = load(tmp_path / "out", AutoModelForImageTextToText).to("meta")
    as_on_a_gpu(model, tmp_path / "out")
    found = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float8_e4m3fn}
    assert len(found) == 21 and all(".language_model.layers." in name for name in found)


# --- sizes ---


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_sizes_are_known_before(family: str, tmp_path: Path) -> None:
    path, options = model_of(tmp_path, family), options_of(tmp_path)
    foreseen = [forecast(path, tmp_path / "none", own).bytes_written for own in (options, plain(options))]
    for name, own, expected in zip(("out", "plain"), (options, plain(options)), foreseen, strict=True):
        flap_stream.prune(path, tmp_path / name, own)
        written = sum(prod(tensor.shape) * tensor.element_size() for tensor in tensors_of(tmp_path / name).values())
        assert written == pytest.approx(expected, rel=0.05)
    assert foreseen[0] < 0.55 * foreseen[1]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("changes", [{}, {"restore": "none", "max_shard_bytes": 10**9}])
def test_a_target_size_is_met_in_fp8(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    path = model_of(tmp_path, family, intermediate_size=1024, moe_intermediate_size=640)
    dense = flap_stream.prune(path, tmp_path / "out", options_of(tmp_path, ratio=0.15)).out
    limit = sum(file.stat().st_size for file in dense.glob("*.safetensors")) * 85 // 100
    record = flap_stream.prune(path, tmp_path / "aimed", options_of(tmp_path, target_size=limit, **changes)).record
    found = sum(file.stat().st_size for file in (tmp_path / "aimed").glob("*.safetensors"))
    assert found <= record["target"]["reached"] <= limit and found > 0.9 * limit


def test_what_need_not_fill_blocks_counts_whole_in_a_target(tmp_path: Path) -> None:
    path, limit = model_of(tmp_path, head_dim=64), 1_500_000
    options = options_of(tmp_path, target_size=limit, min_heads=1)
    assert flap_stream.prune(path, tmp_path / "out", options).record["target"]["reached"] <= limit
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) <= limit


# --- what is said ---


def test_matrices_that_do_not_fill_blocks_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, options = model_of(tmp_path, head_dim=64), options_of(tmp_path, round_neurons_to=8)
    with caplog.at_level(logging.WARNING):
        record = flap_stream.prune(path, tmp_path / "out", options).record
    assert "must be multiples of 128, for which prune with --round-neurons-to 128 and --round-heads-to 4" in caplog.text
    stored = tensors_of(tmp_path / "out")
    left = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    for i, layer in enumerate(record["layers"]):
        for name, size in (
            ("self_attn.v_proj", 64 * len(layer["kept_kv_groups"])),
            ("mlp.up_proj", len(layer["kept_neurons"])),
        ):
            module = f"model.layers.{i}.{name}"
            assert (module in left) == (size % 128 > 0) == (stored[f"{module}.weight"].dtype == torch.bfloat16)
    assert any(name.startswith("model.layers") for name in left)
    values = decoded(tmp_path / "out")
    assert all(
        torch.equal(tensor, values[name]) for name, tensor in load_in_bf16(tmp_path / "out").state_dict().items()
    )


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    small = model_of(tmp_path / "small", hidden_size=64, intermediate_size=96)
    for call in (
        lambda: flap_stream.prune(small, tmp_path / "out", options_of(tmp_path / "small")),
        lambda: forecast(small, tmp_path / "out", options_of(tmp_path / "small", target_size=10_000)),
    ):
        with pytest.raises(InvalidOption, match=r"multiples of 128, but the hidden size of .* is 64; leave it out"):
            call()
    assert not (tmp_path / "out.run").exists()
    path, run = model_of(tmp_path, head_dim=40), tmp_path / "run"
    flap_stream.collect(path, run, calibration=str(tmp_path / "tokens.npy"))
    flap_stream.plan(run, ratio=0.3, round_neurons_to=24)
    with pytest.raises(
        InvalidOption, match=r"would write nothing in FP8: .* prune with --round-neurons-to 128 and --rou"
    ):
        flap_stream.rewrite(run, tmp_path / "out", output_dtype="fp8")
    with pytest.raises(InvalidOption, match="output-dtype 'fp4' is unknown; choose one of auto, fp8"):
        flap_stream.rewrite(run, tmp_path / "out", output_dtype="fp4")


def test_another_dtype_is_another_job_and_the_recipe_has_it(tmp_path: Path) -> None:
    path, text = model_of(tmp_path), str(tmp_path / "tokens.npy")
    command = ["prune", str(path), str(tmp_path / "out"), "--calibration", text, "--ratio", "0.3", "--quiet"]
    assert main([*command, "--output-dtype", "fp8"]) == 0
    with pytest.raises(OutputConflict, match=r"with other options: .*--output-dtype was fp8, now auto"):
        flap_stream.prune(path, tmp_path / "out", ratio=0.3, calibration=text)
    recipe = tmp_path / "out" / "recipe.toml"
    assert 'output-dtype = "fp8"' in recipe.read_text() and "round-neurons-to = 128" in recipe.read_text()
    command[2] = str(tmp_path / "again")
    assert main(["prune", str(path), str(tmp_path / "again"), "--recipe", str(recipe), "--calibration", text]) == 0
    assert (tmp_path / "again" / DIGESTS_NAME).read_bytes() == (tmp_path / "out" / DIGESTS_NAME).read_bytes()
    assert "FP8" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_without_sizes_in_fp8_meets_no_target_in_it(tmp_path: Path) -> None:
    path, run = model_of(tmp_path), tmp_path / "run"
    flap_stream.collect(path, run, calibration=str(tmp_path / "tokens.npy"))
    flap_stream.plan(run, target_size=2_500_000, round_neurons_to=128)
    manifest = json.loads((run / "run.json").read_text())
    del manifest["sizes"]["fp8"], manifest["sha256"]  # as an earlier version wrote it
    (run / "run.json").write_text(json.dumps({**manifest, "sha256": manifest_digest(manifest)}))
    with pytest.raises(RunMismatch, match=r"no sizes in FP8, for --output-dtype fp8: .* collect again"):
        flap_stream.rewrite(run, tmp_path / "out", output_dtype="fp8")
    assert flap_stream.rewrite(run, tmp_path / "out").record["target"]["reached"] <= 2_500_000


def test_scales_are_those_of_the_codes_in_layers_that_got_new_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files list layers 1, 10, 11, 2, ...: with one of the first gone, 10 becomes 9 before the old 9 is written."""
    place = tmp_path / "model"
    model_of(tmp_path, num_hidden_layers=12)
    dense = load_in_bf16(place)
    with torch.no_grad():  # the layer that changes the hidden states least
        for projection in (dense.model.layers[5].self_attn.o_proj, dense.model.layers[5].mlp.down_proj):
            projection.weight.zero_()
    save(dense, place, shard_size="1GB")
    options = options_of(tmp_path, method="shortgpt", ratio=0.1, max_shard_bytes=1_000_000_000)
    monkeypatch.setattr("flap_stream.output.shard_writer._scales", None)  # all codes are in the shard of their scales
    assert 5 not in flap_stream.prune(place, tmp_path / "out", options).record["kept_layers"]
    flap_stream.prune(place, tmp_path / "plain", plain(options))
    stored, values = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "plain")
    packed = [name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn]
    assert len(packed) == 11 * 7
    for name in packed:
        expected = Fp8Quantize(QUANTIZER).convert({name: values[name]})  # type: ignore[arg-type]
        assert torch.equal(stored[f"{name}_scale_inv"], expected[f"{name}_scale_inv"]), name


def test_layers_that_got_new_numbers_are_in_fp8_too(tmp_path: Path) -> None:
    path, options = model_of(tmp_path, num_hidden_layers=4), options_of(tmp_path, method="shortgpt", ratio=0.5)
    record = flap_stream.prune(path, tmp_path / "out", options).record
    assert len(record["kept_layers"]) == 2
    flap_stream.prune(path, tmp_path / "plain", plain(options))
    stored, values = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "plain")
    packed = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    assert packed == {name for name in values if "_proj." in name and name.endswith("weight")}
    ids = torch.from_numpy(random_tokens(2, 12, seed=5))
    with torch.no_grad():
        found = load_in_bf16(tmp_path / "out")
        found.load_state_dict(decoded(tmp_path / "out"))
        assert load_in_bf16(tmp_path / "out")(ids).logits.equal(found(ids).logits)
