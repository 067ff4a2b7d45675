"""Progress on stderr: bars on a terminal, lines elsewhere; in a log, and as events for a file and other listeners."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flap_stream.config.values import shortened
from flap_stream.errors import InvalidOption

if TYPE_CHECKING:
    from tqdm import tqdm

Event = dict[str, Any]  # a layer or shard that is done; see `Progress`
Listener = Callable[[Event], None]

_LONGEST = 1000  # characters of a message
_LABEL_WIDTH = 15
_log = logging.getLogger("flap_stream.progress")  # what is shown goes there, too; it has a handler with --log
_log.propagate = False
_log.addHandler(logging.NullHandler())


def printable(message: str) -> str:
    """The message as one line of limited length, with control characters escaped: quoted file names may hold some."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"


def peak_host_bytes() -> int:
    """Peak resident memory of this process, in bytes."""
    try:
        return high_water_mark("self")
    except (OSError, StopIteration):
        import resource  # its figure includes the parent's if the process was started by vfork

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def high_water_mark(process: int | str) -> int:
    """Peak resident memory of a process, in bytes. Raises OSError or StopIteration if /proc does not tell."""
    status = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


def peak_device_bytes(device: Any) -> int:
    """Peak memory that torch reserved on an accelerator (or its name); 0 for None and a CPU."""
    return _peak(device, "max_memory_reserved")


def peak_device_allocated_bytes(device: Any) -> int:
    """Peak memory that tensors occupied on an accelerator."""
    return _peak(device, "max_memory_allocated")


def _peak(device: Any, figure: str) -> int:
    torch = sys.modules.get("torch")  # not imported just for a progress line
    if torch is None or not device or str(device) in ("cpu", "meta"):
        return 0
    kind = torch.get_device_module(torch.device(device))
    return getattr(kind, figure)(device) if kind.is_initialized() else 0


def format_bytes(count: float) -> str:
    """A readable size, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def _in_notebook() -> bool:
    """Whether this process is a notebook's kernel, whose stderr is not a terminal but can show bars."""
    shell = sys.modules.get("IPython")
    return shell is not None and "IPKernelApp" in getattr(shell.get_ipython(), "config", {})


def _shows_bars() -> bool:
    return sys.stderr.isatty() or _in_notebook()


def _bar_class() -> "type[tqdm]":
    """The bar of a terminal, or of a notebook, where ipywidgets shows it as a widget."""
    if _in_notebook():
        from tqdm.auto import tqdm
    else:
        from tqdm import tqdm
    return tqdm


@dataclass
class Job:
    """Several stages that belong together. weights: roughly how long each takes, relative to the others."""

    weights: Sequence[tuple[str, float]]
    bar: Any = None
    finished: float = 0.0
    share: float = 0.0

    def share_of(self, stage: str) -> float:
        """The share of the job that a stage is, by its name."""
        return dict(self.weights).get(stage, 0.0) / sum(weight for _, weight in self.weights)

    def reach(self, share: float) -> None:
        """Show that this share of the job is done."""
        self.share = share
        if self.bar is not None:
            self.bar.n = round(100 * share)
            self.bar.refresh()


