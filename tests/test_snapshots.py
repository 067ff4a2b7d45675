"""Snapshots of the hidden states: which are kept, and what happens to damaged ones."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import flip
from models import random_tokens, save, save_tokens, tiny_config, tiny_model
from test_store import MANIFEST

import flap_stream
from flap_stream.config import PruneConfig
from flap_stream.engine.hidden_states import HiddenStates, make_hidden_states
from flap_stream.storage import files
from flap_stream.storage.collected import StatisticsStore
from flap_stream.storage.run_directory import RunDirectory
from flap_stream.storage.snapshots import SnapshotStore


def _hidden(seed: int) -> HiddenStates:
    hidden = make_hidden_states("host", (2, 3, 4), torch.bfloat16, torch.device("cpu"))
    hidden.put(0, torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed)).bfloat16())
    return hidden


def test_the_two_newest_snapshots_alone_are_kept(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", MANIFEST) as run:
        files.make_directory(tmp_path / "run" / "hidden")
        digests = {}
        for layer in (1, 2, 5, 6):
            digests[layer] = _hidden(layer).save(run.snapshots.path(layer))
            run.snapshots.record(layer, digests[layer])
        assert run.snapshots.newest() == [(6, digests[6]), (5, digests[5])]
        assert sorted(p.name for p in (tmp_path / "run" / "hidden").iterdir()) == ["0005.bin", "0006.bin"]
        run.snapshots.drop()
        assert run.snapshots.newest() == []
        assert list((tmp_path / "run" / "hidden").iterdir()) == []


class _Stop(Exception):
    """Ends a run where a test wants it."""


@pytest.mark.parametrize("harmed", [(3,), (2, 3)], ids=["newest", "both"])
def test_a_corrupted_snapshot_is_passed_over_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, harmed: tuple[int, ...]
) -> None:
    model = save(tiny_model(tiny_config(layers=5)), tmp_path / "model")
    tokens = save_tokens(tmp_path / "tokens.npy", random_tokens(4, 8))
    options = PruneConfig(
        calibration=(tokens,), samples=4, sequence_length=8, batch_size=4, ratio=0.3, snapshot_interval=1
    )
    expected = flap_stream.prune(model, tmp_path / "expected", options)

    write = StatisticsStore.write

    def stop_at_layer_3(statistics: StatisticsStore, layer: int, *values: Any) -> None:
        if layer == 3:
            raise _Stop
        write(statistics, layer, *values)

    with monkeypatch.context() as patch:
        patch.setattr(StatisticsStore, "write", stop_at_layer_3)
        with pytest.raises(_Stop):
            flap_stream.prune(model, tmp_path / "out", options)
    for layer in harmed:
        flip(tmp_path / "out.run" / "hidden" / f"{layer:04d}.bin")
    with caplog.at_level(logging.WARNING, logger="flap_stream"):
        result = flap_stream.prune(model, tmp_path / "out", options)
    warned = [record.getMessage() for record in caplog.records if "resuming from an earlier point" in record.message]
    assert all(f"{layer:04d}.bin" in message for layer, message in zip(harmed[::-1], warned, strict=True))
    assert result.record == expected.record
    for file in (tmp_path / "expected").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_snapshots_are_gone_once_all_layers_are_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save(tiny_model(tiny_config(layers=3)), tmp_path / "model")
    tokens = save_tokens(tmp_path / "tokens.npy", random_tokens(4, 8))
    options = flap_stream.CollectConfig(
        calibration=(tokens,), samples=4, sequence_length=8, batch_size=4, snapshot_interval=1
    )

    def stop(_snapshots: SnapshotStore) -> None:
        raise _Stop

    with monkeypatch.context() as patch:
        patch.setattr(SnapshotStore, "drop", stop)
        with pytest.raises(_Stop):
            flap_stream.collect(model, tmp_path / "run", options)
    assert list((tmp_path / "run" / "hidden").iterdir())
    flap_stream.collect(model, tmp_path / "run", options)
    assert not list((tmp_path / "run" / "hidden").iterdir())
