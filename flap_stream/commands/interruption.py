"""Ctrl-C while the program is still loading: nothing can be lost yet, so the process exits at once.

An exception raised in the middle of an import ends in a traceback, or in whatever the importing code turns it into.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 130
_is_command = False  # whether this process was started as the command, so that its signal handlers are ours


def is_first_rank() -> bool:
    """Whether this is the only process of the job, or the first of several that a launcher has started."""
    return int(os.environ.get("WORLD_SIZE", 1)) <= 1 or int(os.environ.get("RANK", 0)) == 0


def arm() -> None:
    """Until `begun`, and inside `loading`, an interruption ends this process with one line.

    A process that was told to ignore interruptions, such as a background job of a script, still ignores them.
    """
    global _is_command
    _is_command = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if _is_command:
        signal.signal(signal.SIGINT, _leave)


def begun() -> None:
    """From here on an interruption raises KeyboardInterrupt."""
    if _is_command:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def disarm() -> None:
    """During interpreter shutdown an interruption ends the process without a traceback."""
    if _is_command and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def loading() -> Iterator[None]:
    """Modules are imported inside; an interruption ends the process at once."""
    numbers = (signal.SIGINT, signal.SIGTERM) if _is_command else ()
    before = {number: signal.signal(number, _leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(_signal: int, _frame: object) -> None:
    if is_first_rank():
        os.write(2, b"\nflap-stream: interrupted while loading; nothing was started\n")
    os._exit(EXIT_CODE)
