import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from models import random_tokens, save, save_tokens, tensors_of, tiny_config, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file

import flap_stream
from flap_stream.config import CollectConfig, PlanConfig, RewriteConfig
from flap_stream.model import checkpoint
from flap_stream.model.opening import open_checkpoint
from flap_stream.model.safetensors_format import row_ranges
from flap_stream.model.shard_files import ShardFiles

PRUNED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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


@pytest.mark.parametrize("rows", [[0], [30, 31], [0, 2, 3, 9], [1, 5, 30, 31], [], list(range(40))])
def test_rows_are_those_of_the_file_whatever_lies_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[int]
) -> None:
    model, read, reads = save(tiny_model(tiny_config()), tmp_path / "model"), ShardFiles.read, list[int]()
    expected = tensors_of(model)["model.embed_tokens.weight"].view(torch.uint8)
    row_bytes = expected.shape[1]
    monkeypatch.setattr(checkpoint, "_GAP_BYTES", 5 * row_bytes)

    def note(self: ShardFiles, file: str, offset: int, buffers: Sequence[memoryview]) -> None:
        reads.append(offset)
        read(self, file, offset, buffers)

    monkeypatch.setattr(ShardFiles, "read", note)
    found = torch.zeros(len(rows), row_bytes, dtype=torch.uint8)
    with open_checkpoint(model) as opened:
        ranges = list(row_ranges(np.array(rows, dtype=np.int64), row_bytes))
        entry = opened.tensors["model.embed_tokens.weight"]
        opened.read_ranges(entry, ranges, memoryview(found.numpy().reshape(-1)))
    assert torch.equal(found, expected[rows])
    apart = [row for before, row in itertools.pairwise(rows) if row - before > 6]
    assert len(reads) == bool(rows) + len(apart)


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
