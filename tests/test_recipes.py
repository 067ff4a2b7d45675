"""Recipes: files of options that any verb reads, and the presets."""

import argparse
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

from flap_stream.cli import VERBS, _module_of, main
from flap_stream.commands.parser import Parser
from flap_stream.commands.recipe import PRESETS
from flap_stream.commands.recipe_files import with_recipe
from flap_stream.config import PruneConfig
from flap_stream.errors import InvalidOption
from flap_stream.output.recipe import RECIPE_NAME


@pytest.fixture(scope="module")
def verbs() -> dict[str, argparse.ArgumentParser]:
    parsers = {verb: Parser(prog=verb) for verb in VERBS if verb != "recipe"}
    for verb, parser in parsers.items():
        _module_of(verb).add_arguments(parser)
    return dict(parsers)


def parsed(verbs: dict[str, argparse.ArgumentParser], *arguments: str) -> dict[str, Any]:
    verb, *rest = with_recipe(verbs, arguments)
    return vars(verbs[verb].parse_args(rest))


def written(place: Path, text: str) -> str:
    (place / "job.toml").write_text(text)
    return str(place / "job.toml")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_recipes_of_a_job(
    preset: str, verbs: dict[str, argparse.ArgumentParser], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipe", "--preset", preset]) == 0
    text = capsys.readouterr().out
    options = tomllib.loads(text)
    found = parsed(verbs, "prune", "MODEL", "OUT", "--recipe", written(tmp_path, text))
    assert found["calibration"] == ["wikitext2"]
    assert all(str(found[key.replace("-", "_")]) == str(value) for key, value in options.items())
    PruneConfig(**{key.replace("-", "_"): value for key, value in options.items()})


def test_a_recipe_does_what_its_options_do(place: Path) -> None:
    recipe = written(place, 'calibration = ["tokens.npy"]\nratio = 0.3\nround_neurons_to = 1\nkeep-run = false\n')
    assert main(["prune", "model", "first", "--recipe", recipe, "--quiet"]) == 0
    options = ["--calibration", "tokens.npy", "--ratio", "0.3", "--round-neurons-to", "1"]
    assert main(["prune", "model", "second", *options, "--quiet"]) == 0
    sums = [(place / out / "SHA256SUMS").read_bytes() for out in ("first", "second")]
    assert sums[0] == sums[1] and not (place / "first.run").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--calibration", "tokens.npy", "--ratio", "0.3"],
        ["--calibration", "tokens.npy", "--metric", "fisher", "--loss-windows", "4", "--restore", "least-squares"],
        ["--calibration", "tokens.npy", "--target-parameters", "45K", "--min-neurons", "2", "--dtype", "bf16"],
        ["--calibration", "tokens.npy", "--structure", "al-mm", "--remove-heads", "2", "--head-score", "l2"],
        [
            "--calibration",
            "tokens.npy:0.5",
            "tokens.npy:0.5",
            "--sequence-length",
            "16",
            "--samples",
            "4",
            "--method",
            "wanda-sp",
        ],
        ["--calibration", "tokens.npy", "--statistics", "released", "--restore", "none"],
        ["--method", "magnitude-sp", "--max-shard-size", "20KB"],
        ["--calibration", "tokens.npy", "--method", "shortgpt", "--ratio", "0.5"],
        ["--calibration", "tokens.npy", "--depth", "--metric", "fisher", "--ratio", "0.8", "--min-neurons", "32"],
    ],
    ids=lambda options: "-".join(options[2:6:2]),
)
def test_the_recipe_of_a_checkpoint_gives_the_same_bytes(options: list[str], place: Path) -> None:
    assert main(["prune", "model", "first", *options, "--quiet"]) == 0
    recipe = place / "first" / RECIPE_NAME
    assert main(["prune", "model", "second", "--recipe", str(recipe), "--quiet"]) == 0
    sums = [(place / out / "SHA256SUMS").read_text() for out in ("first", "second")]
    assert sums[0] == sums[1] and RECIPE_NAME in sums[0]


