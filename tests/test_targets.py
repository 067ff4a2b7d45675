"""Targets in place of a ratio: met, never exceeded, and missed by less than one unit."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import random_tokens, save, save_tokens, tiny_config, tiny_model
from safetensors import safe_open

import flap_stream
from flap_stream.arithmetic.target_prices import target_of
from flap_stream.cli import main
from flap_stream.config import PlanConfig, PruneConfig, SweepConfig
from flap_stream.errors import InvalidOption, RunMismatch
from flap_stream.report.facts import read_facts
from flap_stream.stages.plan import PlanResult
from flap_stream.storage.loss import LossStore
from flap_stream.storage.run_directory import RunDirectory
from flap_stream.storage.run_manifest import model_sizes

MODELS = {  # family to dtype; None is float32 norms among bfloat16 weights
    "llama": torch.float32,
    "qwen2": None,
    "gemma2": torch.bfloat16,
    "mixtral": torch.bfloat16,
    "phi3": torch.float16,
}
CACHE = {"context": 50, "batch": 2}
TARGETS: list[tuple[str, float, dict[str, Any]]] = [  # name, share of the dense model's, other options
    ("target_parameters", 0.9, {}),
    ("target_parameters", 0.6, {"metric": "fisher", "round_neurons_to": 1}),
    ("target_parameters", 0.75, {"structure": "ul-um", "round_neurons_to": 1}),
    ("target_parameters", 0.8, {"structure": "al-mm", "remove_heads": 2}),
    ("target_size", 0.8, {"min_neurons": 40}),
    ("target_size", 0.7, {"metric": "fisher", "restore": "none"}),
    ("target_size", 0.75, {"method": "magnitude-sp"}),
    ("target_memory", 0.9, CACHE),
    ("target_memory", 0.7, {"metric": "fisher", "round_neurons_to": 1, **CACHE}),
    ("target_memory", 0.6, {"metric": "ifv", "min_heads": 2, "context": 500}),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run directory with loss scores for each model, and the models beside them."""
    place = tmp_path_factory.mktemp("targets")
    text = save_tokens(place / "tokens.npy", random_tokens(4, 12))
    for family, dtype in MODELS.items():
        model = tiny_model(tiny_config(family))
        if dtype is None:
            for module in model.modules():
                if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                    module.to(torch.bfloat16)
        save(model, place / "models" / family, dtype=dtype)
        options: dict[str, Any] = {"calibration": text, "loss_windows": 4, "dtype": "float32", "batch_size": 2}
        flap_stream.collect(place / "models" / family, place / family, **options)
    return {family: place / family for family in MODELS}


def planned(run: Path, name: str, limit: int, options: dict[str, Any]) -> PlanResult:
    return flap_stream.plan(run, **{name: limit, **options})


def dense_amount(run: Path, name: str, options: dict[str, Any]) -> int:
    with RunDirectory(run, is_writer=False) as directory:
        plan = PlanConfig(**{name: 1, **{key: options[key] for key in CACHE if key in options}})
        target = target_of(plan, directory.layer_shapes, model_sizes(directory.manifest), "bias")
    assert target is not None
    return target.dense


def one_step(run: Path, plan: PlanResult) -> int:
    """The most that the last step of a decision can take away: a KV group or a block of neurons; of all layers if
    the structure says so."""
    with RunDirectory(run, is_writer=False) as directory:
        shapes, sizes = directory.layer_shapes, model_sizes(directory.manifest)
    target = target_of(plan.options, shapes, sizes, "bias")
    assert target is not None and plan.options.neuron_multiple in (1, 8)
    steps = [(price.group, plan.options.neuron_multiple * price.neuron) for price in target.prices]
    if plan.options.structure == "ul-um":
        return sum(map(sum, steps))
    return max(map(max, steps))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "share", "options"), TARGETS)
@pytest.mark.parametrize("family", MODELS)
def test_a_target_is_met_and_one_unit_more_would_exceed_it(
    runs: dict[str, Path], family: str, name: str, share: float, options: dict[str, Any]
) -> None:
    run, options = runs[family], dict(options)
    limit = int(share * dense_amount(run, name, options))
    options.pop("restore", None)
    plan = planned(run, name, limit, options)
    assert plan.target is not None and plan.target["limit"] == limit
    assert limit - one_step(run, plan) < plan.target["reached"] <= limit
    if name == "target_parameters":
        assert plan.parameters_after == plan.target["reached"]
    assert plan.sizes.width_multiple % plan.options.neuron_multiple == 0


def files_and_elements(out: Path) -> tuple[int, int, int]:
    """Bytes of the weight files, bytes of their tensors, and parameters."""
    files = list(out.glob("*.safetensors"))
    nbytes = elements = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                tensor = tensors.get_tensor(name)
                nbytes, elements = nbytes + tensor.nbytes, elements + tensor.numel()
    return sum(file.stat().st_size for file in files), nbytes, elements


def cache_bytes(out: Path, tokens: int, item_bytes: int) -> int:
    config = json.loads((out / "config.json").read_text())
    groups = sum(layer["num_key_value_heads"] for layer in config["per_layer_config"].values())
    return 2 * config["head_dim"] * groups * tokens * item_bytes


@pytest.mark.parametrize(
    ("family", "name", "options", "shards"),
    [
        ("llama", "target_size", {}, 5 * 10**9),
        ("qwen2", "target_size", {"round_neurons_to": 1}, 100_000),
        ("mixtral", "target_parameters", {}, 5 * 10**9),
        ("gemma2", "target_memory", {"metric": "fisher", **CACHE}, 5 * 10**9),
        ("qwen2", "target_memory", CACHE, 5 * 10**9),
    ],
)
def test_what_is_written_is_what_was_promised(
    runs: dict[str, Path], tmp_path: Path, family: str, name: str, options: dict[str, Any], shards: int
) -> None:
    limit = int(0.8 * dense_amount(runs[family], name, options))
    plan = planned(runs[family], name, limit, options)
    record = flap_stream.rewrite(runs[family], tmp_path / "out", max_shard_bytes=shards).record
    files, nbytes, elements = files_and_elements(tmp_path / "out")
    reached = record["target"]["reached"]
    assert record["options"][name] == limit and record["options"]["ratio"] == plan.decoder_ratio
    if name == "target_parameters":
        assert elements == reached
    elif name == "target_memory":
        assert nbytes + cache_bytes(tmp_path / "out", CACHE["context"] * CACHE["batch"], 2) == reached
    else:
        assert files <= reached
        assert reached - files < (200 if shards > files else 2000)  # the headers are counted as one, with many digits
        assert files <= limit or shards < files  # a plan does not know the limit of files, a whole job does


def test_a_whole_job_counts_the_files_and_biases_that_it_writes(runs: dict[str, Path], tmp_path: Path) -> None:
    model, text = runs["llama"].parent / "models" / "llama", str(runs["llama"].parent / "tokens.npy")
    limit = int(0.7 * dense_amount(runs["llama"], "target_size", {}))
    for restore, shards in (("none", 10**9), ("bias", 60_000)):
        out = tmp_path / restore
        options = PruneConfig(calibration=(text,), target_size=limit, restore=restore, max_shard_bytes=shards)
        record = flap_stream.prune(model, out, options).record
        files = files_and_elements(out)[0]
        assert files <= record["target"]["reached"] <= limit < files + 8 * 3 * 64 * 4 + 2000


def test_the_order_is_that_of_a_ratio(runs: dict[str, Path]) -> None:
    for metric in ("wifv", "fisher"):
        for name in ("target_parameters", "target_size"):
            limit = int(0.8 * dense_amount(runs["llama"], name, {}))
            plan = planned(runs["llama"], name, limit, {"metric": metric})
            same = flap_stream.plan(runs["llama"], metric=metric, ratio=plan.decoder_ratio)
            for one, other in zip(plan.layers, same.layers, strict=True):
                assert np.array_equal(one.kv_groups, other.kv_groups) and np.array_equal(one.neurons, other.neurons)


