"""Whole layers removed: how they are scored, what is written, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed_jobs import require_same_after_a_kill
from masked import decoder_of, masked_model
from models import load, random_tokens, save, save_tokens, tiny_config, tiny_model
from rank_jobs import RankJob
from torch.nn import functional

import flap_stream
from flap_stream.arithmetic.allocation import LayerKeep, allocate
from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.arithmetic.scoring import LayerScores
from flap_stream.cli import main
from flap_stream.config import CollectConfig, EvaluateConfig, PlanConfig, PruneConfig, SweepConfig
from flap_stream.errors import CorruptRun, InvalidOption, UnsupportedModel
from flap_stream.model.families import FAMILIES
from flap_stream.storage.run_directory import RunDirectory

LAYERS = 6
TOKENS = random_tokens(7, 24)
# With what each layer is, where the defaults of a family would make all layers alike.
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 3},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1, 0, 1]},
    "qwen3_moe": {"mlp_only_layers": [1, 3]},
    "deepseek_v3": {"first_k_dense_replace": 2},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention", "linear_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"] * 2},
}
_BY_NUMBER = "depends on its number in a way that config.json cannot say"
REFUSED = {
    **dict.fromkeys(("diffllama", "minimax", "minicpm3"), _BY_NUMBER),
    "gemma3n_text": "hand on more than hidden states",
}
HYBRID = ["full_attention", "linear_attention", "full_attention", "full_attention"]
BY_LOSS: dict[str, Any] = {"method": "flap", "metric": "fisher", "depth": True, "loss_windows": 5}
QUICK = ("llama", "gemma3_text", "qwen3_moe", "qwen3_next")


def options_of(place: Path, **changes: Any) -> PruneConfig:
    given = {"ratio": 0.6, "calibration": (str(place / "tokens.npy"),), "max_shard_bytes": 60_000, "batch_size": 3}
    return PruneConfig(**{**given, "method": "shortgpt", **changes})


def made(place: Path, family: str, layers: int = LAYERS, **changes: Any) -> Path:
    """A tiny model of a family, and windows beside it."""
    place.mkdir(exist_ok=True)
    save_tokens(place / "tokens.npy", TOKENS)
    own = CASES.get(family, {}) if layers == LAYERS else {}
    return save(tiny_model(tiny_config(family, layers=layers, **{**own, **changes}), seed=3), place / "model")


def gone_of(record: dict[str, Any]) -> list[int]:
    return sorted(set(range(len(record["layers"]))) - set(record["kept_layers"]))


def skipping(model: Any, gone: list[int]) -> Any:
    """The model with its layers of these numbers replaced by nothing."""

    def skip(_layer: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> Any:
        return (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]

    for number in gone:
        decoder_of(model).layers[number].register_forward_hook(skip)
    return model


def influences(model: Any) -> list[float]:
    """Block influence of each layer in memory."""
    found: list[float] = []

    def see(_layer: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        found.append(1 - float(functional.cosine_similarity(inputs[0].double(), after.double(), dim=-1).mean()))

    handles = [layer.register_forward_hook(see) for layer in decoder_of(model).layers]
    with torch.no_grad():
        model(torch.from_numpy(TOKENS))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    "family", [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in CASES]
)
def test_the_checkpoint_computes_what_the_dense_model_does_without_the_layers(family: str, tmp_path: Path) -> None:
    path = made(tmp_path, family)
    record = flap_stream.prune(path, tmp_path / "out", options_of(tmp_path, keep_run=True)).record
    gone = gone_of(record)
    with RunDirectory(tmp_path / "out.run") as run:
        found = [run.statistics.read(i).block for i in range(LAYERS)]
    values = influences(load(path))
    np.testing.assert_allclose([1 - float(own.similarity[0]) for own in found if own], values, rtol=1e-5)
    assert gone == sorted(np.argsort(values)[: len(gone)].tolist()) and 1 < len(gone) < LAYERS
    ours, expected = load(tmp_path / "out"), skipping(load(path), gone)
    tokens = random_tokens(3, 20, seed=5)
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        assert (ours(ids).logits - expected(ids).logits).abs().max() <= 1e-5
        in_memory = expected(ids, labels=ids).loss.exp().item()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    # the dense model would ask its first layer's cache how many tokens there were
    assert torch.equal(ours.generate(ids, **settings), expected.generate(ids, use_cache=False, **settings))
    assert sum(tensor.numel() for tensor in ours.state_dict().values()) == record["parameters"]["after"]
    assert len(decoder_of(ours).layers) == ours.config.num_hidden_layers == LAYERS - len(gone)
    text = (save_tokens(tmp_path / "evaluation.npy", tokens),)
    streamed = flap_stream.evaluate(tmp_path / "out", EvaluateConfig(text=text)).perplexity
    assert streamed == pytest.approx(in_memory, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_the_checkpoint_is_pruned_again(family: str, tmp_path: Path) -> None:
    path = made(tmp_path, family, layers=4, **({"layer_types": HYBRID} if family == "qwen3_next" else {}))
    flap_stream.prune(path, tmp_path / "out", options_of(tmp_path, ratio=0.3))
    ids = torch.from_numpy(random_tokens(3, 20, seed=5))
    options = PruneConfig(ratio=0.3, calibration=(str(tmp_path / "tokens.npy"),), round_neurons_to=1)
    record = flap_stream.prune(tmp_path / "out", tmp_path / "units", options).record
    expected = masked_model(tmp_path / "out", record, torch.from_numpy(TOKENS))
    fewer = flap_stream.prune(tmp_path / "units", tmp_path / "layers", options_of(tmp_path, ratio=0.6)).record
    skipped = skipping(load(tmp_path / "units"), gone_of(fewer))
    with torch.no_grad():
        assert (load(tmp_path / "units")(ids).logits - expected(ids).logits).abs().max() <= 1e-5
        assert (load(tmp_path / "layers")(ids).logits - skipped(ids).logits).abs().max() <= 1e-5


def test_neither_the_batch_size_nor_the_number_of_ranks_changes_a_byte(tmp_path: Path) -> None:
    path, digests = made(tmp_path, "llama"), set()
    for batch_size in (1, 2, 7):
        run = tmp_path / f"run-{batch_size}"
        options = CollectConfig(
            method="shortgpt", calibration=(str(tmp_path / "tokens.npy"),), batch_size=batch_size, device="cpu"
        )
        flap_stream.collect(path, run, options)
        with RunDirectory(run) as directory:
            blocks = [directory.statistics.read(i).block for i in range(LAYERS)]
        digests.add(tuple(own.similarity.tobytes() for own in blocks if own))
    assert len(digests) == 1 and len(next(iter(digests))) == LAYERS
    job = RankJob(tmp_path / "ranks", tiny_config("llama", layers=4), method="shortgpt", structure=None, ratio=0.5)
    assert job.trouble("two", 2) is None


def test_a_killed_job_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    path, options = made(tmp_path, "gemma3_text"), options_of(tmp_path)
    flap_stream.prune(path, tmp_path / "whole", options)
    require_same_after_a_kill(path, tmp_path / "whole", options, tmp_path / "out")


# --- the decision ---


def decided(values: list[float], ratio: float, sizes: list[int] | None = None) -> list[int]:
    """Layers that go, of these block influences and numbers of neurons."""
    sizes = sizes or [10] * len(values)
    shapes = [LayerShape(0, 1, 8, size, 0, 3) for size in sizes]
    scores = [LayerScores(np.zeros(0), np.zeros(size), layer=value) for value, size in zip(values, sizes, strict=True)]
    keeps = allocate(scores, shapes, PlanConfig(method="shortgpt", ratio=ratio))
    assert all(len(keep.neurons) == (0 if keep.is_gone else size) for keep, size in zip(keeps, sizes, strict=True))
    return [number for number, keep in enumerate(keeps) if keep.is_gone]


def test_the_layers_of_least_influence_go_as_many_as_the_ratio_allows() -> None:
    assert decided([0.1, 0.4, 0.2, 0.3], 0.5) == [0, 2] == decided([0.1, 0.4, 0.2, 0.3], 0.74)
    assert decided([0.4, 0.1, 0.2, 0.3], 0.75) == [1, 2, 3] == decided([0.4, 0.1, 0.2, 0.3], 0.99)
    assert decided([0.3] * 3, 1 / 3) == [0]
    assert decided([0.5, 0.1, 0.2], 0.5, [20, 10, 10]) == [1, 2]
    assert decided([0.1, 0.5, 0.2], 0.5, [20, 10, 10]) == [0]
    assert decided([0.1, 0.5, 0.2], 0.5, [0, 10, 10]) == [2]  # of the first the ratio counts nothing
    with pytest.raises(InvalidOption, match=r"the first to go has 0.3334 of the prunable weights"):
        decided([0.3, 0.1, 0.3], 0.3)


# --- what becomes of it ---


def test_a_sweep_measures_what_rewrite_writes_and_all_say_which_layers_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run, text = made(tmp_path, "qwen3_moe"), tmp_path / "run", (str(tmp_path / "tokens.npy"),)
    flap_stream.collect(path, run, CollectConfig(calibration=text, method="shortgpt"))
    swept = flap_stream.sweep(run, SweepConfig(method="shortgpt", ratios=(0.3, 0.6), evaluate=text)).points[1]
    assert main(["plan", str(run), "--method", "shortgpt", "--ratio", "0.6"]) == 0
    record = flap_stream.rewrite(run, tmp_path / "out").record
    assert main(["inspect", str(tmp_path / "out")]) == 0
    gone = gone_of(record)
    assert capsys.readouterr().out.count("(removed)") == 2 * len(gone) > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("(removed)") == len(gone) and "whole decoder layers removed" in card
    assert swept.parameters == record["parameters"]["after"]
    measured = flap_stream.evaluate(tmp_path / "out", EvaluateConfig(text=text)).perplexity
    assert swept.perplexity == pytest.approx(measured, rel=1e-5)


def test_a_plan_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    path, run = made(tmp_path, "llama", layers=3), tmp_path / "run"
    flap_stream.collect(path, run, CollectConfig(calibration=(str(tmp_path / "tokens.npy"),), method="shortgpt"))
    flap_stream.plan(run, method="shortgpt", ratio=0.4)
    with RunDirectory(run) as directory:
        options, keeps = directory.plan.read()
        gone = next(keep for keep in keeps if keep.is_gone)
        directory.plan.write(options, [gone, gone, gone])
        with pytest.raises(CorruptRun, match="it keeps no layer"):
            directory.plan.read()


# --- what is refused ---


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in REFUSED])
def test_a_family_computes_the_same_without_its_first_layer(family: str, tmp_path: Path) -> None:
    path, run = made(tmp_path, family, layers=3), tmp_path / "run"
    flap_stream.collect(path, run, CollectConfig(calibration=(str(tmp_path / "tokens.npy"),), method="shortgpt"))
    nothing = np.zeros(0, dtype=np.int64)
    with RunDirectory(run) as directory:  # a decision made by hand
        keeps = [LayerKeep(np.arange(s.kv_groups), np.arange(s.neurons)) for s in directory.layer_shapes]
        keeps[0] = LayerKeep(nothing, nothing, is_gone=True)
        directory.plan.write(PlanConfig(method="shortgpt", ratio=0.5), keeps)
    record = flap_stream.rewrite(run, tmp_path / "out").record
    ours, expected = load(tmp_path / "out"), skipping(load(path), [0])
    ids = torch.from_numpy(random_tokens(3, 20, seed=5))
    with torch.no_grad():
        assert (ours(ids).logits - expected(ids).logits).abs().max() <= 1e-5
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    # transformers' dense DeepSeek-V3.2 itself attends to other tokens with a cache than without
    found = ours.generate(ids, use_cache=family != "deepseek_v32", **settings)
    assert torch.equal(found, expected.generate(ids, use_cache=False, **settings))
    assert sum(tensor.numel() for tensor in ours.state_dict().values()) == record["parameters"]["after"]


@pytest.mark.parametrize("family", REFUSED)
def test_layers_that_are_not_the_same_under_another_number_are_not_removed(family: str, tmp_path: Path) -> None:
    path = made(tmp_path, family, layers=3)
    with pytest.raises(UnsupportedModel, match=REFUSED[family]):
        flap_stream.prune(path, tmp_path / "out", options_of(tmp_path))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


def test_a_hybrid_keeps_a_layer_whose_cache_counts_tokens(tmp_path: Path) -> None:
    path, run = made(tmp_path, "qwen3_next", layers=3), tmp_path / "run"  # the second layer alone is attention
    flap_stream.collect(path, run, CollectConfig(calibration=(str(tmp_path / "tokens.npy"),), method="shortgpt"))
    flap_stream.plan(run, method="shortgpt", ratio=0.4)
    with RunDirectory(run) as directory:  # a decision made by hand
        options, keeps = directory.plan.read()
        gone, whole = sorted(keeps, key=lambda keep: not keep.is_gone)[:2]
        directory.plan.write(options, [whole, gone, whole])
    with pytest.raises(UnsupportedModel, match=r"no attention would be left .*, only layers \[0, 2\]; lower the ratio"):
        flap_stream.rewrite(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 0.1}, "the first to go has 0.3334 of the prunable weights"),
        ({"target_parameters": 1000, "ratio": None}, "--target-parameters is not valid with --method shortgpt"),
        ({**BY_LOSS, "metric": "wifv"}, "only valid with --method flap --metric fisher --structure al-am"),
        ({**BY_LOSS, "whole_experts": True}, "without --whole-experts"),
        ({**BY_LOSS, "target_parameters": 1000, "ratio": None}, "--target-parameters is not valid with --depth"),
        ({"restore": "bias"}, "shortgpt is defined without a bias"),
        ({"min_neurons": 3}, "only valid with a method that removes KV groups and neurons"),
        ({"round_neurons_to": 32}, "only valid with a method that removes KV groups and neurons"),
        ({"metric": "ifv"}, "only valid with --method flap"),
        ({"structure": "ul-um"}, "not valid with --method shortgpt, which is al-am"),
    ],
)
def test_what_is_not_defined_is_refused_before_any_work(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = made(tmp_path, "llama", layers=3)
    given = {"calibration": (str(tmp_path / "tokens.npy"),), "method": "shortgpt", "ratio": 0.6, **options}
    given = {name: value for name, value in given.items() if value is not None}
    with pytest.raises(InvalidOption, match=words):
        flap_stream.prune(path, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()
