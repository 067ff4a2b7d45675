"""Ends a rank's process when its job is over, and what ranks tell each other about that.

Everything goes through torch.distributed's key-value store: `done/RANK` says that a rank has finished, `beat/RANK` that
a node is alive, and `failure` who ended the job, with which exit code.
"""

import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flap_stream.errors import RankLost

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5  # between two looks at the other ranks; not measured
_SILENCE_SECONDS = 6.0  # without a beat from a node or an answer from the store, it counts as lost; not measured
_FAREWELL_SECONDS = 5.0  # that a failed process gets to report its error and end by itself; not measured


def claim_failure(store: Any, rank: int, who: str, code: int) -> tuple[bool, int]:
    """Report that the job has failed; returns whether this report was the first, and the exit code of the first.

    who: `main` or `watch`, the thread that reports."""
    mine = json.dumps({"rank": rank, "who": who, "code": code})
    said = store.compare_set("failure", "", mine).decode()
    return said == mine, json.loads(said)["code"]


def done_keys(world: int) -> list[str]:
    """The key that each rank sets in the store when it has finished."""
    return [f"done/{rank}" for rank in range(world)]


def obituary(lost: int, world: int) -> str:
    """The message about a rank that ended without reporting a failure."""
    return (
        f"rank {lost} of {world} exited unexpectedly (killed, or its machine is unreachable); run the same command "
        "again to resume, with any number of ranks"
    )


class Watchdog(threading.Thread):
    """Ends this process when the job is over, even if its main thread is stuck in a product, a disk or a connection.

    A rank that fails reports it in the store. One that is killed cannot: ranks of its node notice that its process is
    gone, and the first ranks of other nodes notice that its node's beats stop.
    """

    def __init__(self, store: Any, rank: int, nodes: Sequence[Sequence[int]], pids: Sequence[int]) -> None:
        super().__init__(name="ranks", daemon=True)
        self._store, self._rank, self._world = store, rank, len(pids)
        own = next(ranks for ranks in nodes if rank in ranks)
        self._neighbours = {other: pids[other] for other in own if other != rank}
        self._leads = own[0] == rank
        self._heard = {ranks[0]: (b"", time.monotonic()) for ranks in nodes if ranks is not own and self._leads}
        self._beats, self._stopped = itertools.count(), threading.Event()
        self._over_since: float | None = None

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()
        self.join()

    def lost(self) -> int | None:
        """A rank that has ended, as far as this rank can see."""
        gone = (rank for rank, pid in self._neighbours.items() if not _is_running(pid))
        silent = (rank for rank, (_, since) in self._heard.items() if time.monotonic() - since > _SILENCE_SECONDS)
        return next(itertools.chain(gone, silent), None)

    def run(self) -> None:
        """Check on the job periodically."""
        while not self._stopped.wait(_LOOK_SECONDS):
            too_late = threading.Timer(_SILENCE_SECONDS, self._without_store)
            too_late.daemon = True
            too_late.start()
            try:
                self._look()
            except (RuntimeError, OSError):
                self._without_store()
            finally:
                too_late.cancel()

    def _look(self) -> None:
        if self._leads:
            self._store.set(f"beat/{self._rank}", str(next(self._beats)))
        for rank, (before, _) in self._heard.items():
            if self._store.check([f"beat/{rank}"]) and (beat := self._store.get(f"beat/{rank}")) != before:
                self._heard[rank] = (beat, time.monotonic())
        if not self._store.check(["failure"]):
            lost = self.lost()
            if lost is None or self._store.check(done_keys(self._world)):
                return  # once all have finished, a death does no harm
            if claim_failure(self._store, self._rank, "watch", RankLost.exit_code)[0]:
                self._end(RankLost.exit_code, obituary(lost, self._world))
        failure = json.loads(self._store.get("failure"))
        self._over_since = self._over_since or time.monotonic()
        is_own = (
            failure["rank"] == self._rank and failure["who"] == "main"
        )  # it is ending already and reports the reason itself
        if not is_own or time.monotonic() - self._over_since > _FAREWELL_SECONDS:
            self._end(failure["code"])

    def _without_store(self) -> None:
        """End: the launcher, or its machine, cannot be reached."""
        if self._stopped.is_set():
            return
        message = "the launcher of this job, or its machine, is gone; run the same command again to resume"
        self._end(RankLost.exit_code, message if self.speaks() else "")

    def speaks(self) -> bool:
        """Whether this is the lowest rank of its node that is still running."""
        return self._rank < min(
            (rank for rank, pid in self._neighbours.items() if _is_running(pid)), default=self._world
        )

    def _end(self, code: int, message: str = "") -> None:
        """End the process as a kill would; every file is written to survive that."""
        if self._stopped.is_set():
            return
        if message:
            logger.error("%s", message)
        os._exit(code)


def _is_running(pid: int) -> bool:
    """Whether a process of this machine is running; a zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
