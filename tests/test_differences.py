"""What no longer fits together is named as people know it: the model, the text, the option, then and now."""

import json
import shutil
from pathlib import Path

import pytest
from models import random_tokens, save, save_tokens, tiny_config, tiny_model

import flap_stream
from flap_stream.cli import main
from flap_stream.config import PlanConfig, PruneConfig


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models, two texts, a run of one of each, and what was pruned from it."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    save(tiny_model(tiny_config()), place / "model")
    save(tiny_model(tiny_config(layers=2)), place / "other")
    for i, name in enumerate(("then.npy", "now.npy")):
        save_tokens(place / name, random_tokens(6, 16, seed=i))
    options = PruneConfig(ratio=0.3, calibration=(str(place / "then.npy"),))
    flap_stream.prune(place / "model", place / "out", options, run=place / "run")
    return place


def refused(capsys: pytest.CaptureFixture[str], command: str) -> str:
    capsys.readouterr()
    assert main([*command.split(), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "sha256" not in error and "{" not in error and "..." not in error, error
    return error


def test_a_run_of_another_model_names_both(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "prune other new --run run --calibration then.npy")
    before = flap_stream.plan("run", PlanConfig(ratio=0.3)).parameters_before
    assert f"run was made from the model {place / 'model'} ({before:,} parameters), not {place / 'other'} (" in error
    assert "differs in config.json, model-0000" in error
    error = refused(capsys, "rewrite run new --model other")
    assert "run was collected from the model " in error and str(place / "other") in error


def test_a_run_of_another_text_names_both(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "prune model new --run run --calibration now.npy")
    assert "--calibration was then.npy, now now.npy" in error
    error = refused(capsys, "collect model run --calibration now.npy --samples 3")
    assert "--calibration was then.npy, now now.npy, --samples was 1024, now 3" in error
    shutil.copy("now.npy", "then.npy")
    error = refused(capsys, "collect model run --calibration then.npy")
    assert "from another text or with another tokenizer: then.npy produced different tokens then" in error


def test_a_model_that_was_changed_names_its_files(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    error = refused(capsys, "collect model run --calibration then.npy")
    assert "before it was changed: its config.json differed" in error


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("prune model out --calibration then.npy --ratio 0.4", "--ratio was 0.3, now 0.4"),
        ("prune model out --calibration now.npy --ratio 0.3", "--calibration was then.npy, now now.npy"),
        (
            "prune model out --calibration then.npy --ratio 0.3 --samples 5 --seed 1",
            "--samples was 1024, now 5, --seed was 0, now 1",
        ),
        (
            "prune model out --calibration then.npy --ratio 0.3 --restore least-squares",
            "out was pruned with other options: --restore was bias, now least-squares;",
        ),
        ("prune other out --calibration then.npy --ratio 0.3", "out was pruned from the model model, not other"),
        ("rewrite run out --restore none", "--restore was bias, now none"),
    ],
)
def test_an_output_of_something_else_names_what_differs(
    place: Path, capsys: pytest.CaptureFixture[str], command: str, words: str
) -> None:
    before = (place / "out" / "pruning.json").read_bytes()
    assert words in refused(capsys, command)
    assert (place / "out" / "pruning.json").read_bytes() == before


def test_an_output_of_another_model_of_the_same_name_says_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("model")
    shutil.move("other", "model")
    error = refused(capsys, "prune model out --calibration then.npy --ratio 0.3")
    assert "pruned from another model named model" in error


def test_a_dense_model_is_named_as_what_it_is(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parameters = flap_stream.plan("run", PlanConfig(ratio=0.3)).parameters_before
    assert main(["inspect", "model"]) == 0
    shown = capsys.readouterr().out
    assert f"a dense model (LlamaForCausalLM, 3 layers, {parameters:,} parameters)" in shown
    assert "4 heads in 2 KV groups, 96 neurons" in shown and "next: flap-stream prune model OUT" in shown
    assert main(["inspect", "model", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["is_dense"] and body["parameters"] == parameters and body["layers"] == 3
    for command in ("report model --html r.html", "inspect model --verify"):
        error = refused(capsys, command)
        assert "a dense model (LlamaForCausalLM, 3 layers" in error and "nothing was pruned" in error
        assert "flap-stream prune model OUT" in error
    assert not Path("r.html").exists()


def test_a_dense_model_of_no_known_family_is_named_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**config, "model_type": "gpt2", "architectures": None}))
    assert main(["inspect", "model"]) == 0
    shown = capsys.readouterr().out
    Path("model/config.json").write_text(json.dumps({"model_type": ["\x1b[2J"], "num_hidden_layers": "many"}))
    assert main(["inspect", "model"]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert "a dense model (model_type gpt2, 3 layers" in shown and "flap-stream does not prune model_type gpt2" in shown
