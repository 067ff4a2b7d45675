"""A device that runs out of memory: what failed leaves nothing behind, and what cannot be split is told."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_tokens, save, save_tokens, tiny_config, tiny_model
from simulated_device import simulated

import flap_stream
from flap_stream.config import CollectConfig, EngineConfig
from flap_stream.engine import weight_stream
from flap_stream.engine.layer_pass import LayerPass
from flap_stream.engine.placement import Placement
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import InsufficientMemory
from flap_stream.model.opening import open_checkpoint
from flap_stream.model.skeleton import Skeleton
from flap_stream.progress import Stage
from flap_stream.restore.stand_ins import Captures
from flap_stream.stages import layer_statistics

TOKENS = random_tokens(8, 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(tiny_config(layers=2)), tmp_path_factory.mktemp("memory") / "model")


class Pass:
    """A model open on the CPU with all windows ahead of its first layer."""

    def __init__(self, checkpoint: Any) -> None:
        self.streamed = StreamedModel(checkpoint, EngineConfig(device="cpu"))
        self.hidden = self.streamed.hidden_states("host", *TOKENS.shape)
        self.batches = LayerPass(self.streamed, Placement(4, "host", 0, 0, 0), TOKENS, [self.hidden])

    def run_first_layer(self, **how: Any) -> None:
        for i, weights in self.batches.layers(Stage("collect", 2)):
            for _start, output in self.batches.run(i, weights, **how):
                del output  # lest it live while the next batch runs
            return


def watched(
    streamed: StreamedModel, monkeypatch: pytest.MonkeyPatch, check: Callable[[torch.Tensor], None]
) -> list[weakref.ref[torch.Tensor]]:
    """Outputs of the model's batches so far. check: called with the values of each batch before it runs."""
    run_batch, outputs = streamed.run_batch, list[weakref.ref[torch.Tensor]]()

    def watch(index: int, weights: Any, values: torch.Tensor, stand_ins: Any) -> torch.Tensor:
        check(values)
        output = run_batch(index, weights, values, stand_ins)
        outputs.append(weakref.ref(output))
        return output

    monkeypatch.setattr(streamed, "run_batch", watch)
    return outputs


def test_no_batch_runs_while_the_output_of_the_last_one_lives(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_checkpoint(model) as checkpoint, torch.inference_mode():
        job = Pass(checkpoint)
        alive: list[int] = []
        outputs = watched(job.streamed, monkeypatch, lambda _: alive.append(sum(o() is not None for o in outputs)))
        job.run_first_layer()
    assert alive == [0, 0] and len(outputs) == 2


def test_a_failed_batch_leaves_no_tensor_in_a_stand_in(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_checkpoint(model) as checkpoint, torch.inference_mode():
        job = Pass(checkpoint)
        stand_in = Captures(64)
        run_batch, left = job.streamed.run_batch, []

        def fail_late(index: int, weights: Any, values: torch.Tensor, modules: Any) -> torch.Tensor:
            left.append([t for t in vars(stand_in).values() if isinstance(t, torch.Tensor)])
            output = run_batch(index, weights, values, modules)
            if len(values) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return output

        monkeypatch.setattr(job.streamed, "run_batch", fail_late)
        job.run_first_layer(stand_ins={"self_attn.o_proj": stand_in})
    assert left[0] == left[1] == []  # the second is the first half of the batch that failed


def test_a_batch_that_cannot_be_moved_is_halved(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved, sizes = torch.Tensor.to, []

    def to(values: torch.Tensor, *where: Any, **how: Any) -> torch.Tensor:
        if values.ndim == 3 and values.shape[1:] == (16, 64) and where and "cuda" in str(where[0]):
            sizes.append(len(values))
            if len(values) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return moved(values, *where, **how)

    text = save_tokens(tmp_path / "tokens.npy", TOKENS)
    place = Placement(4, "host", 1, 0, 0)
    monkeypatch.setattr("flap_stream.engine.placement.place", lambda *_: place)
    with simulated("lazy"):
        monkeypatch.setattr(torch.Tensor, "to", to)
        flap_stream.collect(model, tmp_path / "run", CollectConfig(calibration=(text,), device="cuda"))
    assert sizes[0] == 4 and set(sizes[1:]) == {2}


def test_batches_that_one_refit_halved_are_whole_in_the_next(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, run_layer = save_tokens(tmp_path / "tokens.npy", TOKENS), Skeleton.run_layer

    def limited(skeleton: Skeleton, index: int, weights: Any, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        if index == 1 and len(hidden) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_layer(skeleton, index, weights, hidden, *rest)

    flap_stream.collect(model, tmp_path / "run", CollectConfig(calibration=(text,), batch_size=4))
    flap_stream.plan(tmp_path / "run", ratio=0.3)
    with monkeypatch.context() as patch:
        patch.setattr(Skeleton, "run_layer", limited)
        flap_stream.rewrite(tmp_path / "run", tmp_path / "first", restore="least-squares")
    sizes: list[int] = []

    def seen(skeleton: Skeleton, index: int, weights: Any, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.extend([len(hidden)] * (index == 1))
        return run_layer(skeleton, index, weights, hidden, *rest)

    monkeypatch.setattr(Skeleton, "run_layer", seen)
    flap_stream.rewrite(tmp_path / "run", tmp_path / "second", restore="reconstruct")
    assert sizes[:2] == [4, 4]


def no_memory(*_: Any, **__: Any) -> Any:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (weight_stream._Cast, "__init__"),
        (StreamedModel, "embed"),
        (layer_statistics.MomentMerger, "take_batch"),
    ],
)
def test_whatever_else_runs_out_of_memory_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str
) -> None:
    text = save_tokens(tmp_path / "tokens.npy", TOKENS)
    monkeypatch.setattr(where, name, no_memory)
    with simulated("eager") as simulator:
        with pytest.raises(InsufficientMemory, match="cuda:0 ran out of memory outside a layer's batches"):
            flap_stream.collect(model, tmp_path / "run", CollectConfig(calibration=(text,), device="cuda"))
        assert simulator.limit == simulator.total, "the limit outlives the stage"
