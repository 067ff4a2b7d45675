"""What a person sees while a job runs: on a real terminal, and in a log."""

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_tokens, save, save_tokens, tiny_config, tiny_model
from warm_commands import WarmProcess

import flap_stream
from flap_stream.config import CollectConfig, PruneConfig
from flap_stream.progress import Progress, peak_device_bytes
from flap_stream.stages.measured import Measured


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("progress")
    save(tiny_model(tiny_config(layers=5)), place / "model", shard_size="1GB")
    save_tokens(place / "tokens.npy", random_tokens(6, 16))
    return place


def _on_a_terminal(start: Any, *arguments: object) -> str:
    """What a command prints on a terminal of 120 columns, its stdout aside. start: as `subprocess.Popen`."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flap_stream", *map(str, arguments)]
    with start(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment) as process:
        os.close(theirs)
        printed = b""
        try:
            while block := os.read(ours, 1 << 16):
                printed += block
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0, printed.decode()
    return printed.decode()


@pytest.mark.slow
def test_a_terminal_shows_a_word_a_header_and_a_bar_for_the_whole_job(place: Path, tmp_path: Path) -> None:
    options = ("--calibration", place / "tokens.npy", "--max-shard-size", "100KB")
    printed = _on_a_terminal(subprocess.Popen, "prune", place / "model", tmp_path / "out", *options)
    assert printed.index("loading torch") < printed.index("run directory  ") < printed.index("collect: ")
    jobs = [int(found[1]) for found in re.finditer(r"job: +(\d+)%", printed)]
    assert jobs == sorted(jobs) and jobs[0] == 0 and jobs[-1] == 100 and len(set(jobs)) >= 7
    assert re.search(r"collect: +\d+%.*[1-4]/5", printed) and "collect: 5/5, " in printed


@pytest.mark.slow
def test_a_bar_that_goes_on_begins_where_it_was(place: Path, tmp_path: Path) -> None:
    text = (str(place / "tokens.npy"),)
    flap_stream.collect(place / "model", tmp_path / "out.run", CollectConfig(calibration=text, ratio=0.3))
    arguments = ("prune", place / "model", tmp_path / "out", "--calibration", *text, "--ratio", 0.3)
    printed = _on_a_terminal(WarmProcess, *arguments)
    assert "collect: 5 of 5 layers already done" in printed
    shares = [int(found[1]) for found in re.finditer(r"job: +(\d+)%", printed)]
    assert min(share for share in shares if share) > 50


def test_shards_and_refits_that_are_there_are_told_of(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = (str(place / "tokens.npy"),), tmp_path / "out"
    options = PruneConfig(calibration=text, restore="least-squares", max_shard_bytes=100_000, keep_run=True)
    flap_stream.prune(place / "model", out, options)
    count = len(list(out.glob("*.safetensors")))
    (out / f"model-{count:05d}-of-{count:05d}.safetensors").unlink()
    out.rename(tmp_path / "out.partial")  # as a job that was interrupted in its last shard leaves it
    flap_stream.prune(place / "model", out, options, progress=Progress("auto"))
    said = capsys.readouterr().err
    assert "collect: 5 of 5 layers already done" in said
    assert "refit: 5 of 5 layers already done" in said
    assert f"rewrite: {count - 1} of {count} shards already done" in said
    assert re.findall(r"rewrite: (\d+)/", said) == [str(count)]


def test_a_sweep_that_reads_the_model_twice_is_one_job(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("auto")
    with progress.job([("sweep", 1.0)] * 2):
        for _ in range(2):
            with progress.stage("sweep", 4) as stage:
                for _ in range(4):
                    stage.advance(tokens=1)
    shares = [int(found[1]) for found in re.finditer(r"; (\d+)% of the job", capsys.readouterr().err)]
    assert shares == [12, 25, 38, 50, 62, 75, 88, 100]


def test_peaks_are_of_the_device_in_use(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two devices, which this machine need not have: torch alone is asked, and what it is asked is what counts."""
    reserved = {torch.device("cuda:0"): 0, torch.device("cuda:1"): 7 << 20}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda name="cuda:0": reserved[torch.device(name)])
    assert [peak_device_bytes(name) for name in ("cuda:0", "cuda:1", "cpu", None)] == [0, 7 << 20, 0, 0]
    measured = Measured(device="cuda:1")
    with measured.stage("collect"), Progress("auto").stage("collect", 1, device=torch.device("cuda:1")) as stage:
        stage.advance()
    assert measured.peak_device_bytes == 7 << 20
    assert "device 7.0 MiB" in capsys.readouterr().err


def test_rates_and_times_are_of_what_this_run_does(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("auto").stage("collect", 1000) as stage:
        stage.skip(998, recorded=999)
        stage.started -= 10
        stage.advance(tokens=500)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "collect: 999 of 1000 layers already done; resuming from layer 998, at the newest snapshot"
    assert said[1].startswith("collect: 999/1000, 50 tokens/s") and said[1].endswith(", 10 s left")
