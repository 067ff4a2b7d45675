"""Where test children are forked from: a server that has imported everything, so that hundreds are affordable."""

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from typing import Any

KILLED = -signal.SIGKILL
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "pytest",
        "flap_stream.stages.prune",
        "flap_stream.modeling.modeling_flap_stream",
        "tests.warm",
    ]  # torch by these
)


def forked(target: Callable[..., None], arguments: Sequence[Any]) -> "multiprocessing.context.ForkServerProcess":
    """A process that has not started yet."""
    return _SERVER.Process(target=target, args=tuple(arguments))


def forked_to_its_end(target: Callable[..., None], arguments: Sequence[Any]) -> int:
    """Run a process; its exit code, negative for the signal that ended it."""
    process = forked(target, arguments)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode
