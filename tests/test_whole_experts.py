"""Whole experts as units: how they are scored, chosen, removed with their part of the router, and refused."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed_jobs import require_same_after_a_kill
from masked import decoder_of, hide_experts, masked_model, mixture_of, separate, streamed
from models import (
    FAMILY_EXTRAS,
    GEMMA4_EXPERTS,
    fisher_draw,
    load,
    random_tokens,
    save,
    save_tokens,
    tiny_config,
    tiny_model,
)
from quantised_models import write_microscaled
from rank_jobs import RankJob
from test_quantised import dense_model, require_the_same

import flap_stream
from flap_stream.arithmetic.allocation import LayerKeep, allocate
from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.arithmetic.scoring import LayerScores
from flap_stream.cli import main
from flap_stream.config import CollectConfig, EvaluateConfig, PlanConfig, PruneConfig, SweepConfig
from flap_stream.errors import CorruptRun, InvalidOption, RunMismatch, UnsupportedModel
from flap_stream.model.architecture import with_layer_count
from flap_stream.model.families import FAMILIES
from flap_stream.model.skeleton import Skeleton
from flap_stream.modeling.modeling_flap_stream import router_modules
from flap_stream.storage.loss import LossStore
from flap_stream.storage.run_directory import RunDirectory

TOKENS = random_tokens(7, 24)
MIXTURES = [family for family, row in FAMILIES.items() if row.experts is not None]
QUICK = ("gpt_oss", "llama4_text", "mixtral", "qwen3_moe")  # those that differ most
AS_A_WHOLE: dict[str, Any] = {"metric": "fisher", "whole_experts": True, "loss_windows": 5}


def options_of(place: Path, **changes: Any) -> PruneConfig:
    """With a minimum of neurons that experts cannot all keep."""
    least = max(max(shape.experts, default=1) for shape in streamed(place / "model").shapes) * 3 // 10
    given = {"ratio": 0.74, "calibration": (str(place / "tokens.npy"),), "max_shard_bytes": 60_000, "batch_size": 3}
    return PruneConfig(**{**given, "round_neurons_to": 1, "min_neurons": least, **AS_A_WHOLE, **changes})


def made(place: Path, family: str, **changes: Any) -> Path:
    """A tiny model of a family, and windows beside it."""
    place.mkdir(exist_ok=True)
    save_tokens(place / "tokens.npy", TOKENS)
    return save(tiny_model(tiny_config(family, **changes), seed=3), place / "model")


def removed_experts(record: dict[str, Any]) -> int:
    return sum(len(kept["experts"]) - len(kept["kept_experts"]) for kept in record["layers"] if "experts" in kept)


@pytest.mark.parametrize(
    "family", [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in MIXTURES]
)
def test_the_checkpoint_computes_what_the_dense_model_does_if_the_router_never_chooses_what_is_gone(
    family: str, tmp_path: Path
) -> None:
    path = made(tmp_path, family)
    record = flap_stream.prune(path, tmp_path / "out", options_of(tmp_path)).record
    assert removed_experts(record) and record["experts"]["after"] < record["experts"]["before"]
    ours, expected = load(tmp_path / "out"), masked_model(path, record, torch.from_numpy(TOKENS))
    tokens = random_tokens(3, 20, seed=7)
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        assert (ours(ids).logits - expected(ids).logits).abs().max() <= 1e-5
        in_memory = expected(ids, labels=ids).loss.exp().item()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **settings), expected.generate(ids, **settings))
    assert sum(tensor.numel() for tensor in ours.state_dict().values()) == record["parameters"]["after"]
    text = (save_tokens(tmp_path / "evaluation.npy", tokens),)
    streamed = flap_stream.evaluate(tmp_path / "out", EvaluateConfig(text=text)).perplexity
    assert streamed == pytest.approx(in_memory, rel=1e-5)


# --- scores ---


def scores_in_memory(model: Any, dtype: torch.dtype, windows: int, means: list[np.ndarray]) -> list[np.ndarray]:
    """F of each layer's experts and of all their neurons together, from the outputs of its mixture without them.

    means: of what `down` of each layer's experts reads.
    """
    model, tokens = copy.deepcopy(model), torch.from_numpy(TOKENS[:windows])
    separate(model, decoder_of(model))
    model.to(dtype)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    mixtures = {i: mixture_of(layer) for i, layer in enumerate(decoder_of(model).layers)}
    mixtures = {i: mixture for i, mixture in mixtures.items() if hasattr(mixture, "experts")}

    def see(i: int) -> Any:
        def hook(_module: Any, inputs: Any, output: Any) -> None:
            seen[i] = inputs[0], output[0] if isinstance(output, tuple) else output

        return hook

    handles = [mixture.register_forward_hook(see(i)) for i, mixture in mixtures.items()]
    logits = model(tokens).logits
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(logits, [output for _, output in seen.values()], fisher_draw(logits))
    found = []
    for (i, (hidden, output)), gradient, mean in zip(seen.items(), gradients, means, strict=True):
        scores, count = [], len(mixtures[i].experts.each)
        for number in range(count + 1):
            without = copy.deepcopy(mixtures[i])
            if number < count:
                hide_experts(without, [number])
            else:
                for expert, own in zip(without.experts.each, mean.reshape(count, -1), strict=True):
                    expert.down.register_forward_pre_hook(_reading(torch.from_numpy(own)))
            with torch.no_grad():
                other = without(hidden)
            change = (other[0] if isinstance(other, tuple) else other) - output.detach()
            per_token = (change.double() * gradient.double()).flatten(0, -2).sum(dim=-1)
            scores.append(float(per_token.square().sum()) / windows)
        found.append(np.array(scores))
    return found


def _reading(mean: torch.Tensor) -> Any:
    return lambda _module, inputs: (mean.to(inputs[0]).expand_as(inputs[0]),)


@pytest.mark.parametrize(
    ("family", "batch_size"), [("mixtral", 1), ("qwen3_moe", 2), ("gpt_oss", 3), ("llama4_text", 4), ("glm4_moe", 5)]
)
def test_scores_are_those_of_the_mixture_run_without_each_expert(family: str, batch_size: int, tmp_path: Path) -> None:
    path, text = made(tmp_path, family), (str(tmp_path / "tokens.npy"),)
    options = CollectConfig(calibration=text, batch_size=batch_size, loss_windows=5, whole_experts=True)
    flap_stream.collect(path, tmp_path / "run", options)
    with RunDirectory(tmp_path / "run") as run:
        store, mixtures = LossStore.of(run), [i for i, shape in enumerate(run.layer_shapes) if shape.experts]
        means = [run.statistics.read(i).mlp.mean for i in mixtures]
        found = [(store.read(i).experts, store.read(i).together) for i in mixtures]
    single, double = (scores_in_memory(load(path), dtype, 5, means) for dtype in (torch.float32, torch.float64))
    for (experts, together), same, exact in zip(found, single, double, strict=True):
        assert experts is not None and together is not None and len(experts) + 1 == len(exact)
        ours = np.append(experts, together)
        own, lost = (float(np.linalg.norm(values - exact) / np.linalg.norm(exact)) for values in (ours, same))
        assert own < max(1e-6, 2 * lost)  # what float32 loses by itself


def test_neither_the_batch_size_nor_the_number_of_ranks_changes_a_byte(tmp_path: Path) -> None:
    path, digests = made(tmp_path, "mixtral"), set()
    for batch_size in range(1, 6):
        out = tmp_path / f"out-{batch_size}"
        flap_stream.prune(path, out, options_of(tmp_path, batch_size=batch_size, restore="none"))
        files = sorted(file for file in out.glob("*.safetensors"))
        digests.add(tuple(file.read_bytes() for file in files))
    assert len(digests) == 1
    job = RankJob(tmp_path / "ranks", tiny_config("mixtral", layers=2), ratio=0.7, **AS_A_WHOLE)
    assert job.trouble("two", 2) is None


def test_a_killed_job_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    path, options = made(tmp_path, "mixtral"), options_of(tmp_path)
    flap_stream.prune(path, tmp_path / "whole", options)
    require_same_after_a_kill(path, tmp_path / "whole", options, tmp_path / "out")


# --- the decision ---


@pytest.mark.parametrize("seed", range(40))
def test_an_expert_is_kept_with_its_minimum_or_gone_and_as_many_as_the_router_needs_are_kept(seed: int) -> None:
    draw = np.random.default_rng(seed)
    options = PlanConfig(
        ratio=float(draw.uniform(0.1, 0.45)),
        min_neurons=int(draw.integers(0, 6)),
        min_experts=[None, 3][seed % 2],
        round_neurons_to=[1, 8, 3][seed % 3],
        metric="fisher",
        whole_experts=True,
    )
    sizes = [tuple(draw.integers(1, 9, size=count).tolist()) for count in (5, 7)]
    sizes = [tuple(options.neuron_multiple * n for n in own) if options.neuron_multiple == 3 else own for own in sizes]
    shapes = [LayerShape(4, 1, 8, sum(own), 3, 2, experts=own, expert_rest=2, router_needs=2) for own in sizes]

    def drawn(count: int) -> np.ndarray:
        return draw.integers(0, 4, size=count).astype(float)  # of few values, so that many are equal

    scores = [LayerScores(drawn(4), drawn(shape.neurons), drawn(len(shape.experts))) for shape in shapes]
    keeps = allocate(scores, shapes, options)
    for shape, own, keep in zip(shapes, scores, keeps, strict=True):
        left, least = shape.expert_sizes(keep.neurons), np.minimum(shape.experts, max(options.min_neurons, 1))
        assert own.experts is not None
        assert np.all((left == 0) | (left >= least))
        assert np.count_nonzero(left) >= (options.min_experts or 2)
        best = np.argsort(-own.experts, kind="stable")[: options.min_experts or 2]
        assert np.all(left[best] > 0)


def test_an_expert_that_costs_less_than_its_neurons_goes_before_them() -> None:
    shape = LayerShape(2, 1, 8, 12, 3, 2, experts=(4, 4, 4), router_needs=2)
    scores = LayerScores(np.array([9.0, 9]), np.array([3.0, 3, 1, 1, 2, 2, 2, 2, 9, 9, 9, 9]), np.array([1.0, 9, 9]))
    options = PlanConfig(ratio=4 / 15, round_neurons_to=1, metric="fisher", whole_experts=True)
    kept = allocate([scores], [shape], options)
    assert kept[0].neurons.tolist() == [*range(4, 12)]
    kept = allocate([scores._replace(experts=None)], [shape], PlanConfig(ratio=4 / 15, round_neurons_to=1))
    assert kept[0].neurons.tolist() == [0, 1, 4, 5, 8, 9, 10, 11]


def test_an_expert_that_no_token_reached_stays_with_the_least_of_neurons(tmp_path: Path) -> None:
    path = made(tmp_path, "mixtral")
    save_tokens(tmp_path / "tokens.npy", np.full((4, 8), 5))  # one token again and again: few experts see any
    record = flap_stream.prune(path, tmp_path / "out", options_of(tmp_path, ratio=0.5, keep_run=True)).record
    with RunDirectory(tmp_path / "out.run") as run:
        found = [LossStore.of(run).read(i).experts for i in range(3)]
    sizes = load(tmp_path / "out").config.pruned_expert_sizes
    for layer, (experts, kept) in enumerate(zip(found, record["layers"], strict=True)):
        assert experts is not None
        unseen = np.flatnonzero(np.isinf(experts)).tolist()
        assert len(unseen) and set(unseen) <= set(kept["kept_experts"])
        assert all(sizes[layer][kept["kept_experts"].index(number)] == 28 for number in unseen)


def test_experts_that_no_token_reached_do_not_stand_for_those_that_a_token_needs() -> None:
    shape = LayerShape(2, 1, 8, 12, 3, 2, experts=(4, 4, 4), router_needs=1)
    scores = LayerScores(np.array([9.0, 9]), np.array([0.0] * 4 + [5] * 8), np.array([np.inf, 2, 3]))
    kept = allocate(
        [scores], [shape], PlanConfig(ratio=14 / 30, round_neurons_to=1, metric="fisher", whole_experts=True)
    )
    assert shape.kept_experts(kept[0].neurons) == [0, 2] and shape.expert_sizes(kept[0].neurons)[0] == 1


# --- what becomes of it ---


def test_a_sweep_measures_what_rewrite_writes_and_a_target_is_met(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, text = made(tmp_path, "qwen3_moe"), (str(tmp_path / "tokens.npy"),)
    run = tmp_path / "run"
    how: dict[str, Any] = {"metric": "fisher", "whole_experts": True, "round_neurons_to": 1}
    flap_stream.collect(path, run, CollectConfig(calibration=text, loss_windows=5, batch_size=2, whole_experts=True))
    swept = flap_stream.sweep(run, SweepConfig(ratios=(0.8,), evaluate=text, predict=True, **how)).points[0]
    planned = flap_stream.plan(run, ratio=0.8, **how)
    assert planned.sizes.experts_after < planned.sizes.experts_before
    written = flap_stream.rewrite(run, tmp_path / "out")
    assert removed_experts(written.record)
    said = f"experts      {planned.sizes.experts_before} -> {planned.sizes.experts_after}\n"
    command = ["plan", str(run), "--ratio", "0.8", "--metric", "fisher", "--whole-experts", "--round-neurons-to", "1"]
    assert main(command) == main(["inspect", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count(said) == 2 and "| experts of all" in (tmp_path / "out/README.md").read_text()
    assert swept.parameters == written.record["parameters"]["after"]
    measured = flap_stream.evaluate(tmp_path / "out", EvaluateConfig(text=text)).perplexity
    assert swept.perplexity == pytest.approx(measured, rel=1e-5) and swept.predicted == planned.predicted
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    for name, limit in (("target_parameters", swept.parameters), ("target_size", size)):
        record = flap_stream.plan(run, **how, **dict[str, Any]({name: limit})).target
        assert record is not None and 0.95 * limit < record["reached"] <= limit
        found = flap_stream.rewrite(run, tmp_path / name)
        size = sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors"))
        amount = found.record["parameters"]["after"] if name == "target_parameters" else size
        assert removed_experts(found.record) and amount <= record["reached"]


@pytest.mark.parametrize("again", [{"whole_experts": True}, {"whole_experts": False}])
def test_the_checkpoint_is_pruned_again(again: dict[str, Any], tmp_path: Path) -> None:
    path = made(tmp_path, "qwen3_moe")
    first = flap_stream.prune(path, tmp_path / "out", options_of(tmp_path)).record
    record = flap_stream.prune(
        tmp_path / "out", tmp_path / "again", options_of(tmp_path, ratio=0.3, min_neurons=1, **again)
    ).record
    for before, after in zip(first["layers"], record["layers"], strict=True):
        assert len(after.get("experts", [])) == len(before.get("kept_experts", []))
    expected = masked_model(tmp_path / "out", record, torch.from_numpy(TOKENS))
    ids = torch.from_numpy(random_tokens(3, 20, seed=5))
    with torch.no_grad():
        assert (load(tmp_path / "again")(ids).logits - expected(ids).logits).abs().max() <= 1e-5


@pytest.mark.slow
def test_packed_experts_are_removed_as_those_that_transformers_decodes(tmp_path: Path) -> None:
    dense = dense_model(tmp_path / "model", "gpt_oss")
    write_microscaled(dense, tmp_path / "quantised", tmp_path / "decoded")
    save_tokens(tmp_path / "tokens.npy", TOKENS)
    require_the_same(tmp_path, options_of(tmp_path))
    assert min(map(len, load(tmp_path / "out").config.pruned_expert_sizes)) < 4


def test_reconstruction_fits_layers_with_fewer_experts(tmp_path: Path) -> None:
    path, tokens = made(tmp_path, "gpt_oss"), random_tokens(40, 16)
    save_tokens(tmp_path / "tokens.npy", tokens)
    divergences, ids = [], torch.from_numpy(random_tokens(16, 16, seed=9))
    for restore in ("bias", "reconstruct"):
        options = options_of(tmp_path, restore=restore)
        record = flap_stream.prune(path, tmp_path / restore, options).record
        assert removed_experts(record)
        with torch.no_grad():
            dense, ours = (load(place)(ids).logits.log_softmax(dim=-1) for place in (path, tmp_path / restore))
        divergences.append(float((dense.exp() * (dense - ours)).sum(dim=-1).mean()))
    assert divergences[1] < divergences[0]


def test_a_plan_that_leaves_fewer_experts_than_a_token_needs_is_refused(tmp_path: Path) -> None:
    path, run, text = made(tmp_path, "mixtral"), tmp_path / "run", (str(tmp_path / "tokens.npy"),)
    flap_stream.collect(path, run, CollectConfig(calibration=text, loss_windows=5, whole_experts=True))
    options = flap_stream.plan(run, ratio=0.5, metric="fisher", whole_experts=True).options
    with RunDirectory(run) as directory:  # a decision made by hand
        _, keeps = directory.plan.read()
        directory.plan.write(options, [LayerKeep(keeps[0].kv_groups, np.arange(3)), *keeps[1:]])
    with pytest.raises(CorruptRun, match="layer 0 keeps 1 experts, its router needs 2"):
        flap_stream.rewrite(run, tmp_path / "out")


def test_scores_are_added_to_a_run_whose_statistics_stay(tmp_path: Path) -> None:
    path, run, text = made(tmp_path, "mixtral"), tmp_path / "run", (str(tmp_path / "tokens.npy"),)
    options = CollectConfig(calibration=text, loss_windows=5, batch_size=2)
    flap_stream.collect(path, run, options)
    plain = flap_stream.plan(run, metric="fisher", ratio=0.5)
    with pytest.raises(RunMismatch, match=r"no loss scores of whole experts; .*--loss-windows 5 --whole-experts"):
        flap_stream.plan(run, metric="fisher", whole_experts=True)
    statistics = sorted((p, p.stat().st_mtime_ns) for p in (run / "statistics.zarr").rglob("*"))
    flap_stream.collect(path, run, CollectConfig(calibration=text, loss_windows=5, batch_size=2, whole_experts=True))
    assert statistics == sorted((p, p.stat().st_mtime_ns) for p in (run / "statistics.zarr").rglob("*"))
    assert (
        flap_stream.plan(run, metric="fisher", whole_experts=True, min_neurons=32, ratio=0.75).sizes.experts_after < 12
    )
    again = flap_stream.plan(run, metric="fisher", ratio=0.5)
    assert [keep.neurons.tolist() for keep in again.layers] == [keep.neurons.tolist() for keep in plain.layers]


@pytest.mark.parametrize(
    ("family", "changes", "options", "words"),
    [
        ("llama", {}, {}, "has no experts"),
        ("gemma4_text", GEMMA4_EXPERTS, {}, "beside an MLP that all tokens go through"),
        ("glm4_moe", {"n_group": 2, "topk_group": 2}, {}, "2 groups .* leave out --whole-experts"),
        ("mixtral", {}, {"metric": "wifv"}, "only valid with --method flap --metric fisher --structure al-am"),
        ("mixtral", {}, {"structure": "ul-um"}, "only valid with --method flap --metric fisher --structure al-am"),
        ("mixtral", {}, {"whole_experts": False, "min_experts": 3}, "only valid with --whole-experts"),
        ("mixtral", {}, {"min_experts": 9}, "no layer has more than 4 experts"),
    ],
)
def test_what_is_not_defined_is_refused_before_any_work(
    family: str, changes: dict[str, Any], options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = made(tmp_path, family, **changes)
    with pytest.raises((InvalidOption, UnsupportedModel), match=words):
        flap_stream.prune(path, tmp_path / "out", options_of(tmp_path, **options))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


@pytest.mark.parametrize("family", MIXTURES)
def test_a_family_finds_the_tensors_that_its_pruned_class_cuts(family: str) -> None:
    skeleton = Skeleton(with_layer_count(tiny_config(family).to_dict() | {"architectures": []}), family)
    index = next(i for i in range(len(skeleton.layers)) if skeleton.layer_shape(i).experts)
    layer, tensors, shape = skeleton.layers[index], skeleton.layer_tensors(index), skeleton.layer_shape(index)
    routers = router_modules(mixture_of(layer))
    cut = [t for module in routers for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))]
    named = {name for name, t in (*layer.named_parameters(), *layer.named_buffers()) if any(t is own for own in cut)}
    axes = skeleton.family.router_axes(tensors)
    assert axes.keys() == named and any(name.endswith(".weight") for name in axes)
    assert all(tensors[name][axis] == len(shape.experts) for name, axis in axes.items())
    has_groups = any(hasattr(router, "num_group") for router in routers)
    assert shape.router_needs == (2 if has_groups else FAMILY_EXTRAS[family].get("num_experts_per_tok", 2))
