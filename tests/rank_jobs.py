"""Jobs of several ranks, real processes: forked from a server that has imported everything, so that many are cheap.

What a launcher does for its ranks is done here: it tells each its number, and holds the store where they meet. Unlike
torchrun this one ends no rank when another dies: they have to notice by themselves.
"""

import logging
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from fork_server import KILLED, forked
from models import contents, random_tokens, save, save_tokens, tiny_config, tiny_model
from torch.distributed import TCPStore

import flap_stream
from flap_stream import PruneConfig, cli

WINDOWS, LENGTH = 22, 16


def _rank(environment: dict[str, str], said: Path, action: Callable[[], Any], kill_after: float | None) -> None:
    os.environ |= environment
    if kill_after is not None:
        timer = threading.Timer(kill_after, os.kill, [os.getpid(), signal.SIGKILL])
        timer.daemon = True
        timer.start()
    torch.set_num_threads(1)
    with open(said, "w", buffering=1) as file, redirect_stderr(file):
        logging.basicConfig(level=logging.ERROR, format="flap-stream: %(message)s", stream=file)
        code = cli.reported(action)
    sys.exit(code)


class Prune:
    """A call of `prune`, which a process can be given."""

    def __init__(self, model: Path, out: Path, options: PruneConfig) -> None:
        self.model, self.out, self.options = model, out, options

    def __call__(self) -> None:
        flap_stream.prune(self.model, self.out, self.options)


class Ended:
    """Exit codes of all ranks; what they said, by rank; seconds from the first end of one to the last."""

    def __init__(self, codes: list[int], said: list[str], seconds: float) -> None:
        self.codes, self.said, self.seconds = codes, said, seconds

    @property
    def sentences(self) -> list[str]:
        return [line for text in self.said for line in text.splitlines() if "flap-stream: " in line]


