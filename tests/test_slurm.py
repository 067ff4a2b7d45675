"""The example for clusters, with a scheduler played by the test: it preempts the job, and starts it when requeued."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launchers import wait_for

import flap_stream

SCRIPT = Path(__file__).parent.parent / "tools" / "slurm_prune.sh"


@pytest.mark.slow
def test_a_job_that_is_preempted_is_requeued_and_goes_on_to_the_same_bytes(place: Path) -> None:
    flap_stream.prune("model", "whole", calibration="tokens.npy", ratio=0.3, batch_size=1)
    tools = place / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text('#!/bin/sh\necho "$@" >> requeued\n')
    (tools / "flap-stream").write_text(f'#!/bin/sh\nexec {sys.executable} -m flap_stream "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    command = [str(SCRIPT), "model", "out", "--calibration", "tokens.npy", "--ratio", "0.3", "--batch-size", "1"]
    job = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for((place / "out.run" / "journal").exists, 60)
    job.send_signal(signal.SIGTERM)  # Slurm's --signal=B: signals the script alone
    _, said = job.communicate(timeout=60)
    assert (job.returncode, (place / "requeued").read_text()) == (130, "requeue 17\n"), said
    assert not (place / "out").exists()
    (place / "requeued").unlink()
    again = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert again.returncode == 0 and not (place / "requeued").exists(), again.stderr
    sums = [(place / name / "SHA256SUMS").read_bytes() for name in ("whole", "out")]
    assert sums[0] == sums[1]
