"""`--statistics exact` equals a float64 computation over the whole array of inputs."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from masked import projection_inputs, streamed
from models import random_tokens, save, save_tokens, tensors_of, tiny_config, tiny_model

import flap_stream
from flap_stream.config import CollectConfig, PlanConfig, RewriteConfig

pytestmark = pytest.mark.slow

RATIO = 0.35


def whole_array_decision(model: Any, inputs: Any, head_score: str) -> Any:
    """al-am with wifv, written out over whole float64 arrays; masks and biases of every layer."""
    config = model.config
    group_channels = config.num_attention_heads // config.num_key_value_heads * model.model.layers[0].self_attn.head_dim
    hidden = config.hidden_size
    entries = []  # (score, cost, layer, kind, unit)
    for i, layer in enumerate(model.model.layers):
        for kind, weight in (("attention", layer.self_attn.o_proj.weight), ("mlp", layer.mlp.down_proj.weight)):
            weight = weight.detach().double()
            metric = inputs[i][kind].var(dim=0) * weight.square().sum(dim=0)
            if kind == "attention":
                z = (metric.square() - metric.square().mean()) / metric.square().std()
                z = z.reshape(-1, group_channels)
                scores = z.mean(dim=1) if head_score == "mean-z" else z.square().sum(dim=1).sqrt()
                cost = 2 * group_channels * hidden + 2 * layer.self_attn.head_dim * hidden
            else:
                scores, cost = (metric - metric.mean()) / metric.std(), 3 * hidden
            entries += [(score, cost, i, kind, unit) for unit, score in enumerate(scores.tolist())]
    entries.sort(key=lambda entry: -entry[0])
    spent = np.cumsum([entry[1] for entry in entries])
    length = int(np.argmin(np.abs(spent - (1 - RATIO) * spent[-1]))) + 1
    kept: dict[tuple[int, str], list[Any]] = {
        (i, kind): [] for i in range(len(inputs)) for kind in ("attention", "mlp")
    }
    for _, _, i, kind, unit in entries[:length]:
        kept[i, kind].append(unit)
    biases = {}
    for i, layer in enumerate(model.model.layers):
        for kind, module in (("attention", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):
            kept[i, kind].sort()
            size = group_channels if kind == "attention" else 1
            removed = torch.ones(module.weight.shape[1], dtype=torch.bool)
            for unit in kept[i, kind]:
                removed[unit * size : (unit + 1) * size] = False
            mean = inputs[i][kind].mean(dim=0)
            biases[i, kind] = module.weight.detach().double()[:, removed] @ mean[removed]
    return kept, biases


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_exact_equals_the_float64_whole_array_for_every_batch_size(tmp_path: Path, kv_heads: int) -> None:
    model = tiny_model(tiny_config(kv_heads=kv_heads), seed=kv_heads)
    tokens = random_tokens(9, 24)
    path, text = save(model, tmp_path / "model"), save_tokens(tmp_path / "tokens.npy", tokens)
    opened = streamed(path)
    read = projection_inputs(model, opened.family, opened.shapes, torch.from_numpy(tokens))
    inputs = [{"attention": layer["self_attn.o_proj"], "mlp": layer["mlp.down_proj"]} for layer in read]
    decisions = {head_score: whole_array_decision(model, inputs, head_score) for head_score in ("mean-z", "l2")}
    for batch_size, (head_score, (kept, biases)) in product(range(1, 8), decisions.items()):
        run, out = tmp_path / f"run-{batch_size}", tmp_path / f"out-{batch_size}-{head_score}"
        flap_stream.collect(path, run, CollectConfig(calibration=(text,), batch_size=batch_size))  # once for both
        flap_stream.plan(run, PlanConfig(ratio=RATIO, head_score=head_score, round_neurons_to=1))
        record = flap_stream.rewrite(run, out, RewriteConfig()).record
        tensors = tensors_of(out)
        for i, layer in enumerate(record["layers"]):
            assert layer["kept_kv_groups"] == kept[i, "attention"]
            assert layer["kept_neurons"] == kept[i, "mlp"]
            for kind, name in (("attention", "self_attn.o_proj"), ("mlp", "mlp.down_proj")):
                ours, expected = tensors[f"model.layers.{i}.{name}.bias"].double(), biases[i, kind]
                assert torch.linalg.norm(ours - expected) <= 1e-6 * torch.linalg.norm(expected)
