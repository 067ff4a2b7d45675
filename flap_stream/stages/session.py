"""What the stages of one call share, and how the ranks of a job open the same model and run directory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flap_stream.engine.ranks import Ranks
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.model.opening import open_checkpoint
from flap_stream.output.pruning_record import fingerprint_digest
from flap_stream.progress import Progress
from flap_stream.stages.measured import Measured
from flap_stream.storage.run_directory import RunDirectory


@dataclass(frozen=True)
class Session:
    """What all stages of one call share. source: the dense model."""

    source: Checkpoint
    ranks: Ranks
    progress: Progress
    measured: Measured = field(default_factory=Measured)


@contextmanager
def opened_model(model: str | Path, ranks: Ranks) -> Iterator[Checkpoint]:
    """The model, which must be the same for all ranks; the first rank of each machine downloads it from the Hub."""
    if not ranks.leads_node:
        ranks.node_barrier()
    with open_checkpoint(model) as source:
        if ranks.leads_node:
            ranks.node_barrier()
        ranks.require_same(f"the model {model}", fingerprint_digest(source.fingerprint))
        yield source


@contextmanager
def opened_run(ranks: Ranks, path: Path, open_first: Callable[[], RunDirectory]) -> Iterator[RunDirectory]:
    """The run directory, locked until the end of the block.

    open_first: opens it for writing, and prepares it, on rank 0; the other ranks then read what has been committed.
    """
    if not ranks.is_first:
        ranks.barrier()
    directory = open_first() if ranks.is_first else RunDirectory(path, is_writer=False)
    del open_first  # else what it refers to, such as the model, would live as long as the run directory is open
    with directory:
        if ranks.is_first:
            ranks.barrier()
        yield directory
