"""The processes of one job: who they are, what passes between them, and how they end together.

`torchrun` and `accelerate launch` start a job as ranks, one process each, which all run the same stages. A process that
was started by itself is a `Ranks` of one, for which everything here gives back what it was given.

What passes between ranks is small (moments, decisions) and goes through torch.distributed's gloo, on GPU machines too:
weights, which are large, are read once a node into memory that its ranks share.
"""

import itertools
import json
import logging
import mmap
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from math import inf
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from flap_stream.engine.memory import host_buffer
from flap_stream.errors import FlapStreamError, InvalidInput, InvalidOption, RankLost

logger = logging.getLogger(__name__)

INTERRUPTED = 130  # exit code

_LOOK_SECONDS = 0.5
_EXIT_SECONDS = 1.0  # that a killed process may take to end, under load
_SILENCE_SECONDS = 6.0  # without a sign from another node, or an answer of the store: it is gone
_FAREWELL_SECONDS = 5.0  # from the moment when a failure is known until its process ends, at the latest
_JOIN_SECONDS = 600.0
_NO_TIMEOUT = timedelta(days=30)  # a rank may well wait for hours for another; a dead one is found otherwise
_Value = TypeVar("_Value")
_joins = itertools.count()
_current: "Ranks | None" = None


@dataclass(frozen=True, eq=False)
class Ranks:
    """This process among those of its job.

    rank, world: its number, and how many there are. nodes: the ranks on each machine, this one's at `node`.
    """

    rank: int = 0
    nodes: tuple[tuple[int, ...], ...] = ((0,),)
    _group: Any = None
    _node_group: Any = None  # for the thread that reads ahead: threads that share a group would mix up their turns

    @property
    def world(self) -> int:
        """Number of ranks."""
        return sum(map(len, self.nodes))

    @property
    def node(self) -> int:
        """Number of this rank's machine."""
        return next(number for number, ranks in enumerate(self.nodes) if self.rank in ranks)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes the run directory and the output's small files."""
        return self.rank == 0

    @property
    def local(self) -> tuple[int, int]:
        """This rank's number on its node, and how many ranks are there."""
        ranks = self.nodes[self.node]
        return ranks.index(self.rank), len(ranks)

    @property
    def leads_node(self) -> bool:
        """Whether this is the first rank of its node."""
        return self.local[0] == 0

    def share(self, samples: int, batch_size: int) -> range:
        """The windows of this rank: whole batches, as one process would run them, in one piece."""
        return self.shares(samples, batch_size)[self.rank]

    def shares(self, samples: int, batch_size: int) -> list[range]:
        """The windows of every rank, in order."""
        return window_shares(samples, batch_size, self.world)

    # --- from rank to rank; every rank must call these in the same order ---

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            with _peers():
                dist.barrier(group=self._group)

    def from_first(self, action: Callable[[], _Value]) -> _Value:
        """What the action gives on rank 0, on every rank; the others wait and do not act."""
        if self.world == 1:
            return action()
        values = [action() if self.is_first else None]
        with _peers():
            dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]  # type: ignore[return-value]

    def gathered(self, value: _Value) -> list[_Value]:
        """Every rank's value, in order of ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with _peers():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def exchanged(self, values: Sequence[_Value]) -> list[_Value]:
        """What every rank has for this one, in order of ranks. values: what this one has for each."""
        if self.world == 1:
            return list(values)
        packed = [torch.frombuffer(bytearray(pickle.dumps(value, protocol=5)), dtype=torch.uint8) for value in values]
        sizes, counts = torch.tensor([len(item) for item in packed]), torch.zeros(self.world, dtype=torch.int64)
        with _peers():
            dist.all_to_all_single(counts, sizes, group=self._group)
            received = torch.empty(int(counts.sum()), dtype=torch.uint8)
            dist.all_to_all_single(received, torch.cat(packed), counts.tolist(), sizes.tolist(), group=self._group)
        return [pickle.loads(memoryview(item.numpy())) for item in received.split(counts.tolist())]

    def sum_on_first(self, values: torch.Tensor) -> None:
        """Put the sum of every rank's values in place of rank 0's; those of the others mean nothing from then on.

        Ranks are added in whatever order the network likes, so sums must be exact in any.
        """
        if self.world > 1:
            on_host = values.cpu()
            with _peers():
                dist.reduce(on_host, 0, group=self._group)
            values.copy_(on_host)

    def in_order(self, blocks: Iterator[memoryview], block_bytes: int) -> Iterator[memoryview]:
        """On rank 0 the blocks of all ranks, in order of ranks; each is valid until the next. The others send theirs.

        blocks: this rank's, none larger than `block_bytes`.
        """
        if self.is_first:
            yield from blocks
            buffer = torch.empty(block_bytes if self.world > 1 else 0, dtype=torch.uint8)
            size = torch.zeros(1, dtype=torch.int64)
            for source in range(1, self.world):
                while self._receive(size, source) and int(size):
                    part = buffer[: int(size)]
                    self._receive(part, source)
                    yield memoryview(part.numpy())
            return
        for block in blocks:
            self._send(torch.tensor([len(block)]))
            self._send(torch.frombuffer(block, dtype=torch.uint8))
        self._send(torch.zeros(1, dtype=torch.int64))

    def _send(self, values: torch.Tensor) -> None:
        with _peers():
            dist.send(values, 0, group=self._group)

    def _receive(self, values: torch.Tensor, source: int) -> bool:
        with _peers():
            dist.recv(values, source, group=self._group)
        return True

    def require_same(self, what: str, value: str) -> None:
        """Raise InvalidInput unless all ranks have the same value. what: "the model at PATH", for the message."""
        for rank, other in enumerate(self.gathered(value)):
            if other != value:
                raise InvalidInput(
                    f"{what} is not the same for rank {rank} as for rank {self.rank}; all machines of a job must see "
                    "the same files, so share one file system or copy them again"
                )

    # --- within a node ---

    def node_barrier(self) -> None:
        """Wait for the ranks of this node."""
        if self.local[1] > 1:
            with _peers():
                dist.barrier(group=self._node_group)

    def node_buffer(self, nbytes: int) -> torch.Tensor:
        """Host memory, uint8 `[nbytes]`, that is the same for all ranks of the node."""
        if self.local[1] == 1 or nbytes == 0:
            return host_buffer((nbytes,), torch.uint8)
        # Anonymous memory, which no kill leaves behind; unlike /dev/shm it is not cut to 64 MiB in containers.
        own = os.memfd_create("flap-stream") if self.leads_node else -1
        if own >= 0:
            os.posix_fallocate(own, 0, nbytes)
        places: list[Any] = [None] * self.local[1]
        with _peers():
            dist.all_gather_object(places, f"/proc/{os.getpid()}/fd/{own}", group=self._node_group)
        descriptor = own if own >= 0 else os.open(places[0], os.O_RDWR)
        shared = mmap.mmap(descriptor, nbytes)
        os.close(descriptor) if own < 0 else None
        self.node_barrier()
        if own >= 0:
            os.close(own)
        return torch.frombuffer(shared, dtype=torch.uint8)


ALONE = Ranks()


def window_shares(samples: int, batch_size: int, ranks: int) -> list[range]:
    """Contiguous ranges of windows, one a rank, cut where one process would begin a batch; some may be empty."""
    batches = -(-samples // batch_size)
    cuts = [min(batch_size * (batches * rank // ranks), samples) for rank in range(ranks + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(cuts)]


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process among the ranks of its job, which enter and leave together; within it, the same again.

    If one fails, or dies, all end: the first to fail raises what it failed with, with a note of its rank, the others
    raise SystemExit with the same exit code, or are ended where they are.
    """
    global _current
    if int(os.environ.get("WORLD_SIZE", 1)) <= 1:
        yield ALONE
        return
    if _current is not None:
        yield _current
        return
    job = _Job()
    try:
        _current = job.join()
        yield _current
        job.leave(_current)
    except BaseException as error:
        job.fail(error)
        raise
    finally:
        _current = None


