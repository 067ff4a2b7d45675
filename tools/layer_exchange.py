"""Times four ways to give all ranks of a node a layer that is read once.

    torchrun --nproc-per-node 2 tools/layer_exchange.py [--layer-bytes 256MiB] [--layers 8]

`broadcast`: the first rank reads, and broadcasts through gloo. `all-gather`: each reads its share, and gets the rest
through gloo. `shared`: each reads its share into memory that all see (what flap_stream does). `apart`: each reads all,
for comparison. Each once with the file dropped from the page
cache and once with it cached; memory is what a rank needs for one layer.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from flap_stream.config.values import parse_size
from flap_stream.engine.membership import joined
from flap_stream.engine.ranks import Ranks
from flap_stream.engine.shared_memory import node_buffer
from flap_stream.progress import format_bytes

BLOCK_BYTES = 1 << 25


def read(descriptor: int, buffer: torch.Tensor, start: int, stop: int, at: int) -> None:
    """Bytes `start` to `stop` of a layer, which begins at byte `at` of the file, into the same place of a buffer."""
    view = memoryview(buffer.numpy())
    while start < stop:
        start += os.preadv(descriptor, [view[start : min(stop, start + BLOCK_BYTES)]], at + start)


def ways(ranks: Ranks, size: int) -> dict[str, tuple[Callable[[int, int], None], torch.Tensor]]:
    """Name to what brings a layer (of a descriptor, from a byte on) into a buffer, and that buffer."""
    own, count = ranks.local
    share = size // count
    shared, apart = node_buffer(ranks, size), torch.empty(size, dtype=torch.uint8)

    def broadcast(descriptor: int, at: int) -> None:
        if own == 0:
            read(descriptor, apart, 0, size, at)
        dist.broadcast(apart, 0)

    def all_gather(descriptor: int, at: int) -> None:
        read(descriptor, apart, own * share, (own + 1) * share, at)
        dist.all_gather_into_tensor(apart, apart[own * share : (own + 1) * share].clone())

    def in_shared_memory(descriptor: int, at: int) -> None:
        ranks.node_barrier()
        read(descriptor, shared, own * share, (own + 1) * share, at)
        ranks.node_barrier()

    def all_by_each(descriptor: int, at: int) -> None:
        read(descriptor, apart, 0, size, at)
        ranks.node_barrier()

    return {
        "broadcast": (broadcast, apart),
        "all-gather": (all_gather, apart),
        "shared": (in_shared_memory, shared),
        "apart": (all_by_each, apart),
    }


def main() -> None:
    """Time every way; rank 0 prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer-bytes", default="256MiB", type=parse_size)
    parser.add_argument("--layers", default=8, type=int)
    parser.add_argument("--directory", default=None, help="where the file is made (default: the temporary folder)")
    options = parser.parse_args()
    with joined() as ranks, tempfile.TemporaryDirectory(dir=options.directory) as directory:
        size = options.layer_bytes // ranks.world * ranks.world
        path = ranks.from_first(lambda: Path(directory, "layers"))
        if ranks.is_first:
            with open(path, "wb") as file:
                for _ in range(options.layers):
                    file.write(os.urandom(size))
                os.fsync(file.fileno())
            print(f"{ranks.world} ranks, {options.layers} layers of {format_bytes(size)}; seconds a layer")
        ranks.barrier()
        descriptor = os.open(path, os.O_RDONLY)
        reference = None
        for state in ("cold", "warm"):
            for name, (bring, buffer) in ways(ranks, size).items():
                if state == "cold":
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                ranks.barrier()
                started = time.monotonic()
                for layer in range(options.layers):
                    bring(descriptor, layer * size)
                seconds = (time.monotonic() - started) / options.layers
                reference = buffer.clone() if reference is None else reference
                assert torch.equal(buffer, reference), name
                if ranks.is_first:
                    memory = size // ranks.world if name == "shared" else size
                    rate = format_bytes(size / seconds)
                    print(f"{state}  {name:10s} {seconds:6.3f} s  {rate}/s  {format_bytes(memory)} a rank")
        os.close(descriptor)
        ranks.barrier()


if __name__ == "__main__":
    main()
