"""How the ranks of a job find each other, and how they leave or fail together."""

import itertools
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from math import inf
from typing import Any

import torch.distributed as dist

from flap_stream.engine.ranks import ALONE, Ranks, peer_errors
from flap_stream.engine.watchdog import Watchdog, claim_failure, done_keys, obituary
from flap_stream.errors import FlapStreamError, RankLost

INTERRUPTED = 130  # exit code

_EXIT_SECONDS = 1.0  # that a killed process may take to disappear under load; not measured
_JOIN_SECONDS = 600.0  # from the first rank's start to the last one's; torchrun may wait as long for its nodes
_NO_TIMEOUT = timedelta(days=30)  # one rank may wait hours for another; the watchdog finds dead ones
_joins = itertools.count()
_current: "Ranks | None" = None


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of this process's job, which enter and leave the block together; a nested call yields the same ranks.

    If one rank fails or dies, all end: the first to fail raises its own error, with a note naming its rank; the others
    raise SystemExit with the same exit code, or their processes are ended wherever they are.
    """
    global _current
    if int(os.environ.get("WORLD_SIZE", 1)) <= 1:
        yield ALONE
        return
    if _current is not None:
        yield _current
        return
    job = _Membership()
    try:
        _current = job.join()
        yield _current
        job.leave(_current)
    except BaseException as error:
        job.fail(error)
        raise
    finally:
        _current = None


class _Membership:
    """A rank's membership of its job: torch.distributed's store, and a thread that watches other ranks through it."""

    def __init__(self) -> None:
        self._owns_group = not dist.is_initialized()
        store, self._rank, self._world = next(iter(dist.rendezvous("env://")))
        attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}.{next(_joins)}"
        self._store: Any = dist.PrefixStore(f"flap-stream/{attempt}", store)
        self._watch: Watchdog | None = None

    def join(self) -> Ranks:
        """Wait until all ranks have started; returns them.

        Raises RankLost if some do not start."""
        mine = {"host": socket.gethostname(), "group": os.environ.get("GROUP_RANK", ""), "pid": os.getpid()}
        self._store.set(f"process/{self._rank}", json.dumps(mine))
        keys = [f"process/{rank}" for rank in range(self._world)]
        if not self._wait_for(keys, _JOIN_SECONDS):
            raise RankLost(
                f"some of the {self._world} ranks did not start within {_JOIN_SECONDS:.0f} s; start the job again"
            )
        processes = [json.loads(self._store.get(key)) for key in keys]
        places = [(process["host"], process["group"]) for process in processes]
        nodes = tuple(
            tuple(rank for rank, other in enumerate(places) if other == place) for place in dict.fromkeys(places)
        )
        self._watch = Watchdog(self._store.clone(), self._rank, nodes, [process["pid"] for process in processes])
        self._watch.start()
        members = (range(self._world), *nodes)
        with peer_errors():  # one may be killed while others connect to it
            if self._owns_group:
                dist.init_process_group(
                    "gloo", store=self._store, rank=self._rank, world_size=self._world, timeout=_NO_TIMEOUT
                )
            groups = [dist.new_group(list(ranks), timeout=_NO_TIMEOUT, backend="gloo") for ranks in members]
        node = next(number for number, ranks in enumerate(nodes) if self._rank in ranks)
        return Ranks(self._rank, nodes, groups[0], groups[1 + node])

    def leave(self, ranks: Ranks) -> None:
        """Wait until all ranks have finished, then leave."""
        assert self._watch is not None
        self._store.set(done_keys(self._world)[self._rank], "")
        # Not a barrier: if a rank is killed in it, some of the others pass it and some do not.
        with peer_errors():
            self._wait_for(done_keys(self._world))
        self._watch.stop()
        with suppress(RankLost):
            ranks.barrier()
        if self._owns_group:
            dist.destroy_process_group()

    def _wait_for(self, keys: list[str], seconds: float = inf) -> bool:
        """Wait until the store has all keys, at most that many seconds; returns whether it has."""
        deadline = time.monotonic() + seconds
        while not self._store.check(keys):  # not a blocking wait, which signals could not interrupt
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks; raise SystemExit or RankLost if that explains the end better than `error`."""
        with suppress(ValueError):  # not in the main thread
            for number in (signal.SIGTERM, signal.SIGINT):  # the launcher sends them when a rank ends
                signal.signal(number, signal.SIG_IGN)
        lost = self._lost(_EXIT_SECONDS if isinstance(error, RankLost) else 0.0)
        if lost is not None and isinstance(error, (RankLost, KeyboardInterrupt)):
            code, reason = RankLost.exit_code, RankLost(obituary(lost, self._world))
        else:
            code, reason = _exit_code(error), None
        try:
            is_first, code = claim_failure(self._store, self._rank, "main", code)
        except (RuntimeError, OSError):  # the launcher, which holds the store, has ended
            is_first = self._watch is None or self._watch.speaks()
        if not is_first:
            raise SystemExit(code) from error
        if reason is not None:
            reason.add_note("")  # the message names the rank already
            raise reason from error
        error.add_note(f"rank {self._rank} of {self._world}: ")

    def _lost(self, seconds: float) -> int | None:
        """A rank that has ended, or ends within that time: a killed process loses its connections before it is gone."""
        deadline = time.monotonic() + seconds
        while self._watch is not None:
            lost = self._watch.lost()
            if lost is not None or time.monotonic() > deadline:
                return lost
            time.sleep(0.01)
        return None


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return error.exit_code if isinstance(error, FlapStreamError) else 1
