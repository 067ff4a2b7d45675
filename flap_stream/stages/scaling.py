"""How long a job takes on any number of ranks: a model of what they share. Plain arithmetic on sizes and rates.

A layer's products are divided among ranks, and so are reading it within a node and merging its moments; its bytes go to
every node, from file systems that nodes share or not. Reading goes on beside the products, the rest after them.
"""

from dataclasses import dataclass
from math import inf

from flap_stream.engine.ranks import window_shares


@dataclass(frozen=True)
class Work:
    """What a job consists of.

    samples, batch_size: windows in all, and at once. operations: floating-point, of all layers. layer_bytes: of all
    layers on disk. moment_bytes: window moments of all layers.
    hidden_traffic: bytes of hidden states that go to disk and back. read_again, written: bytes, of pass 2, in so many
    shards.
    refit: None if nothing is refitted.
    """

    layers: int
    samples: int
    batch_size: int
    operations: int
    layer_bytes: int
    moment_bytes: int
    hidden_traffic: int
    read_again: int
    written: int
    shards: int
    refit: "RefitWork | None" = None


@dataclass(frozen=True)
class RefitWork:
    """What refitting consists of, beside reading layers once more.

    operations: of layers and moments, which ranks divide. solving: operations on rank 0 while the others wait.
    sum_bytes: of the sums that every rank hands to rank 0.
    """

    operations: int
    solving: int
    sum_bytes: int


@dataclass(frozen=True)
class Rates:
    """Operations and bytes per second, and seconds.

    product: of one rank. node_product: of all ranks of a node together, at most.
    disk_read, disk_write: of the disk or the link to it of one node. shared_read, shared_write: of all nodes together.
    link: from host memory to a rank's device. network: out of a node, and into it.
    merge: window moments that one rank merges. layer_seconds: what every layer takes besides, such as waiting for its
    statistics to be on the disk.
    """

    product: float
    disk_read: float
    disk_write: float
    node_product: float = inf
    shared_read: float = inf
    shared_write: float = inf
    link: float = inf
    network: float = inf
    merge: float = inf
    layer_seconds: float = 0.0


@dataclass(frozen=True)
class Scaled:
    """What a job takes on so many ranks.

    busy_ranks: those that have windows. bound: what pass 1 waits for most: `products`, `reading`, `moments` or `rest`.
    network_bytes: that leave one node, all stages together. seconds: a stage.
    """

    ranks: int
    nodes: int
    busy_ranks: int
    bound: str
    network_bytes: float
    seconds: dict[str, float]


def scale(work: Work, rates: Rates, ranks: int = 1, nodes: int = 1) -> Scaled:
    """Predict a job on ranks that are spread evenly over nodes."""
    shares = [len(share) for share in window_shares(work.samples, work.batch_size, ranks)] if work.samples else [0]
    largest_share = max(shares) / max(work.samples, 1)
    local = -(-ranks // nodes)
    product = min(rates.product, rates.node_product / local)
    products = work.operations * largest_share / product
    to_node = min(rates.disk_read, rates.shared_read / nodes)
    reading = work.layer_bytes / min(to_node, rates.link) + work.hidden_traffic / min(
        rates.disk_read * nodes, rates.shared_read
    )
    leaving = work.moment_bytes / nodes * (nodes - 1) / nodes
    moments = work.moment_bytes / ranks / rates.merge + leaving / rates.network
    rest = work.layers * rates.layer_seconds
    collect = max(products, reading) + moments + rest
    parts = {"products": products, "reading": reading, "moments": moments, "rest": rest}
    writers = min(nodes, work.shards)
    read = min(rates.disk_read * writers, rates.shared_read)
    write = min(rates.disk_write * writers, rates.shared_write)
    seconds = {"collect": collect, "rewrite": work.read_again / read + work.written / write}
    if work.refit is not None:
        sent = work.refit.sum_bytes if nodes > 1 else 0
        leaving += sent
        refitting = max(work.refit.operations * largest_share / product, reading)
        seconds["refit"] = refitting + work.refit.solving / rates.product + sent / rates.network + rest
    return Scaled(
        ranks=ranks,
        nodes=nodes,
        busy_ranks=sum(share > 0 for share in shares),
        bound=max(parts, key=lambda name: parts[name]),
        network_bytes=leaving,
        seconds=seconds,
    )
