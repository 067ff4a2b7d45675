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