def test_a_target_of_memory_counts_what_groups_take_of_the_cache(runs: dict[str, Path]) -> None:
    kept = []
    for context in (1, 20_000):
        limit = int(0.7 * dense_amount(runs["llama"], "target_memory", {"context": context}))
        plan = flap_stream.plan(runs["llama"], metric="fisher", target_memory=limit, context=context)
        kept.append(sum(len(layer.kv_groups) for layer in plan.layers))
    assert kept[1] < kept[0]


def test_older_run_directories_never_exceed_a_target(runs: dict[str, Path]) -> None:
    for family in ("llama", "phi3"):
        with RunDirectory(runs[family], is_writer=False) as directory:
            known, manifest = model_sizes(directory.manifest), directory.manifest
            for name in ("unit_bytes", "header_bytes"):
                del manifest["sizes"][name]  # type: ignore[misc]
            guessed = model_sizes(manifest)
        assert replace(guessed, header_bytes=known.header_bytes) == known
        assert all(a >= b for a, b in zip(guessed.header_bytes, known.header_bytes, strict=True))


# --- what is refused, and what is said ---


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("plan RUN --ratio 0.2 --target-size 1GiB", "--ratio 0.2 and --target-size 1073741824 both say"),
        ("plan RUN --ratio 0.3 --target-parameters 5B", "--ratio 0.3 and --target-parameters 5000000000 both say"),
        ("prune MODEL OUT --target-size 1GiB --target-parameters 5B", "only one target can be met"),
        ("plan RUN --context 5", "only valid with --target-memory SIZE"),
        ("plan RUN --target-size 1MB --batch 2", "only valid with --target-memory SIZE"),
        ("plan RUN --target-memory 1MB", "--target-memory needs --context TOKENS"),
        ("plan RUN --target-parameters 5X", "is not a number of parameters; write one such as 5B"),
        ("plan RUN --target-parameters 5B", "the dense model has 105,024 parameters already; lower the target"),
        ("prune MODEL OUT --calibration TEXT --target-parameters 5B", "lower the target"),
        ("prune MODEL OUT --method wanda-sp --calibration TEXT --target-size 1MB", "not valid with --method wanda-sp"),
    ],
)
def test_targets_that_mean_nothing_are_refused(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, words: str
) -> None:
    place = runs["llama"].parent
    names = {"RUN": runs["llama"], "MODEL": place / "models/llama", "OUT": tmp_path / "out"}
    names["TEXT"] = place / "tokens.npy"
    assert main([str(names.get(part, part)) for part in command.split()]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


def test_a_sweep_has_no_target(runs: dict[str, Path]) -> None:
    with pytest.raises(InvalidOption, match="--target-size 100000 would have no effect"):
        flap_stream.sweep(runs["llama"], target_size=100_000)


def test_the_released_decision_meets_a_target_too(runs: dict[str, Path]) -> None:
    for structure in ({}, {"structure": "ul-um"}, {"structure": "ul-mm", "remove_heads": 6}):
        plan = planned(runs["llama"], "target_parameters", 80_000, {"statistics": "released", **structure})
        steps = 3 * (64 * 3 + 64 * 16 * 6) if structure else 64 * 16 * 6
        assert 80_000 - steps < plan.parameters_after <= 80_000


@pytest.mark.parametrize("options", [{}, {"structure": "ul-um"}, {"structure": "al-mm", "remove_heads": 6}])
def test_the_smallest_that_a_refusal_names_can_be_reached(runs: dict[str, Path], options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match="cannot be met: the smallest model with") as refused:
        flap_stream.plan(runs["llama"], target_parameters=1000, **options)
    named = re.search(r"has ([\d,]+) parameters", str(refused.value))
    assert named is not None
    least = int(named[1].replace(",", ""))
    assert flap_stream.plan(runs["llama"], target_parameters=least, **options).parameters_after == least
    with pytest.raises(InvalidOption, match=f"has {least:,} parameters"):
        flap_stream.plan(runs["llama"], target_parameters=least - 1, **options)


def test_a_target_is_recorded_shown_and_compared(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    place = runs["llama"].parent
    model, out, text = str(place / "models/llama"), str(tmp_path / "out"), str(place / "tokens.npy")
    command = ["prune", model, out, "--calibration", text, "--keep-run"]
    assert main([*command, "--target-parameters", "100K"]) == 0
    record = json.loads((tmp_path / "out/pruning.json").read_text())
    assert record["options"]["target_parameters"] == 100_000 and "target_size" not in record["options"]
    said = f"target       {record['parameters']['after']:,} of at most 100,000 parameters"
    assert said in capsys.readouterr().out
    for shown in (out, f"{out}.run"):
        assert main(["inspect", shown]) == 0 and said in capsys.readouterr().out
    assert read_facts(tmp_path / "out.run").target == record["target"]
    assert main(["report", out, "--html", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert f"Target: {said.removeprefix('target').strip()}." in page
    assert f"pruned by {100 * record['realised_ratio']['decoder']:.1f} %" in page
    capsys.readouterr()
    assert main([*command, "--target-parameters", "1e5"]) == 0 and "already complete" in caplog.text
    capsys.readouterr()
    for other, words in (
        (("--target-parameters", "90K"), "--target-parameters was 100000, now 90000"),
        (("--ratio", "0.3"), "--target-parameters was 100000, now not given"),
        (("--target-size", "400KB"), "--target-size was not given, now 400000"),
    ):
        assert main([*command, *other]) == 2
        assert words in capsys.readouterr().err


# --- predictions ---


def test_the_predicted_rise_is_half_the_sum_of_f_of_what_goes(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(runs["mixtral"], tmp_path / "run")
    plan = flap_stream.plan(run, metric="fisher", ratio=0.3)
    with RunDirectory(run, is_writer=False) as directory:
        found = [LossStore.of(directory).read(i) for i in range(len(plan.layers))]
    total = 0.0
    for layer, keep in zip(found, plan.layers, strict=True):
        total += sum(f for u, f in enumerate(layer.attention) if u not in keep.kv_groups) / 2
        total += sum(f for u, f in enumerate(layer.mlp) if u not in keep.neurons) / 2
    assert plan.predicted is not None and total > 0
    assert plan.predicted.window == pytest.approx(total, rel=1e-12)
    assert plan.predicted.token == pytest.approx(total / 11, rel=1e-12)  # windows of 12 tokens
    assert plan.predicted.perplexity_factor == pytest.approx(np.exp(total / 11), rel=1e-12)
    assert main(["plan", str(run), "--metric", "fisher", "--ratio", "0.3"]) == 0
    assert f"predicted to rise by {total:.4g} nats a window" in capsys.readouterr().out


def test_a_predicted_curve_needs_no_model(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(runs["llama"], tmp_path / "run")
    options = SweepConfig(ratios=(0.2, 0.3, 0.5), metric="fisher", predict=True)
    points = flap_stream.sweep(run, options, model=tmp_path / "nowhere").points
    for point in points:
        assert point.predicted == flap_stream.plan(run, metric="fisher", ratio=point.ratio).predicted
    rises = [point.predicted.token for point in points if point.predicted is not None]
    assert rises == sorted(rises)
    by_fluctuation = flap_stream.sweep(run, replace(options, metric="wifv")).points
    assert all(a.predicted.token >= b.predicted.token for a, b in zip(by_fluctuation, points, strict=True))  # type: ignore[union-attr]
    assert main(["sweep", str(run), "--predict", "--metric", "fisher", "--ratios", "0.3", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["points"][0]["predicted"]["token"] == pytest.approx(rises[1])
    assert main(["sweep", str(run), "--predict", "--metric", "fisher", "--ratios", "0.3"]) == 0
    assert f"{rises[1]:+.4g}" in capsys.readouterr().out


def test_a_prediction_asks_for_loss_scores(place: Path) -> None:
    flap_stream.collect("model", "run", calibration="tokens.npy")
    with pytest.raises(RunMismatch, match="--loss-windows 256"):
        flap_stream.sweep("run", predict=True)