def test_the_recipe_of_a_run_directory_prunes_as_its_plan_does(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect", "model", "run", "--calibration", "tokens.npy", "--quiet"]) == 0
    assert main(["plan", "run", "--ratio", "0.4", "--quiet"]) == 0
    assert main(["rewrite", "run", "first", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["recipe", "--run", "run"]) == 0
    recipe = written(place, capsys.readouterr().out)
    assert main(["prune", "model", "second", "--recipe", recipe, "--quiet"]) == 0
    assert (place / "first" / "SHA256SUMS").read_bytes() == (place / "second" / "SHA256SUMS").read_bytes()
    assert main(["recipe", "--run", "run", "--preset", "fast"]) == 2


@pytest.mark.parametrize(
    ("collected", "planned"),
    [
        (["--method", "wanda-sp", "--ratio", "0.3", "--min-neurons", "16"], {"ratio": 0.3, "min-neurons": 16}),
        (["--loss-windows", "2"], {"metric": "fisher", "loss-windows": 2}),
    ],
    ids=["wanda-sp", "loss"],
)
def test_a_collection_tells_what_to_plan_and_its_recipe_says_the_same(
    collected: list[str], planned: dict[str, Any], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["collect", "model", "a run", "--calibration", "tokens.npy", *collected]) == 0
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next: "))
    assert main(["recipe", "--run", "a run"]) == 0
    recipe = tomllib.loads(capsys.readouterr().out)
    assert planned.items() <= recipe.items()
    assert main([*shlex.split(told)[2:], "--quiet"]) == 0


def test_the_command_line_wins(verbs: dict[str, argparse.ArgumentParser], tmp_path: Path) -> None:
    recipe = written(tmp_path, 'ratio = 0.3\nsamples = 7\ncalibration = ["a.txt", "b.txt"]\nquiet = true\n')
    found = parsed(verbs, "prune", f"--recipe={recipe}", "M", "O", "--samples", "9", "--calibration", "c.txt")
    assert (found["samples"], found["calibration"], found["ratio"], found["quiet"]) == (9, ["c.txt"], "0.3", True)
    found = parsed(verbs, "prune", "M", "O", "--target-parameters", "5B", "--recipe", recipe)
    assert found["target_parameters"] == "5B" and found["ratio"] != "0.3"  # either says how much to remove
    recipe = written(tmp_path, 'target-memory = "9GiB"\ncontext = 4096\nbatch = 2\n')
    found = parsed(verbs, "prune", "M", "O", "--recipe", recipe, "--ratio", "0.3")
    assert (found["ratio"], found["target_memory"], found["context"], found["batch"]) == ("0.3", None, None, None)
    found = parsed(verbs, "prune", "M", "O", "--recipe", recipe, "--target-memory", "8GiB")
    assert (found["target_memory"], found["context"], found["batch"]) == ("8GiB", "4096", 2)


def test_one_recipe_serves_several_verbs(verbs: dict[str, argparse.ArgumentParser], tmp_path: Path) -> None:
    text = 'ratio = 0.3\nsequence-length = 64\n[evaluate]\nsequence-length = 256\ntext = ["test.txt"]\n'
    recipe = written(tmp_path, text)
    assert parsed(verbs, "prune", "M", "O", "--recipe", recipe)["sequence_length"] == 64
    found = parsed(verbs, "evaluate", "M", "--recipe", recipe)
    assert (found["sequence_length"], found["text"]) == (256, ["test.txt"])
    assert parsed(verbs, "plan", "RUN", "--recipe", recipe)["ratio"] == "0.3"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ratoi = 0.2", "has ratoi, which is no option; did you mean ratio"),
        ("[prnue]\nratio = 0.2", r"a table \[prnue\], which is no verb; did you mean prune"),
        ("[evaluate]\nratio = 0.2", r"in \[evaluate\] has ratio, which is no option"),
        ("ratio = [0.2, 0.3]", "a list for ratio"),
        ("quiet = 1", "quiet = 1; it is a switch"),
        ("ratio = true", "ratio = True; give a number or text"),
        ("ratio = ", "is not TOML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(
    text: str, words: str, verbs: dict[str, argparse.ArgumentParser], tmp_path: Path
) -> None:
    with pytest.raises(InvalidOption, match=words):
        parsed(verbs, "prune", "M", "O", "--recipe", written(tmp_path, text))


def test_a_recipe_that_is_missing_is_refused_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in ([str(tmp_path / "none.toml")], []):
        with pytest.raises(SystemExit) as ended:
            main(["prune", "M", "O", "--recipe", *given])
        assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "none.toml: No such file or directory; give the path" in said and "--recipe names no file" in said
