"""Perplexities of a sweep are those of the checkpoints that would be written, from one reading of the model."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import random_tokens, save, save_tokens, tiny_config, tiny_model
from test_cli import run as command
from test_interruption import identities

import flap_stream
from flap_stream.cli import main
from flap_stream.config import CollectConfig, EvaluateConfig, PlanConfig, RewriteConfig, SweepConfig
from flap_stream.config.values import parse_ratios
from flap_stream.engine import placement, snapshots
from flap_stream.engine.layer_pass import Batch, LayerPass
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import InvalidOption, RunMismatch
from flap_stream.stages import sweep as ratio_sweep
from flap_stream.storage.run_directory import RunDirectory

pytestmark = pytest.mark.slow

RATIOS = (0.2, 0.5)


class Collected:
    """A tiny model, its collection, and text to evaluate on."""

    def __init__(self, place: Path, family: str = "llama", **changes: Any) -> None:
        self.place, self.run = place, place / "run"
        self.model = save(tiny_model(tiny_config(family, **changes), seed=3), place / "model")
        self.text = save_tokens(place / "text.npy", random_tokens(5, 20, seed=5))
        calibration = (save_tokens(place / "calibration.npy", random_tokens(8, 24)),)
        flap_stream.collect(self.model, self.run, CollectConfig(calibration=calibration, batch_size=3))

    def options(self, **changes: Any) -> SweepConfig:
        return SweepConfig(**{"ratios": RATIOS, "evaluate": (self.text,), "batch_size": 2, **changes})


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Collected:
    return Collected(tmp_path_factory.mktemp("sweep"))


CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biases": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "phi3": {"family": "phi3"},
    "gemma2": {"family": "gemma2", "tied": True},
    "mixtral": {"family": "mixtral"},
    "qwen3_moe": {"family": "qwen3_moe"},
}


@pytest.mark.parametrize("case", CASES)
def test_perplexities_are_those_of_the_written_checkpoints(case: str, tmp_path: Path) -> None:
    made = Collected(tmp_path, **CASES[case])
    measure = EvaluateConfig(text=(made.text,), batch_size=2)
    for restore in ("bias", "none"):
        result = flap_stream.sweep(made.run, made.options(restore=restore))
        dense = flap_stream.evaluate(made.model, measure)
        assert result.dense_perplexity == pytest.approx(dense.perplexity, rel=1e-6)
        for point in result.points:
            plan = flap_stream.plan(made.run, PlanConfig(ratio=point.ratio))
            out = tmp_path / f"{restore}-{point.ratio}"
            record = flap_stream.rewrite(made.run, out, RewriteConfig(restore=restore)).record
            written = flap_stream.evaluate(out, measure)
            assert point.perplexity == pytest.approx(written.perplexity, rel=1e-5)
            assert point.perplexity is not None
            assert abs(point.perplexity / dense.perplexity - 1) > 3e-5  # so that equality says something
            assert (point.decoder_ratio, point.parameters) == (plan.decoder_ratio, record["parameters"]["after"])


def test_layers_that_lose_all_heads_and_bfloat16_are_as_written(tmp_path: Path) -> None:
    made = Collected(tmp_path, layers=2)
    common: dict[str, Any] = {"min_heads": 0, "structure": "al-mm", "remove_heads": 4}
    for dtype, precision in (("float32", 1e-5), ("bfloat16", 2e-2)):
        result = flap_stream.sweep(made.run, made.options(ratios=(0.7,), dtype=dtype, **common))
        kept = flap_stream.plan(made.run, PlanConfig(ratio=0.7, **common)).layers
        assert min(len(keep.kv_groups) for keep in kept) < 2
        flap_stream.rewrite(made.run, tmp_path / dtype, RewriteConfig())
        written = flap_stream.evaluate(tmp_path / dtype, EvaluateConfig(text=(made.text,), dtype=dtype))
        assert result.points[0].perplexity == pytest.approx(written.perplexity, rel=precision)


def test_every_layer_is_read_once_for_all_ratios(collected: Collected) -> None:
    ratios = tuple(np.linspace(0.1, 0.7, 8).round(2).tolist())
    few, many = (
        flap_stream.sweep(collected.run, collected.options(ratios=chosen, samples=3)) for chosen in (ratios[:1], ratios)
    )
    dense = flap_stream.evaluate(collected.model, EvaluateConfig(text=(collected.text,), samples=3, batch_size=2))
    assert many.bytes_read == few.bytes_read == dense.bytes_read
    assert [point.ratio for point in many.points] == list(ratios)


def test_the_stored_plan_and_statistics_stay_and_verify_checks_the_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Collected(tmp_path)
    flap_stream.plan(made.run, PlanConfig(ratio=0.4))
    before = identities(made.run / "statistics.zarr"), (made.run / "plan.json").read_bytes()
    flap_stream.sweep(made.run, made.options())
    assert (identities(made.run / "statistics.zarr"), (made.run / "plan.json").read_bytes()) == before
    with RunDirectory(made.run) as run:
        assert run.plan.read()[0].ratio == 0.4
        (curve,) = run.sweeps.curves()
    assert [point["ratio"] for point in curve["points"]] == list(RATIOS) and curve["text"]["shape"] == [5, 20]
    assert command(capsys, "inspect", made.run, "--verify")[0] == 0
    (file,) = (made.run / "sweeps").iterdir()
    file.write_bytes(file.read_bytes().replace(b"0.2", b"0.3"))
    code, _, err = command(capsys, "inspect", made.run, "--verify")
    assert code == 1 and "sweeps/" in err and "altered" in err
    flap_stream.sweep(made.run, made.options())  # measured again
    assert command(capsys, "inspect", made.run, "--verify")[0] == 0


def test_a_sweep_goes_on_where_it_was_and_only_for_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Collected(tmp_path)
    passes: list[Any] = []
    measure = ratio_sweep.perplexities

    def counted(model: Any, tokens: Any, decisions: Any, *rest: Any) -> list[float]:
        if len(passes) == stop_at:
            raise KeyboardInterrupt
        passes.append(len(decisions))
        return measure(model, tokens, decisions, *rest)

    monkeypatch.setattr(ratio_sweep, "perplexities", counted)
    monkeypatch.setattr(
        ratio_sweep, "_group", lambda model, options, tokens, *_: (1, model.place(options, model.job(5, 20)))
    )
    stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        flap_stream.sweep(made.run, made.options())
    stop_at = 99
    result = flap_stream.sweep(made.run, made.options())
    assert passes == [1, 1, 1]  # the dense model, and each ratio once
    assert flap_stream.sweep(made.run, made.options()).points == result.points and len(passes) == 3
    flap_stream.sweep(made.run, made.options(restore="none"))
    flap_stream.sweep(made.run, made.options(samples=4))
    assert len(passes) == 8  # the dense model is known to the first of the two
    with RunDirectory(made.run) as run:
        assert len(run.sweeps.curves()) == 3


@pytest.mark.parametrize("place", ["host", "disk"])
def test_a_reading_of_the_model_goes_on_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    made = Collected(tmp_path)
    run, options = made.run, made.options(samples=3)
    find, run_layer = placement.place, LayerPass.run
    layers: list[Any] = []

    def stopping(batches: LayerPass, index: int, *rest: Any, **how: Any) -> Iterator[Batch]:
        if index == stop_at:
            raise KeyboardInterrupt
        layers.append(index)
        return run_layer(batches, index, *rest, **how)

    monkeypatch.setattr(placement, "place", lambda *a: replace(find(*a), hidden_place=place))
    monkeypatch.setattr(LayerPass, "run", stopping)
    monkeypatch.setattr(snapshots, "_LAYER_TIME_PER_WRITE", 0.0)
    stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        flap_stream.sweep(run, options)
    assert sorted(file.name for file in (run / "hidden-sweep").iterdir()) == ["0001.bin", "0002.bin"]
    stop_at = 99
    result = flap_stream.sweep(run, options)
    assert sorted(layers) == [0, 0, 0, 1, 1, 1, 2, 2, 2]  # for the dense model and two ratios
    assert not list((run / "hidden-sweep").iterdir())
    shutil.rmtree(run / "sweeps")
    assert flap_stream.sweep(run, options).points == result.points
    with RunDirectory(run) as directory:
        assert directory.damaged() == []


def test_ratios_go_in_groups_where_their_hidden_states_have_no_room(
    collected: Collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, groups = flap_stream.sweep(collected.run, collected.options(samples=2)), []
    place, measure = placement.place, ratio_sweep.perplexities

    def crowded(job: placement.Job, *rest: Any) -> placement.Placement:
        return replace(place(job, *rest), hidden_place="host" if job.samples <= 2 else "disk")

    def counted(model: Any, tokens: Any, decisions: Any, *rest: Any) -> list[float]:
        groups.append(len(decisions))
        return measure(model, tokens, decisions, *rest)

    monkeypatch.setattr(placement, "place", crowded)
    monkeypatch.setattr(ratio_sweep, "perplexities", counted)
    files = collected.run / "sweeps"
    for file in files.iterdir():
        file.write_bytes(b"")  # so that it is measured again
    monkeypatch.setattr(StreamedModel, "layer_bytes", lambda self, index: 1)  # reading the model again costs nothing
    again = flap_stream.sweep(collected.run, collected.options(samples=2))
    assert groups == [1, 1, 1]
    assert again.points == at_once.points
    for file in files.iterdir():
        file.write_bytes(b"")
    monkeypatch.setattr(StreamedModel, "layer_bytes", lambda self, index: 1 << 40)  # on disk rather than that
    again = flap_stream.sweep(collected.run, collected.options(samples=2))
    assert groups == [1, 1, 1, 3]
    assert again.points == at_once.points


def test_the_limit_is_found_between_the_ratios(collected: Collected) -> None:
    swept = flap_stream.sweep(collected.run, collected.options(ratios=(0.1, 0.7)))
    assert swept.dense_perplexity is not None
    rises = {p.ratio: p.perplexity / swept.dense_perplexity - 1 for p in swept.points if p.perplexity is not None}
    wanted = sum(rises.values()) / 2
    assert rises[0.1] < wanted < rises[0.7]
    options = collected.options(ratios=(0.1, 0.7), max_perplexity_increase=wanted, resolution=0.1)
    result = flap_stream.sweep(collected.run, options)
    limit = result.limit
    assert limit is not None and limit.ratio is not None and 0.1 <= limit.ratio < 0.7 and not limit.is_last
    assert len(result.points) == 5  # halved thrice
    above = min(p.ratio for p in result.points if p.ratio > limit.ratio)
    assert above - limit.ratio <= 0.1 + 1e-9
    for point in result.points:
        if point.ratio in (limit.ratio, above):
            assert point.perplexity is not None
            assert (point.perplexity <= limit.perplexity) == (point.ratio == limit.ratio)
    again = flap_stream.sweep(collected.run, options)
    assert (again.points, again.limit) == (result.points, result.limit)
    generous = flap_stream.sweep(collected.run, replace(options, max_perplexity_increase=1e6)).limit
    assert generous is not None and generous.ratio == 0.7 and generous.is_last


def test_without_text_it_only_plans_and_needs_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Collected(tmp_path)
    made.model.rename(tmp_path / "elsewhere")
    code, out, _ = command(capsys, "sweep", made.run, "--ratios", "0.1:0.3:0.1", "--json")
    body = json.loads(out)
    assert code == 0 and [p["ratio"] for p in body["points"]] == [0.1, 0.2, 0.3] and body["dense_perplexity"] is None
    assert not (made.run / "sweeps").exists() and not (made.run / "plan.json").exists()
    arguments = ("sweep", made.run, "--ratios", "0.2", "--evaluate", made.text, "--max-perplexity-increase", "5%")
    code, _, err = command(capsys, *arguments)
    assert code == 2 and "no such model" in err
    code, out, _ = command(capsys, *arguments, "--model", tmp_path / "elsewhere", "--resolution", "0.1", "--quiet")
    assert code == 0 and "perplexity" in out and "of the dense perplexity" in out


@pytest.mark.parametrize(
    ("text", "ratios"),
    [
        ("0.1:0.6:0.1", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)),
        ("0.2", (0.2,)),
        ("0.5,0.2,0.2", (0.2, 0.5)),
        ("0.1:0.35:0.1", (0.1, 0.2, 0.3)),
        ("10%:30%:10%", (0.1, 0.2, 0.3)),
    ],
)
def test_ratios_are_read_both_ends_included(text: str, ratios: tuple[float, ...]) -> None:
    assert parse_ratios(text) == ratios


NO_RATIOS = [
    "",
    "a",
    "0.1:0.2",
    "0.1:0.6:0",
    "0.1:0.6:-0.1",
    "0.6:0.1:0.1",
    "0.1,0.2:0.3",
    "nan:1:0.1",
    "0:1e1000000:0.1",
]


@pytest.mark.parametrize("text", NO_RATIOS)
def test_what_is_no_list_of_ratios_is_refused(text: str) -> None:
    with pytest.raises(InvalidOption, match="not a list of ratios"):
        parse_ratios(text)


def test_too_many_ratios_are_called_that() -> None:
    with pytest.raises(InvalidOption, match="more than 1000 ratios; use a larger step"):
        parse_ratios("0.0001:0.5:0.0001")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--ratios 0:0.5:0.1", "--ratios is 0.0"),
        ("--ratios 0.2,nan", "not a list of ratios"),
        ("--ratios 0.2,1.5", "--ratios is 1.5"),
        ("--ratios 0.999", "--ratio 0.999 would remove units that must be kept"),
        ("--max-perplexity-increase 5%", "needs --evaluate"),
        ("--max-perplexity-increase much --evaluate text.npy", "is not a percentage"),
        ("--max-perplexity-increase 0% --evaluate text.npy", "above 0"),
        ("--resolution 0 --evaluate text.npy", "--resolution is 0"),
        ("--evaluate none.txt", "no such text"),
        ("--restore bias --method magnitude-sp", "defined without a bias"),
        ("--method wanda-sp", "does not serve wanda-sp"),
    ],
)
def test_bad_options_are_refused_in_one_sentence_and_nothing_changes(
    collected: Collected,
    arguments: str,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(collected.place)
    before = identities(collected.run)
    capsys.readouterr()
    assert main(["sweep", "run", *arguments.split(), "--quiet"]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    after = identities(collected.run)
    assert {name for name in before if before[name] != after[name]} <= {"lock"} and before.keys() == after.keys()


def test_another_model_is_refused(collected: Collected, tmp_path: Path) -> None:
    other = save(tiny_model(tiny_config(), seed=4), tmp_path / "other")
    with pytest.raises(RunMismatch, match="does not have the weights"):
        flap_stream.sweep(collected.run, collected.options(samples=1), model=other)
