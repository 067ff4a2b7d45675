"""--log, --events and --track: what a job did, for those who look later, and for programs."""

import json
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from warm_commands import run_warm

import flap_stream
from flap_stream.cli import main
from flap_stream.integrations.tracking import TRACKERS
from flap_stream.progress import Progress

PRUNE = ["prune", "model", "out", "--calibration", "tokens.npy", "--ratio", "0.3"]


def events(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_layer_and_shard_is_an_event(place: Path) -> None:
    assert main([*PRUNE, "--restore", "least-squares", "--events", "events.jsonl", "--quiet"]) == 0
    found = events(place / "events.jsonl")
    layers = len(json.loads((place / "out" / "pruning.json").read_text())["layers"])
    stages = [(event["stage"], event["done"]) for event in found if event["unit"] == "layer"]
    assert stages == [(stage, done + 1) for stage in ("collect", "refit") for done in range(layers)]
    assert found[-1]["stage"] == "rewrite" and found[-1]["done"] == found[-1]["total"]
    shares = [event["job"] for event in found]
    assert shares == sorted(shares) and shares[-1] == 1  # type: ignore[type-var]
    assert all(int(str(event["peak_host_bytes"])) > 1 << 20 for event in found)
    assert sum(int(str(event["tokens"])) for event in found if event["stage"] == "collect") == layers * 6 * 16


def test_events_go_on_in_the_same_file(place: Path) -> None:
    progress = Progress("silent", place / "events.jsonl")
    flap_stream.collect("model", "run", calibration="tokens.npy", progress=progress)
    count = len(events(place / "events.jsonl"))
    flap_stream.evaluate("model", text="tokens.npy", progress=progress)
    assert len(events(place / "events.jsonl")) > count > 0


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_a_log_has_what_was_shown_and_how_it_ended(place: Path, quiet: list[str]) -> None:
    command = [sys.executable, "-m", "flap_stream", *PRUNE, "--log", "log.txt", *quiet]
    first = run_warm(command)
    assert first.returncode == 0, first.stderr
    assert main([*command[3:], "--ratio", "0.4"]) == 2
    log = (place / "log.txt").read_text()
    assert "flap-stream prune model out" in log and "collect: 3/3" in log and "rewrite: " in log
    assert "ended by OutputConflict: out was pruned with other options: --ratio was 0.3" in log
    assert all(line[:2] == "20" for line in log.splitlines())
    assert bool(quiet) == ("collect" not in first.stderr)


def test_errors_are_shown_beside_a_log_though_all_else_is_quiet(place: Path) -> None:
    code = (
        "import logging, sys; from flap_stream import cli; import flap_stream.commands.plan as plan; "
        "plan.run = lambda options: [logging.getLogger('flap_stream.x').log(level, str(level)) for level in (20, 40)]; "
        "sys.exit(cli.main(['plan', 'run', '--log', 'log.txt', '--quiet']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == "flap-stream: 40\n"
    logged = [line.split()[-2:] for line in (place / "log.txt").read_text().splitlines()]
    assert logged[1:] == [["INFO", "20"], ["ERROR", "40"]]


def test_a_log_that_cannot_be_written_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PRUNE, "--log", str(place / "none" / "log.txt")]) == 2
    assert "cannot be written (No such file or directory); name another file" in capsys.readouterr().err
    assert main([*PRUNE, "--events", str(place / "none" / "events")]) == 2
    assert "none/events cannot be written (No such file or directory)" in capsys.readouterr().err


def test_a_tracker_is_told_of_every_layer_and_shard(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["flap-stream", *PRUNE, "--track", "wandb", "--events", "events.jsonl", "--quiet"])
    assert main() == 0
    told = wandb.run.summary
    for event in {event["stage"]: event for event in events(place / "events.jsonl")}.values():
        assert told[f"{event['stage']}/done"] == event["total"] and told[f"{event['stage']}/seconds"] > 0
    assert told["job"] == 1 and wandb.run.config["command"] == shlex.join(sys.argv)
    wandb.finish()


def test_a_tracker_that_is_not_there_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = next((name for name in TRACKERS if find_spec(name) is None), None)
    if name is None:
        pytest.skip("all trackers are installed")
    assert main([*PRUNE, "--track", name]) == 2
    assert (
        f"{name} is not installed; run pip install {name}" in capsys.readouterr().err and not (place / "out").exists()
    )
