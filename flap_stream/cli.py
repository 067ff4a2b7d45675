"""The command `flap-stream`: finds the verb, configures logging, turns our errors into one line and an exit code."""

import argparse
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from io import TextIOWrapper
from types import ModuleType
from typing import Any, TextIO, cast

from flap_stream.commands import interruption
from flap_stream.commands.parser import Parser
from flap_stream.commands.recipe_files import OPTION, with_recipe
from flap_stream.errors import FlapStreamError, InvalidOption, StorageFailure
from flap_stream.progress import printable

VERBS = {
    "prune": "prune a model (collect, plan and rewrite in one); rerun after an interruption to continue",
    "evaluate": "measure perplexity of a dense or pruned model, one layer in memory at a time",
    "try": "generate from a prompt, with the dense and the pruned model",
    "demo": "prune and evaluate the bundled model, offline",
    "collect": "collect the statistics of every layer into a run directory",
    "plan": "decide what each layer keeps, in seconds, and print it",
    "sweep": "plan many ratios from one collection, and measure perplexity at each",
    "rewrite": "write the pruned checkpoint that a plan describes",
    "inspect": "show what is in a run directory, a pruned checkpoint or a dense model",
    "report": "draw a run directory or a pruned checkpoint, as one page or as PNG files",
    "bench-inference": "compare speed and memory of the dense and the pruned model in transformers",
    "export-gguf": "write a GGUF file for llama.cpp",
    "export-stock": "write a pruned checkpoint that loads without remote code",
    "advise": "say whether a model fits a card, and what to do so that it does",
    "push": "upload a pruned checkpoint to the Hub, with a card that says how it was made",
    "recipe": "print a file of options, with comments, for --recipe of the other verbs",
    "doctor": "look for what on this machine would keep jobs from running",
    "completion": "print a script that completes commands in bash, zsh or fish",
}
WITHOUT_RECIPE = ("recipe", "completion")
TOGETHER = ("prune", "collect", "rewrite", "evaluate")  # verbs that all ranks run; the others run on rank 0 only
NO_READER = 141  # exit code when the reader of stdout is gone, as shells report a process ended by SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0 done, 1 may pass on a rerun, 2 wrong use or input, 130 interrupted."""
    parser = Parser(
        prog="flap-stream", description="Structured pruning of LLMs too large for memory, streamed from disk (FLAP)."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    arguments = sys.argv[1:] if arguments is None else arguments
    has_recipe = any(argument.partition("=")[0] == OPTION for argument in arguments)
    for verb, summary in VERBS.items():
        own = verbs.add_parser(verb, help=summary, description=summary, allow_abbrev=False)
        if has_recipe or verb in arguments:  # what builds the others' options costs more than all else
            add_options(verb, own)
    with nullcontext() if interruption.is_first_rank() else redirect_stderr(None):  # all ranks have the same arguments
        try:
            arguments = with_recipe(verbs.choices, arguments)
        except InvalidOption as error:
            parser.error(str(error))
        options = parser.parse_args(arguments)
    if options.verb not in TOGETHER:
        if not interruption.is_first_rank():
            return 0
        os.environ.pop("WORLD_SIZE", None)  # so that nothing it calls waits for the others
    elif not interruption.is_first_rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    quiet = getattr(options, "quiet", False) or not interruption.is_first_rank()
    level = logging.ERROR if quiet else logging.INFO
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("flap-stream: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("flap_stream").setLevel(level)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its hints are for users who call it themselves
    if options.verb != "bench-inference":  # which must time models as their users run them
        _sleep_while_waiting()
    with redirect_stdout(cast(TextIO, _Output(sys.stdout))):
        return reported(lambda: _run(options), resumes=_resumes(options))


def _run(options: argparse.Namespace) -> None:
    """Run a verb, and log it where --log says."""
    file = getattr(options, "log", None) if interruption.is_first_rank() else None
    with nullcontext() if file is None else _logged(file):
        _module_of(options.verb).run(options)


@contextmanager
def _logged(file: str) -> Iterator[None]:
    """Append what is shown and logged, down to the error that ends the command, to a file."""
    try:
        handler = logging.FileHandler(file, encoding="utf-8")
    except OSError as error:
        raise InvalidOption(f"--log {file} cannot be written ({error.strerror}); name another file") from error
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
    own = logging.getLogger("flap_stream")
    loggers = (own, logging.getLogger("flap_stream.progress"))
    before = [logger.level for logger in loggers]
    shown = [(other, other.level) for other in logging.getLogger().handlers]
    for other, level in shown:  # what is shown stays as it was, and the file gets all
        other.setLevel(max(level, own.getEffectiveLevel()))
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    own.info("flap-stream %s", shlex.join(sys.argv[1:]))
    try:
        yield
    except BaseException as error:
        own.info("ended by %s: %s", type(error).__name__, error)
        raise
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
        for other, level in shown:
            other.setLevel(level)
        handler.close()


def add_options(verb: str, parser: argparse.ArgumentParser) -> None:
    """Give a verb's parser its arguments."""
    module = _module_of(verb)
    module.add_arguments(parser)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(("examples:", *(f"  flap-stream {example}" for example in module.EXAMPLES)))
    if verb not in WITHOUT_RECIPE:
        parser.add_argument(OPTION, metavar="FILE", help="read options from a TOML file; those given here win")


class _Version(argparse.Action):
    """Print the version and end; looking it up takes a tenth of the whole start."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any, **keywords: Any) -> None:
        from importlib.metadata import version

        print(f"flap-stream {version('flap-stream')}")
        parser.exit()


def _resumes(options: argparse.Namespace) -> bool:
    """Whether the same command continues where it stopped; all others start over."""
    if options.verb == "prune":
        return not options.dry_run
    if options.verb in ("sweep", "demo"):
        return bool(options.evaluate if options.verb == "sweep" else options.out)
    return options.verb in ("collect", "rewrite", "push")


def _sleep_while_waiting() -> None:
    """Make OpenMP's threads sleep while they wait for each other, unless the environment says how they wait.

    Otherwise they spin, and on a busy machine take time from the thread they wait for. Libgomp, which is part of torch,
    reads this when it is loaded, so this must run before torch is imported.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def reported(action: Callable[[], object], resumes: bool = True) -> int:
    """Run an action and return its exit code; our errors and the system's become one sentence on stderr.

    resumes: whether the action, called again, continues where it stopped.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    interruption.begun()
    try:
        action()
        sys.stdout.flush()  # which may fail: the disk may be full, or the reader gone
    except BrokenPipeError:  # the reader has closed the pipe
        return NO_READER
    except FlapStreamError as error:
        return _tell_failure(error, resumes)
    except OSError as error:
        return _tell_failure(_named(error), resumes)
    except KeyboardInterrupt as error:
        again = "run the same command again to continue" if resumes else "a rerun starts over"
        _tell(error, f"interrupted; {again}", before="\n")
        return interruption.EXIT_CODE
    return 0


def _tell_failure(error: FlapStreamError, resumes: bool) -> int:
    _tell(error, printable(f"{error} (it resumes where it stopped)" if resumes and error.resumes else str(error)))
    return error.exit_code


def _named(error: OSError) -> StorageFailure:
    """The failure in a sentence, with the notes of the rank it happened on."""
    failure = StorageFailure.of(error)
    for note in getattr(error, "__notes__", []):
        failure.add_note(note)
    return failure


class _Output:
    """Standard output, whose failures are named as such."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Print."""
        return self._naming(lambda: self._stream.write(text))

    def flush(self) -> None:
        """Print what is buffered."""
        self._naming(self._stream.flush)

    def _naming(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError as error:
            error.filename = "standard output"
            _close_output()
            raise


def _close_output() -> None:
    """Discard all further output, so that the flush at exit does not fail again."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _OneLine(logging.Formatter):
    """Escape control characters; our own messages, which quote names from files, stay on one line."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        lines = [message] if record.name.startswith("flap_stream") and not record.exc_info else message.split("\n")
        return "\n".join(map(printable, lines))


def _tell(error: BaseException, message: str, before: str = "") -> None:
    """Print an error's message, only once in a job of several ranks.

    The error that ended the job carries a note of its rank; an error without one is the same on all ranks.
    """
    notes = getattr(error, "__notes__", [])
    if notes or interruption.is_first_rank():
        with suppress(BrokenPipeError):
            print(f"{before}flap-stream: {''.join(notes)}{message}", file=sys.stderr)


def _module_of(verb: str) -> ModuleType:
    name = {"try": "try_out"}.get(verb, verb.replace("-", "_"))  # a keyword names no module
    return import_module(f"flap_stream.commands.{name}")


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt
