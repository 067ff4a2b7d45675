"""The path through an accelerator on a simulated one, whose work runs as early or as late as a real one's may.

Results are the CPU's whatever runs when, and mistakes in the order of work are found.
"""

import itertools
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import random_tokens, save, save_tokens, tiny_config, tiny_model
from safetensors.torch import load_file
from simulated_device import POLICIES, Event, simulated

import flap_stream
from flap_stream.arithmetic.moments import Moments
from flap_stream.config import (
    REFITS,
    CollectConfig,
    EngineConfig,
    EvaluateConfig,
    PlanConfig,
    RewriteConfig,
    SweepConfig,
)
from flap_stream.engine import hidden_states, placement, weight_stream
from flap_stream.engine.device import HostCopy
from flap_stream.engine.hidden_states import PLACES, make_hidden_states
from flap_stream.engine.layer_pass import LayerPass
from flap_stream.engine.memory import page_locked
from flap_stream.engine.placement import Placement, landing_bytes
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import FlapStreamError, RunMismatch
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.model.opening import open_checkpoint
from flap_stream.progress import Stage
from flap_stream.stages.input_moments import MomentMerger, input_moments
from flap_stream.storage.loss import LossStore
from flap_stream.storage.run_directory import RunDirectory

TOKENS = random_tokens(9, 16)
BATCH = 4
LAYERS = 3
RING_BLOCK_BYTES = 1 << 15  # a layer's weights take several, so that the ring is reused within it
Statistics = list[dict[str, np.ndarray]]  # by layer, then by projection


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(tiny_config(layers=LAYERS)), tmp_path_factory.mktemp("simulated") / "model")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_stream, "RING_BLOCK_BYTES", RING_BLOCK_BYTES)
    monkeypatch.setattr("flap_stream.stages.input_moments._MERGED_CHANNELS", 16)  # several groups, and threads


def measured(model: Path, device: str, place: str = "host", prefetch: int = 1, batch: int = BATCH) -> Statistics:
    """What collection measures, without storing it."""
    found = []
    with open_checkpoint(model) as checkpoint, torch.inference_mode():
        streamed = StreamedModel(checkpoint, EngineConfig(device=device))
        with (
            streamed.hidden_states(place, *TOKENS.shape) as hidden,
            page_locked(streamed.device, landing_bytes(streamed.shapes, batch)) as landing,
        ):
            batches = LayerPass(streamed, Placement(batch, place, prefetch, 0, 0), TOKENS, [hidden])
            for i, weights in batches.layers(Stage("collect", LAYERS)):
                with input_moments(streamed, i, weights, landing) as merger:
                    for _ in batches.run(i, weights):
                        merger.take_batch()
                found.append({name: np.stack([m.mean, m.m2]) for name, m in merger.finish().items()})
    return found


@pytest.fixture(scope="module")
def expected(model: Path) -> Statistics:
    return measured(model, "cpu")


def differ(found: Statistics, expected: Statistics) -> bool:
    pairs = [(f[name], e[name]) for f, e in zip(found, expected, strict=True) for name in e]
    return not all(np.allclose(f, e, rtol=1e-4, atol=1e-6) for f, e in pairs)


# --- results ---


@pytest.mark.parametrize(("policy", "place"), list(zip(POLICIES, itertools.cycle(PLACES), strict=False)))
def test_statistics_are_the_cpus_whatever_runs_when(model: Path, expected: Statistics, policy: str, place: str) -> None:
    with simulated(policy):
        assert not differ(measured(model, "cuda", place), expected)


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


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


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
            known[restore] = tensors(rewritten(collected, f"cpu-{restore}", "cpu", restore))
        return known[restore]

    return of


@pytest.mark.parametrize(("policy", "seed"), [("lazy", 0), ("random", 1)])
@pytest.mark.parametrize("restore", REFITS)
def test_refits_are_the_cpus_whatever_runs_when(
    collected: Collected, refitted: Callable[[str], dict[str, torch.Tensor]], restore: str, policy: str, seed: int
) -> None:
    with simulated(policy, seed):
        found = tensors(rewritten(collected, f"{policy}-{restore}", "cuda", restore))
    for name, tensor in refitted(restore).items():
        wanted = tensor.float()
        assert (found[name].float() - wanted).norm() <= 1e-3 * max(float(wanted.norm()), 1.0), name


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


