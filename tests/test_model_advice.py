"""`advise`: what it promises is what comes of the commands that it prints."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from models import random_tokens, save, save_tokens, tiny_config, tiny_model
from quantised_models import write_quantised
from safetensors import safe_open

import flap_stream
from flap_stream.cli import main
from flap_stream.export.advice import USED, advise
from flap_stream.model.families import FAMILIES

CONTEXT, BATCH = 1024, 2
LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
}  # fmt: skip
CACHE_7B = 32 * 2 * 4096 * 2  # bytes of a token


@pytest.fixture
def model(place: Path) -> Path:
    config = tiny_config("llama", 4, hidden_size=128, intermediate_size=512, layers=4)
    save(tiny_model(config), place / "larger", dtype=torch.bfloat16)
    save_tokens(place / "tokens.npy", random_tokens(6, 16))
    return place / "larger"


def run_commands(commands: list[str]) -> None:
    more = {"prune": ["--calibration", "tokens.npy", "--loss-windows", "6"], "evaluate": ["--text", "tokens.npy"]}
    for command in commands:
        _, verb, *rest = shlex.split(command)
        if verb == "push":
            continue  # tests/test_push.py has a server
        assert main([verb, *rest, *more.get(verb, []), "--quiet"]) == 0


def tensor_bytes(directory: Path) -> int:
    total = 0
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118 (not a dict)
    return total


def test_the_commands_make_the_model_fit(model: Path) -> None:
    (dense,) = (form for form in advise(model, context=CONTEXT, batch=BATCH).forms if form.name == "bfloat16")
    gpu = int(0.87 * (dense.weight_bytes + dense.kv_bytes) / USED)
    found = advise(model, gpu=gpu, context=CONTEXT, batch=BATCH, form="bfloat16")
    form = found.forms[0]
    assert found.chosen == "bfloat16" and form.ratio is not None and 0.1 < form.ratio < 0.2
    run_commands(found.commands)
    layers = json.loads(Path("pruned/config.json").read_text())["per_layer_config"].values()
    cache = sum(2 * layer["num_key_value_heads"] * 32 * 2 for layer in layers) * CONTEXT * BATCH
    reached = tensor_bytes(Path("pruned")) + cache
    assert reached <= found.limit and reached == pytest.approx(form.pruned_bytes, rel=0.01)
    record = json.loads(Path("pruned/pruning.json").read_text())
    assert record["realised_ratio"]["decoder"] == pytest.approx(form.ratio, abs=0.05)


def test_a_quantised_form_that_loses_less_is_preferred(model: Path) -> None:
    _, eight, four = advise(model, context=1).forms
    found = advise(model, gpu=int(0.86 * eight.weight_bytes / USED), context=1)
    assert found.chosen == "q4_0" and found.forms[1].ratio and found.forms[2].ratio == 0 and found.forecast is None
    run_commands(found.commands)  # it fits as it is
    assert Path("larger.gguf").stat().st_size > four.weight_bytes
    found = advise(model, gpu=int(0.9 * four.weight_bytes / USED), context=1)
    assert found.chosen == "q4_0" and "--round-neurons-to 32" in found.commands[0]
    run_commands([found.commands[0]])
    flap_stream.export_gguf("pruned", "pruned.gguf", type="q4_0")
    written = sum(int(tensor.n_bytes) for tensor in GGUFReader("pruned.gguf").tensors)
    assert written == pytest.approx(found.forms[2].pruned_bytes, rel=0.01)
    assert written <= found.limit


@pytest.mark.parametrize(
    ("changes", "cache"),
    [
        ({}, CACHE_7B),
        ({"num_key_value_heads": 8}, CACHE_7B // 4),
        ({"model_type": "olmo2"}, CACHE_7B),  # attention stays whole
        (
            {"model_type": "qwen3_5_text", "num_key_value_heads": 8, "head_dim": 128},
            CACHE_7B // 4 // 4,
        ),  # three of four layers keep a state
        (
            {
                "model_type": "deepseek_v3",
                "kv_lora_rank": 512,
                "qk_rope_head_dim": 64,
                "n_routed_experts": 8,
                "n_group": 1,
                "topk_group": 1,
            },
            32 * 576 * 2,
        ),
    ],
)
def test_a_config_is_enough(changes: dict[str, object], cache: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_7B, **changes}))
    found = advise(tmp_path / "config.json", gpu="16GiB", context="4k", batch=2)
    assert found.forms[0].kv_bytes == cache * 4096 * 2
    assert found.capacity == 16 << 30 and found.forms[0].weight_bytes == 2 * found.parameters


def test_a_quantised_model_may_fit_as_it_is(tmp_path: Path) -> None:
    dense = tiny_model(tiny_config("llama", hidden_size=128, intermediate_size=512)).bfloat16()
    dense.save_pretrained(tmp_path / "dense")
    write_quantised("FP8 by row", tmp_path / "dense", tmp_path / "packed", tmp_path / "decoded")
    packed, plain = advise(tmp_path / "packed", context=1).forms[:2]
    assert packed.name == "quantised" and 0.5 < packed.weight_bytes / plain.weight_bytes < 0.8
    assert advise(tmp_path / "packed", gpu=int(1.1 * packed.weight_bytes / USED), context=1).chosen == "quantised"
    found = advise(tmp_path / "packed", gpu=int(0.9 * packed.weight_bytes / USED), context=1)
    assert found.forms[0].ratio is None and found.chosen == "q4_0"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_advised(family: str, tmp_path: Path) -> None:
    tiny_config(family).save_pretrained(tmp_path)
    found = advise(tmp_path, gpu="16GiB", context=16)
    assert found.forms[0].ratio == 0 and found.forms[0].kv_bytes > 0


def test_a_card_that_is_too_small_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    assert main(["advise", str(tmp_path), "--gpu", "2GiB"]) == 0
    said = capsys.readouterr().out
    assert "too large" in said and "take a larger card" in said
    assert main(["advise", str(tmp_path), "--gpu", "24GiB", "--context", "1k"]) == 0
    assert "As bfloat16 it fits without pruning" in capsys.readouterr().out
    assert main(["advise", str(tmp_path), "--gpu", "15GiB", "--context", "8k", "--form", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert "minutes with 100 TFLOP/s" in said and "flap-stream prune" in said and "--target-memory" in said
    assert main(["advise", str(tmp_path), "--gpu", "15GiB", "--form", "bfloat16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forecast"]["placement"]["device_bytes"] > 1 << 30
    assert main(["advise", str(tmp_path), "--gpu", "much"]) == 2
    assert "--gpu 'much' is not a size" in capsys.readouterr().err
    assert main(["advise", str(tmp_path), "--form", "q2"]) == 2
    assert "choose one of bfloat16, q8_0, q4_0" in capsys.readouterr().err
