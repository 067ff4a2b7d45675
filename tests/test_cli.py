import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from models import random_tokens, save, save_tokens, tiny_config, tiny_model

import flap_stream
from flap_stream.cli import VERBS, main
from flap_stream.progress import format_bytes


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def place(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(original, tmp_path_factory.mktemp("cli") / "place")


def test_the_public_surface_is_what_it_says() -> None:
    assert all(hasattr(flap_stream, name) for name in flap_stream.__all__)
    with pytest.raises(AttributeError):
        _ = flap_stream.nothing


def test_importing_the_package_and_its_help_load_no_torch() -> None:
    code = "import sys, flap_stream, flap_stream.cli; sys.exit('torch' in sys.modules or 'zarr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    code = f"import sys; from flap_stream.cli import main\ntry: main({['--help']})\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 0
    assert all(verb in result.stdout for verb in VERBS)


@pytest.mark.parametrize("module", ["stages.plan", "stages.targets", "report.page", "report.live", "output.recipe"])
def test_what_reads_a_run_directory_alone_loads_no_torch(module: str) -> None:
    code = f"import sys, flap_stream.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="torch brings libgomp along on Linux alone")
@pytest.mark.parametrize(
    ("given", "policy", "spins"),
    [
        ({}, "PASSIVE", "0"),
        ({"OMP_WAIT_POLICY": "active"}, "ACTIVE", None),
        ({"GOMP_SPINCOUNT": "123"}, "PASSIVE", "123"),
    ],
)
def test_threads_sleep_while_they_wait_unless_told_otherwise(
    tmp_path: Path, given: dict[str, str], policy: str, spins: str | None
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_DISPLAY_ENV": "verbose", "OMP_NUM_THREADS": "2", **given}
    (tmp_path / "text.txt").write_text("In the beginning")
    command = [sys.executable, "-m", "flap_stream", "evaluate", str(tmp_path / "none")]
    command += ["--text", str(tmp_path / "text.txt")]
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    shown = dict(line.split(" = ") for line in result.stderr.splitlines() if " = '" in line)  # by libgomp, as it loads
    found = {name.split()[-1]: value.strip("'") for name, value in shown.items()}
    assert result.returncode == 2 and found["OMP_WAIT_POLICY"] == policy
    assert spins is None or found["GOMP_SPINCOUNT"] == spins


def test_the_stages_by_themselves_give_what_prune_gives(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = place / "tokens.npy"
    collected = run(capsys, "collect", place / "model", place / "run", "--calibration", text)
    assert collected[0] == 0 and "next: flap-stream plan" in collected[1]
    assert run(capsys, "plan", place / "run", "--ratio", "0.3")[0] == 0
    assert run(capsys, "rewrite", place / "run", place / "staged")[0] == 0
    code, out, err = run(
        capsys, "prune", place / "model", place / "whole", "--ratio", "0.3", "--calibration", text, "--json"
    )
    assert code == 0
    body = json.loads(out)
    assert body["parameters"]["after"] < body["parameters"]["before"]
    assert set(body["seconds"]) == {"collect", "plan", "rewrite"} and body["bytes_written"] > 0
    assert "collect: 3/3" in err and "tokens/s" in err
    rows = dict(re.findall(r"^([a-z ]+?)  +(.*)$", err, re.MULTILINE))
    assert rows["model"] == f"{place / 'model'} (llama, 3 layers, {body['parameters']['before']:,} parameters)"
    assert rows["run directory"] == f"{place / 'whole.run'}"
    windows = f"{body['placement']['batch_size']} of 6 windows of 16 tokens at once"
    assert rows["run as"].startswith(f"float32 on cpu, {windows}, hidden states on the host")
    assert rows["memory"] == f"{format_bytes(body['placement']['host_bytes'])} at its peak by prediction"
    shares = [int(found[1]) for found in re.finditer(r"; (\d+)% of the job", err)]
    assert shares == sorted(shares) and shares[-1] == 100 and len(shares) == 4
    assert not (place / "whole.run").exists()
    for file in (place / "staged").iterdir():
        assert file.read_bytes() == (place / "whole" / file.name).read_bytes()


def test_planning_needs_the_run_directory_alone(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(tiny_model(tiny_config()), tmp_path / "model")
    run(capsys, "collect", model, tmp_path / "run", "--calibration", place / "tokens.npy", "--quiet")
    model.rename(tmp_path / "elsewhere")
    code, out, _ = run(capsys, "plan", tmp_path / "run", "--ratio", "0.3", "--json")
    layers = json.loads(out)["layers"]
    assert code == 0 and len(layers) == 3
    code, _, err = run(capsys, "rewrite", tmp_path / "run", tmp_path / "out", "--quiet")
    assert code == 2 and "no such model" in err
    assert run(capsys, "rewrite", tmp_path / "run", tmp_path / "out", "--model", tmp_path / "elsewhere")[0] == 0
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    for planned, written in zip(layers, record["layers"], strict=True):
        assert planned.items() <= written.items()


def test_quiet_says_nothing_and_json_is_one_object(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "evaluate", place / "model", "--text", place / "tokens.npy", "--json", "--quiet")
    assert code == 0 and err == ""
    assert json.loads(out)["windows"] == 6


def test_inspect_tells_runs_from_outputs(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = place / "tokens.npy"
    run(capsys, "prune", place / "model", tmp_path / "out", "--calibration", text, "--keep-run", "--quiet")
    assert "statistics   3 of 3 layers" in run(capsys, "inspect", tmp_path / "out.run")[1]
    assert "by flap, al-am, wifv" in run(capsys, "inspect", tmp_path / "out")[1]
    assert run(capsys, "inspect", tmp_path)[0] == 2


COMMANDS = "\x1b[2J\x9b31m\r\u202e\x07\nverified"
AS_A_PATH = r"\x1b[2J\x9b31m\r\u202e\x07\nverified"
AS_A_MODEL_NAME = "?[2J?31m????verified"


def test_names_that_are_printed_command_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = save_tokens(tmp_path / "tokens.npy", random_tokens(6, 16))
    model, place = save(tiny_model(tiny_config()), tmp_path / COMMANDS), tmp_path / "of" / COMMANDS
    for shown, *arguments in (
        (AS_A_PATH, "collect", model, f"{place}-run", "--calibration", text),
        (AS_A_PATH, "plan", f"{place}-run"),
        (AS_A_PATH, "prune", model, f"{place}-out", "--calibration", text, "--keep-run", "--structure", "ul-um"),
        (AS_A_PATH, "prune", model, f"{place}-out", "--calibration", text, "--keep-run", "--structure", "ul-um"),
        (AS_A_MODEL_NAME, "inspect", f"{place}-out"),
        (AS_A_PATH, "inspect", f"{place}-out.run"),
        (AS_A_PATH, "export-stock", f"{place}-out", f"{place}-stock"),
        (AS_A_PATH, "evaluate", model, "--text", text),
    ):
        code, out, err = run(capsys, *arguments)
        assert code == 0, err
        assert shown in out + err
        assert all(line.isprintable() for line in (out + err).split("\n"))


def test_the_model_card_has_the_hubs_metadata(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub import ModelCard

    model = save(tiny_model(tiny_config()), tmp_path / "model")
    (model / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Base\n")
    (model / "LICENSE").write_text("the licence")
    run(capsys, "prune", model, tmp_path / "out", "--calibration", place / "tokens.npy", "--quiet")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    assert "| 2 |" in card.text
    assert (tmp_path / "out" / "LICENSE").read_text() == "the licence"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 2
