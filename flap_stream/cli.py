"""The command `flap-stream`: finds the verb, configures logging, turns our errors into one line and an exit code."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from importlib.metadata import version
from io import TextIOWrapper
from types import ModuleType
from typing import Any, TextIO, cast

from flap_stream.commands import interruption
from flap_stream.commands.parser import Parser
from flap_stream.errors import FlapStreamError, StorageFailure
from flap_stream.progress import printable

VERBS = {
    "prune": "the main job: prune a model into a checkpoint; run it again after any interruption and it goes on",
    "collect": "pass 1 alone: the statistics of every layer",
    "plan": "decide what stays, in seconds; prints what would remain, layer by layer",
    "sweep": "one collection, many ratios: what would remain at each, and its perplexity",
    "rewrite": "pass 2 alone: write the pruned checkpoint that the plan describes",
    "export-gguf": "a GGUF file for llama.cpp",
    "export-stock": "a pruned checkpoint that loads without remote code",
    "evaluate": "perplexity of a dense or pruned model, one layer in memory at a time",
    "report": "figures of a run directory or a pruned checkpoint, as one page and as PNG files",
    "bench-inference": "what the pruning is worth: speed and memory of both models through transformers",
    "inspect": "what is in a run directory or a pruned checkpoint",
    "demo": "the main job on the bundled model and text, offline",
}
TOGETHER = ("prune", "collect", "rewrite", "evaluate")  # what all ranks do; rank 0 does the rest by itself
NO_READER = 141  # of what was printed, as shells say it of a process that SIGPIPE has ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code comes out (0 done, 1 may pass on a rerun, 2 wrong use or input, 130 interrupted)."""
    parser = Parser(
        prog="flap-stream", description="Structured pruning of LLMs that do not fit, streamed from disk (FLAP)."
    )
    parser.add_argument("--version", action="version", version=f"flap-stream {version('flap-stream')}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, summary in VERBS.items():
        module = _module_of(verb)
        module.add_arguments(verbs.add_parser(verb, help=summary, description=summary, allow_abbrev=False))
    with nullcontext() if _is_first_rank() else redirect_stderr(None):  # all ranks have the same arguments
        options = parser.parse_args(arguments)
    if options.verb not in TOGETHER:
        if not _is_first_rank():
            return 0
        os.environ.pop("WORLD_SIZE", None)  # what else it calls need not wait for the others
    elif not _is_first_rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    quiet = getattr(options, "quiet", False) or not _is_first_rank()
    level = logging.ERROR if quiet else logging.INFO
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("flap-stream: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("flap_stream").setLevel(level)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its hints are for users of its models, not for ours
    if options.verb != "bench-inference":  # which times models as their users run them
        _sleep_while_waiting()
    with redirect_stdout(cast(TextIO, _Output(sys.stdout))):
        return reported(lambda: _module_of(options.verb).run(options), goes_on=_goes_on(options))


def _goes_on(options: argparse.Namespace) -> bool:
    """Whether the same command goes on where it was stopped; all else starts anew."""
    if options.verb == "prune":
        return not options.dry_run
    if options.verb in ("sweep", "demo"):
        return bool(options.evaluate if options.verb == "sweep" else options.out)
    return options.verb in ("collect", "rewrite")


def _sleep_while_waiting() -> None:
    """Have OpenMP's threads sleep while one waits for another, unless the environment says how they wait.

    Otherwise they spin, and on a busy machine they spin away the time of the one that they wait for. Libgomp, which
    torch brings along, reads this when it is loaded, so torch must not be yet.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def reported(action: Callable[[], object], goes_on: bool = True) -> int:
    """Exit code of an action; an error of ours or of the system is one sentence on stderr.

    goes_on: whether the action, called again, goes on where it was stopped.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    interruption.begun()
    try:
        action()
        sys.stdout.flush()  # which may fail: to a full disk, or to nobody
    except BrokenPipeError:  # whoever read it has enough
        return NO_READER
    except FlapStreamError as error:
        return _tell_failure(error, goes_on)
    except OSError as error:
        return _tell_failure(_named(error), goes_on)
    except KeyboardInterrupt as error:
        again = "nothing is lost, run the same command again to go on" if goes_on else "the same command starts anew"
        _tell(error, f"interrupted; {again}", before="\n")
        return interruption.EXIT_CODE
    return 0


def _tell_failure(error: FlapStreamError, goes_on: bool) -> int:
    _tell(error, printable(f"{error}: it goes on" if goes_on and error.goes_on else str(error)))
    return error.exit_code


def _named(error: OSError) -> StorageFailure:
    """The failure in a sentence, with what is noted of the rank that it came upon."""
    failure = StorageFailure.of(error)
    for note in getattr(error, "__notes__", []):
        failure.add_note(note)
    return failure


class _Output:
    """Standard output, whose failures say that it is the one that failed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Print."""
        return self._naming(lambda: self._stream.write(text))

    def flush(self) -> None:
        """Print what is left."""
        self._naming(self._stream.flush)

    def _naming(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError as error:
            error.filename = "standard output"
            _close_output()
            raise


def _close_output() -> None:
    """Print into nothing from now on, so that the end of the process does not fail to."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _OneLine(logging.Formatter):
    """Messages of ours, which quote names from files, in one line that commands nothing; of others, line by line."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        lines = [message] if record.name.startswith("flap_stream") and not record.exc_info else message.split("\n")
        return "\n".join(map(printable, lines))


def _tell(error: BaseException, message: str, before: str = "") -> None:
    """Print what a person needs to know, in a job of several ranks once.

    The error of a rank carries a note if it is the one that ended the job; without it, all ranks have the same.
    """
    notes = getattr(error, "__notes__", [])
    if notes or _is_first_rank():
        with suppress(BrokenPipeError):
            print(f"{before}flap-stream: {''.join(notes)}{message}", file=sys.stderr)


def _is_first_rank() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) <= 1 or int(os.environ.get("RANK", 0)) == 0


def _module_of(verb: str) -> ModuleType:
    return import_module(f"flap_stream.commands.{verb.replace('-', '_')}")


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt
