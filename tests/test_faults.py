"""What becomes of a job when the system fails it, its files are altered, or the power goes.

`FAULTS` and `CORRUPTIONS` are also the tables of the README.
"""

import errno
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from faults import (
    DISK_FULL,
    INPUT_OUTPUT,
    NO_ACCESS,
    READ_ONLY,
    Fault,
    Job,
    do,
    fail_to_lock,
    fail_to_sync_directories,
    flip,
    interrupt,
    is_one_sentence,
    make_job,
    move_few_bytes_at_once,
    set_clock_back,
    terminate,
)
from fork_server import KILLED
from models import contents

import flap_stream
from flap_stream.cli import main
from flap_stream.errors import InsufficientSpace
from flap_stream.model.opening import open_checkpoint
from flap_stream.output import destination
from flap_stream.stages.forecast import forecast
from flap_stream.storage import files

pytestmark = pytest.mark.slow

FAILED, REFUSED, INTERRUPTED = 1, 2, 130


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("faults"))


def some(steps: list[int], count: int, seed: int = 0) -> list[int]:
    """So many of these steps, the first and the last among them."""
    return sorted({steps[0], steps[-1], *random.Random(seed).sample(steps, min(count, len(steps)))})


# --- the system fails: name to what happens, exit code, words, and how many steps are tried ---

FAULTS: dict[str, tuple[Callable[[str], None], bool, int, str, int]] = {
    "disk full (ENOSPC), from some operation on": (DISK_FULL, True, FAILED, "is full", 12),
    "read-only file system (EROFS), from some operation on": (READ_ONLY, True, FAILED, "is not accessible", 6),
    "an operation fails (EIO)": (INPUT_OUTPUT, False, FAILED, "check the disk", 12),
    "an operation is not permitted (EACCES)": (NO_ACCESS, False, FAILED, "is not accessible", 6),
    "SIGINT": (interrupt, False, INTERRUPTED, "run the same command again to continue", 8),
    "SIGTERM": (terminate, False, INTERRUPTED, "run the same command again to continue", 8),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_failing_system_stops_the_job_with_a_sentence_and_it_goes_on(name: str, job: Job) -> None:
    action, lasts, code, words, count = FAULTS[name]
    writes = [n for n, step in enumerate(job.steps, 1) if lasts is False or step.startswith(("open", "os.mkdir"))]
    stopped = 0
    for step in some(writes, count):
        place = job.place(f"{name}-{step}".replace(" ", "-"))
        found = job.run(place, Fault(step, action, lasts))
        if found != 0:  # not every operation matters: a directory that cannot be made may be there already
            assert found == code, job.steps[step - 1]
            assert words in job.said(place) and is_one_sentence(job.said(place)), job.said(place)
            stopped += 1
        assert not (place / "out").exists() or contents(place / "out") == job.expected
        assert job.trouble_in(place) is None
        shutil.rmtree(place)
    assert stopped > count / 2


def test_after_an_fsync_that_failed_nothing_more_is_written(job: Job) -> None:
    syncs = [n for n, step in enumerate(job.steps, 1) if step.startswith("os.fsync")]
    for step in some(syncs, 10):
        place = job.place(f"unsynced-{step}")
        assert job.run(place, Fault(step, INPUT_OUTPUT)) == FAILED
        said = job.said(place)
        assert "Input/output error" in said and is_one_sentence(said)
        steps = place.with_name(f"{place.name}.steps").read_text().splitlines()
        assert len(steps) == step  # it was the last thing that this process did to the disk
        assert job.trouble_in(place) is None
        shutil.rmtree(place)


@pytest.mark.parametrize("action", [set_clock_back, move_few_bytes_at_once])
def test_a_clock_set_back_and_short_reads_and_writes_change_nothing(action: Callable[[str], None], job: Job) -> None:
    place = job.place(action.__name__)
    assert job.run(place, Fault(1, action)) == 0
    assert contents(place / "out") == job.expected


def test_a_run_from_the_future_goes_on(job: Job) -> None:
    place = job.place("future")
    assert job.run(place, job.first_step("layers/0002.partial")) == KILLED
    for path in place.rglob("*"):
        os.utime(path, (4e9, 4e9))
    assert job.trouble_in(place) is None


def test_no_temporary_folder_is_needed(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    flap_stream.prune(job.model, tmp_path / "out", job.options)
    assert contents(tmp_path / "out") == job.expected


# --- room on the disk ---


@pytest.mark.parametrize("moment", ["layers/0002.partial", "model-00003", "out.partial/config.json"])
def test_the_run_directory_takes_no_more_than_was_said(moment: str, job: Job, on_disk: Path) -> None:
    said = forecast(job.model, on_disk / "out", job.options)
    assert job.run(on_disk, job.first_step(moment)) == KILLED
    taken = files.tree_bytes(on_disk / "out.run")
    assert 0.3 * said.run_directory_bytes < taken <= said.run_directory_bytes
    assert files.tree_bytes(on_disk) <= said.disk_bytes + 3 * said.run_directory_bytes


def test_what_an_interrupted_call_has_written_needs_no_room_again(
    job: Job, on_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job.run(on_disk, job.first_step("model-00004")) == KILLED
    there = sum(files.tree_bytes(on_disk / name) for name in ("out.partial", "out.run"))
    left = forecast(job.model, on_disk / "out", job.options).disk_bytes - there
    monkeypatch.setattr(files, "free_bytes", lambda _path: left + destination._MARGIN_BYTES - 60_000)
    with pytest.raises(InsufficientSpace, match="the output and the run directory need"):
        flap_stream.prune(job.model, on_disk / "out", job.options)
    monkeypatch.setattr(files, "free_bytes", lambda _path: left + destination._MARGIN_BYTES)
    flap_stream.prune(job.model, on_disk / "out", job.options)
    assert contents(on_disk / "out") == job.expected


# --- the model changes under the run ---


@pytest.fixture
def model(job: Job, tmp_path: Path) -> Path:
    shutil.copytree(job.model, tmp_path / "model")
    return tmp_path / "model"


def position(model: Path, tensor: str, row: int = 0) -> tuple[Path, int]:
    """A shard and the place in it of a row's first byte."""
    with open_checkpoint(model) as checkpoint:
        entry = checkpoint.tensors[tensor]
    return model / entry.file, entry.offset + row * (entry.nbytes // entry.shape[0])


LAYER, SHARD = "model.layers.{}.mlp.up_proj.weight", "model-00003"


@pytest.mark.parametrize("how", [flip, Path.unlink])
@pytest.mark.parametrize("moment", ["layers/0001.partial", SHARD], ids=["collect", "rewrite"])
def test_a_shard_changed_or_removed_while_in_use_is_noticed(
    how: Callable[[Path], None], moment: str, job: Job, model: Path
) -> None:
    place, shard = job.place(f"{how.__name__}-{moment[:6]}"), position(model, LAYER.format(2))[0]
    assert job.run(place, Fault(job.first_step(moment), partial(do, how, shard)), model=model) == REFUSED
    said = job.said(place)
    assert f"{shard} was" in said and "while in use; restore it" in said and is_one_sentence(said)
    assert not (place / "out").exists()
    shutil.copy(job.model / shard.name, shard)
    assert job.trouble_in(place, model) is None
    assert "reading them to see" in job.said(place)


@pytest.mark.parametrize(
    ("tensor", "named"), [(LAYER.format(0), "layer 0"), ("model.embed_tokens.weight", "embedding")]
)
@pytest.mark.parametrize("moment", ["layers/0002.partial", SHARD], ids=["collect", "rewrite"])
def test_a_shard_changed_between_two_calls_is_noticed(
    tensor: str, named: str, moment: str, job: Job, model: Path
) -> None:
    place, row = job.place(f"between-{named}-{moment[:6]}"), int(np.load(job.directory / "tokens.npy")[0, 0])
    assert job.run(place, job.first_step(moment), model=model) == KILLED
    shard, at = position(model, tensor, row)
    flip(shard, at)
    assert job.run(place, model=model) == REFUSED
    assert named in job.said(place) and "does not have the weights" in job.said(place)
    flip(shard, at)
    assert job.trouble_in(place, model) is None


def test_a_model_that_was_only_touched_is_read_once_more(job: Job, model: Path) -> None:
    place = job.place("touched")
    assert job.run(place, job.first_step("layers/0002.partial"), model=model) == KILLED
    for shard in model.glob("*.safetensors"):
        os.utime(shard, (1e9, 1e9))
    assert job.run(place, job.first_step("layers/0002.partial"), model=model) == KILLED
    assert job.trouble_in(place, model) is None
    assert "reading them" not in job.said(place)  # the second call has recorded the new times


# --- files of the run directory are altered ---

MADE_AGAIN, NOTICED = "made again", "refused"
EARLY, LATE = "layers/0002.partial", SHARD
# A file of the run directory or beside it, when the job was killed, its other for a swap, and what happens.
CORRUPTIONS: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "run.json": (LATE, "out.run/run.json", "", {"flip": NOTICED, "cut": NOTICED, "delete": NOTICED}),
    "journal, first line": (LATE, "out.run/journal", "", {"flip": NOTICED}),
    "journal, last line": (LATE, "out.run/journal", "", {"cut": MADE_AGAIN}),
    "journal": (EARLY, "out.run/journal", "", {"delete": MADE_AGAIN}),
    "tokens": (EARLY, "out.run/tokens.zarr/tokens/c/0/0", "", dict.fromkeys(("flip", "cut", "delete"), NOTICED)),
    "statistics of a layer": (
        LATE,
        "out.run/statistics.zarr/layers/0000/mlp/mean/c/0",
        "out.run/statistics.zarr/layers/0001/mlp/mean/c/0",
        dict.fromkeys(("flip", "cut", "delete", "swap"), NOTICED),
    ),
    "metadata of statistics": (
        LATE,
        "out.run/statistics.zarr/layers/0000/mlp/mean/zarr.json",
        "out.run/statistics.zarr/layers/0000/attention/mean/zarr.json",
        dict.fromkeys(("flip", "cut", "delete", "swap"), NOTICED),
    ),
    "snapshot of the hidden states": (
        EARLY,
        "out.run/hidden/0002.bin",
        "out.run/hidden/0001.bin",
        dict.fromkeys(("flip", "cut", "delete", "swap"), MADE_AGAIN),
    ),
    "plan": (LATE, "out.run/plan.json", "", dict.fromkeys(("flip", "cut", "delete"), MADE_AGAIN)),
    "finished shard of the output": (
        LATE,
        "out.partial/model-00001-of-00004.safetensors",
        "out.partial/model-00002-of-00004.safetensors",
        dict.fromkeys(("flip", "cut", "delete", "swap"), MADE_AGAIN),
    ),
}


def do_harm(harm: str, path: Path, other: Path) -> None:
    if harm == "flip":
        flip(path, at=20 if path.name == "journal" else None)
    elif harm == "cut":
        os.truncate(path, path.stat().st_size - 3)
    elif harm == "delete":
        path.unlink()
    else:
        path.rename(path.with_name("aside"))
        other.rename(path)
        path.with_name("aside").rename(other)


@pytest.fixture(scope="module")
def killed(job: Job) -> dict[str, Path]:
    """A job killed at two moments, with all that it left, to be taken back to its place."""
    left = {}
    for moment in (EARLY, LATE):
        place = job.place(f"killed-{moment[:6]}")
        assert job.run(place, job.first_step(moment)) == KILLED
        left[moment] = place.rename(place.with_name(f"{place.name}.left"))
    return left


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_altered_file_is_noticed_and_made_again_or_refused(
    name: str, job: Job, killed: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    moment, file, other, outcomes = CORRUPTIONS[name]
    harmed_visibly = name not in ("journal", "journal, last line")  # what it no longer names never was
    place = job.directory / f"killed-{moment[:6]}"  # where it was: the journal knows the place of the output
    for harm, outcome in outcomes.items():
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(killed[moment], place)
        if file.startswith("out.run"):
            assert main(["inspect", str(place / "out.run"), "--verify"]) == 0
        do_harm(harm, place / file, place / other)
        if file.startswith("out.run") and harmed_visibly:
            capsys.readouterr()
            assert main(["inspect", str(place / "out.run"), "--verify"]) != 0
            said = capsys.readouterr().err
            assert is_one_sentence(said)
            assert any(part in said for part in ("out.run exists", "journal", *file.split("/")[1:4]))
        code = job.run(place)
        if outcome == MADE_AGAIN:
            assert code == 0, (harm, job.said(place))
            assert contents(place / "out") == job.expected
        else:
            assert code in (FAILED, REFUSED) and is_one_sentence(job.said(place)), (harm, job.said(place))
            assert not (place / "out").exists()


@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
def test_inspect_notices_any_altered_file_of_the_output(
    harm: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in job.expected:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(job.directory / "reference" / "out", tmp_path / "out")
        assert main(["inspect", str(tmp_path / "out"), "--verify"]) == 0
        do_harm(harm, tmp_path / "out" / name, tmp_path)
        capsys.readouterr()
        assert main(["inspect", str(tmp_path / "out"), "--verify"]) != 0, name
        said = capsys.readouterr().err
        assert is_one_sentence(said) and (name in said or name in ("SHA256SUMS", "pruning.json")), (name, said)


# --- file systems that lack something ---


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK])
def test_a_file_system_without_locks_is_named_and_a_run_directory_elsewhere_is_enough(number: int, job: Job) -> None:
    place, elsewhere = job.place(f"no-locks-{number}"), job.place(f"locks-{number}")
    fault = Fault(1, partial(fail_to_lock, number, place), lasts=True)
    assert job.run(place, fault) == REFUSED
    said = job.said(place)
    assert f"the file system of {place / 'out.run'} has no file locks ({os.strerror(number)})" in said
    assert "--run DIR" in said and is_one_sentence(said) and "it resumes" not in said
    assert list(place.iterdir()) == []
    assert job.run(place, fault, run=elsewhere / "run") == 0
    assert contents(place / "out") == job.expected


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_directories_is_warned_of_once(number: int, job: Job) -> None:
    place = job.place(f"no-sync-{number}")
    assert job.run(place, Fault(1, partial(fail_to_sync_directories, number), lasts=True)) == 0
    assert job.said(place).count("cannot sync directories") == 1
    assert contents(place / "out") == job.expected


# --- resuming is promised where it is true ---

COMMANDS = {  # and whether the same command goes on
    "prune MODEL OUT --calibration TOKENS": True,
    "collect MODEL RUN --calibration TOKENS": True,
    "demo --out OUT": True,
    "sweep RUN --evaluate TOKENS": True,
    "rewrite RUN OUT": True,
    "prune MODEL OUT --calibration TOKENS --dry-run": False,
    "sweep RUN": False,
    "plan RUN": False,
    "evaluate MODEL --text TOKENS": False,
    "inspect RUN": False,
    "report RUN --html OUT": False,
    "export-stock MODEL OUT": False,
    "demo": False,
}
STOPS: list[tuple[Exception | type[BaseException], str]] = [
    (OSError(errno.EIO, "Input/output error", "/a/file"), "it resumes"),
    (OSError(errno.ENOSPC, "No space left on device", "/a/file"), "it resumes"),
    (KeyboardInterrupt, "run the same command again to continue"),
]


@pytest.mark.parametrize(("stop", "words"), STOPS, ids=["EIO", "ENOSPC", "SIGINT"])
@pytest.mark.parametrize("command", COMMANDS)
def test_going_on_is_promised_where_it_is_true(
    command: str, stop: Exception, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_options: object) -> None:
        raise stop

    monkeypatch.setattr(import_module(f"flap_stream.commands.{command.split()[0].replace('-', '_')}"), "run", fail)
    assert main(command.split()) in (FAILED, INTERRUPTED)
    said = capsys.readouterr().err
    assert is_one_sentence(said) and (words in said) == COMMANDS[command], said


def test_a_reader_that_has_enough_ends_a_command_without_a_word(job: Job) -> None:
    assert job.run(job.place("read"), keep_run=True) == 0
    command = [sys.executable, "-m", "flap_stream", "inspect", str(job.directory / "read" / "out"), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)


def test_a_full_disk_behind_standard_output_is_named(job: Job) -> None:
    command = [sys.executable, "-m", "flap_stream", "inspect", str(job.directory / "reference" / "out")]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == FAILED
    assert "the disk of standard output is full" in ended.stderr and is_one_sentence(ended.stderr)
    assert "it resumes" not in ended.stderr
