"""Faults all through a whole job of two layers; tools/fault_campaign.py is the same at every single operation."""

from pathlib import Path

import campaign
import pytest
from faults import Job, make_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """It keeps its run directory, so that the statistics can be held against each other."""
    return make_job(tmp_path_factory.mktemp("kept"), layers=2, keep_run=True)


@pytest.fixture(scope="module")
def removing(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("removing"), layers=2)


def troubles(outcomes: list[str]) -> list[str]:
    return [outcome for outcome in outcomes if not outcome.startswith(campaign.SURVIVED)]


def test_a_kill_at_any_file_operation_changes_nothing(kept: Job, removing: Job) -> None:
    outcomes = campaign.kills_at_operations(kept, removing, stride=18)
    assert troubles(outcomes) == []
    assert len(outcomes) > len(removing.steps) / 18 > len(kept.steps) / 18 > 25


def test_a_kill_at_any_time_changes_nothing(kept: Job) -> None:
    outcomes = campaign.kills_at_random_times(kept, 24)
    assert troubles(outcomes) == []
    assert outcomes.count(campaign.SURVIVED) > 6


def test_a_kill_in_a_sweep_by_the_loss_changes_nothing(tmp_path: Path) -> None:
    job = make_job(tmp_path, layers=2, keep_run=True, metric="fisher", loss_windows=5)
    assert any(name.startswith("loss.zarr") for name in job.statistics)
    outcomes = campaign.kills_in_a_backward_pass(job, 4)
    assert outcomes == [campaign.SURVIVED] * 4


def test_a_second_kill_changes_nothing(kept: Job) -> None:
    outcomes = campaign.second_kills(kept, 10)
    assert troubles(outcomes) == []
    assert outcomes.count(campaign.SURVIVED) > 5


def test_a_power_cut_at_any_fsync_changes_nothing(removing: Job) -> None:
    outcomes = campaign.power_cuts(removing, draws=1, every=5)
    assert troubles(outcomes) == []
    assert len(outcomes) > 75


def test_power_cuts_find_out_what_is_not_synced(tmp_path: Path) -> None:
    job = make_job(tmp_path, layers=2)
    outcomes = [what for _, what in job.power_cuts("unsynced", 20, 1, forgets_files=True)]
    assert any(outcomes)
