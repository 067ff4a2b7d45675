"""Whole jobs that are killed after they have stored a layer's results, in processes of their own."""

import os
import signal
from pathlib import Path
from typing import Any

from fork_server import KILLED, forked_to_its_end

import flap_stream
from flap_stream.config import PruneConfig
from flap_stream.output.digests import DIGESTS_NAME
from flap_stream.storage.collected import StatisticsStore


def _prune_until_killed(model: Path, out: Path, options: PruneConfig, store: Any, layer: int) -> None:
    write = store.write

    def write_and_die(self: Any, number: int, *arguments: Any) -> None:
        write(self, number, *arguments)
        if number == layer:
            os.kill(os.getpid(), signal.SIGKILL)

    store.write = write_and_die
    flap_stream.prune(model, out, options)


def require_same_after_a_kill(
    model: Path, whole: Path, options: PruneConfig, out: Path, store: Any = StatisticsStore, layer: int = 1
) -> None:
    """Prune into `out`, killed once that layer's results are in a store of this kind, and go on: the same bytes.

    whole: what the same job wrote that nobody killed.
    """
    assert forked_to_its_end(_prune_until_killed, (model, out, options, store, layer)) == KILLED
    assert out.with_name(f"{out.name}.run").exists()
    flap_stream.prune(model, out, options)
    assert (out / DIGESTS_NAME).read_bytes() == (whole / DIGESTS_NAME).read_bytes()
