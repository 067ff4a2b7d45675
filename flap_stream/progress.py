"""Telling a person on stderr how far a stage is: a bar on a terminal, a line a layer elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flap_stream.errors import InvalidOption
from flap_stream.values import shortened


def peak_host_bytes() -> int:
    """Largest resident memory of this process so far."""
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        import resource  # its figure starts from the parent's, where a process is started by vfork

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_device_bytes() -> int:
    """Most memory that torch had reserved on the current CUDA device; 0 without one."""
    torch = sys.modules.get("torch")  # not imported for a progress line's sake
    return torch.cuda.max_memory_reserved() if torch and torch.cuda.is_initialized() else 0


def format_bytes(count: float) -> str:
    """A size for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, whose stderr is no terminal but shows a bar."""
    shell = sys.modules.get("IPython")
    return shell is not None and "IPKernelApp" in getattr(shell.get_ipython(), "config", {})


def _bar_class() -> type[tqdm]:
    """The bar of a terminal, or of a notebook, where ipywidgets shows it as a widget."""
    if not _in_notebook():
        return tqdm
    from tqdm.auto import tqdm as notebook_bar

    return notebook_bar


@dataclass
class Stage:
    """One stage under way, counted in layers (or shards)."""

    name: str
    total: int
    bar: Any = None
    lines: bool = False
    done: int = 0
    tokens: int = 0
    bytes_moved: int = 0
    started: float = field(default_factory=time.monotonic)

    def advance(self, tokens: int = 0, bytes_moved: int = 0) -> None:
        """One more layer is done, after so many tokens and bytes."""
        self.done += 1
        self.tokens += tokens
        self.bytes_moved += bytes_moved
        if self.bar is not None:
            self.bar.set_postfix_str(self._rates())
            self.bar.update(1)
        elif self.lines:
            left = (time.monotonic() - self.started) / self.done * (self.total - self.done)
            print(f"{self.name}: {self.done}/{self.total}, {self._rates()}, {left:.0f} s left", file=sys.stderr)

    def skip(self, count: int) -> None:
        """So many layers were done by an earlier run."""
        self.total -= count
        if self.bar is not None:
            self.bar.total = self.total
            self.bar.refresh()

    def _rates(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        parts = [f"{self.tokens / seconds:,.0f} tokens/s"] if self.tokens else []
        parts += [f"{format_bytes(self.bytes_moved / seconds)}/s"] if self.bytes_moved else []
        parts.append(f"peak {format_bytes(peak_host_bytes())}")
        if device := peak_device_bytes():
            parts.append(f"device {format_bytes(device)}")
        return ", ".join(parts)


class Progress:
    """Where stages report. `mode` is `auto` (a bar on a terminal, else lines) or `silent`."""

    def __init__(self, mode: str = "silent") -> None:
        self._mode = mode

    @classmethod
    def of(cls, wanted: "Progress | bool | None") -> "Progress":
        """What a stage was given as `progress`: True is `auto`, False and None are silent."""
        if isinstance(wanted, Progress):
            return wanted
        if wanted is not None and not isinstance(wanted, bool):
            raise InvalidOption(f"progress is {shortened(wanted)}; expected True, False or a Progress")
        return cls("auto" if wanted else "silent")

    @contextmanager
    def stage(self, name: str, total: int, unit: str = "layer") -> Iterator[Stage]:
        """A stage of `total` layers (or other units)."""
        if self._mode == "silent":
            yield Stage(name, total)
        elif sys.stderr.isatty() or _in_notebook():
            with _bar_class()(total=total, desc=name, unit=unit, file=sys.stderr) as bar:
                yield Stage(name, total, bar=bar)
        else:
            yield Stage(name, total, lines=True)
