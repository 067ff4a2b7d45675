from pathlib import Path

import numpy as np
import pytest
import torch
from models import random_tokens, save, save_tokens, tiny_config, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file

import flap_stream
from flap_stream.config import CollectConfig, PlanConfig, RewriteConfig
from flap_stream.model.opening import open_checkpoint
from flap_stream.model.safetensors_format import row_ranges

PRUNED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def collected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shards")
    save(tiny_model(tiny_config("qwen2")), place / "model", dtype=request.param)
    text = save_tokens(place / "tokens.npy", random_tokens(6, 16))
    flap_stream.collect(place / "model", place / "run", CollectConfig(calibration=(text,)))
    return place


def test_neighbouring_rows_are_read_together() -> None:
    assert list(row_ranges(np.array([0, 1, 2, 5, 7, 8]), 10)) == [(0, 30), (50, 60), (70, 90)]
    assert list(row_ranges(np.array([], dtype=np.int64), 10)) == []


def test_three_ratios_come_from_one_collection(collected: Path) -> None:
    sizes = []
    for ratio in (0.2, 0.3, 0.5):
        flap_stream.plan(collected / "run", PlanConfig(ratio=ratio))
        result = flap_stream.rewrite(collected / "run", collected / f"out-{ratio}", RewriteConfig())
        assert result.record["realised_ratio"]["decoder"] == pytest.approx(ratio, abs=0.02)
        sizes.append(result.record["parameters"]["after"])
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


def test_what_is_not_pruned_is_byte_identical_and_the_rest_is_cut(collected: Path) -> None:
    flap_stream.plan(collected / "run", PlanConfig(ratio=0.3))
    record = flap_stream.rewrite(collected / "run", collected / "out", RewriteConfig(max_shard_bytes=30_000)).record
    dense, pruned = tensors_of(collected / "model"), tensors_of(collected / "out")
    assert len(list((collected / "out").glob("*.safetensors"))) > 3
    for name, tensor in dense.items():
        if not any(part in name for part in PRUNED):
            assert torch.equal(pruned[name].view(torch.uint8), tensor.view(torch.uint8))
    for i, layer in enumerate(record["layers"]):
        neurons = torch.tensor(layer["kept_neurons"])
        heads = (torch.tensor(layer["kept_kv_groups"])[:, None] * 16 + torch.arange(16)).flatten()  # kv head_dim 16
        queries = (torch.tensor(layer["kept_kv_groups"])[:, None] * 32 + torch.arange(32)).flatten()
        prefix = f"model.layers.{i}."
        for name, axis, kept in (
            ("mlp.gate_proj.weight", 0, neurons),
            ("mlp.down_proj.weight", 1, neurons),
            ("self_attn.k_proj.weight", 0, heads),
            ("self_attn.v_proj.bias", 0, heads),
            ("self_attn.q_proj.bias", 0, queries),
            ("self_attn.o_proj.weight", 1, queries),
        ):
            assert torch.equal(pruned[prefix + name], dense[prefix + name].index_select(axis, kept))
            assert pruned[prefix + name].dtype == dense[prefix + name].dtype


def test_the_index_and_the_shards_agree(collected: Path) -> None:
    flap_stream.plan(collected / "run", PlanConfig(ratio=0.3))
    record = flap_stream.rewrite(
        collected / "run", collected / "out-index", RewriteConfig(max_shard_bytes=30_000)
    ).record
    checkpoint = open_checkpoint(collected / "out-index")  # checks headers, sizes and the index
    assert checkpoint.parameters == record["parameters"]["after"]
    for file in (collected / "out-index").glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
        assert file.stat().st_size <= 30_000 + 8_000 or len(load_file(file)) <= 2


def test_restore_none_adds_no_bias(collected: Path) -> None:
    flap_stream.plan(collected / "run", PlanConfig(ratio=0.3))
    flap_stream.rewrite(collected / "run", collected / "out-none", RewriteConfig(restore="none"))
    names = tensors_of(collected / "out-none")
    assert not any(name.endswith(("o_proj.bias", "down_proj.bias")) for name in names)
    assert names.keys() == tensors_of(collected / "model").keys()
