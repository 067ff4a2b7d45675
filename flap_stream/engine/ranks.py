"""The ranks of a job and what they exchange.

`torchrun` and `accelerate launch` start a job as ranks, one process each, which all run the same stages. A process
started on its own is a `Ranks` of one, for which every collective returns its argument.

Ranks exchange only small values (moments, decisions), through torch.distributed's gloo backend, on GPU machines too.
Weights, which are large, are read once per node into memory that its ranks share (`shared_memory`).
"""

import itertools
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from flap_stream.errors import InvalidInput, RankLost

_Value = TypeVar("_Value")


@dataclass(frozen=True, eq=False)
class Ranks:
    """This process among the ranks of its job.

    rank: its number. nodes: the ranks on each machine; this one's is `nodes[node]`.
    """

    rank: int = 0
    nodes: tuple[tuple[int, ...], ...] = ((0,),)
    _group: Any = None
    _node_group: Any = None  # for the thread that reads ahead: two threads must not use one group

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
        """Whether this is rank 0, the only one that writes the run directory and the output's small files."""
        return self.rank == 0

    @property
    def local(self) -> tuple[int, int]:
        """This rank's number on its node, and the number of ranks there."""
        ranks = self.nodes[self.node]
        return ranks.index(self.rank), len(ranks)

    @property
    def leads_node(self) -> bool:
        """Whether this is the first rank of its node."""
        return self.local[0] == 0

    def share(self, samples: int, batch_size: int) -> range:
        """The windows of this rank: a contiguous range of whole batches, cut as one process would cut them."""
        return self.shares(samples, batch_size)[self.rank]

    def shares(self, samples: int, batch_size: int) -> list[range]:
        """The windows of every rank, in order."""
        return window_shares(samples, batch_size, self.world)

    # --- collectives: every rank must call them in the same order ---

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            with peer_errors():
                dist.barrier(group=self._group)

    def from_first(self, action: Callable[[], _Value]) -> _Value:
        """The result of calling `action` on rank 0, returned on every rank; the others wait without calling it."""
        if self.world == 1:
            return action()
        values = [action() if self.is_first else None]
        with peer_errors():
            dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]  # type: ignore[return-value]

    def gathered(self, value: _Value) -> list[_Value]:
        """The value of every rank, in order of ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with peer_errors():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def exchanged(self, values: Sequence[_Value]) -> list[_Value]:
        """The values that every rank has for this one, in order of ranks. values: this rank's, one for each rank."""
        if self.world == 1:
            return list(values)
        packed = [torch.frombuffer(bytearray(pickle.dumps(value, protocol=5)), dtype=torch.uint8) for value in values]
        sizes, counts = torch.tensor([len(item) for item in packed]), torch.zeros(self.world, dtype=torch.int64)
        with peer_errors():
            dist.all_to_all_single(counts, sizes, group=self._group)
            received = torch.empty(int(counts.sum()), dtype=torch.uint8)
            dist.all_to_all_single(received, torch.cat(packed), counts.tolist(), sizes.tolist(), group=self._group)
        return [pickle.loads(memoryview(item.numpy())) for item in received.split(counts.tolist())]

    def sum_on_first(self, values: torch.Tensor) -> None:
        """Replace rank 0's values by the sum over all ranks; those of the others are undefined afterwards.

        Ranks are added in no fixed order, so sums must be exact in any.
        """
        if self.world > 1:
            on_host = values.cpu()
            with peer_errors():
                dist.reduce(on_host, 0, group=self._group)
            values.copy_(on_host)

    def in_order(self, blocks: Iterator[memoryview], block_bytes: int) -> Iterator[memoryview]:
        """Yield the blocks of all ranks on rank 0, in order of ranks, each valid until the next; others send theirs.

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
        with peer_errors():
            dist.send(values, 0, group=self._group)

    def _receive(self, values: torch.Tensor, source: int) -> bool:
        with peer_errors():
            dist.recv(values, source, group=self._group)
        return True

    def require_same(self, what: str, value: str) -> None:
        """Raise InvalidInput unless all ranks have the same value. what: for the message, as in "the model at PATH"."""
        for rank, other in enumerate(self.gathered(value)):
            if other != value:
                raise InvalidInput(
                    f"{what} differs between rank {rank} and rank {self.rank}; all machines of a job must see "
                    "the same files, so use a shared file system or copy them again"
                )

    # --- within a node ---

    def node_barrier(self) -> None:
        """Wait for the ranks of this node."""
        if self.local[1] > 1:
            with peer_errors():
                dist.barrier(group=self._node_group)

    def gathered_on_node(self, value: _Value) -> list[_Value]:
        """The value of every rank of this node, in order of ranks."""
        if self.local[1] == 1:
            return [value]
        values: list[Any] = [None] * self.local[1]
        with peer_errors():
            dist.all_gather_object(values, value, group=self._node_group)
        return values


ALONE = Ranks()


def window_shares(samples: int, batch_size: int, ranks: int) -> list[range]:
    """Contiguous ranges of windows, one per rank, cut where one process would begin a batch.

    Where there are fewer batches than ranks, some are empty, but never the first rank's.
    """
    batches = -(-samples // batch_size)
    cuts = [min(batch_size * -(-batches * rank // ranks), samples) for rank in range(ranks + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(cuts)]


@contextmanager
def peer_errors() -> Iterator[None]:
    """Turn what torch.distributed raises when another rank has ended into RankLost."""
    try:
        yield
    except RuntimeError as error:  # the base class of all its errors
        raise RankLost(
            "another rank of this job has ended; run the same command again to resume, with any number of ranks"
        ) from error
