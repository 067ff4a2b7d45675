"""The path through an accelerator on a simulated one: results are the CPU's, whatever runs when."""

import itertools
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import random_tokens, save, save_tokens, tensors_of, tiny_config, tiny_model
from simulated_device import POLICIES, simulated
from simulated_jobs import (
    BATCH,
    LAYERS,
    TOKENS,
    Statistics,
    differ,
    made_model,
    measured,
    use_small_blocks,
)

import flap_stream
from flap_stream.config import (
    REFITS,
    CollectConfig,
    EngineConfig,
    EvaluateConfig,
    PlanConfig,
    PruneConfig,
    RewriteConfig,
    SweepConfig,
)
from flap_stream.engine import placement
from flap_stream.engine.hidden_states import PLACES
from flap_stream.engine.placement import Placement
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import RunMismatch
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.model.opening import open_checkpoint
from flap_stream.storage.loss import LossStore
from flap_stream.storage.run_directory import RunDirectory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_model(tmp_path_factory.mktemp("simulated"))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)


@pytest.fixture(scope="module")
def expected(model: Path) -> Statistics:
    return measured(model, "cpu")


# --- results ---


@pytest.mark.parametrize(("policy", "place"), list(zip(POLICIES, itertools.cycle(PLACES), strict=False)))
def test_statistics_are_the_cpus_whatever_runs_when(model: Path, expected: Statistics, policy: str, place: str) -> None:
    with simulated(policy):
        assert not differ(measured(model, "cuda", place), expected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_statistics_are_the_cpus_in_any_order_of_work(model: Path, expected: Statistics, seed: int) -> None:
    with simulated("random", seed):
        assert not differ(measured(model, "cuda", PLACES[seed % 3], prefetch=seed // 3 % 2), expected)


@dataclass(frozen=True)
class Collected:
    """A collection on the CPU, with a plan."""

    place: Path
    run: Path
    text: str

    def folder(self, name: str) -> Path:
        """A copy of the run directory, to refit in."""
        shutil.copytree(self.run, self.place / f"{name}.run")
        return self.place / f"{name}.run"


@pytest.fixture(scope="module")
def collected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Collected:
    place = tmp_path_factory.mktemp("collected")
    text = save_tokens(place / "tokens.npy", TOKENS)
    flap_stream.collect(model, place / "run", collect_options(text, "cpu"))
    flap_stream.plan(place / "run", PlanConfig(ratio=0.3))
    return Collected(place, place / "run", text)


def collect_options(text: str, device: str) -> CollectConfig:
    return CollectConfig(calibration=(text,), device=device, batch_size=BATCH, loss_windows=5)


def rewritten(collected: Collected, name: str, device: str, restore: str) -> Path:
    out = collected.place / name
    options = RewriteConfig(device=device, batch_size=BATCH, restore=restore)
    flap_stream.rewrite(collected.folder(name), out, options)
    return out


@pytest.fixture(scope="module")
def refitted(collected: Collected) -> Callable[[str], dict[str, torch.Tensor]]:
    """What a refit on the CPU gives, by restoration."""
    known: dict[str, dict[str, torch.Tensor]] = {}

    def of(restore: str) -> dict[str, torch.Tensor]:
        if restore not in known:
            known[restore] = tensors_of(rewritten(collected, f"cpu-{restore}", "cpu", restore))
        return known[restore]

    return of


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        wanted = tensor.float()
        assert (found[name].float() - wanted).norm() <= 1e-3 * max(float(wanted.norm()), 1.0), name


@pytest.mark.slow
def test_experts_are_refitted_as_on_the_cpu(tmp_path: Path) -> None:
    model, text = save(tiny_model(tiny_config("mixtral")), tmp_path / "model"), save_tokens(tmp_path / "t.npy", TOKENS)
    flap_stream.collect(model, tmp_path / "run", collect_options(text, "cpu"))
    flap_stream.plan(tmp_path / "run", PlanConfig(ratio=0.3))
    own = Collected(tmp_path, tmp_path / "run", text)
    expected = tensors_of(rewritten(own, "cpu", "cpu", "least-squares"))
    with simulated("random", 1):
        found = tensors_of(rewritten(own, "simulated", "cuda", "least-squares"))
    assert_near(found, expected)


@pytest.mark.parametrize(("policy", "seed"), [("lazy", 0), ("random", 1)])
@pytest.mark.parametrize("restore", REFITS)
def test_refits_are_the_cpus_whatever_runs_when(
    collected: Collected, refitted: Callable[[str], dict[str, torch.Tensor]], restore: str, policy: str, seed: int
) -> None:
    with simulated(policy, seed):
        found = tensors_of(rewritten(collected, f"{policy}-{restore}", "cuda", restore))
    assert_near(found, refitted(restore))


@pytest.mark.parametrize(("policy", "seed"), [("lazy", 0), ("random", 1)])
def test_the_backward_sweep_is_the_cpus_whatever_runs_when(
    model: Path, collected: Collected, policy: str, seed: int, tmp_path: Path
) -> None:
    with simulated(policy, seed):
        flap_stream.collect(model, tmp_path / "run", collect_options(collected.text, "cuda"))
    with RunDirectory(tmp_path / "run") as ours, RunDirectory(collected.run) as theirs:
        for layer in range(LAYERS):
            for kind in ("attention", "mlp"):
                found, wanted = (getattr(LossStore(run, 5).read(layer), kind) for run in (ours, theirs))
                assert np.linalg.norm(found - wanted) <= 1e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize(("policy", "seed"), [("lazy", 0), ("random", 1)])
def test_perplexities_are_the_cpus_whatever_runs_when(
    model: Path, collected: Collected, policy: str, seed: int
) -> None:
    def perplexities(device: str) -> list[float]:
        how: dict[str, Any] = {"device": device, "batch_size": BATCH}
        options = SweepConfig(ratios=(0.3,), evaluate=(collected.text,), **how)
        swept = flap_stream.sweep(collected.folder(f"sweep-{device}-{policy}"), options).points
        dense = flap_stream.evaluate(model, EvaluateConfig(text=(collected.text,), **how)).perplexity
        return [dense, *(point.perplexity or 0.0 for point in swept)]

    wanted = perplexities("cpu")
    with simulated(policy, seed):
        assert perplexities("cuda") == pytest.approx(wanted, rel=1e-4)


# --- waits ---


@pytest.mark.parametrize("place", PLACES)
def test_the_host_waits_a_few_times_a_layer_and_never_in_a_batch(
    model: Path, collected: Collected, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as many batches, the same number of waits, but for what arrives while the next batch runs."""
    counts = []
    for batch_size in (4, 2):
        options = CollectConfig(calibration=(collected.text,), device="cuda", snapshot_interval=100)
        monkeypatch.setattr(placement, "place", lambda *_, size=batch_size: Placement(size, place, 1, 0, 0))
        with simulated("computations first") as simulator:
            run = tmp_path / f"{batch_size}"
            flap_stream.collect(model, run, options)
        counts.append(simulator.waits)
    few, many = counts
    more = {line: count - few[line] for line, count in many.items() if count != few[line]}
    finite, norms = (
        ("engine/finite.py:all_finite", "copy to host"),
        ("arithmetic/moments.py:column_norms", "copy to host"),
    )
    embedding = [(f"engine/streamed_model.py:{name}", "copy from host") for name in ("embed", "read")]
    # Once a run, every batch is embedded: its rows are copied to the device, and must be finite.
    assert more.keys() <= {finite, *embedding, ("model/skeleton.py:record", "value")} and more[finite] == 2
    assert (many[norms], many[finite]) == (2 * LAYERS, LAYERS + 5)
    outputs = [count for (line, _), count in many.items() if line.endswith("require_finite_outputs")]
    assert outputs == [LAYERS]


# --- limits and records ---


@pytest.mark.slow
def test_what_a_reconstruction_takes_is_predicted(tmp_path: Path) -> None:
    config = tiny_config(layers=2, kv_heads=4, hidden_size=768, intermediate_size=2048)
    path = save(tiny_model(config), tmp_path / "model", "1GB", torch.bfloat16)
    text = save_tokens(tmp_path / "tokens.npy", random_tokens(9, 64))
    options = PruneConfig(ratio=0.3, calibration=(text,), device="cuda", restore="reconstruct")
    with simulated("eager") as simulator:
        placement = flap_stream.prune(path, tmp_path / "out", options).measured.placement
    assert placement is not None
    assert 0.6 * placement.device_bytes < simulator.peak_live + (128 << 20) < placement.device_bytes


def test_a_limit_above_what_is_free_is_lowered_to_that(
    model: Path, collected: Collected, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = CollectConfig(calibration=(collected.text,), device="cuda", device_memory=1 << 30)
    with simulated("eager", total=1 << 30) as simulator:
        flap_stream.collect(model, tmp_path / "run", options)
    assert simulator.limits == [pytest.approx(0.95 * (1 << 30), rel=1e-6), 1 << 30]
    assert "--device-memory is 1.0 GiB, but only 972.8 MiB of cuda:0 are free" in caplog.text


def test_a_run_is_not_taken_up_on_another_card(
    model: Path, collected: Collected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = CollectConfig(calibration=(collected.text,), device="cuda", batch_size=BATCH)
    with simulated("eager"):
        flap_stream.collect(model, tmp_path / "run", options)
        flap_stream.collect(model, tmp_path / "run", options)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="other", uuid="1"))
        with pytest.raises(RunMismatch, match="made on an accelerator simulated, not other, whose results differ"):
            flap_stream.collect(model, tmp_path / "run", options)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_products_are_summed_in_full_precision_while_a_stage_runs(
    model: Path, collected: Collected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    name, run_batch, seen = f"allow_{dtype}_reduced_precision_reduction", StreamedModel.run_batch, []

    def look(*how: Any) -> torch.Tensor:
        seen.append((getattr(torch.backends.cuda.matmul, name), torch.get_float32_matmul_precision()))
        return run_batch(*how)

    monkeypatch.setattr(StreamedModel, "run_batch", look)
    before = getattr(torch.backends.cuda.matmul, name)
    with simulated("eager"):
        flap_stream.collect(model, tmp_path / "run", CollectConfig(calibration=(collected.text,), device="cuda"))
    assert set(seen) == {(False, "highest")} and getattr(torch.backends.cuda.matmul, name) == before


# --- reading ---


def test_several_reads_are_in_flight_and_checksums_are_those_of_one_after_another(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, together = itertools.count(), threading.Barrier(4)
    read_block = Checkpoint.read_block

    def read(checkpoint: Checkpoint, block: Any, buffers: Any) -> None:
        if next(number) < 4:
            together.wait(20)  # broken, and raises, unless four reads get here
        read_block(checkpoint, block, buffers)

    with open_checkpoint(model) as checkpoint, torch.inference_mode(), simulated("random", 3):
        streamed = StreamedModel(checkpoint, EngineConfig(device="cuda"))
        monkeypatch.setattr(Checkpoint, "read_block", read)
        with streamed.stream(prefetch=0) as layers:
            for _ in layers:
                pass
        found = [checkpoint.checksum(list(entries.values())) for entries in streamed.layer_entries]
    with open_checkpoint(model) as checkpoint:
        assert found == [checkpoint.read_checksum(list(entries.values())) for entries in streamed.layer_entries]
