"""Mistakes in the order of work on an accelerator are found on a simulated one, and in the use of host memory too."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save, tiny_config, tiny_model
from simulated_device import POLICIES, Event, simulated
from simulated_jobs import LAYERS, TOKENS, differ, made_model, measured, use_small_blocks

from flap_stream.arithmetic.moments import Moments
from flap_stream.config import EngineConfig
from flap_stream.engine import hidden_states, weight_stream
from flap_stream.engine.device import HostCopy
from flap_stream.engine.hidden_states import make_hidden_states
from flap_stream.engine.layer_pass import LayerPass
from flap_stream.engine.placement import Placement
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import FlapStreamError
from flap_stream.model.opening import open_checkpoint
from flap_stream.progress import Stage
from flap_stream.stages.layer_statistics import MomentMerger


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_model(tmp_path_factory.mktemp("simulated"))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)


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
        sums = []
        for _ in range(2):
            with streamed.stream() as layers:
                sums += [w.square().sum() for _, weights in layers for w in weights.values()]
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


@pytest.mark.parametrize("policy", POLICIES)
def test_a_pass_waits_for_the_copies_of_the_one_before(policy: str, tmp_path: Path) -> None:
    with simulated(policy), torch.inference_mode():
        device = torch.device("cuda:0")
        with make_hidden_states("disk", (3, 2, 4), torch.float32, device, tmp_path) as hidden:
            for window in range(3):
                hidden.put(window, torch.full((1, 2, 4), float(window), device=device))
            hidden.advance()
            passes = [[values for _, values in hidden.stream(1)] for _ in range(3)]
            assert [[float(values.mean()) for values in seen] for seen in passes] == [[0, 1, 2]] * 3


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


@pytest.mark.slow
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
