"""Host memory that the ranks of a node share, so that weights are read once per node."""

import mmap
import os

import torch

from flap_stream.engine.memory import host_buffer
from flap_stream.engine.ranks import Ranks


def node_buffer(ranks: Ranks, nbytes: int) -> torch.Tensor:
    """Host memory, uint8 `[nbytes]`, shared by all ranks of the node; every one of them must call this."""
    if ranks.local[1] == 1 or nbytes == 0:
        return host_buffer((nbytes,), torch.uint8)
    # Anonymous memory, which no kill leaves behind; unlike /dev/shm it is not limited to 64 MiB in containers.
    own = os.memfd_create("flap-stream") if ranks.leads_node else -1
    if own >= 0:
        os.posix_fallocate(own, 0, nbytes)
    paths = ranks.gathered_on_node(f"/proc/{os.getpid()}/fd/{own}")
    descriptor = own if own >= 0 else os.open(paths[0], os.O_RDWR)
    shared = mmap.mmap(descriptor, nbytes)
    if own < 0:
        os.close(descriptor)
    ranks.node_barrier()  # the leader's descriptor stays open until all have opened it
    if own >= 0:
        os.close(own)
    return torch.frombuffer(shared, dtype=torch.uint8)
