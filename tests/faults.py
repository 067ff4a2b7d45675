"""Faults at any file operation of a real process: killed, signalled, refused by the system, cut off from power.

Children are forked from a server that has imported everything and computed nothing, so that hundreds of them are
affordable. A fault happens at a step, counted from the start of the process.
"""

import errno
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from fork_server import KILLED, forked
from models import contents, random_tokens, save, save_tokens, tiny_config, tiny_model
from power_cuts import PowerCuts

import flap_stream
from flap_stream import PruneConfig, cli
from flap_stream.engine.layer_pass import Batch, LayerPass

LAYERS = 3
# Names of Python's audit events for what changes a directory; a file that is opened for writing comes on top.
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Fault:
    """What happens at a step.

    action: called with the step's name, once, or from this step on at every one of the same process if `lasts`; what
    it raises, the operation raises.
    """

    step: int
    action: Callable[[str], None]
    lasts: bool = False


def kill(_step: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt(_step: str) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate(_step: str) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def set_clock_back(_step: str) -> None:
    time.time = lambda: 0.0


def move_few_bytes_at_once(_step: str) -> None:
    """From now on the system reads and writes less than it is asked to."""
    write, preadv = os.write, os.preadv

    def write_half(descriptor: int, data: memoryview) -> int:
        return write(descriptor, data[: len(data) // 2 + 1])

    def read_half(descriptor: int, buffers: Sequence[memoryview], at: int) -> int:
        return preadv(descriptor, [buffers[0][: len(buffers[0]) // 2 + 1]], at)

    os.write, os.preadv = write_half, read_half  # type: ignore[assignment]


def flip(path: Path, at: int | None = None) -> None:
    """Change one bit of a file, in the middle by default."""
    body = bytearray(path.read_bytes())
    body[len(body) // 2 if at is None else at] ^= 1
    path.write_bytes(body)


def do(how: Callable[[Path], None], path: Path, _step: str) -> None:
    how(path)


def fail(number: int, step: str) -> None:
    raise OSError(number, os.strerror(number), step.partition(" ")[2])


def fail_to_write(number: int, step: str) -> None:
    """As on a disk without room: what is there can still be read, renamed and removed."""
    if step.startswith(("os.write", "open", "os.mkdir", "os.posix_fallocate")):
        fail(number, step)


def fail_to_lock(number: int, place: Path, step: str) -> None:
    """As on a file system without locks, of what is at a place."""
    if step.startswith(f"fcntl.flock {place}{os.sep}"):
        fail(number, step)


def fail_to_sync_directories(number: int, step: str) -> None:
    """As on a file system that syncs files alone."""
    if step.startswith("os.fsync ") and os.path.isdir(step.partition(" ")[2]):
        fail(number, step)


class Steps:
    """Counts what a process does to the disk below a directory, and lets a fault happen at one of these steps.

    A step comes before a file is opened for writing, renamed, removed or synced; in the middle of a write, so that half
    of it is there. What the kernel has survives a kill, so syncing itself is left to `sync`, by default nothing.
    """

    def __init__(self, root: Path, fault: Fault | None = None, sync: Callable[[int], None] | None = None) -> None:
        self._root, self._fault, self._sync = f"{root}{os.sep}", fault, sync
        self.names: list[str] = []
        self._write = os.write
        os.write, os.fsync = self._torn_write, self._fsync  # type: ignore[assignment]
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "fcntl.flock":
            self._lock_step(arguments[0])
        if event not in CHANGES and not (event == "open" and arguments[2] & WRITING):
            return
        target = arguments[0] if isinstance(arguments[0], int) else os.fspath(arguments[0])
        in_open_directory = event in ("os.remove", "os.rmdir") and arguments[1] != -1
        if isinstance(target, int) or in_open_directory or target.startswith(self._root):
            self._step(f"{event} {target}")

    def _lock_step(self, descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.startswith(self._root):
            self._step(f"fcntl.flock {name}")

    def _torn_write(self, descriptor: int, data: memoryview) -> int:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.startswith(self._root):
            if self._is_next():
                self._write(descriptor, data[: len(data) // 2])
            self._step(f"os.write {name}")
        return self._write(descriptor, data)

    def _fsync(self, descriptor: int) -> None:
        self._step(f"os.fsync {os.readlink(f'/proc/self/fd/{descriptor}')}")
        if self._sync is not None:
            self._sync(descriptor)

    def _is_next(self) -> bool:
        return self._fault is not None and len(self.names) + 1 == self._fault.step

    def _step(self, name: str) -> None:
        is_due = self._is_next() or (
            self._fault is not None and self._fault.lasts and self._fault.step <= len(self.names)
        )
        self.names.append(name)
        if is_due and self._fault is not None:
            self._fault.action(name)


def _child(
    model: Path,
    out: Path,
    options: PruneConfig,
    names: Path,
    fault: Fault | None,
    cuts: Callable[[Path], PowerCuts] | None,
    seconds: float | None,
    run: Path | None = None,
) -> None:
    if seconds is not None:
        threading.Timer(seconds, kill, [""]).start()
    torch.set_num_threads(1)
    power = cuts(out.parent) if cuts is not None else None
    steps, layers = Steps(out.parent, fault, power.sync if power is not None else None), _record_layers()
    with redirect_stderr(io.StringIO()) as said:
        code = cli.reported(lambda: flap_stream.prune(model, out, options, run=run))
    if power is not None:
        power.cut()
    names.write_text("\n".join(steps.names))
    names.with_suffix(".said").write_text(said.getvalue())
    names.with_suffix(".layers").write_text(json.dumps(layers))
    sys.exit(code)


def _record_layers() -> list[int]:
    """The layers that this process runs, in order."""
    layers: list[int] = []
    run = LayerPass.run

    def recorded(batches: LayerPass, index: int, *arguments: Any, **options: Any) -> Iterator[Batch]:
        layers.append(index)
        return run(batches, index, *arguments, **options)

    LayerPass.run = recorded  # type: ignore[method-assign, assignment]
    return layers


class Job:
    """A model and options to prune it with, the bytes that come out, and the steps that it takes."""

    def __init__(self, directory: Path, model: Path, options: PruneConfig) -> None:
        self.directory, self.model, self.options = directory, model, options
        self._lock = threading.Lock()
        place = self.place("reference")
        assert self.run(place) == 0
        self.expected = contents(place / "out")
        self.statistics = self._statistics(place)
        self.steps = (directory / "reference.steps").read_text().splitlines()

    def place(self, name: str) -> Path:
        (self.directory / name).mkdir()
        return self.directory / name

    def run(
        self,
        place: Path,
        fault: Fault | int | None = None,
        *,
        cuts: Callable[[Path], PowerCuts] | None = None,
        model: Path | None = None,
        seconds: float | None = None,
        run: Path | None = None,
        **changes: Any,
    ) -> int | None:
        """Exit code of the job in a process of its own.

        fault: a number kills it at that step. seconds: when it is killed, by the clock. run: the run directory.
        """
        fault = Fault(fault, kill) if isinstance(fault, int) else fault
        names, options = place.with_name(f"{place.name}.steps"), replace(self.options, **changes)
        arguments = (model or self.model, place / "out", options, names, fault, cuts, seconds, run)
        with self._lock:  # another thread's start would take this child's exit code
            process = forked(_child, arguments)
            process.start()
        wait([process.sentinel], 120)
        with self._lock:
            return process.exitcode

    def said(self, place: Path) -> str:
        """What the last process there that ended by itself wrote to stderr."""
        return place.with_name(f"{place.name}.said").read_text()

    def layers_run(self, place: Path) -> list[int]:
        """The layers that the last process there that ended by itself has run."""
        return json.loads(place.with_name(f"{place.name}.layers").read_text())

    def first_step(self, text: str) -> int:
        """Number of the first step whose name holds the text."""
        return 1 + next(i for i, name in enumerate(self.steps) if text in name)

    def longest_work_between_records(self) -> int:
        """The most steps from one line of the journal to the next."""
        return max(after - before for before, after in pairwise([0, *self.records()]))

    def records(self) -> list[int]:
        """Numbers of the steps that write to the journal."""
        return [n for n, name in enumerate(self.steps, 1) if name.startswith("os.write") and "journal" in name]

    def backward_steps(self) -> range:
        """Numbers of the steps from the first layer inputs kept for the loss to the last score."""
        found = [n for n, name in enumerate(self.steps, 1) if "/loss" in name]
        return range(found[0], found[-1] + 1)

    def own_steps(self) -> list[int]:
        """Numbers of the steps outside zarr's groups, several writes to one file in a row counted once."""
        root, numbered = str(self.directory), enumerate(zip(["", *self.steps], self.steps, strict=False), start=1)
        return [n for n, (before, name) in numbered if root in name and ".zarr" not in name and name != before]

    def troubles(self, faults: Sequence[Fault | int], accepted: Sequence[int] = (KILLED,)) -> list[str]:
        """What goes wrong after each of these faults, two at a time."""
        with ThreadPoolExecutor(2) as pool:
            numbered = enumerate(faults)
            return [t for t in pool.map(lambda f: self.trouble_after(f[1], f"fault-{f[0]}", accepted), numbered) if t]

    def trouble_after(self, fault: Fault | int, name: str, accepted: Sequence[int]) -> str | None:
        """What is wrong after a fault and a second call; None if all is well."""
        place = self.place(name)
        step = fault.step if isinstance(fault, Fault) else fault
        where = f"step {step} ({self.steps[step - 1]})"
        code = self.run(place, fault)
        if code not in accepted:
            return f"{where}: exit code {code} instead of {accepted}"
        if code != KILLED and (code != 0 and not is_one_sentence(self.said(place))):
            return f"{where}: it said {self.said(place)!r}"
        if (place / "out").exists() and contents(place / "out") != self.expected:
            return f"{where}: the output was there before it was whole"
        trouble = self.trouble_in(place)
        shutil.rmtree(place)
        return f"{where}: {trouble}" if trouble else None

    def trouble_in(self, place: Path, model: Path | None = None) -> str | None:
        """What is wrong after a call that goes on with what is there."""
        if (code := self.run(place, model=model)) != 0:
            return f"exit code {code} of the second call: {self.said(place)}"
        if contents(place / "out") != self.expected or self._statistics(place) != self.statistics:
            return "other bytes"
        if self.options.keep_run:
            return None
        left = {p.relative_to(place).as_posix() for p in place.rglob("*")} - {f"out/{name}" for name in self.expected}
        left -= {"out"}
        return f"{sorted(left)} left behind" if left else None

    def _statistics(self, place: Path) -> dict[str, bytes]:
        """The files of all layers' statistics and loss scores; none unless the run directory is kept."""
        return {
            f"{name}/{path}": body
            for name in ("statistics.zarr", "loss.zarr")
            for path, body in contents(place / "out.run" / name).items()
        }

    def power_cuts(
        self, name: str, stride: int, draws: int, share: tuple[int, int] = (0, 1), forgets_files: bool = False
    ) -> Iterator[tuple[str, str | None]]:
        """States that a power cut at every stride-th fsync leaves; what is wrong after a call that goes on from each.

        draws: random choices of what was not synced, at each. share: (i, n) takes every n-th state from the i-th on.
        """
        place, states = self.place(name), self.directory / f"{name}.states"
        cuts = partial(PowerCuts, states=states, stride=stride, draws=draws, forgets_files=forgets_files)
        assert self.run(place, cuts=cuts) == 0
        for state in sorted(states.iterdir())[share[0] :: share[1]]:
            shutil.rmtree(place)
            shutil.copytree(state, place)
            if (place / "out").exists() and contents(place / "out") != self.expected:
                yield state.name, "the output was there before it was whole"
            else:
                yield state.name, self.trouble_in(place)
        shutil.rmtree(states)


def is_one_sentence(said: str) -> bool:
    return said.strip().startswith("flap-stream: ") and said.strip().count("\n") == 0


def make_job(directory: Path, layers: int = LAYERS, family: str = "llama", **changes: Any) -> Job:
    model = save(tiny_model(tiny_config(family, layers=layers)), directory / "model")
    tokens = save_tokens(directory / "tokens.npy", random_tokens(6, 16))
    options = {"ratio": 0.3, "snapshot_interval": 1, "max_shard_bytes": 100_000, "batch_size": 4, **changes}
    return Job(directory, model, PruneConfig(calibration=(tokens,), samples=6, **options))


DISK_FULL, READ_ONLY = partial(fail_to_write, errno.ENOSPC), partial(fail_to_write, errno.EROFS)
INPUT_OUTPUT, NO_ACCESS = partial(fail, errno.EIO), partial(fail, errno.EACCES)
