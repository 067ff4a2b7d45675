"""A model of how long a job takes on any number of ranks: plain arithmetic on sizes and rates.

Matrix products, reading within a node and merging of moments are divided among ranks; every node reads all bytes of a
layer, from file systems that nodes may share. Reading overlaps with the products; the rest follows them.
"""

from dataclasses import dataclass
from math import inf

from flap_stream.engine.ranks import window_shares


@dataclass(frozen=True)
class Work:
    """What a job consists of.

    samples, batch_size: windows in total, and per batch. operations: floating-point operations to run all layers once.
    layer_bytes: all layers on disk. moment_bytes: window moments of all layers.
    hidden_traffic: bytes of hidden states written to disk and read back while all layers are run once.
    read_again, written: bytes that rewriting reads from the model, and writes in `shards` shards.
    refit: None if nothing is refitted. loss: None if no loss scores are collected.
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
    loss: "LossWork | None" = None

    @property
    def passes(self) -> int:
        """How many times all layers are read and run over all windows: to collect, and to refit."""
        return 1 if self.refit is None else 2

    @property
    def total_operations(self) -> int:
        """Floating-point operations of collection, of the backward pass and of refitting."""
        refit = 0 if self.refit is None else self.refit.operations + self.refit.solving
        return self.operations + (0 if self.loss is None else self.loss.operations) + refit

    def bytes_read(self, nodes: int) -> int:
        """Bytes of the model and of hidden states that all nodes read."""
        read = 0 if self.loss is None else nodes * self.layer_bytes + self.loss.input_bytes
        return self.passes * (nodes * self.layer_bytes + self.hidden_traffic) + read + self.read_again

    @property
    def bytes_written(self) -> int:
        """Bytes of the output and of hidden states."""
        inputs = 0 if self.loss is None else self.loss.input_bytes
        return self.written + self.passes * self.hidden_traffic + inputs


@dataclass(frozen=True)
class LossWork:
    """What the backward pass consists of, besides reading the layers once more.

    samples, batch_size: windows in total, and per batch. operations: divided among ranks.
    input_bytes: layer inputs that are written while collecting, and read back.
    """

    samples: int
    batch_size: int
    operations: int
    input_bytes: int


@dataclass(frozen=True)
class RefitWork:
    """What refitting consists of, besides reading the layers once more.

    operations: for layers and moments, divided among ranks if they are shared. solving: operations on rank 0 while the
    others wait. sum_bytes: the sums that every rank sends to rank 0.
    """

    operations: int
    solving: int
    sum_bytes: int
    is_shared: bool = True


@dataclass(frozen=True)
class Rates:
    """Operations and bytes per second, and seconds.

    product: operations of one rank. node_product: at most, of all ranks of a node together.
    disk_read, disk_write: one node's disk, or its link to it. shared_read, shared_write: all nodes together.
    link: from host memory to a rank's device. network: out of a node, and into it.
    merge: window moments merged by one rank. layer_seconds: overhead per layer, such as waiting until its statistics
    are on the disk.
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
    """What a job takes on `ranks` ranks.

    busy_ranks: ranks that have windows. bound: the bottleneck of collection: `products`, `reading`, `moments` or
    `rest`. network_bytes: sent by one node in all stages together. seconds: by stage.
    """

    ranks: int
    nodes: int
    busy_ranks: int
    bound: str
    network_bytes: float
    seconds: dict[str, float]


def scale(work: Work, rates: Rates, ranks: int = 1, nodes: int = 1) -> Scaled:
    """Predict a job on ranks spread evenly over nodes."""
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
    if work.loss is not None:
        loss, own = work.loss, window_shares(work.loss.samples, work.loss.batch_size, ranks)
        seconds["collect"] += loss.input_bytes / min(rates.disk_write, rates.shared_write)  # by rank 0
        computing = loss.operations * max(map(len, own)) / loss.samples / product
        read_back = loss.input_bytes / min(rates.disk_read, rates.shared_read)
        seconds["loss"] = max(computing, work.layer_bytes / min(to_node, rates.link)) + read_back + rest
    if work.refit is not None:
        sent = work.refit.sum_bytes if nodes > 1 else 0
        leaving += sent
        fitted = largest_share / product if work.refit.is_shared else 1 / rates.product
        refitting = max(work.refit.operations * fitted, reading)
        seconds["refit"] = refitting + work.refit.solving / rates.product + sent / rates.network + rest
    return Scaled(
        ranks=ranks,
        nodes=nodes,
        busy_ranks=sum(share > 0 for share in shares),
        bound=max(parts, key=lambda name: parts[name]),
        network_bytes=leaving,
        seconds=seconds,
    )