def meeting(ranks: int, nodes: int = 1) -> tuple[TCPStore, list[dict[str, str]]]:
    """The store where ranks meet, as long as it is held, and what a launcher puts in the environment of each."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    size = -(-ranks // nodes)
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    common["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    own = [{"RANK": str(r), "LOCAL_RANK": str(r % size), "GROUP_RANK": str(r // size)} for r in range(ranks)]
    return store, [{**common, **one} for one in own]


def launch(
    place: Path, ranks: int, action: Callable[[], Any], *, nodes: int = 1, kill: tuple[int, float] | None = None
) -> Ended:
    """Start that many ranks and wait for all. kill: which one to kill, after how many seconds."""
    _store, environments = meeting(ranks, nodes) if ranks > 1 else (None, [{}])
    said = [place.with_name(f"{place.name}.said.{rank}") for rank in range(ranks)]
    children = []
    for rank, environment in enumerate(environments):
        seconds = kill[1] if kill is not None and kill[0] == rank else None
        children.append(forked(_rank, (environment, said[rank], action, seconds)))
        children[-1].start()
    left, first = {child.sentinel: child for child in children}, None
    while left and (ended := wait(list(left), 300)):
        first = time.monotonic() if first is None else first
        for sentinel in ended:
            del left[sentinel]  # type: ignore[arg-type]
    for child in left.values():
        child.kill()
    assert first is not None and not left, "ranks did not end"
    for child in children:
        child.join()
    spent = time.monotonic() - first
    codes = [child.exitcode for child in children if child.exitcode is not None]
    assert len(codes) == len(children)
    return Ended(codes, [path.read_text() for path in said], spent)


class RankJob:
    """A model and options to prune it with, and the bytes that one process makes of it."""

    def __init__(
        self, directory: Path, config: Any = None, shard_size: str = "60KB", length: int = LENGTH, **changes: Any
    ) -> None:
        self.directory = directory
        self.seconds: dict[int, float] = {}
        self.model = save(tiny_model(config or tiny_config(layers=4)), directory / "model", shard_size=shard_size)
        tokens = save_tokens(directory / "tokens.npy", random_tokens(WINDOWS, length))
        options = {"ratio": 0.3, "snapshot_interval": 1, "max_shard_bytes": 60_000, "batch_size": 3, **changes}
        self.options = PruneConfig(calibration=(tokens,), samples=WINDOWS, **options)
        ended = self.run("one", 1, keep_run=True)
        assert ended.codes == [0], ended.said
        self.expected = contents(directory / "one" / "out")
        self.statistics = self._statistics("one")

    def run(
        self, name: str, ranks: int, *, nodes: int = 1, kill: tuple[int, float] | None = None, **changes: Any
    ) -> Ended:
        return launch(self.place(name), ranks, self.action(name, **changes), nodes=nodes, kill=kill)

    def place(self, name: str) -> Path:
        (self.directory / name).mkdir(exist_ok=True)
        return self.directory / name

    def action(self, name: str, model: Path | None = None, **changes: Any) -> Prune:
        return Prune(model or self.model, self.place(name) / "out", replace(self.options, **changes))

    def trouble(self, name: str, ranks: int, **changes: Any) -> str | None:
        """What is wrong with the job's results on that many ranks; None if nothing is."""
        ended = self.run(name, ranks, keep_run=True, **changes)
        if set(ended.codes) != {0}:
            return f"exit codes {ended.codes}: {ended.said}"
        return self.difference(name)

    def _seconds(self, ranks: int) -> float:
        """How long that many ranks take."""
        started = time.monotonic()
        self.run(f"timed-{ranks}", ranks)
        return time.monotonic() - started

    def difference(self, name: str) -> str | None:
        place = self.directory / name
        if contents(place / "out") != self.expected:
            return "other bytes in the output"
        return None if self._statistics(name) == self.statistics else "other statistics"

    def _statistics(self, name: str) -> dict[str, bytes]:
        """The files of all layers' statistics and loss scores."""
        return {
            f"{kind}/{path}": body
            for kind in ("statistics.zarr", "loss.zarr")
            for path, body in contents(self.directory / name / "out.run" / kind).items()
        }

    def trouble_after_kill(self, number: int, most_seconds: float) -> tuple[str, dict[str, Any]]:
        """Kill a rank at a random time, go on with another number of ranks: what is wrong, or that nothing is."""
        draw, name = random.Random(number), f"kill-{number}"
        ranks, then, nodes = draw.choice([2, 3, 4]), draw.choice([1, 2, 3, 4]), draw.choice([1, 2])
        self.seconds[ranks] = self.seconds.get(ranks) or self._seconds(ranks)
        victim, seconds = draw.randrange(ranks), draw.uniform(0.0, 0.9) * self.seconds[ranks]
        ended = self.run(name, ranks, nodes=nodes, kill=(victim, seconds), keep_run=True)
        facts: dict[str, Any] = {
            "ranks": ranks,
            "then": then,
            "nodes": nodes,
            "victim": victim,
            "seconds": round(seconds, 2),
        }
        facts |= {"codes": ended.codes, "took": round(ended.seconds, 2)}
        died = ended.codes[victim] == KILLED
        trouble = None
        if not died and set(ended.codes) != {0}:
            trouble = f"exit codes {ended.codes} without a kill: {ended.said}"
        elif died and ended.seconds > most_seconds:
            trouble = f"the others took {ended.seconds:.1f} s to end"
        elif died and set(ended.codes) - {KILLED} not in ({1}, {0}):
            trouble = f"exit codes {ended.codes}: {ended.said}"
        elif died and 1 in ended.codes and len(ended.sentences) != 1:
            trouble = f"{len(ended.sentences)} sentences: {ended.sentences}"
        trouble = trouble or self.trouble(name, then, nodes=min(nodes, then))
        shutil.rmtree(self.directory / name, ignore_errors=True)
        return trouble or ("went on" if died else "done before the kill"), facts
