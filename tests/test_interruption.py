"""Real processes, really killed: the same command goes on, and the output is the same byte for byte.

Children are forked from a server that has imported everything and computed nothing, so that hundreds of them are
affordable.
"""

import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from models import random_tokens, save, save_tokens, tiny_config, tiny_model

import flap_stream
from flap_stream import PruneConfig
from flap_stream.errors import RunMismatch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["pytest", "flap_stream.pipeline", "flap_stream.modeling.modeling_flap_stream"]  # and, by these, torch and the rest
)
LAYERS = 3
KILL_STRIDE = 12  # of the many small steps in which zarr writes a group, and of removing them
# Names of Python's audit events for what changes a directory; a file that is opened for writing comes on top.
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
KILLED = -signal.SIGKILL


class _Steps:
    """Counts what a process does to the disk below a directory; at step `last` it is killed.

    Before a file is opened, renamed or removed; in the middle of a write, so that half of it is there. What the
    kernel has survives a kill, so fsync makes no difference here and is left out.
    """

    def __init__(self, root: Path, last: int | None) -> None:
        self._root, self._last = f"{root}{os.sep}", last
        self.names: list[str] = []
        self._write = os.write
        os.write = self._torn_write
        os.fsync = lambda _descriptor: None
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES and not (event == "open" and arguments[2] & WRITING):
            return
        target = arguments[0] if isinstance(arguments[0], int) else os.fspath(arguments[0])
        in_open_directory = event in ("os.remove", "os.rmdir") and arguments[1] != -1
        if isinstance(target, int) or in_open_directory or target.startswith(self._root):
            self._step(f"{event} {target}")

    def _torn_write(self, descriptor: int, data: memoryview) -> int:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.startswith(self._root) and self._is_next():
            self._write(descriptor, data[: len(data) // 2])
        if name.startswith(self._root):
            self._step(f"os.write {name}")
        return self._write(descriptor, data)

    def _is_next(self) -> bool:
        return len(self.names) + 1 == self._last

    def _step(self, name: str) -> None:
        if self._is_next():
            os.kill(os.getpid(), signal.SIGKILL)
        self.names.append(name)


def _child(model: Path, out: Path, options: PruneConfig, kill_at: int | None, names: Path) -> None:
    gc.freeze()  # what the server imported need not be looked through again
    torch.set_num_threads(1)
    zarr.config.set({"threading.max_workers": 1})  # the same steps in the same order every time
    steps = _Steps(out.parent, kill_at)
    flap_stream.prune(model, out, options)
    names.write_text("\n".join(steps.names))


class Job:
    """A model and options to prune it with, the bytes that come out, and the steps that it takes."""

    def __init__(self, directory: Path, model: Path, options: PruneConfig) -> None:
        self.directory, self.model, self.options = directory, model, options
        self._lock = threading.Lock()
        place = self.place("reference")
        assert self.run(place) == 0
        self.expected = contents(place / "out")
        self.steps = (directory / "reference.steps").read_text().splitlines()

    def place(self, name: str) -> Path:
        (self.directory / name).mkdir()
        return self.directory / name

    def run(self, place: Path, kill_at: int | None = None, **changes: Any) -> int | None:
        names = place.with_name(f"{place.name}.steps")
        options = replace(self.options, **changes)
        child = SERVER.Process(target=_child, args=(self.model, place / "out", options, kill_at, names))
        with self._lock:  # another thread's start would take this child's exit code
            child.start()
        wait([child.sentinel], 120)
        with self._lock:
            return child.exitcode

    def first_step(self, text: str) -> int:
        """Number of the first step whose name holds the text."""
        return 1 + next(i for i, name in enumerate(self.steps) if text in name)

    def longest_work_between_records(self) -> int:
        """The most steps from one line of the journal to the next."""
        return max(after - before for before, after in pairwise([0, *self.records()]))

    def records(self) -> list[int]:
        """Numbers of the steps that write to the journal."""
        return [n for n, name in enumerate(self.steps, 1) if name.startswith("os.write") and "journal" in name]

    def own_steps(self) -> list[int]:
        """Numbers of the steps outside zarr's groups, several writes to one file in a row counted once."""
        root, numbered = str(self.directory), enumerate(zip(["", *self.steps], self.steps, strict=False), start=1)
        return [n for n, (before, name) in numbered if root in name and ".zarr" not in name and name != before]

    def troubles(self, kill_points: list[int]) -> list[str]:
        """What goes wrong after a kill at each of these steps, two at a time."""
        with ThreadPoolExecutor(2) as pool:
            return [trouble for trouble in pool.map(self.trouble_after_kill, kill_points) if trouble]

    def trouble_after_kill(self, kill_at: int) -> str | None:
        """What is wrong after a kill at that step and a second call; None if all is well."""
        place = self.place(f"kill-{kill_at}")
        where = f"step {kill_at} ({self.steps[kill_at - 1]})"
        if (code := self.run(place, kill_at)) != KILLED:
            return f"{where}: exit code {code} instead of a kill"
        if (place / "out").exists() and contents(place / "out") != self.expected:
            return f"{where}: the output was there before it was whole"
        if (code := self.run(place)) != 0:
            return f"{where}: exit code {code} of the second call"
        if contents(place / "out") != self.expected:
            return f"{where}: other bytes"
        left = {p.relative_to(place).as_posix() for p in place.rglob("*")} - {f"out/{name}" for name in self.expected}
        left -= {"out"}
        shutil.rmtree(place)
        return f"{where}: {sorted(left)} left behind" if left else None


def contents(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def identities(directory: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of change of every file and directory."""
    return {
        p.relative_to(directory).as_posix(): (p.stat().st_ino, p.stat().st_size, p.stat().st_mtime_ns)
        for p in (directory, *directory.rglob("*"))
    }


def _make_job(directory: Path, **changes: Any) -> Job:
    model = save(tiny_model(tiny_config(layers=LAYERS)), directory / "model")
    tokens = save_tokens(directory / "tokens.npy", random_tokens(6, 16))
    options = {"ratio": 0.3, "snapshot_interval": 1, "max_shard_bytes": 100_000, "batch_size": 4, **changes}
    return Job(directory, model, PruneConfig(calibration=(tokens,), samples=6, sequence_length=16, **options))


@pytest.fixture(scope="module")
def flap(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return _make_job(tmp_path_factory.mktemp("flap"))


@pytest.fixture(scope="module")
def wanda(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return _make_job(tmp_path_factory.mktemp("wanda"), method="wanda-sp", ratio=0.5)


@pytest.mark.timeout(300)
def test_a_run_killed_at_any_step_goes_on_to_the_same_bytes(flap: Job) -> None:
    kill_points = sorted({*flap.own_steps(), *range(1, len(flap.steps) + 1, KILL_STRIDE)})
    assert len(kill_points) > 120
    assert flap.troubles(kill_points) == []


def test_a_killed_wanda_run_goes_on_to_the_same_bytes(wanda: Job) -> None:
    journal = wanda.records()
    assert len(journal) > 2 * LAYERS
    assert wanda.troubles([n + after for n in journal for after in (0, 1)]) == []


def test_a_run_killed_again_and_again_goes_on_to_the_same_bytes(flap: Job) -> None:
    place, kills = flap.place("again-and-again"), 0
    kill_at = flap.longest_work_between_records() * 5 // 4  # so each run records one thing more, or a few
    while (code := flap.run(place, kill_at)) == KILLED:
        kills += 1
        assert kills < 20
    assert code == 0 and kills >= LAYERS
    assert contents(place / "out") == flap.expected


def test_a_run_killed_before_its_run_directory_is_removed_is_cleaned_by_the_next_call(flap: Job) -> None:
    place = flap.place("cleaned")
    renamed = flap.first_step("os.rename " + str(flap.directory / "reference" / "out.partial") + "/config.json") + 1
    for step in (renamed, renamed + 1, renamed + 2, len(flap.steps) - 10):
        assert flap.run(place, kill_at=step) == KILLED
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
        assert flap.run(place, kill_at=step) == KILLED
        if (place / "out").exists():
            shutil.rmtree(place / "out")
        assert flap.run(place) == 0
        assert [p.name for p in place.iterdir()] == ["out"]
        assert contents(place / "out") == flap.expected


def test_statistics_of_complete_layers_are_not_written_again(flap: Job) -> None:
    place = flap.place("statistics")
    assert flap.run(place, kill_at=flap.first_step("layers/0002.partial")) == KILLED
    layers = place / "out.run" / "statistics.zarr" / "layers"
    before = [identities(layers / name) for name in ("0000", "0001")]
    assert not (place / "out").exists()
    assert flap.run(place, keep_run=True) == 0
    assert [identities(layers / name) for name in ("0000", "0001")] == before
    assert (layers / "0002").is_dir()
    assert contents(place / "out") == flap.expected


def test_shards_that_are_complete_are_not_written_again(flap: Job) -> None:
    place, name = flap.place("shards"), "model-00001-of-00004.safetensors"
    assert flap.run(place, kill_at=flap.first_step("model-00003")) == KILLED
    before = identities(place / "out.partial")[name]
    assert flap.run(place) == 0
    assert identities(place / "out")[name] == before
    assert contents(place / "out") == flap.expected


def test_a_killed_rewrite_can_go_on_with_another_ratio(flap: Job) -> None:
    alone, place = flap.place("other-ratio-alone"), flap.place("other-ratio")
    assert flap.run(alone, ratio=0.5) == 0
    assert flap.run(place, kill_at=flap.first_step("model-00003")) == KILLED
    assert flap.run(place, ratio=0.5) == 0
    assert contents(place / "out") == contents(alone / "out") != flap.expected


@pytest.mark.parametrize(
    ("changes", "named"), [({"batch_size": 3}, "batch_size was 4"), ({"dtype": "bfloat16"}, "dtype was torch.float32")]
)
def test_going_on_with_options_that_change_statistics_is_refused(
    flap: Job, changes: dict[str, Any], named: str
) -> None:
    place = flap.place(f"refused-{next(iter(changes))}")
    assert flap.run(place, kill_at=flap.first_step("layers/0001.partial")) == KILLED
    with pytest.raises(RunMismatch, match=named):
        flap_stream.prune(flap.model, place / "out", replace(flap.options, **changes))
    assert flap.run(place) == 0
    assert contents(place / "out") == flap.expected


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """A command line, without OUT, that takes long enough to be interrupted."""
    directory = tmp_path_factory.mktemp("command")
    save(tiny_model(tiny_config(layers=24)), directory / "model", shard_size="1MB")
    tokens = save_tokens(directory / "tokens.npy", random_tokens(64, 64))
    yield [
        *(sys.executable, "-m", "flap_stream", "prune", str(directory / "model")),
        *("--calibration", tokens, "--samples", "64", "--sequence-length", "64", "--max-shard-size", "1MB"),
    ]


def _start(command: list[str], out: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, str(out)], text=True, stderr=subprocess.PIPE, env=environment)


def _finish(command: list[str], out: Path) -> str:
    with _start(command, out) as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return errors


@pytest.fixture(scope="module")
def uninterrupted(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    _finish(command, out)
    return contents(out)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_exits_130_and_the_same_command_completes_it(
    command: list[str], uninterrupted: dict[str, bytes], tmp_path: Path, sent: signal.Signals
) -> None:
    out = tmp_path / "out"
    with _start(command, out) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("collect: 4/"):
                process.send_signal(sent)
                break
        errors = process.stderr.read()
    assert process.returncode == 130
    assert "run the same command again to go on" in errors and "Traceback" not in errors
    assert not out.exists()
    assert "collect: 24/24" not in _finish(command, out)  # fewer layers are left
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
    assert "complete already" in _finish(command, out)
    assert identities(tmp_path) == before