class _Job:
    """What holds the ranks together: torch.distributed's store, and a thread that watches the others through it."""

    def __init__(self) -> None:
        self._owns_group = not dist.is_initialized()
        store, self._rank, self._world = next(iter(dist.rendezvous("env://")))
        attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}.{next(_joins)}"
        self._store: Any = dist.PrefixStore(f"flap-stream/{attempt}", store)
        self._watch: _Watch | None = None

    def join(self) -> Ranks:
        """Wait until all ranks are there, and get to know them."""
        mine = {"host": socket.gethostname(), "group": os.environ.get("GROUP_RANK", ""), "pid": os.getpid()}
        self._store.set(f"process/{self._rank}", json.dumps(mine))
        keys = [f"process/{rank}" for rank in range(self._world)]
        if not self._wait_for(keys, _JOIN_SECONDS):
            raise RankLost(f"some of the {self._world} ranks of this job did not come up; start it again")
        processes = [json.loads(self._store.get(key)) for key in keys]
        places = [(process["host"], process["group"]) for process in processes]
        nodes = tuple(
            tuple(rank for rank, other in enumerate(places) if other == place) for place in dict.fromkeys(places)
        )
        self._watch = _Watch(self._store.clone(), self._rank, nodes, [process["pid"] for process in processes])
        self._watch.start()
        if self._owns_group:
            dist.init_process_group(
                "gloo", store=self._store, rank=self._rank, world_size=self._world, timeout=_NO_TIMEOUT
            )
        groups = [
            dist.new_group(list(ranks), timeout=_NO_TIMEOUT, backend="gloo") for ranks in (range(self._world), *nodes)
        ]
        node = next(number for number, ranks in enumerate(nodes) if self._rank in ranks)
        return Ranks(self._rank, nodes, groups[0], groups[1 + node])

    def leave(self, ranks: Ranks) -> None:
        """All is done: go when all can go."""
        assert self._watch is not None
        self._store.set(_done_keys(self._world)[self._rank], "")
        # Not a barrier: if a rank is killed in one, some of the others get through it and some do not.
        with _peers():
            self._wait_for(_done_keys(self._world))
        self._watch.stop()
        with suppress(RankLost):
            ranks.barrier()
        if self._owns_group:
            dist.destroy_process_group()

    def _wait_for(self, keys: list[str], seconds: float = inf) -> bool:
        """Wait for so long, at most, until the store has all keys; whether it has."""
        deadline = time.monotonic() + seconds
        while not self._store.check(keys):  # not a blocking wait: a signal must get through
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def fail(self, error: BaseException) -> None:
        """Let the others know; raise SystemExit or RankLost where that says better why it is over."""
        with suppress(ValueError):  # in another thread than the main one
            for number in (signal.SIGTERM, signal.SIGINT):  # the launcher's, which would come in between
                signal.signal(number, signal.SIG_IGN)
        lost = self._lost(_EXIT_SECONDS if isinstance(error, RankLost) else 0.0)
        if lost is not None and isinstance(error, (RankLost, KeyboardInterrupt)):
            code, reason = RankLost.exit_code, RankLost(_obituary(lost, self._world))
        else:
            code, reason = _exit_code(error), None
        try:
            is_first, code = _claim(self._store, self._rank, "main", code)
        except (RuntimeError, OSError):  # the launcher, where the store is, is gone
            is_first = self._watch is None or self._watch.speaks()
        if not is_first:
            raise SystemExit(code) from error
        if reason is not None:
            reason.add_note("")  # says by itself whom it is about
            raise reason from error
        error.add_note(f"rank {self._rank} of {self._world}: ")

    def _lost(self, seconds: float) -> int | None:
        """A rank that has ended, or does within so long: a killed process loses its connections before it is gone."""
        deadline = time.monotonic() + seconds
        while self._watch is not None:
            lost = self._watch.lost()
            if lost is not None or time.monotonic() > deadline:
                return lost
            time.sleep(0.01)
        return None