@dataclass
class Stage:
    """One stage under way, counted in layers (or shards).

    job: the one it is part of. line_every: units per line. device: the one it runs on, to report its peak memory.
    listeners: told of every unit.
    """

    name: str
    total: int
    unit: str = "layer"
    bar: Any = None
    lines: bool = False
    job: Job | None = None
    line_every: int = 1
    device: Any = None
    listeners: Sequence[Listener] = ()
    done: int = 0
    skipped: int = 0
    tokens: int = 0
    bytes_moved: int = 0
    started: float = field(default_factory=time.monotonic)

    def advance(self, tokens: int = 0, bytes_moved: int = 0) -> None:
        """Count one more layer. tokens, bytes_moved: what it took."""
        self.done += 1
        self.tokens += tokens
        self.bytes_moved += bytes_moved
        self._tell_job()
        if self.listeners:
            self._tell_listeners(tokens, bytes_moved)
        is_due = self.done % self.line_every == 0 or self.done == self.total
        if self.bar is not None:
            self.bar.set_postfix_str(self.rates())
            self.bar.update(1)
        if is_due:
            left = (time.monotonic() - self.started) / (self.done - self.skipped) * (self.total - self.done)
            job = f"; {self.job.share:.0%} of the job" if self.job is not None else ""
            _say(f"{self.name}: {self.done}/{self.total}, {self.rates()}, {left:.0f} s left{job}", self.lines)

    def _tell_listeners(self, tokens: int, bytes_moved: int) -> None:
        """Tell what is done, what this unit took, and the peaks of memory so far."""
        event: Event = {
            "time": round(time.time(), 3),
            "stage": self.name,
            "unit": self.unit,
            "done": self.done,
            "total": self.total,
            "seconds": round(time.monotonic() - self.started, 3),
            "tokens": tokens,
            "bytes": bytes_moved,
            "peak_host_bytes": peak_host_bytes(),
            "peak_device_bytes": peak_device_bytes(self.device),
            **({} if self.job is None else {"job": round(self.job.share, 4)}),
        }
        for tell in self.listeners:
            tell(event)

    def skip(self, count: int, recorded: int | None = None) -> None:
        """Count layers that an earlier run did and that are not run again.

        recorded: layers whose results it stored, if more: their inputs are lost, so they run again.
        """
        self.done = self.skipped = count
        self.started = time.monotonic()
        recorded = count if recorded is None else recorded
        if self.bar is not None:
            self.bar.n = self.bar.initial = count  # so that rates only count this run
            self.bar.refresh()
        self._tell_job()
        if recorded and (self.lines or self.bar is not None):
            again = f"; resuming from layer {count}, at the newest snapshot" if recorded > count else ""
            _say(f"{self.name}: {recorded} of {self.total} {self.unit}s already done{again}")

    def _tell_job(self) -> None:
        if self.job is not None:
            self.job.reach(self.job.finished + self.job.share_of(self.name) * self.done / max(self.total, 1))

    def rates(self) -> str:
        """Tokens and bytes per second in this run, and peak memory."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        parts = [f"{self.tokens / seconds:,.0f} tokens/s"] if self.tokens else []
        parts += [f"{format_bytes(self.bytes_moved / seconds)}/s"] if self.bytes_moved else []
        parts.append(f"peak {format_bytes(peak_host_bytes())}")
        if device := peak_device_bytes(self.device):
            parts.append(f"device {format_bytes(device)}")
        return ", ".join(parts)


class Progress:
    """What stages report to. `mode` is `auto` (bars on a terminal, else lines) or `silent`.

    events: a file to which a line of JSON is appended for every layer or shard: `time` (seconds since 1970), `stage`,
    `unit`, `done`, `total`, `seconds` since the stage began, `tokens` and `bytes` of this layer or shard,
    `peak_host_bytes`, `peak_device_bytes`, and the share of the `job`. listeners: called with the same, as a dict.
    Raises InvalidOption if the file cannot be written.
    """

    def __init__(self, mode: str = "silent", events: Path | None = None, listeners: Sequence[Listener] = ()) -> None:
        self._mode, self._listeners = mode, list(listeners)
        if events is not None:
            self._listeners.append(partial(_append, events))
            try:
                events.touch()
            except OSError as error:
                raise InvalidOption(
                    f"--events {events} cannot be written ({error.strerror}); name another file"
                ) from error
        self._job: Job | None = None

    def say(self, message: str) -> None:
        """Print a line between stages."""
        _say(message, self._mode != "silent")

    def header(self, rows: Mapping[str, str]) -> None:
        """Print what the job is, one labelled line each."""
        for label, text in rows.items():
            self.say(f"{label:{_LABEL_WIDTH}}{text}")

    @classmethod
    def of(cls, wanted: "Progress | bool | None") -> "Progress":
        """The argument `progress` of a stage: True is `auto`, False and None are silent."""
        if isinstance(wanted, Progress):
            return wanted
        if wanted is not None and not isinstance(wanted, bool):
            raise InvalidOption(f"progress is {shortened(wanted)}; expected True, False or a Progress")
        return cls("auto" if wanted else "silent")

    @contextmanager
    def job(self, weights: Sequence[tuple[str, float]]) -> Iterator[None]:
        """Group the stages inside into one job. weights: each stage in order, and roughly how long it takes."""
        with self._bar(100, "job", bar_format="{l_bar}{bar}| {elapsed}") as bar:
            self._job = Job(weights, bar)
            try:
                yield
            finally:
                self._job = None

    @contextmanager
    def stage(
        self, name: str, total: int, unit: str = "layer", most_lines: int | None = None, device: Any = None
    ) -> Iterator[Stage]:
        """A stage of `total` layers (or other units).

        most_lines: roughly how many lines to print. device: the one it runs on.
        """
        every = 1 if most_lines is None else max(1, total // most_lines)
        with self._bar(total, name, unit=unit, leave=self._job is None) as bar:
            lines = self._mode != "silent" and bar is None
            yield (stage := Stage(name, total, unit, bar, lines, self._job, every, device, self._listeners))
        if self._job is not None:
            self._job.finished += self._job.share_of(name)
            self._job.reach(self._job.finished)
            if bar is not None and stage.done > stage.skipped:  # its bar has been removed
                self.say(f"{name}: {stage.done}/{total}, {stage.rates()}")

    def _bar(self, total: int, name: str, **how: Any) -> Any:
        """A context manager: a bar on a terminal, else None."""
        if self._mode == "silent" or not _shows_bars():
            return nullcontext()
        return _bar_class()(total=total, desc=name, file=sys.stderr, dynamic_ncols=True, **how)


def _append(path: Path, event: Event) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


def _say(message: str, is_shown: bool = True) -> None:
    """Log a line, and print it if it is to be shown."""
    _log.info("%s", message)
    if is_shown:
        write = _bar_class().write if _shows_bars() else print  # which does not break the bars
        write(printable(message), file=sys.stderr)
