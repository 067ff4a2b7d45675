"""Predictions for ranks follow from what they share."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import tiny_config

from flap_stream.cli import main
from flap_stream.stages.scaling import Rates, RefitWork, Work, scale

WORK = Work(
    layers=10,
    samples=64,
    batch_size=4,
    operations=8_000,
    layer_bytes=1_000,
    moment_bytes=640,
    hidden_traffic=0,
    read_again=500,
    written=400,
    shards=8,
)
RATES = Rates(product=10, disk_read=10, disk_write=10)


def test_products_are_divided_and_reading_is_not() -> None:
    assert scale(WORK, RATES).seconds == {"collect": 800, "rewrite": 90}
    assert scale(WORK, RATES, 4).seconds["collect"] == 200 and scale(WORK, RATES, 4).bound == "products"
    assert scale(WORK, RATES, 16).seconds["collect"] == 100 and scale(WORK, RATES, 16).bound == "reading"


def test_the_rank_with_most_batches_is_waited_for() -> None:
    assert scale(WORK, RATES, 3).seconds["collect"] == pytest.approx(800 * 6 / 16)
    assert scale(WORK, RATES, 32).busy_ranks == 16


def test_cores_of_a_node_are_shared() -> None:
    rates = replace(RATES, node_product=20)
    assert [scale(WORK, rates, n).seconds["collect"] for n in (1, 2, 4)] == [800, 400, 400]
    assert scale(WORK, rates, 4, nodes=2).seconds["collect"] == 200


def test_a_reconstruction_is_not_divided() -> None:
    refits = [replace(WORK, refit=RefitWork(16_000, 0, 0, is_shared)) for is_shared in (True, False)]
    assert [[scale(work, RATES, n).seconds["refit"] for n in (1, 4)] for work in refits] == [[1600, 400], [1600, 1600]]


def test_nodes_share_a_file_system_and_each_reads_the_model() -> None:
    rates = replace(RATES, shared_read=20, shared_write=10)
    assert [scale(WORK, rates, 64, nodes).seconds["collect"] for nodes in (1, 2, 4)] == [100, 100, 200]
    assert [scale(WORK, rates, 64, nodes).seconds["rewrite"] for nodes in (1, 2, 4)] == [90, 65, 65]


def test_moments_cross_the_network_but_not_within_a_node() -> None:
    rates = replace(RATES, network=1, merge=4)
    assert scale(WORK, rates, 4).network_bytes == 0
    assert scale(WORK, rates, 4).seconds["collect"] == 200 + 640 / 4 / 4
    assert scale(WORK, rates, 4, 2).network_bytes == 160
    assert scale(WORK, rates, 4, 2).seconds["collect"] == 200 + 640 / 4 / 4 + 160


@pytest.fixture
def config(tmp_path: Path) -> Path:
    sizes = tiny_config(hidden_size=512, intermediate_size=1024, layers=4).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "dtype": "float32"}))
    return tmp_path / "config.json"


def dry_run(capsys: pytest.CaptureFixture[str], config: Path, *arguments: str) -> dict[str, Any]:
    out = str(config.parent / "out")
    assert main(["prune", str(config), out, "--dry-run", "--json", "--samples", "256", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_dry_run_says_what_ranks_would_need(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    dry_run(capsys, config)  # what a process keeps of its first one counts in the next
    one, eight = dry_run(capsys, config), dry_run(capsys, config, "--ranks", "8", "--nodes", "2")
    assert (one["ranks"], one["busy_ranks"], one["network_bytes"]) == (1, 1, 0)
    assert (eight["ranks"], eight["nodes"], eight["busy_ranks"]) == (8, 2, 8)
    assert eight["placement"]["batch_size"] == one["placement"]["batch_size"]
    hidden = 256 * 128 * 512 * 4
    assert eight["placement"]["host_bytes"] < one["placement"]["host_bytes"] - hidden // 2
    layers = 4 * (512 * 512 * 3 + 3 * 512 * 1024 + 2 * 512) * 4
    assert eight["bytes_read"] - one["bytes_read"] == layers
    assert 0 < eight["network_bytes"] < 256 * 4 * (512 + 1024) * 8


def test_a_dry_run_tells_ranks_that_would_have_nothing_to_do(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    command = ["prune", str(config), "out", "--dry-run", "--samples", "16", "--batch-size", "8", "--ranks", "4"]
    assert main(command) == 0
    assert "2 would have no windows; lower --batch-size" in capsys.readouterr().out


def test_more_nodes_than_ranks_are_refused(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    assert main(["prune", str(config), "out", "--dry-run", "--ranks", "2", "--nodes", "3"]) == 2
    assert "--nodes is 3; 2 ranks can be on 1 to 2" in capsys.readouterr().err
