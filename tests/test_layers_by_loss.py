"""Whole layers go by the loss, among units: how they are scored, chosen and removed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed_jobs import require_same_after_a_kill
from masked import decoder_of, masked_model, separate
from models import fisher_draw, load, random_tokens, save_tokens, tiny_config
from placements import placed
from rank_jobs import RankJob
from test_depth import BY_LOSS, TOKENS, gone_of, made, options_of, skipping

import flap_stream
from flap_stream.arithmetic.allocation import allocate
from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.arithmetic.scoring import LayerScores
from flap_stream.arithmetic.whole_layers import whole_layer_score
from flap_stream.config import CollectConfig, EvaluateConfig, PlanConfig, SweepConfig
from flap_stream.errors import RunMismatch
from flap_stream.storage.loss import LossStore
from flap_stream.storage.refits import RefitStore
from flap_stream.storage.run_directory import RunDirectory

GEMMA = ["sliding_attention", "full_attention"] * 2


def layer_scores(model: Any, dtype: torch.dtype, windows: int) -> np.ndarray:
    """F of each layer, from what it adds and the gradient with respect to its output."""
    separate(model, decoder_of(model))
    model, seen = model.to(dtype), []

    def see(_layer: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        seen.append((inputs[0], output[0] if isinstance(output, tuple) else output))

    handles = [layer.register_forward_hook(see) for layer in decoder_of(model).layers]
    logits = model(torch.from_numpy(TOKENS[:windows])).logits
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(logits, [after for _, after in seen], fisher_draw(logits))
    return np.array(
        [
            float(((after - before).detach().double() * gradient.double()).sum(dim=-1).square().sum()) / windows
            for (before, after), gradient in zip(seen, gradients, strict=True)
        ]
    )


@pytest.mark.parametrize(
    ("family", "batch_size"), [("llama", 1), ("gemma3_text", 2), ("qwen3_moe", 3), ("qwen3_next", 5)]
)
def test_scores_by_the_loss_are_those_of_autograd(family: str, batch_size: int, tmp_path: Path) -> None:
    path, text = made(tmp_path, family, layers=3), (str(tmp_path / "tokens.npy"),)
    options = CollectConfig(calibration=text, batch_size=batch_size, loss_windows=5, depth=True)
    flap_stream.collect(path, tmp_path / "run", options)
    with RunDirectory(tmp_path / "run") as run:
        found = [LossStore.of(run).read(i).layer for i in range(3)]
    ours = np.array([float(own[0]) for own in found if own is not None])
    same, exact = (layer_scores(load(path), dtype, 5) for dtype in (torch.float32, torch.float64))
    own, lost = (np.abs(values / exact - 1).max() for values in (ours, same))
    assert len(ours) == 3 and own < max(1e-6, 2 * lost)  # what float32 loses by itself


@pytest.mark.parametrize(("family", "restore"), [("llama", "bias"), ("qwen3_moe", "none"), ("gemma3_text", "bias")])
def test_layers_go_beside_units_and_the_checkpoint_computes_what_the_masked_model_does(
    family: str, restore: str, tmp_path: Path
) -> None:
    path = made(tmp_path, family, layers=4, **({"layer_types": GEMMA} if family == "gemma3_text" else {}))
    options = options_of(tmp_path, **BY_LOSS, ratio=0.7, restore=restore, min_neurons=24, round_neurons_to=1)
    record = flap_stream.prune(path, tmp_path / "out", options).record
    gone = gone_of(record)
    assert 0 < len(gone) < 4 and record["realised_ratio"]["decoder"] == pytest.approx(0.7, abs=0.03)
    assert any(len(layer["kept_neurons"]) not in (0, layer["neurons"]) for layer in record["layers"])
    assert "whole decoder layers, KV groups" in (tmp_path / "out" / "README.md").read_text()
    expected = skipping(masked_model(path, record, torch.from_numpy(TOKENS) if restore == "bias" else None), gone)
    ours, ids = load(tmp_path / "out"), torch.from_numpy(random_tokens(3, 20, seed=5))
    with torch.no_grad():
        assert (ours(ids).logits - expected(ids).logits).abs().max() <= 1e-5
    assert sum(tensor.numel() for tensor in ours.state_dict().values()) == record["parameters"]["after"]


def test_neither_batches_nor_ranks_nor_a_kill_change_what_the_loss_says(tmp_path: Path) -> None:
    path, sums = made(tmp_path, "llama", layers=4), set()
    given = {**BY_LOSS, "ratio": 0.7, "min_neurons": 24, "restore": "none"}
    for batch_size in (1, 3, 5):
        options = options_of(tmp_path, **given, batch_size=batch_size)
        record = flap_stream.prune(path, tmp_path / f"out-{batch_size}", options).record
        shards = (tmp_path / f"out-{batch_size}").glob("*.safetensors")
        sums.add(tuple(file.read_bytes() for file in sorted(shards)))
    assert len(sums) == 1 and gone_of(record)
    require_same_after_a_kill(path, tmp_path / "out-5", options, tmp_path / "killed")
    job = RankJob(tmp_path / "ranks", tiny_config("llama", layers=4), **given)
    assert job.trouble("two", 2) is None


def test_a_layer_goes_where_that_costs_less_than_the_units_that_would_go_instead() -> None:
    shapes = [LayerShape(0, 1, 8, 10, 0, 2) for _ in range(3)]
    neurons = [np.arange(1.0, 11) * scale / 2 for scale in (1, 2, 4)]  # by their cost
    options = PlanConfig(ratio=0.5, metric="fisher", depth=True, round_neurons_to=1)

    def gone(*layers: float, **changes: Any) -> list[bool]:
        scores = [LayerScores(np.zeros(0), own, layer=layer) for own, layer in zip(neurons, layers, strict=True)]
        keeps = allocate(scores, shapes, PlanConfig(**{**vars(options), **changes}))
        assert sum(len(keep.neurons) for keep in keeps) == 15
        return [keep.is_gone for keep in keeps]

    # 9 neurons of the first layer, 4 of the second and 2 of the third cost 77; 5 of the second and the third cost 24
    assert gone(50, 110, 220) == [True, False, False] == gone(52, 110, 220)
    assert gone(54, 110, 220) == [False] * 3
    assert gone(100, 60, 220) == [False, True, False]
    # where each layer keeps 5 neurons, the 15 others cost 105
    assert gone(80, 900, 900, min_neurons=5) == [True, False, False]


def test_the_score_of_a_layer_is_the_most_of_any_choice_of_its_units() -> None:
    draw = np.random.default_rng(0)
    shape = LayerShape(3, 2, 8, 5, 7, 2)
    scores = LayerScores(draw.uniform(size=3), draw.uniform(size=5), layer=30.0)
    options = PlanConfig(metric="fisher", min_heads=3, min_neurons=2)
    best = -np.inf
    units = [(float(np.min(scores.kv_groups)), 7), *((float(f), 2) for f in np.sort(scores.neurons)[:3])]
    for chosen in range(1 << len(units)):
        own = [unit for bit, unit in enumerate(units) if chosen >> bit & 1]
        left = shape.prunable - sum(cost for _, cost in own)
        best = max(best, (30.0 - sum(f * cost for f, cost in own)) / left)
    assert whole_layer_score(scores, shape, options) == pytest.approx(best)


@pytest.mark.slow
@pytest.mark.parametrize("restore", ["least-squares", "reconstruct"])
def test_what_stays_is_refitted_past_removed_layers_and_goes_on_after_a_kill(restore: str, tmp_path: Path) -> None:
    path, ids = made(tmp_path, "llama", layers=5), torch.from_numpy(random_tokens(16, 16, seed=9))
    save_tokens(tmp_path / "tokens.npy", random_tokens(40, 16))
    divergences = []
    for how in ("bias", restore):
        given = {**BY_LOSS, "ratio": 0.7, "min_neurons": 24, "restore": how, "snapshot_interval": 1}
        options = options_of(tmp_path, **given)
        record = flap_stream.prune(path, tmp_path / how, options).record
        with torch.no_grad():
            dense, ours = (load(place)(ids).logits.log_softmax(dim=-1) for place in (path, tmp_path / how))
        divergences.append(float((dense.exp() * (dense - ours)).sum(dim=-1).mean()))
    assert any(number < 3 for number in gone_of(record)) and divergences[1] < divergences[0]
    require_same_after_a_kill(path, tmp_path / restore, options, tmp_path / "killed", RefitStore, 2)


@pytest.mark.parametrize("hidden_place", ["host", "disk"])
def test_a_sweep_lets_hidden_states_past_removed_layers(
    hidden_place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run, text = made(tmp_path, "llama", layers=4), tmp_path / "run", (str(tmp_path / "tokens.npy"),)
    how: dict[str, Any] = {"metric": "fisher", "depth": True, "min_neurons": 24}
    flap_stream.collect(path, run, CollectConfig(calibration=text, loss_windows=5, depth=True))
    placed(monkeypatch, hidden_place=hidden_place)
    points = flap_stream.sweep(run, SweepConfig(ratios=(0.3, 0.7), evaluate=text, batch_size=2, **how)).points
    for point in points:
        flap_stream.plan(run, ratio=point.ratio, **how)
        record = flap_stream.rewrite(run, tmp_path / f"out-{point.ratio}").record
        measured = flap_stream.evaluate(tmp_path / f"out-{point.ratio}", EvaluateConfig(text=text)).perplexity
        assert point.perplexity == pytest.approx(measured, rel=1e-5)
        assert point.parameters == record["parameters"]["after"]
    assert gone_of(record)


def test_what_needs_scores_of_layers_or_their_units_is_refused(tmp_path: Path) -> None:
    path, run, text = made(tmp_path, "llama", layers=3), tmp_path / "run", (str(tmp_path / "tokens.npy"),)
    how: dict[str, Any] = {"metric": "fisher", "depth": True, "ratio": 0.7, "min_neurons": 32}
    flap_stream.collect(path, run, CollectConfig(calibration=text, loss_windows=5))
    with pytest.raises(RunMismatch, match=r"no loss scores of whole layers; .*--loss-windows 5 --depth"):
        flap_stream.plan(run, **how)
    flap_stream.collect(path, run, CollectConfig(calibration=text, loss_windows=5, depth=True))
    planned = flap_stream.plan(run, **how)
    assert any(keep.is_gone for keep in planned.layers) and planned.predicted is not None
    with RunDirectory(run) as directory:
        found = [LossStore.of(directory).read(i) for i in range(3)]
    rise = 0.0
    for own, keep in zip(found, planned.layers, strict=True):
        assert own.layer is not None
        kept = float(own.attention[keep.kv_groups].sum() + own.mlp[keep.neurons].sum())
        rise += float(own.layer[0]) if keep.is_gone else float(own.attention.sum() + own.mlp.sum()) - kept
    assert planned.predicted.window == pytest.approx(rise / 2)
