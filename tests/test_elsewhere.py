"""The examples for clusters, machines behind SSH and containers; the test plays the scheduler and the connection."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from launchers import wait_for

import flap_stream

TOOLS = Path(__file__).parent.parent / "tools"
OPTIONS = ("--calibration", "tokens.npy", "--ratio", "0.3", "--batch-size", "1")


def environment(place: Path, **tools: str) -> dict[str, str]:
    """What a script sees: these commands, each given as a shell script, and `flap-stream`."""
    commands = place / "bin"
    commands.mkdir()
    for name, text in {"flap-stream": f'exec {sys.executable} -m flap_stream "$@"', **tools}.items():
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    return {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}"}


@pytest.fixture
def whole(place: Path) -> bytes:
    """The digests of a job that nothing interrupted."""
    flap_stream.prune("model", "whole", calibration="tokens.npy", ratio=0.3, batch_size=1)
    return (place / "whole" / "SHA256SUMS").read_bytes()


@pytest.mark.slow
def test_a_job_that_is_preempted_is_requeued_and_goes_on_to_the_same_bytes(place: Path, whole: bytes) -> None:
    seen = environment(place, scontrol='echo "$@" >> requeued') | {"SLURM_JOB_ID": "17"}
    command = [str(TOOLS / "slurm_prune.sh"), "model", "out", *OPTIONS]
    job = subprocess.Popen(command, env=seen, stderr=subprocess.PIPE, text=True)
    wait_for((place / "out.run" / "journal").exists, 60)
    job.send_signal(signal.SIGTERM)  # Slurm's --signal=B: signals the script alone
    _, said = job.communicate(timeout=60)
    assert (job.returncode, (place / "requeued").read_text()) == (130, "requeue 17\n"), said
    assert not (place / "out").exists()
    (place / "requeued").unlink()
    again = subprocess.run(command, env=seen, stderr=subprocess.PIPE, text=True, check=False)
    assert again.returncode == 0 and not (place / "requeued").exists(), again.stderr
    assert (place / "out" / "SHA256SUMS").read_bytes() == whole


@pytest.mark.slow
def test_a_job_on_a_machine_that_goes_away_is_begun_again_and_goes_on_to_the_same_bytes(
    place: Path, whole: bytes
) -> None:
    connection = 'echo "$4" >> hosts; test $(wc -l < hosts) -ne 2 || exit 255; shift 4; exec sh -c "$1"'
    seen = environment(place, ssh=connection) | {"RETRY_SECONDS": "0"}
    command = [str(TOOLS / "ssh_prune.sh"), "me@there", str(place), "model", "out", *OPTIONS]
    job = subprocess.Popen(command, env=seen, stderr=subprocess.PIPE, text=True)
    wait_for((place / "out.run" / "journal").exists, 60)
    (there,) = [child for child in psutil.Process(job.pid).children(recursive=True) if "flap_stream" in child.cmdline()]
    there.terminate()
    _, said = job.communicate(timeout=120)
    assert job.returncode == 0 and "interrupted" in said, said
    assert (place / "hosts").read_text() == 3 * "me@there\n"  # the second time it was not back yet
    assert (place / "out" / "SHA256SUMS").read_bytes() == whole
    wrong = subprocess.run([*command, "--ratio", "2"], env=seen, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and (place / "hosts").read_text().count("\n") == 4


@pytest.mark.slow
def test_the_image_can_be_built(tmp_path: Path) -> None:
    """Built where a docker daemon runs, which fetches the base image; else checked by a linter."""
    has_docker = shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True).returncode == 0
    file = str(TOOLS / "Dockerfile")
    words = ["docker", "build", "-f", file, str(TOOLS.parent)] if has_docker else ["hadolint", file]
    seen = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    found = subprocess.run(words, env=seen, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
