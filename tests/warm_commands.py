"""Commands started as by `subprocess`, in real processes forked from a server that has imported everything.

A cold `python -m flap_stream` spends five seconds of a core on its imports. What is about starting, or is told by the
environment before torch is loaded, takes a cold one.
"""

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from threading import Timer
from typing import Any, TextIO

from fork_server import forked


def _command(words: Sequence[str], folder: str, environment: dict[str, str], out: Connection, err: Connection) -> None:
    for connection, descriptor in ((out, 1), (err, 2)):
        os.dup2(connection.fileno(), descriptor)
        connection.close()
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (until the process ends)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kind, what, *arguments = words
    sys.argv = ["-c", *arguments]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what, {"__name__": "__main__"})


def _joined(target: int) -> tuple[TextIO | None, Connection]:
    """What the caller reads from, if it is a pipe, and where the process writes to."""
    if target == subprocess.DEVNULL:
        return None, Connection(os.open(os.devnull, os.O_WRONLY), readable=False)
    if target != subprocess.PIPE:
        return None, Connection(os.dup(target), readable=False)
    reads, writes = os.pipe()
    return open(reads, errors="replace"), Connection(writes, readable=False)


class WarmProcess:
    """As `subprocess.Popen` of `[sys.executable, "-m", MODULE, *arguments]`, or of `-c CODE`, in text.

    stdout, stderr: `subprocess.PIPE`, `subprocess.DEVNULL` or a descriptor.
    """

    def __init__(
        self,
        words: Sequence[str],
        *,
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
        env: Mapping[str, str] | None = None,
        **_text: Any,
    ) -> None:
        assert words[0] == sys.executable and words[1] in ("-m", "-c")
        (self.stdout, out), (self.stderr, err) = _joined(stdout), _joined(stderr)
        environment = dict(os.environ if env is None else env)
        with out, err:
            self._process = forked(_command, (list(words[1:]), os.getcwd(), environment, out, err))
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """What it prints from now on; it is killed after so many seconds."""
        killer = Timer(timeout, self._process.kill)
        killer.start()
        with ThreadPoolExecutor(2) as pool:  # a pipe that nobody reads would stop it
            out, err = pool.map(lambda stream: "" if stream is None else stream.read(), (self.stdout, self.stderr))
        self._process.join()
        killer.cancel()
        return out, err

    def __enter__(self) -> "WarmProcess":
        return self

    def __exit__(self, *_error: object) -> None:
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self._process.join()


def run_warm(words: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with its output captured, in text."""
    with WarmProcess(words, env=env) as process:
        out, err = process.communicate()
    assert process.returncode is not None
    return subprocess.CompletedProcess(list(words), process.returncode, out, err)