def _claim(store: Any, rank: int, who: str, code: int) -> tuple[bool, int]:
    """Whether this is the first to say that the job is over, and the exit code of the one who was."""
    mine = json.dumps({"rank": rank, "who": who, "code": code})
    said = store.compare_set("failure", "", mine).decode()
    return said == mine, json.loads(said)["code"]


def _done_keys(world: int) -> list[str]:
    """What each rank puts into the store when it has nothing left to do."""
    return [f"done/{rank}" for rank in range(world)]


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return error.exit_code if isinstance(error, FlapStreamError) else 1


def _obituary(lost: int, world: int) -> str:
    return (
        f"rank {lost} of {world} is gone without a word (killed, or its machine is unreachable); run the same command "
        "again, with as many ranks as you like"
    )


@contextmanager
def _peers() -> Iterator[None]:
    """What torch.distributed raises when another rank is gone is a RankLost."""
    try:
        yield
    except RuntimeError as error:  # the base of all that torch.distributed raises
        raise RankLost(
            "another rank of this job is gone; run the same command again, with as many ranks as you like"
        ) from error


class _Watch(threading.Thread):
    """Ends this process when the job is over, wherever its main thread is: in a product, a disk, a dead connection.

    A rank that fails says so in the store. One that is killed cannot: those of its node miss its process, and the first
    ranks of the nodes miss each other's signs of life.
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
        """Look no more."""
        self._stopped.set()
        self.join()

    def lost(self) -> int | None:
        """A rank that has ended, as far as can be seen from here."""
        gone = (rank for rank, pid in self._neighbours.items() if not _is_running(pid))
        silent = (rank for rank, (_, since) in self._heard.items() if time.monotonic() - since > _SILENCE_SECONDS)
        return next(itertools.chain(gone, silent), None)

    def run(self) -> None:
        """Look around from time to time."""
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
            if lost is None or self._store.check(_done_keys(self._world)):
                return  # from when all are done, a death does no harm
            if _claim(self._store, self._rank, "watch", RankLost.exit_code)[0]:
                self._end(RankLost.exit_code, _obituary(lost, self._world))
        failure = json.loads(self._store.get("failure"))
        self._over_since = self._over_since or time.monotonic()
        is_own = failure["rank"] == self._rank and failure["who"] == "main"  # which is on its way out, and will say why
        if not is_own or time.monotonic() - self._over_since > _FAREWELL_SECONDS:
            self._end(failure["code"])

    def _without_store(self) -> None:
        """The launcher, or the machine that it is on, is gone."""
        if self._stopped.is_set():
            return
        message = "the launcher of this job, or its machine, is gone; run the same command again"
        self._end(RankLost.exit_code, message if self.speaks() else "")

    def speaks(self) -> bool:
        """Whether this is the first of the ranks of its node that are left."""
        return self._rank < min(
            (rank for rank, pid in self._neighbours.items() if _is_running(pid)), default=self._world
        )

    def _end(self, code: int, message: str = "") -> None:
        """End the process as a kill would, which every file here is made for."""
        if self._stopped.is_set():
            return
        if message:
            logger.error("%s", message)
        os._exit(code)


def _is_running(pid: int) -> bool:
    """Whether a process of this machine has not ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def own_device(name: str, ranks: Ranks) -> str:
    """The name of the device that a rank takes of its node: `auto` and `cuda` are the one with its local number.

    Raises InvalidOption for `cuda:N`, which all would share.
    """
    index, count = ranks.local
    if count == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return name
    if name.startswith("cuda:"):
        raise InvalidOption(f"--device {name} is one device for {count} ranks; write cuda, and each takes its own")
    return f"cuda:{index}"
