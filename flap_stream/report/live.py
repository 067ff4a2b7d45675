"""`report --watch`: the page of a job that is running, served read-only and only to this machine."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import mean

import psutil

from flap_stream.errors import FlapStreamError, InvalidOption
from flap_stream.progress import format_bytes, high_water_mark
from flap_stream.report.facts import facts_of
from flap_stream.report.figures import drawings
from flap_stream.report.page import page, plain_page
from flap_stream.storage.loss import LossStore
from flap_stream.storage.run_directory import RunDirectory
from flap_stream.storage.run_lock import LOCK_NAME

REFRESH_SECONDS = 15
_LATEST = 8  # layers whose times say how long others will take


@dataclass(frozen=True)
class Status:
    """How far a job is.

    stages: name, layers (or shards) done, and of how many; None where that is not known. seconds_left: of the
    collection; tokens_per_second: of its latest layers. None before the first layer is done. process: in words.
    promised: most memory that the job is predicted to take, of the host and of the device; None until it is known.
    device_peak: most bytes of the device that the collection has taken.
    """

    stages: list[tuple[str, int, int | None]]
    seconds_left: float | None
    tokens_per_second: float | None
    process: str
    promised: tuple[int, int] | None
    device_peak: int


def read_status(run: RunDirectory) -> Status:
    """How far the job in a run directory is, from what it has stored."""
    layers, done = len(run.layer_shapes), run.statistics.complete_layers()
    stages: list[tuple[str, int, int | None]] = [("collect", done, layers)]
    if loss := LossStore.begun(run):
        stages.append(("gradient of the loss", loss.complete(), layers))
    if run.plan.exists():
        stages.append(("plan", 1, 1))
    if refitted := run.refits.complete_layers():
        stages.append(("refit", refitted, layers))
    if shards := {entry["name"] for entry in run.journal.of_kind("shard")}:
        stages.append(("shards written", len(shards), None))
    costs = [cost for cost in run.statistics.costs() if cost is not None][-_LATEST:]
    seconds = mean(cost.seconds for cost in costs) if costs else None
    return Status(
        stages,
        None if seconds is None else seconds * (layers - done),
        None if not seconds else mean(cost.tokens for cost in costs) / seconds,
        _process(run.path / LOCK_NAME),
        run.promise(),
        max((cost.peak_device_bytes for cost in costs), default=0),
    )


def _process(lock: Path) -> str:
    """The process that wrote its number into the lock, with its memory if it runs on this machine."""
    words = lock.read_text(errors="replace").split()[:4] if lock.is_file() else []
    if len(words) < 4 or not words[1].isdecimal() or words[3] != socket.gethostname():
        return f"{' '.join(words)}, on another machine" if len(words) == 4 else "no process works on it"
    try:
        now = psutil.Process(int(words[1])).memory_info().rss
        peak = high_water_mark(int(words[1]))
    except (psutil.Error, OSError, StopIteration):  # a process that ends has no such line any more
        return "no process is working on it; rerun the same command to resume"
    return f"{' '.join(words)}: {format_bytes(now)} of memory, {format_bytes(peak)} at its peak"


class Watch(ThreadingHTTPServer):
    """A server on the loopback interface of the page of one run directory. port: 0 chooses a free one."""

    daemon_threads = True

    def __init__(self, place: Path, port: int = 0) -> None:
        try:
            super().__init__(("127.0.0.1", port), _Answer)
        except (OSError, OverflowError) as error:
            raise InvalidOption(f"--watch {port}: that port cannot be used ({error}); name another, or none") from error
        self.place = place

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.server_port}/"

    def contents(self) -> str:
        """The page as of now."""
        if not (self.place / "run.json").exists():
            return plain_page(
                f"{self.place.name}: not there", "The job has not begun, or has finished.", REFRESH_SECONDS
            )
        try:
            with RunDirectory(self.place, is_writer=False) as run:
                facts, status = facts_of(run), read_status(run)
            return page(facts, drawings(facts), _section(status), REFRESH_SECONDS)
        except (FlapStreamError, OSError) as error:  # written, or removed, at this moment
            return plain_page(self.place.name, str(error), REFRESH_SECONDS)


class _Answer(BaseHTTPRequestHandler):
    server: Watch

    def do_GET(self) -> None:
        """Send the page, to a browser on this machine."""
        host = self.headers.get("Host", "").partition(":")[0]  # a browser leaves port 80 out
        if self.path != "/" or host not in ("127.0.0.1", "localhost"):  # a page elsewhere may not read this one
            self.send_error(404)
            return
        body = self.server.contents().encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def _section(status: Status) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{_share(done, total)}</td></tr>" for name, done, total in status.stages
    )
    return (
        '<section id="status">\n<h2>Now</h2>\n'
        f"<p>{escape(' '.join(_sentences(status)))}</p>\n<table><tbody>{rows}</tbody></table>\n</section>"
    )


def _share(done: int, total: int | None) -> str:
    return str(done) if total is None else f"{done} of {total}"


def _sentences(status: Status) -> Sequence[str]:
    rate = [] if status.tokens_per_second is None else [f"{status.tokens_per_second:,.0f} tokens/s."]
    promised = []
    if status.promised is not None:
        host, device = status.promised
        promised.append(f"The job is predicted to use at most {format_bytes(host)}")
        promised[-1] += f", and on the device {format_bytes(device)}" if device else ""
        promised[-1] += f", of which it has taken {format_bytes(status.device_peak)}." if status.device_peak else "."
    left = [f"Collection takes {status.seconds_left / 60:,.1f} minutes more."] if status.seconds_left else []
    return [f"{status.process[0].upper()}{status.process[1:]}.", *promised, *rate, *left]
