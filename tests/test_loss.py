"""Scores by the loss: the streamed backward sweep against autograd through the whole model in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import random_tokens, save, save_tokens, tiny_config, tiny_model
from torch.nn import functional

import flap_stream
from flap_stream.config import CollectConfig, PlanConfig
from flap_stream.storage.loss import LossStore
from flap_stream.storage.run_directory import RunDirectory

TOKENS = random_tokens(7, 24)


def changes_in_memory(model: Any, means: dict[Any, torch.Tensor], windows: int) -> dict[Any, torch.Tensor]:
    """-(x - mean) g of the inputs x of all output projections, float64 `[window, channel]`."""
    model, inputs = model.double(), {}
    for i, layer in enumerate(model.model.layers):
        for kind, module in (("attention", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):
            module.register_forward_pre_hook(lambda _, x, key=(i, kind): inputs.update({key: x[0]}))
    tokens = torch.from_numpy(TOKENS[:windows])
    logits = model(tokens).logits
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    return {
        key: -((x - means[key]) * g).sum(dim=1).detach() for (key, x), g in zip(inputs.items(), gradients, strict=True)
    }


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_scores_are_those_of_autograd_through_the_whole_model(tmp_path: Path, family: str, batch_size: int) -> None:
    model = tiny_model(tiny_config(family))
    path, text = save(model, tmp_path / "model"), save_tokens(tmp_path / "tokens.npy", TOKENS)
    options = CollectConfig(calibration=(text,), batch_size=batch_size, loss_windows=5)
    flap_stream.collect(path, tmp_path / "run", options)
    with RunDirectory(tmp_path / "run") as run:
        statistics = [run.statistics.read(i) for i in range(len(run.layer_shapes))]
        found = [LossStore.of(run).read(i) for i in range(len(run.layer_shapes))]
        groups = run.layer_shapes[0].kv_groups
    means = {
        (i, kind): torch.from_numpy(getattr(layer, kind).mean)
        for i, layer in enumerate(statistics)
        for kind in ("attention", "mlp")
    }
    for (i, kind), changes in changes_in_memory(model, means, 5).items():
        units = changes.unflatten(-1, (groups if kind == "attention" else changes.shape[-1], -1)).sum(dim=-1)
        expected = units.square().mean(dim=0).numpy()
        difference = np.linalg.norm(getattr(found[i], kind) - expected) / np.linalg.norm(expected)
        assert difference < 1e-5  # of a forward and backward pass in float32


def test_statistics_that_are_complete_get_scores_later_and_a_plan_by_the_loss_keeps_the_ratio(tmp_path: Path) -> None:
    path = save(tiny_model(tiny_config("mixtral")), tmp_path / "model")
    text = save_tokens(tmp_path / "tokens.npy", TOKENS)
    together = CollectConfig(calibration=(text,), batch_size=2, loss_windows=5)
    flap_stream.collect(path, tmp_path / "together", together)
    flap_stream.collect(path, tmp_path / "later", CollectConfig(calibration=(text,), batch_size=2))
    flap_stream.collect(path, tmp_path / "later", together)
    plans = []
    for name in ("together", "later"):
        with RunDirectory(tmp_path / name) as run:
            assert not (run.path / "loss-inputs").exists()
        plans.append(flap_stream.plan(tmp_path / name, PlanConfig(ratio=0.3, metric="fisher", round_neurons_to=1)))
    assert [keep.neurons.tolist() for keep in plans[0].layers] == [keep.neurons.tolist() for keep in plans[1].layers]
    assert plans[0].decoder_ratio == pytest.approx(0.3, abs=0.01)
