"""tools/gpu_check.py, whole, on the CPU with a tiny model: whoever has a GPU for ten minutes runs it once."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from warm_commands import WarmProcess

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import gpu_check

MEASURING = ("model", "floors", "disk", "main", "statistics", "profile", "small_jobs", "refits")


@pytest.mark.slow
def test_every_stage_that_measures_answers(tmp_path: Path) -> None:
    check = gpu_check.Check(tmp_path / "out", "cpu", gpu_check.TINY, 600, MEASURING, samples=4, start=WarmProcess)
    found = gpu_check.run(check)
    assert found["model"]["layers"] == 3 and found["disk"]["failed"] == 0 and found["floors"]["copy_gbps_pageable"] > 0
    assert found["main"]["code"] == 0 and found["main"]["host_peak_over_prediction"] <= 1
    assert {answer["relative_error"] for answer in found["statistics"].values()} == {0.0}
    assert found["refits"]["least-squares"]["perplexity"] > 1
    assert found["small_jobs"]["by_the_loss"]["code"] == found["small_jobs"]["reconstruct"]["code"] == 0
    assert "collect" in (tmp_path / "out" / "profile.txt").read_text()


@pytest.mark.slow
def test_a_job_that_is_killed_and_resumed_is_compared(tmp_path: Path) -> None:
    starts = iter((WarmProcess, subprocess.Popen, WarmProcess))  # what is killed has begun cold, as outside of tests
    start: Any = lambda *words, **how: next(starts)(*words, **how)  # noqa: E731
    stages = ("model", "kill_and_resume")
    check = gpu_check.Check(tmp_path / "out", "auto", gpu_check.TINY, 600, stages, start=start)
    found = gpu_check.run(check)["kill_and_resume"]
    assert found["codes"] == [0, -9, 0] and found["same_bytes"]


def test_a_stage_that_fails_or_has_no_time_is_written_down(tmp_path: Path) -> None:
    check = gpu_check.Check(tmp_path, "cpu", gpu_check.TINY, 10)
    check.stage("fails", 1, lambda: 1 / 0)
    check.stage("late", 1000, lambda: 1)
    assert "division" in check.found["fails"]["failed"] and check.found["late"].startswith("skipped")
    assert "division" in (tmp_path / "summary.json").read_text()
