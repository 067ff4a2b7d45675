"""`--track`: what a job does, layer by layer, in a tracker that is installed."""

import atexit
import shlex
import sys
from importlib import import_module

from flap_stream.errors import InvalidOption
from flap_stream.progress import Event, Listener

TRACKERS = ("trackio", "wandb")  # both have wandb's interface
PROJECT = "flap-stream"
_METRICS = ("done", "seconds", "tokens", "bytes", "peak_host_bytes", "peak_device_bytes")


def tracker(name: str) -> Listener:
    """Begin a run of one of `TRACKERS`; returns what takes `Progress`'s events to it. The run ends with the process.

    Raises InvalidOption if it is not installed or cannot begin.
    """
    try:
        service = import_module(name)
    except ImportError as error:
        raise InvalidOption(f"--track {name}: {name} is not installed; run pip install {name}") from error
    command = shlex.join(["flap-stream", *sys.argv[1:]])
    try:
        service.init(project=PROJECT, config={"command": command})
    except Exception as error:  # each has its own: no login, no network, no such place
        raise InvalidOption(f"--track {name}: {error}") from error
    atexit.register(service.finish)

    def tell(event: Event) -> None:
        metrics = {f"{event['stage']}/{name}": event[name] for name in _METRICS}
        service.log(metrics | ({"job": event["job"]} if "job" in event else {}))

    return tell