# --- mistakes ---


class Deaf(Event):
    """An event that nobody waits for."""

    def record(self, stream: Any = None) -> None:
        pass


def nothing_waits_before_use(patch: pytest.MonkeyPatch) -> None:
    loader = weight_stream._DeviceLoader
    patch.setattr(loader, "take", lambda self, index: self._slabs[index % len(self._slabs)])


def buffers_are_given_back_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_stream._DeviceLoader, "give_back", lambda self, index: None)


def the_ring_is_reused_at_once(patch: pytest.MonkeyPatch) -> None:
    made = weight_stream._DeviceLoader.__init__

    def make(self: Any, *args: Any) -> None:
        made(self, *args)
        self._block_copied = [Deaf(self._block_copied[0]._simulator) for _ in self._block_copied]

    patch.setattr(weight_stream._DeviceLoader, "__init__", make)


def copies_begin_before_earlier_work_is_done(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_stream, "new_stream", lambda device: torch.Stream(device))


def buffers_belong_to_another_stream(patch: pytest.MonkeyPatch) -> None:
    made = weight_stream._DeviceLoader.__init__

    def make(self: Any, *args: Any) -> None:
        made(self, *args)
        with torch.Stream(self._device):
            used = [slab.clone() for slab in self._slabs]  # what that stream's memory was used for before
            del used
            self._slabs = [torch.empty_like(slab) for slab in self._slabs]

    patch.setattr(weight_stream._DeviceLoader, "__init__", make)


MISTAKES: Sequence[Callable[[pytest.MonkeyPatch], None]] = (
    nothing_waits_before_use,
    buffers_are_given_back_at_once,
    the_ring_is_reused_at_once,
    copies_begin_before_earlier_work_is_done,
    buffers_belong_to_another_stream,
)


def orders() -> Iterator[Any]:
    """Simulated devices, one after another, whose work runs in different orders."""
    yield from (simulated(policy) for policy in POLICIES)
    yield from (simulated("random", seed) for seed in range(10))


def weight_sums(model: Path, device: str) -> list[float]:
    """Sums of squares of the weights of all layers; nothing waits for them until the last one is queued."""
    used = [torch.empty(1 << 18, dtype=torch.uint8, device=device).fill_(1) for _ in range(2)]
    del used  # memory that is free, but whose use may still be queued
    with open_checkpoint(model) as checkpoint, torch.inference_mode():
        streamed = StreamedModel(checkpoint, EngineConfig(device=device))
        sums = [w.square().sum() for _ in range(2) for _, weights in streamed.stream() for w in weights.values()]
        return torch.stack(sums).tolist()


def is_found(measure: Callable[[str], list[float]]) -> bool:
    """Whether a measurement is another than the CPU's in any order of work."""
    expected = measure("cpu")
    for order in orders():
        with order:
            try:
                if measure("cuda") != pytest.approx(expected, rel=1e-4):
                    return True
            except FlapStreamError:  # weights or hidden states that hold NaN
                return True
    return False


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_order_of_work_is_found(
    model: Path, monkeypatch: pytest.MonkeyPatch, mistake: Callable[[pytest.MonkeyPatch], None]
) -> None:
    mistake(monkeypatch)
    assert is_found(partial(weight_sums, model))


def test_without_a_mistake_nothing_is_found(model: Path) -> None:
    assert not is_found(partial(weight_sums, model))


def a_host_buffer_is_read_into_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(hidden_states._Used, "wait", lambda self: None)


def copies_to_the_host_are_not_waited_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HostCopy, "result", lambda self: self._values)


