"""However a job is placed (prefetch, hidden states on disk, batches halved on the way), the result is the same."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import random_tokens, save, save_tokens, tiny_config, tiny_model
from placements import placed
from torch._subclasses.fake_tensor import FakeTensor

import flap_stream
from flap_stream.arithmetic.layer_shape import Sublayer
from flap_stream.config import CollectConfig, PruneConfig
from flap_stream.engine import placement
from flap_stream.engine.placement import candidates
from flap_stream.errors import InsufficientMemory
from flap_stream.model.shard_files import ShardFiles
from flap_stream.model.skeleton import Skeleton
from flap_stream.storage.collected import StatisticsStore
from flap_stream.storage.run_directory import RunDirectory

LAYERS = 4


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PruneConfig]:
    place = tmp_path_factory.mktemp("placement")
    model = save(tiny_model(tiny_config(layers=LAYERS)), place / "model")
    tokens = save_tokens(place / "tokens.npy", random_tokens(10, 16))
    return model, PruneConfig(
        calibration=(tokens,), samples=10, sequence_length=16, batch_size=4, ratio=0.3, snapshot_interval=1
    )


@pytest.fixture(scope="module")
def expected(job: tuple[Path, PruneConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("expected") / "out"
    flap_stream.prune(job[0], out, job[1])
    return out


def assert_same(out: Path, expected: Path) -> None:
    for file in expected.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name


def slow_reads(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float]) -> list[int]:
    """Delay the n-th read of the model; returns the sizes of all reads."""
    read, sizes = ShardFiles.read, []

    def slow(files: Any, file: str, offset: int, buffers: Any) -> None:
        sizes.append(sum(map(len, buffers)))
        time.sleep(seconds(len(sizes)))
        read(files, file, offset, buffers)

    monkeypatch.setattr(ShardFiles, "read", slow)
    return sizes


@pytest.mark.parametrize("prefetch", [0, 1])
@pytest.mark.parametrize("delays", [lambda n: 0.01, lambda n: 0.03 * (n % 3 == 0)], ids=["even", "uneven"])
def test_reading_ahead_changes_nothing_however_slow_the_disk(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    job: tuple[Path, PruneConfig],
    expected: Path,
    prefetch: int,
    delays: Callable[[int], float],
) -> None:
    reads = slow_reads(monkeypatch, delays)
    flap_stream.prune(job[0], tmp_path / "out", replace(job[1], prefetch=prefetch))
    assert len(reads) > LAYERS
    assert_same(tmp_path / "out", expected)


def test_a_layer_in_use_is_not_overwritten_by_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job: tuple[Path, PruneConfig], expected: Path
) -> None:
    run_layer, used = Skeleton.run_layer, []

    def spy(skeleton: Skeleton, index: int, weights: Any, *rest: Any) -> torch.Tensor:
        if isinstance(rest[0], FakeTensor):  # the prediction of the layer's workspace
            return run_layer(skeleton, index, weights, *rest)
        used.append(weights["self_attn.q_proj.weight"].data_ptr())
        time.sleep(0.01)  # long enough for the next layer to be read meanwhile, were its buffer this one's
        before = weights["mlp.up_proj.weight"].clone()
        output = run_layer(skeleton, index, weights, *rest)
        assert torch.equal(before, weights["mlp.up_proj.weight"])
        return output

    with monkeypatch.context() as patch:
        patch.setattr(Skeleton, "run_layer", spy)
        flap_stream.prune(job[0], tmp_path / "out", job[1])
    assert_same(tmp_path / "out", expected)
    assert len(set(used)) == 2, "two buffers, taken in turn"


def test_hidden_states_on_disk_change_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job: tuple[Path, PruneConfig], expected: Path
) -> None:
    placed(monkeypatch, hidden_place="disk")
    result = flap_stream.prune(job[0], tmp_path / "out", job[1])
    assert result.measured.placement is not None and result.measured.placement.hidden_place == "disk"
    assert_same(tmp_path / "out", expected)


@pytest.mark.parametrize("places", [("disk", "host"), ("host", "disk")])
def test_a_run_goes_on_in_another_place(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    job: tuple[Path, PruneConfig],
    expected: Path,
    places: tuple[str, str],
) -> None:
    with monkeypatch.context() as patch:
        placed(patch, hidden_place=places[0])
        stop_at_layer(patch, 2)
        with pytest.raises(_Stop):
            flap_stream.prune(job[0], tmp_path / "out", job[1])
    placed(monkeypatch, hidden_place=places[1])
    flap_stream.prune(job[0], tmp_path / "out", job[1])
    assert_same(tmp_path / "out", expected)


class _Stop(Exception):
    """Ends a run where a test wants it."""


def stop_at_layer(monkeypatch: pytest.MonkeyPatch, layer: int) -> None:
    write = StatisticsStore.write

    def stop(statistics: StatisticsStore, index: int, *values: Any) -> None:
        if index == layer:
            raise _Stop
        write(statistics, index, *values)

    monkeypatch.setattr(StatisticsStore, "write", stop)


def limit_windows(monkeypatch: pytest.MonkeyPatch, allowed: Callable[[int], int]) -> list[tuple[int, int]]:
    """Raise out of memory for more windows than a layer is allowed; returns the layers and sizes that ran."""
    run_layer, ran = Skeleton.run_layer, []

    def limited(skeleton: Skeleton, index: int, weights: Any, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        output = run_layer(skeleton, index, weights, hidden, *rest)  # fails late, after the statistics were taken
        if isinstance(hidden, FakeTensor):
            return output
        if len(hidden) > allowed(index):
            raise torch.OutOfMemoryError("CUDA out of memory")
        ran.append((index, len(hidden)))
        return output

    monkeypatch.setattr(Skeleton, "run_layer", limited)
    return ran


@pytest.mark.parametrize("method", ["flap", "wanda-sp"])
def test_out_of_device_memory_halves_the_batch_and_a_resumed_run_repeats_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job: tuple[Path, PruneConfig], method: str
) -> None:
    model, options = job[0], replace(job[1], method=method, structure=None)
    dense = flap_stream.prune(model, tmp_path / "dense", options)
    with monkeypatch.context() as patch:
        ran = limit_windows(patch, lambda index: 4 if index < 2 else 1)
        whole = flap_stream.prune(model, tmp_path / "whole", options)
    assert {size for index, size in ran if index < 2} == {4, 2} and {size for index, size in ran if index >= 2} == {1}
    assert whole.record["layers"] == dense.record["layers"]

    with monkeypatch.context() as patch:
        limit_windows(patch, lambda index: 4 if index < 2 else 1)
        stop_at_layer(patch, 3)
        with pytest.raises(_Stop):
            flap_stream.prune(model, tmp_path / "out", options)
    for snapshot in (tmp_path / "out.run" / "hidden").iterdir():
        snapshot.unlink()  # so that every layer is run again
    with monkeypatch.context() as patch:
        ran = limit_windows(patch, lambda index: 4)
        flap_stream.prune(model, tmp_path / "out", options)
    assert {size for index, size in ran if index >= 2} == {1}
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_a_failed_batch_of_a_mixture_counts_no_token_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job: tuple[Path, PruneConfig]
) -> None:
    experts, per_token, tokens = 16, 1, np.load(job[1].calibration[0])
    config = tiny_config("mixtral", layers=2, num_local_experts=experts, num_experts_per_tok=per_token)
    model = save(tiny_model(config), tmp_path / "model")
    limit_windows(monkeypatch, lambda index: 1)  # the experts that a whole batch reaches are not all those of a part
    options = CollectConfig(calibration=job[1].calibration, samples=10, sequence_length=16, batch_size=4, device="cpu")
    flap_stream.collect(model, tmp_path / "run", options)
    with RunDirectory(tmp_path / "run") as run:
        for layer in range(2):
            counts = run.statistics.read(layer).mlp.count.reshape(experts, -1)
            assert counts[:, 0].sum() == per_token * tokens.size


def test_a_device_too_small_for_a_single_window_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job: tuple[Path, PruneConfig]
) -> None:
    limit_windows(monkeypatch, lambda index: 0)
    with pytest.raises(InsufficientMemory, match="layer 0 cannot run a single window of 16 tokens"):
        flap_stream.prune(job[0], tmp_path / "out", job[1])


def test_a_run_is_taken_up_with_the_batch_size_that_it_began_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job: tuple[Path, PruneConfig]
) -> None:
    options = flap_stream.CollectConfig(calibration=job[1].calibration, samples=10, sequence_length=16)
    with monkeypatch.context() as patch:
        patch.setattr(candidates, "_BATCH_TOKENS", (48, 48))  # as if there were less memory
        assert _placement(flap_stream.collect(job[0], tmp_path / "run", options)).batch_size == 3
    assert _placement(flap_stream.collect(job[0], tmp_path / "run", options)).batch_size == 3
    assert _placement(flap_stream.collect(job[0], tmp_path / "other", options)).batch_size == 10


def _placement(result: Any) -> placement.Placement:
    return result.measured.placement


def test_statistics_do_not_depend_on_the_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job: tuple[Path, PruneConfig]
) -> None:
    options = CollectConfig(calibration=job[1].calibration, samples=10, sequence_length=16, batch_size=3)
    flap_stream.collect(job[0], tmp_path / "host", options)
    placed(monkeypatch, hidden_place="disk", prefetch=0)
    flap_stream.collect(job[0], tmp_path / "disk", options)
    with RunDirectory(tmp_path / "host") as host, RunDirectory(tmp_path / "disk") as disk:
        for layer in range(LAYERS):
            ours, theirs = host.statistics.read(layer), disk.statistics.read(layer)
            for kind in Sublayer:
                np.testing.assert_array_equal(ours.of(kind).mean, theirs.of(kind).mean)
                np.testing.assert_array_equal(ours.of(kind).m2, theirs.of(kind).m2)
