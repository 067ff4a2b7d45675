"""Ctrl-C while the program is still loading: there is nothing to give up yet, so the process leaves at once.

An exception raised in the middle of an import ends in a traceback, or in whatever the import makes of it.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 130
_is_command = False  # whether this process is ours, so that its handlers are


def arm() -> None:
    """This process is the command line: until `begun`, and while `loading`, an interruption ends it in a sentence.

    A process that was told to ignore interruptions, such as one in the background of a script, still does.
    """
    global _is_command
    _is_command = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if _is_command:
        signal.signal(signal.SIGINT, _leave)


def begun() -> None:
    """From here on an interruption is a KeyboardInterrupt."""
    if _is_command:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def disarm() -> None:
    """All is said: while the interpreter shuts down, an interruption ends it without a traceback."""
    if _is_command and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def loading() -> Iterator[None]:
    """Modules are imported inside."""
    numbers = (signal.SIGINT, signal.SIGTERM) if _is_command else ()
    before = {number: signal.signal(number, _leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(_signal: int, _frame: object) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"\nflap-stream: interrupted before it had begun\n")
    os._exit(EXIT_CODE)