def snapshots_do_not_wait(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(hidden_states, "synchronize", lambda device: None)


def put_and_saved(device: str) -> list[float]:
    """Hidden states as a snapshot has them right after they have been put."""
    with torch.inference_mode(), make_hidden_states("host", (2, 3, 4), torch.float32, torch.device(device)) as hidden:
        hidden.put(0, torch.ones(2, 3, 4, device=device))
        return torch.frombuffer(bytearray(b"".join(hidden._blocks(hidden.nbytes))), dtype=torch.float32).tolist()


def passed_through(model: Path, device: str) -> list[float]:
    """Sums of the outputs of all batches, with hidden states on disk; nothing waits for them within a layer."""
    place = "disk"
    with open_checkpoint(model) as checkpoint, torch.inference_mode():
        streamed = StreamedModel(checkpoint, EngineConfig(device=device))
        with streamed.hidden_states(place, *TOKENS.shape) as hidden:
            batches = LayerPass(streamed, Placement(1, place, 1, 0, 0), TOKENS, [hidden])
            found = list[float]()
            for i, weights in batches.layers(Stage("collect", LAYERS)):
                sums = [output.square().sum() for _, output in batches.run(i, weights)]
                found += map(float, sums)
        return found


@pytest.mark.parametrize("mistake", [a_host_buffer_is_read_into_at_once, copies_to_the_host_are_not_waited_for])
def test_a_mistake_in_the_use_of_host_memory_is_found(
    model: Path, monkeypatch: pytest.MonkeyPatch, mistake: Callable[[pytest.MonkeyPatch], None]
) -> None:
    mistake(monkeypatch)
    assert is_found(partial(passed_through, model))


def summed(model: Path, device: str) -> list[float]:
    """Sums of what collection measures, a window at a time, so that host memory is reused."""
    return [float(part.sum()) for layer in measured(model, device, batch=1) for part in layer.values()]


def test_moments_whose_memory_is_reused_before_they_are_merged_are_found(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_windows, close, expected = (
        Moments.add_windows,
        MomentMerger.close,
        pytest.approx(summed(model, "cpu"), rel=1e-4),
    )
    all_have_run = threading.Event()

    def add_late(*how: Any) -> None:
        assert all_have_run.wait(60)
        add_windows(*how)

    def let_add(merger: MomentMerger) -> None:
        all_have_run.set()
        close(merger)

    with simulated("eager"):
        assert summed(model, "cuda") == expected
    monkeypatch.setattr(Moments, "add_windows", add_late)
    monkeypatch.setattr(MomentMerger, "close", let_add)
    monkeypatch.setattr(MomentMerger, "_wait", lambda self: self._behind.popleft())
    with simulated("eager"):
        assert summed(model, "cuda") != expected


def test_a_thread_merges_a_group_whichever_experts_get_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("mixtral", num_local_experts=16, num_experts_per_tok=1)  # more than windows have tokens for
    model, add_windows = save(tiny_model(config), tmp_path / "model"), Moments.add_windows
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    threads = defaultdict[int, set[int]](set)
    kept = list[Moments]()  # lest another gets the identity of one that is gone

    def note(moments: Moments, *how: Any) -> None:
        kept.append(moments)
        threads[id(moments)].add(threading.get_ident())
        add_windows(moments, *how)

    monkeypatch.setattr(Moments, "add_windows", note)
    with simulated("random", 5):
        found = measured(model, "cuda", batch=1)
    assert len(threads) > 8 and all(len(own) == 1 for own in threads.values())
    monkeypatch.undo()
    assert not differ(found, measured(model, "cpu", batch=1))


def test_a_snapshot_that_does_not_wait_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_found(put_and_saved)
    snapshots_do_not_wait(monkeypatch)
    assert is_found(put_and_saved)


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
    embedding = [(f"engine/streamed_model.py:{name}", "copy from host") for name in ("embed", "_embedding_rows")]
    # Once a run, every batch is embedded: its rows are copied to the device, and must be finite.
    assert more.keys() <= {finite, *embedding, ("model/skeleton.py:record", "value")} and more[finite] == 2
    assert (many[norms], many[finite]) == (2 * LAYERS, LAYERS + 5)
    outputs = [count for (line, _), count in many.items() if line.endswith("require_finite_outputs")]
    assert outputs == [LAYERS]


# --- limits and records ---


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
        layers = streamed.stream(prefetch=0)
        for _ in layers:
            pass
        found = [checkpoint.checksum(list(entries.values())) for entries in streamed.layer_entries]
    with open_checkpoint(model) as checkpoint:
        assert found == [checkpoint.read_checksum(list(entries.values())) for entries in streamed.layer_entries]
