"""Ctrl-C while the command is still loading: one sentence, whatever is being imported, and then as ever."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

# A process that sends itself SIGINT as soon as it imports a module of the name given.
_INTERRUPTED = """
import os, runpy, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), sent)

module, sent = sys.argv[1], signal.Signals[sys.argv[2]]
del sys.argv[1:3]
sys.meta_path.insert(0, Interrupting())
runpy.run_module("flap_stream", run_name="__main__", alter_sys=True)
"""


def _interrupted(module: str, sent: str, *arguments: str, ignores: bool = False) -> tuple[int, str, str]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if ignores else None
    try:
        command = [sys.executable, "-c", _INTERRUPTED, module, sent, *arguments]
        process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
    out, errors = process.communicate(timeout=120)
    return process.returncode, out, errors


@pytest.mark.parametrize(
    "module", ["flap_stream.cli", "logging", "flap_stream.commands.demo", "tqdm", "numpy", "torch.nn", "zarr"]
)
def test_an_interruption_while_loading_is_one_sentence(module: str, tmp_path: Path) -> None:
    code, out, errors = _interrupted(module, "SIGINT", "demo", "--quiet", "--out", str(tmp_path / "out"))
    assert (code, out) == (130, "")
    assert errors.strip() == "flap-stream: interrupted while loading; nothing was started"
    assert list(tmp_path.iterdir()) == []


def test_a_termination_while_loading_is_one_sentence_too(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    code, _, errors = _interrupted("torch.nn", "SIGTERM", "demo", "--quiet", "--out", out)
    assert code == 130 and errors.strip() == "flap-stream: interrupted while loading; nothing was started"


def test_the_installed_command_begins_where_interruptions_are_met() -> None:
    scripts = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert 'flap-stream = "flap_stream.__main__:main"' in scripts


def test_a_command_that_was_told_to_ignore_interruptions_still_does() -> None:
    code, _, errors = _interrupted("flap_stream.cli", "SIGINT", "--version", ignores=True)
    assert code == 0 and errors == ""


def test_an_interruption_after_loading_says_that_nothing_is_lost(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    code, _, errors = _interrupted(
        "transformers.models.llama.modeling_llama", "SIGINT", "demo", "--quiet", "--out", out
    )
    assert code == 130
    assert "run the same command again to continue" in errors and "Traceback" not in errors
