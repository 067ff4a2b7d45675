"""The command `flap-stream`: finds the verb, configures logging, turns our errors into one line and an exit code."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr
from importlib import import_module
from importlib.metadata import version
from types import ModuleType

from flap_stream.errors import FlapStreamError, StorageFailure

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
INTERRUPTED = 130
_LONGEST = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code comes out (0 done, 1 may pass on a rerun, 2 wrong use or input, 130 interrupted)."""
    parser = argparse.ArgumentParser(
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
    logging.basicConfig(level=logging.WARNING, format="flap-stream: %(message)s", stream=sys.stderr)
    logging.getLogger("flap_stream").setLevel(level)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its hints are for users of its models, not for ours
    if options.verb != "bench-inference":  # which times models as their users run them
        _sleep_while_waiting()
    return reported(lambda: _module_of(options.verb).run(options))


def _sleep_while_waiting() -> None:
    """Have OpenMP's threads sleep while one waits for another, unless the environment says how they wait.

    Otherwise they spin, and on a busy machine they spin away the time of the one that they wait for. Libgomp, which
    torch brings along, reads this when it is loaded, so torch must not be yet.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def reported(action: Callable[[], object]) -> int:
    """Exit code of an action; an error of ours or of the system is one sentence on stderr."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        action()
    except FlapStreamError as error:
        _tell(error, printable(str(error)))
        return error.exit_code
    except OSError as error:
        _tell(error, printable(str(StorageFailure.of(error))))
        return StorageFailure.exit_code
    except KeyboardInterrupt as error:
        _tell(error, "interrupted; nothing is lost, run the same command again to go on", before="\n")
        return INTERRUPTED
    return 0


def _tell(error: BaseException, message: str, before: str = "") -> None:
    """Print what a person needs to know, in a job of several ranks once.

    The error of a rank carries a note if it is the one that ended the job; without it, all ranks have the same.
    """
    notes = getattr(error, "__notes__", [])
    if notes or _is_first_rank():
        print(f"{before}flap-stream: {''.join(notes)}{message}", file=sys.stderr)


def _is_first_rank() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) <= 1 or int(os.environ.get("RANK", 0)) == 0


def printable(message: str) -> str:
    """One line of reasonable length, whatever names from a file it quotes: those may hold a terminal's commands."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"


def _module_of(verb: str) -> ModuleType:
    return import_module(f"flap_stream.commands.{verb.replace('-', '_')}")


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt
