"""Experts that go as a whole go so that every mixture keeps a multiple of what was asked for."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from masked import masked_model
from models import load, random_tokens
from test_whole_experts import TOKENS, made, options_of

import flap_stream
from flap_stream.arithmetic.allocation import allocate
from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.arithmetic.scoring import LayerScores
from flap_stream.arithmetic.sizes import pruned_sizes
from flap_stream.arithmetic.target_prices import ModelSizes, target_of
from flap_stream.config import CollectConfig, PlanConfig
from flap_stream.errors import InvalidOption

SHAPE = LayerShape(
    4, 1, 8, 7 * 16, 3, 2, experts=(16,) * 7, expert_rest=5, expert_added=3, added_biases=21, router_needs=2
)
BY_LOSS: dict[str, Any] = {"metric": "fisher", "whole_experts": True, "min_neurons": 8}


def drawn(draw: np.random.Generator, unreached: int = 0) -> LayerScores:
    experts = 8 * draw.normal(size=7) ** 2
    experts[draw.choice(7, unreached, replace=False)] = np.inf
    return LayerScores(draw.normal(size=4) ** 2, draw.normal(size=112) ** 2, experts)


@pytest.mark.parametrize(("multiple", "seed"), list(itertools.product([2, 3, 4, 7], range(6))))
def test_the_best_experts_stay_in_multiples(multiple: int, seed: int) -> None:
    draw = np.random.default_rng([multiple, seed])
    scores = [drawn(draw, unreached=seed % 4) for _ in range(4)]
    options = PlanConfig(ratio=0.45, round_experts_to=multiple, **BY_LOSS)
    keeps, counts = allocate(scores, [SHAPE] * 4, options), set()
    for own, keep in zip(scores, keeps, strict=True):
        assert own.experts is not None
        kept, sizes = SHAPE.kept_experts(keep.neurons), SHAPE.expert_sizes(keep.neurons)
        counts.add(len(kept))
        assert len(kept) % multiple == 0 and len(kept) and all(sizes[kept] >= 8)
        known = [n for n in np.argsort(-own.experts, kind="stable").tolist() if np.isfinite(own.experts[n])]
        assert [n for n in known if n in kept] == known[: sum(n in kept for n in known)] and known[1] in kept
        unknown = np.flatnonzero(np.isinf(own.experts)).tolist()
        assert set(unknown) <= set(kept) or len(kept) == 7 // multiple * multiple
    assert multiple <= 3 or counts == {multiple}  # more than half of them
    share = sum(keep.cost(SHAPE) for keep in keeps) / (4 * SHAPE.prunable)
    assert share == pytest.approx(0.55, abs=multiple * 16 * 2 / (4 * SHAPE.prunable))


def test_experts_that_no_token_reached_go_only_if_the_multiple_does_not_allow_them_all() -> None:
    scores = drawn(np.random.default_rng(0), unreached=6)
    kept = [
        SHAPE.kept_experts(allocate([scores], [SHAPE], PlanConfig(ratio=0.5, round_experts_to=n, **BY_LOSS))[0].neurons)
        for n in (7, 3)
    ]
    assert kept[0] == list(range(7)) and len(kept[1]) == 6
    assert scores.experts is not None and int(np.flatnonzero(np.isfinite(scores.experts))[0]) in kept[1]


@pytest.mark.parametrize("limit", [500, 600, 700])
def test_a_target_counts_what_goes_with_each_of_the_experts(limit: int) -> None:
    draw, shapes = np.random.default_rng(limit), [SHAPE] * 4
    options = PlanConfig(target_parameters=limit, round_experts_to=2, **BY_LOSS)
    sizes = ModelSizes(4 * (SHAPE.prunable + 7 * SHAPE.expert_rest), 0, [(0, 0)] * 4, (0, 0), [0] * 4)
    target = target_of(options, shapes, sizes, "bias")
    assert target is not None
    keeps = allocate([drawn(draw) for _ in shapes], shapes, options, target)
    after = pruned_sizes(shapes, keeps, sizes.parameters, "bias").parameters_after
    assert limit - 2 * (8 * 2 + 5 + 3) < after <= limit
    assert any(len(SHAPE.kept_experts(keep.neurons)) <= 4 for keep in keeps)


@pytest.mark.parametrize(("multiple", "ratio", "left"), [(4, 0.2, 4), (2, 0.2, 4), (3, 0.2, 6), (3, 0.4, 3)])
def test_reap_removes_the_worst_in_multiples(multiple: int, ratio: float, left: int) -> None:
    draw, shape = np.random.default_rng(multiple), LayerShape(4, 1, 8, 96, 3, 2, experts=(16,) * 6, router_needs=2)
    scores = [LayerScores(np.zeros(4), np.zeros(96), draw.normal(size=6) ** 2) for _ in range(3)]
    keeps = allocate(scores, [shape] * 3, PlanConfig(method="reap", ratio=ratio, round_experts_to=multiple))
    for own, keep in zip(scores, keeps, strict=True):
        assert own.experts is not None
        assert shape.kept_experts(keep.neurons) == sorted(np.argsort(-own.experts)[:left].tolist())
    with pytest.raises(InvalidOption, match=r"removes 6 of 6 experts of layer 0, but [234] must stay"):
        allocate(scores, [shape] * 3, PlanConfig(method="reap", ratio=0.95, round_experts_to=multiple))


def test_what_no_mixture_can_meet_is_refused() -> None:
    scores = drawn(np.random.default_rng(0))
    with pytest.raises(InvalidOption, match="layer 0 has 7 experts, of which at least 2 must stay, but --round-exp"):
        allocate([scores], [SHAPE], PlanConfig(ratio=0.5, round_experts_to=8, **BY_LOSS))
    with pytest.raises(InvalidOption, match=r"removes at least 0\.\d+ of the weights, more than --ratio 0\.1"):
        allocate([scores], [SHAPE], PlanConfig(ratio=0.1, round_experts_to=4, **BY_LOSS))
    with pytest.raises(InvalidOption, match="round-experts-to is 0"):
        PlanConfig(round_experts_to=0)


def test_every_mixture_of_the_checkpoint_has_that_many(tmp_path: Path) -> None:
    path = made(tmp_path, "qwen3_moe")  # with 6 experts
    record = flap_stream.prune(path, tmp_path / "out", options_of(tmp_path, ratio=0.6, round_experts_to=4)).record
    kept = [layer["kept_experts"] for layer in record["layers"] if "experts" in layer]
    assert [len(own) for own in kept] == [4, 4] and record["options"]["round_experts_to"] == 4
    assert "round-experts-to = 4\n" in (tmp_path / "out" / "recipe.toml").read_text()
    ours, ids = load(tmp_path / "out"), torch.from_numpy(random_tokens(3, 20, seed=6))
    assert ours.config.num_experts_per_tok == load(path).config.num_experts_per_tok
    with torch.no_grad():
        expected = masked_model(path, record, torch.from_numpy(TOKENS))(ids).logits
        assert (ours(ids).logits - expected).abs().max() <= 1e-5


def test_without_experts_to_remove_it_is_refused(tmp_path: Path) -> None:
    path, text = made(tmp_path, "mixtral"), (str(tmp_path / "tokens.npy"),)
    flap_stream.collect(path, tmp_path / "run", CollectConfig(calibration=text))
    with pytest.raises(
        InvalidOption, match=r"round-experts-to 2 would have no effect: .*--whole-experts or --method r"
    ):
        flap_stream.plan(tmp_path / "run", round_experts_to=2)
    flap_stream.plan(tmp_path / "run", ratio=0.3)
    assert "round_experts_to" not in (tmp_path / "run" / "plan.json").read_text()
