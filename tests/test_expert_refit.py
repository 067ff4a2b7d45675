"""Least-squares restoration of experts: streamed equals in-memory float64, whatever the groups, kills and ranks."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import make_job
from masked import decoder_of, hide_experts, mixture_of, projection_inputs, separate, streamed
from models import GEMMA4_EXPERTS, contents, load, random_tokens, save, save_tokens, tensors_of, tiny_config, tiny_model
from rank_jobs import RankJob
from torch import nn

import flap_stream
from flap_stream import CollectConfig, PlanConfig, PruneConfig, RewriteConfig
from flap_stream.arithmetic import least_squares
from flap_stream.arithmetic.layer_shape import Sublayer
from flap_stream.arithmetic.least_squares import DAMPING, EXPERT_DAMPING
from flap_stream.restore.stand_ins import Captures

pytestmark = pytest.mark.slow

SAMPLES, LENGTH = 24, 32
# Experts as Mixtral and Qwen have them; beside shared ones and a dense layer; with biases; routed by zeros; ungated;
# beside an MLP.
FAMILIES = ("mixtral", "qwen3_moe", "glm4_moe", "deepseek_v3", "gpt_oss", "llama4_text", "nemotron_h", "gemma4_text")


def fit(linear: nn.Linear, kept: torch.Tensor, inputs: torch.Tensor, of_expert: bool) -> None:
    """Refit the kept columns and the bias to the dense outputs for inputs `[token, channel]`."""
    dense, bias, mean = linear.weight.clone(), linear.bias, inputs.mean(0)
    x, y = inputs[:, kept] - mean[kept], (inputs - mean) @ dense.T
    gram, share = x.T @ x, max(DAMPING, EXPERT_DAMPING * len(kept) / len(inputs)) if of_expert else DAMPING
    damping = share * gram.diagonal().mean() * torch.eye(len(kept), dtype=torch.float64)
    weight = torch.linalg.solve(gram + damping, x.T @ y + damping @ dense[:, kept].T).T
    before, after = (torch.linalg.norm(x @ w.T - y) for w in (dense[:, kept], weight))
    assert after <= before, "worse than a bias where it was fitted"
    linear.weight.zero_()
    linear.weight[:, kept] = weight
    linear.bias = nn.Parameter(dense @ mean - weight @ mean[kept] + (0 if bias is None else bias))


@torch.no_grad()
def refitted_in_memory(path: Path, record: dict[str, Any], tokens: np.ndarray) -> Any:
    """The model with refitted weights, zeros in the columns that go, experts separate, everything in float64."""
    model, opened, ids = load(path), streamed(path), torch.from_numpy(tokens)
    separate(model, decoder_of(model))
    model.double()
    layers = model.get_submodule(opened.family.layers)
    for i, (layer, shape, kept) in enumerate(zip(layers, opened.shapes, record["layers"], strict=True)):
        if gone := sorted(set(range(len(shape.experts))) - set(kept.get("kept_experts", range(len(shape.experts))))):
            hide_experts(mixture_of(layer), gone)
        for half in Sublayer:
            parts = [part for part in opened.family.parts(shape) if part.kind.name is half and part.units]
            inputs = projection_inputs(model, opened.family, opened.shapes, ids)[i] if parts else {}
            for part in parts:
                units = np.array(kept["kept_kv_groups" if half is Sublayer.ATTENTION else "kept_neurons"])
                if not len(part.own(units)):
                    continue
                own = part.kind.output.kept_indices(part.own(units), part.units, shape)
                if len(own) < part.kind.output.size(part.units, shape):
                    is_expert = half is Sublayer.MLP and bool(shape.experts)
                    output = layer.get_submodule(part.kind.output.name)
                    fit(output, torch.from_numpy(own), inputs[part.kind.output.name], is_expert)
    return model


def renumbered(name: str, kept: list[int]) -> str:
    """What a module of an expert is called where only those that are kept are left."""
    return re.sub(r"\.each\.(\d+)\.", lambda found: f".each.{kept.index(int(found[1]))}.", name)


WHOLE = {"metric": "fisher", "whole_experts": True, "loss_windows": 5, "min_neurons": 24, "ratio": 0.7}


@pytest.mark.parametrize(
    ("family", "changes"), [*((family, {}) for family in FAMILIES), ("mixtral", WHOLE), ("qwen3_moe", WHOLE)]
)
def test_streaming_refit_equals_the_one_in_memory(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    tokens = random_tokens(SAMPLES, LENGTH)
    config = tiny_config(family, **(GEMMA4_EXPERTS if family == "gemma4_text" else {}))
    path = save(tiny_model(config, seed=3), tmp_path / "model")
    given = {"ratio": 0.4, "samples": SAMPLES, "sequence_length": LENGTH, "restore": "least-squares", "batch_size": 5}
    options = PruneConfig(calibration=(save_tokens(tmp_path / "t.npy", tokens),), **{**given, **changes})
    record = flap_stream.prune(path, tmp_path / "out", options).record
    assert ("experts" in record) == (changes == WHOLE), "experts are gone"
    expected, pruned, opened = refitted_in_memory(path, record, tokens), load(tmp_path / "out"), streamed(path)
    places = zip(*(m.get_submodule(opened.family.layers) for m in (pruned, expected)), opened.shapes, strict=True)
    compared = 0
    for (layer, wanted, shape), kept in zip(places, record["layers"], strict=True):
        numbers = kept.get("kept_experts", list(range(len(shape.experts))))
        for part in opened.family.parts(shape):
            units = np.array(kept["kept_kv_groups" if part.kind.name is Sublayer.ATTENTION else "kept_neurons"])
            if len(part.own(units)):
                name = part.kind.output.name
                own = part.kind.output.kept_indices(part.own(units), part.units, shape)
                found, linear = layer.get_submodule(renumbered(name, numbers)), wanted.get_submodule(name)
                bias = torch.zeros(len(linear.weight)) if linear.bias is None else linear.bias
                for a, b in ((found.weight, linear.weight[:, own]), (found.bias, bias)):
                    assert torch.linalg.norm(a - b) < 1e-3 * torch.linalg.norm(b) + 1e-5
                compared += 1
    assert compared > 4
    with torch.no_grad():
        ids = torch.from_numpy(random_tokens(3, 20, seed=5))
        assert (pruned(ids).logits - expected(ids).logits).abs().max() < 2e-3


def collected(place: Path, family: str = "mixtral") -> Path:
    """A run directory with statistics and a plan."""
    path = save(tiny_model(tiny_config(family), seed=3), place / "model")
    text = (save_tokens(place / "t.npy", random_tokens(SAMPLES, LENGTH)),)
    flap_stream.collect(path, place / "run", CollectConfig(calibration=text, samples=SAMPLES, sequence_length=LENGTH))
    flap_stream.plan(place / "run", PlanConfig(ratio=0.4))
    return place / "run"


def test_experts_in_groups_are_refitted_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = collected(tmp_path)
    flap_stream.rewrite(run, tmp_path / "together", RewriteConfig(restore="least-squares"))
    (tmp_path / "again").mkdir()
    apart = collected(tmp_path / "again")
    monkeypatch.setattr(least_squares, "GROUP_BYTES", 1)
    flap_stream.rewrite(apart, tmp_path / "apart", RewriteConfig(restore="least-squares"))
    weights, others = (contents(tmp_path / name) for name in ("together", "apart"))
    assert all(others[name] == body for name, body in weights.items() if name.endswith(".safetensors"))


def test_experts_that_no_token_reaches_any_more_get_the_bias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = collected(tmp_path, "gpt_oss")
    monkeypatch.setattr(Captures, "taken", lambda self: [])
    written = []
    for restore in ("bias", "least-squares"):
        flap_stream.rewrite(run, tmp_path / restore, RewriteConfig(restore=restore))
        written.append(tensors_of(tmp_path / restore))
    wanted, found = written
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor) or (name.endswith("bias") and torch.allclose(found[name], tensor))


def test_it_is_nearer_to_the_dense_model_than_a_bias(tmp_path: Path) -> None:
    run, ids = collected(tmp_path), torch.from_numpy(random_tokens(SAMPLES, LENGTH))
    errors = {}
    with torch.no_grad():
        wanted = load(tmp_path / "model")(ids).logits
        for restore in ("bias", "least-squares"):
            flap_stream.rewrite(run, tmp_path / restore, RewriteConfig(restore=restore))
            errors[restore] = float((load(tmp_path / restore)(ids).logits - wanted).norm())
    assert errors["least-squares"] < 0.95 * errors["bias"]


def test_a_pruned_mixture_is_pruned_and_refitted_again(tmp_path: Path) -> None:
    run = collected(tmp_path, "qwen3_moe")
    flap_stream.rewrite(run, tmp_path / "once", RewriteConfig(restore="least-squares"))
    text = (str(tmp_path / "t.npy"),)
    options = PruneConfig(ratio=0.25, calibration=text, samples=SAMPLES, sequence_length=LENGTH, round_neurons_to=1)
    flap_stream.prune(tmp_path / "once", tmp_path / "twice", replace(options, restore="least-squares"))
    assert load(tmp_path / "twice")(torch.from_numpy(random_tokens(2, 16))).logits.isfinite().all()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_killed_refit_goes_on_to_the_same_bytes(tmp_path: Path, family: str) -> None:
    job = make_job(tmp_path, family=family, restore="least-squares")
    begun, ended = job.first_step("out.run/refit"), job.first_step("out.partial")
    assert job.troubles(sorted({*range(begun - 3, ended, 17), ended - 1})) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_and_four_ranks_refit_to_the_same_bytes(tmp_path: Path, dtype: str) -> None:
    job = RankJob(tmp_path, tiny_config("mixtral", layers=2), length=512, restore="least-squares", dtype=dtype)
    assert [job.trouble(f"ranks-{ranks}", ranks) for ranks in (2, 4)] == [None, None]
