"""Where test children are forked from: a server that has imported everything, so that hundreds are affordable."""

import multiprocessing
import signal

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "pytest",
        "flap_stream.stages.prune",
        "flap_stream.modeling.modeling_flap_stream",
        "tests.warm",
    ]  # torch by these
)
KILLED = -signal.SIGKILL
