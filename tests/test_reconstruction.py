"""Reconstruction: nearer to the dense model than the bias in every family, never worse, the same bytes after a kill."""

import logging
import re
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import make_job
from models import DEMO, contents, load, random_tokens, save, save_tokens, tiny_config, tiny_model
from placements import placed

import flap_stream
from flap_stream import CollectConfig, EvaluateConfig, PlanConfig, PruneConfig, RewriteConfig
from flap_stream.model.safetensors_format import read_header
from flap_stream.restore.cut_layer import CutLayer
from flap_stream.restore.requirements import HELD_OUT, STEP_TOKENS, epochs

FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "mixtral",
    "qwen3_moe",
    "granite",
    "olmo",
    "gemma3n_text",
)
TOKENS = random_tokens(192, 32)
UNSEEN = torch.from_numpy(random_tokens(64, 32, seed=1))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=UNSEEN, use_cache=False).logits.float()


def test_fewer_windows_are_seen_more_often_up_to_a_limit() -> None:
    assert [epochs(windows * 128) for windows in (0, 256, 512, 600, 700, 1024, 4096)] == [6, 6, 6, 6, 5, 3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_nearer_to_the_dense_model_than_the_bias(
    tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    dense = tiny_model(tiny_config(family))
    path, text = save(dense, tmp_path / "model"), save_tokens(tmp_path / "tokens.npy", TOKENS)
    flap_stream.collect(path, tmp_path / "run", CollectConfig(calibration=(text,)))
    flap_stream.plan(tmp_path / "run", PlanConfig(ratio=0.3))
    flap_stream.rewrite(tmp_path / "run", tmp_path / "bias", RewriteConfig(restore="bias"))
    with caplog.at_level(logging.INFO):
        flap_stream.rewrite(tmp_path / "run", tmp_path / "fitted", RewriteConfig(restore="reconstruct"))
    path.rename(tmp_path / "away")  # nothing of it is needed any more
    wanted = logits(dense)
    bias, fitted = (float((logits(load(tmp_path / name)) - wanted).norm()) for name in ("bias", "fitted"))
    assert fitted < 0.95 * bias
    errors = [tuple(map(float, found)) for found in re.findall(r"held-out .+ (\S+), (\S+) before", caplog.text)]
    assert len(errors) == 3 and all(after <= before for after, before in errors)


def test_layers_that_lose_nothing_and_read_what_they_did_stay_as_they_are(tmp_path: Path) -> None:
    dense = tiny_model(tiny_config())
    with torch.no_grad():  # the loss hardly feels the last layer, which loses all that goes
        for projection in (dense.model.layers[2].self_attn.o_proj, dense.model.layers[2].mlp.down_proj):
            projection.weight.mul_(1e-3)
    path, text = save(dense, tmp_path / "model"), save_tokens(tmp_path / "tokens.npy", TOKENS[:64])
    options = PruneConfig(calibration=(text,), ratio=0.1, metric="fisher", restore="reconstruct")
    flap_stream.prune(path, tmp_path / "out", options)
    found = load(tmp_path / "out").state_dict()
    for name, tensor in dense.state_dict().items():
        is_fitted = name.startswith("model.layers.2.")
        assert (found[name].shape == tensor.shape and torch.equal(found[name], tensor)) != is_fitted, name
    added = [found[f"model.layers.{i}.{name}.bias"] for i in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")]
    assert not torch.stack(added).any()


def test_a_layer_that_gets_worse_is_left_as_the_bias_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tiny_model(tiny_config()), tmp_path / "model")
    text = save_tokens(tmp_path / "tokens.npy", TOKENS[:64])
    monkeypatch.setattr("flap_stream.restore.reconstruction.LEARNING_RATE", 100.0)
    outputs = []
    for restore in ("bias", "reconstruct"):
        options = PruneConfig(calibration=(text,), ratio=0.3, restore=restore)
        flap_stream.prune(path, tmp_path / restore, options)
        outputs.append(load(tmp_path / restore).state_dict())
    for name, tensor in outputs[0].items():
        assert torch.allclose(outputs[1][name], tensor, rtol=1e-5, atol=1e-6), name


def test_a_fit_that_overflows_is_left_as_the_bias_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tiny_model(tiny_config()), tmp_path / "model")
    text = save_tokens(tmp_path / "tokens.npy", TOKENS[:64])
    monkeypatch.setattr("flap_stream.restore.reconstruction.LEARNING_RATE", 1e37)
    found = {}
    for restore in ("bias", "reconstruct"):
        flap_stream.prune(path, tmp_path / restore, PruneConfig(calibration=(text,), ratio=0.3, restore=restore))
        found[restore] = load(tmp_path / restore).state_dict()
    for name, tensor in found["bias"].items():
        assert torch.allclose(found["reconstruct"][name], tensor, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("batch_size", [1, 3, 8, 20])
def test_a_step_is_of_the_same_tokens_whatever_the_batch_size(
    batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tiny_model(tiny_config(layers=1)), tmp_path / "model")
    text = save_tokens(tmp_path / "tokens.npy", random_tokens(40, 128))
    step, steps = torch.optim.Adam.step, list[int]()

    def counted(adam: Any, *rest: Any) -> Any:
        steps.append(1)
        return step(adam, *rest)

    monkeypatch.setattr(torch.optim.Adam, "step", counted)
    options = PruneConfig(calibration=(text,), ratio=0.3, restore="reconstruct", batch_size=batch_size)
    flap_stream.prune(path, tmp_path / "out", options)
    held_out = 40 // HELD_OUT
    assert len(steps) == epochs(40 * 128) * -(-(40 - held_out) * 128 // STEP_TOKENS)


def test_routers_are_not_fitted(tmp_path: Path) -> None:
    dense = tiny_model(tiny_config("gpt_oss"))
    path, text = save(dense, tmp_path / "model"), save_tokens(tmp_path / "tokens.npy", TOKENS[:64])
    flap_stream.prune(path, tmp_path / "out", PruneConfig(calibration=(text,), ratio=0.3, restore="reconstruct"))
    found = load(tmp_path / "out").state_dict()
    routers = {name: tensor for name, tensor in dense.state_dict().items() if ".router." in name}
    assert any(name.endswith("bias") for name in routers)
    for name, tensor in routers.items():
        assert torch.equal(found[name], tensor), name


def test_of_a_layers_fits_only_the_best_and_the_last_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tiny_model(tiny_config()), tmp_path / "model")
    text = save_tokens(tmp_path / "tokens.npy", TOKENS[:64])
    made, held, cut = list[weakref.ref[torch.Tensor]](), list[int](), CutLayer.cut

    def counted(layer: CutLayer, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = cut(layer, tensors)
        made.append(weakref.ref(found["mlp.down_proj.weight"]))
        held.append(sum(one() is not None for one in made))
        return found

    monkeypatch.setattr(CutLayer, "cut", counted)
    flap_stream.prune(path, tmp_path / "out", PruneConfig(calibration=(text,), ratio=0.3, restore="reconstruct"))
    assert len(held) > 6 and max(held) == 2 and held.count(1) == 3  # the first of each layer


def test_empty_sublayers_and_a_pruned_checkpoint(tmp_path: Path) -> None:
    path = save(tiny_model(tiny_config(layers=2)), tmp_path / "model")
    text = save_tokens(tmp_path / "tokens.npy", TOKENS[:32])
    options = PruneConfig(calibration=(text,), ratio=0.6, restore="reconstruct", min_heads=0, min_neurons=0)
    flap_stream.prune(path, tmp_path / "once", options)
    flap_stream.prune(tmp_path / "once", tmp_path / "twice", replace(options, ratio=0.3))
    assert torch.isfinite(logits(load(tmp_path / "twice"))).all()


def test_hidden_states_on_disk_give_the_same_fit(tmp_path: Path) -> None:
    path = save(tiny_model(tiny_config(layers=2)), tmp_path / "model")
    text = save_tokens(tmp_path / "tokens.npy", TOKENS[:40])
    options = PruneConfig(calibration=(text,), restore="reconstruct", batch_size=32)
    flap_stream.prune(path, tmp_path / "host", options)
    with pytest.MonkeyPatch.context() as patch:
        placed(patch, hidden_place="disk")
        flap_stream.prune(path, tmp_path / "disk", options)
    assert contents(tmp_path / "disk") == contents(tmp_path / "host")


@pytest.mark.slow
def test_a_killed_reconstruction_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    job = make_job(tmp_path, layers=2, restore="reconstruct")
    begun, ended = job.first_step("out.run/refit"), job.first_step("out.partial")
    points = sorted({*range(begun - 3, ended, 11), *(n + 1 for n in job.records() if begun < n < ended)})
    assert len(points) > 6
    assert job.troubles(points) == []


@pytest.mark.slow
def test_it_restores_most_on_a_trained_model(tmp_path: Path) -> None:
    """On held-out text, by what share of the rise of the log perplexity is left."""
    measure = EvaluateConfig(text=(str(DEMO / "evaluation.txt"),), samples=60)
    dense = flap_stream.evaluate(DEMO / "model", measure).perplexity
    options = CollectConfig(calibration=(str(DEMO / "calibration.txt"),), samples=64, dtype="float32")
    flap_stream.collect(DEMO / "model", tmp_path / "run", options)
    flap_stream.plan(tmp_path / "run", PlanConfig(ratio=0.3))
    rise = {}
    for restore in ("bias", "least-squares", "reconstruct"):
        flap_stream.rewrite(tmp_path / "run", tmp_path / restore, RewriteConfig(restore=restore))
        rise[restore] = np.log(flap_stream.evaluate(tmp_path / restore, measure).perplexity / dense)
    assert rise["least-squares"] < 0.6 * rise["bias"]
    assert rise["reconstruct"] < 0.9 * rise["least-squares"]
    tensors = [entry for file in (tmp_path / "reconstruct").glob("*.safetensors") for entry in read_header(file)[0]]
    assert {entry.dtype for entry in tensors} == {"BF16"}  # though it ran in float32
