"""Real processes, really killed: the same command resumes, and the output is the same byte for byte."""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faults import LAYERS, Job, make_job
from fork_server import KILLED
from models import contents, random_tokens, save, save_tokens, tiny_config, tiny_model
from warm_commands import WarmProcess, run_warm

import flap_stream
from flap_stream.errors import RunMismatch

pytestmark = pytest.mark.slow


def identities(directory: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of change of every file and directory."""
    return {
        p.relative_to(directory).as_posix(): (p.stat().st_ino, p.stat().st_size, p.stat().st_mtime_ns)
        for p in (directory, *directory.rglob("*"))
    }


@pytest.fixture(scope="module")
def flap(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("flap"))


@pytest.fixture(scope="module")
def wanda(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("wanda"), method="wanda-sp", ratio=0.5)


def test_a_killed_wanda_run_goes_on_to_the_same_bytes(wanda: Job) -> None:
    journal = wanda.records()
    assert len(journal) > 2 * LAYERS
    assert wanda.troubles([n + after for n in journal for after in (0, 1)]) == []


def test_a_run_killed_again_and_again_goes_on_to_the_same_bytes(flap: Job) -> None:
    place, kills = flap.place("again-and-again"), 0
    kill_at = flap.longest_work_between_records() * 3 // 2  # it removes what is half there and records one more
    while (code := flap.run(place, kill_at)) == KILLED:
        kills += 1
        assert kills < 20
    assert code == 0 and kills >= LAYERS
    assert contents(place / "out") == flap.expected


def test_a_run_killed_before_its_run_directory_is_removed_is_cleaned_by_the_next_call(flap: Job) -> None:
    place = flap.place("cleaned")
    renamed = 1 + flap.steps.index(f"os.rename {flap.directory / 'reference' / 'out.partial'}")
    for step in (renamed, renamed + 1, renamed + 2, len(flap.steps) - 10):
        assert flap.run(place, step) == KILLED
        assert (place / "out").exists() == (step > renamed)
        assert flap.run(place) == 0
        assert [p.name for p in place.iterdir()] == ["out"]
        assert contents(place / "out") == flap.expected
        shutil.rmtree(place / "out")


def test_a_half_removed_run_directory_does_not_block_the_next_run(flap: Job) -> None:
    first, last = (
        flap.first_step("os.remove " + str(flap.directory / "reference" / "out.run" / "journal")),
        len(flap.steps),
    )
    for step in sorted({*range(first + 1, last, 50), last - 2, last - 1, last}):
        place = flap.place(f"half-removed-{step}")
        assert flap.run(place, step) == KILLED
        if (place / "out").exists():
            shutil.rmtree(place / "out")
        assert flap.run(place) == 0
        assert [p.name for p in place.iterdir()] == ["out"]
        assert contents(place / "out") == flap.expected


def test_statistics_of_complete_layers_are_not_written_again(flap: Job) -> None:
    place = flap.place("statistics")
    assert flap.run(place, flap.first_step("layers/0002.partial")) == KILLED
    layers = place / "out.run" / "statistics.zarr" / "layers"
    before = [identities(layers / name) for name in ("0000", "0001")]
    assert not (place / "out").exists()
    assert flap.run(place, keep_run=True) == 0
    assert [identities(layers / name) for name in ("0000", "0001")] == before
    assert (layers / "0002").is_dir()
    assert contents(place / "out") == flap.expected


@pytest.mark.parametrize("interval", [1, 3])
def test_a_kill_loses_no_more_than_the_layers_of_one_snapshot_interval(tmp_path: Path, interval: int) -> None:
    job = make_job(tmp_path, layers=7, snapshot_interval=interval)
    lost = []
    for layer in range(1, 7):
        place = job.place(f"layer-{layer}")
        assert job.run(place, job.first_step(f"layers/{layer:04d}.partial")) == KILLED
        assert job.trouble_in(place) is None
        lost.append(layer - min(job.layers_run(place)))  # of those that were complete
    assert max(lost) == interval - 1


def test_shards_that_are_complete_are_not_written_again(flap: Job) -> None:
    place, name = flap.place("shards"), "model-00001-of-00004.safetensors"
    assert flap.run(place, flap.first_step("model-00003")) == KILLED
    before = identities(place / "out.partial")[name]
    assert flap.run(place) == 0
    assert identities(place / "out")[name] == before
    assert contents(place / "out") == flap.expected


def test_a_killed_rewrite_can_go_on_with_another_ratio(flap: Job) -> None:
    alone, place = flap.place("other-ratio-alone"), flap.place("other-ratio")
    assert flap.run(alone, ratio=0.5) == 0
    assert flap.run(place, flap.first_step("model-00003")) == KILLED
    assert flap.run(place, ratio=0.5) == 0
    assert contents(place / "out") == contents(alone / "out") != flap.expected


@pytest.mark.parametrize(
    ("changes", "named"), [({"batch_size": 3}, "--batch-size was 4"), ({"dtype": "bfloat16"}, "--dtype was float32")]
)
def test_going_on_with_options_that_change_statistics_is_refused(
    flap: Job, changes: dict[str, Any], named: str
) -> None:
    place = flap.place(f"refused-{next(iter(changes))}")
    assert flap.run(place, flap.first_step("layers/0001.partial")) == KILLED
    with pytest.raises(RunMismatch, match=named):
        flap_stream.prune(flap.model, place / "out", replace(flap.options, **changes))
    assert flap.run(place) == 0
    assert contents(place / "out") == flap.expected


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """A command line, without OUT, that takes long enough to be interrupted."""
    directory = tmp_path_factory.mktemp("command")
    save(tiny_model(tiny_config(layers=12)), directory / "model", shard_size="1MB")
    tokens = save_tokens(directory / "tokens.npy", random_tokens(64, 64))
    yield [
        *(sys.executable, "-m", "flap_stream", "prune", str(directory / "model")),
        *("--calibration", tokens, "--samples", "64", "--max-shard-size", "1MB"),
    ]


def _finish(command: list[str], out: Path) -> str:
    done = run_warm([*command, str(out)])
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def uninterrupted(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    _finish(command, out)
    return contents(out)


@pytest.mark.parametrize(
    ("sent", "start"), [(signal.SIGINT, subprocess.Popen), (signal.SIGTERM, WarmProcess)], ids=["2", "15"]
)
def test_an_interrupted_command_exits_130_and_the_same_command_completes_it(
    command: list[str], uninterrupted: dict[str, bytes], tmp_path: Path, sent: signal.Signals, start: Any
) -> None:
    out = tmp_path / "out"
    with start([*command, str(out)], text=True, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("collect: 4/"):
                process.send_signal(sent)
                break
        errors = process.stderr.read()
    assert process.returncode == 130
    assert "run the same command again to continue" in errors and "Traceback" not in errors
    assert not out.exists()
    said = _finish(command, out).splitlines()
    recorded = next(
        int(found[1]) for line in said if (found := re.match(r"collect: (\d+) of 12 layers already done", line))
    )
    assert recorded >= 4
    counted = [line.split(",")[0] for line in said if re.match(r"collect: \d+/", line)]
    assert f"collect: {recorded + 1}/12" in counted and counted[-1] == "collect: 12/12"
    assert len(counted) < 12  # what was done is not done again
    assert contents(out) == uninterrupted
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_complete_command_says_so_and_changes_nothing(
    command: list[str], uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, body in uninterrupted.items():
        (out / name).write_bytes(body)
    before = identities(tmp_path)
    assert "already complete" in _finish(command, out)
    assert identities(tmp_path) == before
