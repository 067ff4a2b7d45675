"""What several verbs share: their options, checks before heavy imports, and what they print."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flap_stream import config
from flap_stream.commands import interruption
from flap_stream.config.rules import REMOVED
from flap_stream.config.values import dtype_name
from flap_stream.errors import InvalidOption
from flap_stream.integrations.tracking import TRACKERS, tracker
from flap_stream.progress import Progress


def batch_size(text: str) -> str | None:
    """`auto` or a number of windows."""
    return None if text == "auto" else text


def add_output(parser: argparse.ArgumentParser, runs_layers: bool = True) -> None:
    """--json, --quiet and --log, and for verbs that run layers or write shards, what follows these."""
    group = parser.add_argument_group("printing")
    group.add_argument("--json", action="store_true", help="print one JSON object on stdout at the end")
    group.add_argument("--quiet", action="store_true", help="print no progress on stderr")
    group.add_argument("--log", metavar="FILE", help="append progress and messages to a file, with their times")
    if not runs_layers:
        return
    group.add_argument("--events", metavar="FILE", help="append a line of JSON for every layer and shard to a file")
    group.add_argument("--track", choices=TRACKERS, help="log every layer and shard in a tracker, if it is installed")


def add_revision(group: argparse._ActionsContainer) -> None:
    """--revision, for verbs with a MODEL."""
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub id (same as MODEL@REV)")


def model_of(model: Any, options: argparse.Namespace) -> Any:
    """The model as the API takes it: a directory, `name` or `name@revision`; None if none is named."""
    if options.revision is None:
        return model
    if model is None or Path(model).exists() or "@" in model:
        what = "no MODEL is named" if model is None else f"{model} is not a Hub id without a revision"
        raise InvalidOption(f"--revision {options.revision}: {what}; use it with a Hub id such as name/model")
    return f"{model}@{options.revision}"


def add_engine(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """How layers are run, and within how much memory."""
    group = parser.add_argument_group("device and memory")
    group.add_argument(
        "--device", default=config.EngineConfig.device, metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    group.add_argument(
        "--dtype",
        type=dtype_name,
        default=config.EngineConfig.dtype,
        choices=config.DTYPES,
        help="dtype of the forward pass (default: auto, the model's)",
    )
    group.add_argument(
        "--host-memory", metavar="SIZE", help="host memory to stay within, such as 8GiB (default: what is free)"
    )
    group.add_argument("--device-memory", metavar="SIZE", help="GPU memory to stay within (default: what is free)")
    group.add_argument(
        "--batch-size",
        type=batch_size,
        default=None,
        metavar="auto|N",
        help="windows that run through a layer at once (default: auto)",
    )
    group.add_argument("--prefetch", type=int, metavar="0|1", help="layers to read ahead (default: 1 if it fits)")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="allow the tokenizer to run code that comes with the model"
    )
    return group


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """What statistics are collected from."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration",
        nargs="+",
        default=[*config.CollectConfig.calibration],
        metavar="TEXT",
        help="wikitext2, c4 or ptb; or .txt, .jsonl, .json, .parquet files (also .gz, .bz2, .xz, .zst) or directories "
        "of them; or one .npy of integer tokens [sample, token], used in order; with shares of the windows, they are "
        "mixed: prose.txt:0.7 code.txt:0.3 (default: wikitext2)",
    )
    group.add_argument(
        "--samples",
        type=int,
        default=config.CollectConfig.samples,
        metavar="N",
        help="calibration windows (default: %(default)s)",
    )
    add_sequence_length(group)
    group.add_argument(
        "--seed",
        type=int,
        default=config.CollectConfig.seed,
        metavar="N",
        help="seed of the window sampling (default: %(default)s)",
    )
    group.add_argument(
        "--loss-windows",
        type=int,
        default=config.CollectConfig.loss_windows,
        metavar="N",
        help="windows whose loss is differentiated, for --metric fisher (default: 0; "
        f"prune with --metric fisher: {config.LOSS_WINDOWS})",
    )
    add_text(group)


def add_sequence_length(group: argparse._ActionsContainer) -> None:
    """--sequence-length."""
    group.add_argument(
        "--sequence-length",
        type=int,
        default=config.CollectConfig.sequence_length,
        metavar="N",
        help="tokens in each window (default: %(default)s)",
    )


def add_evaluation(group: argparse._ActionsContainer, option: str, default: Sequence[str]) -> None:
    """What perplexity is measured on. option: name of the one that takes the texts."""
    shown = f" (default: {' '.join(default)})" if default else ""
    group.add_argument(
        option,
        nargs="+",
        default=[*default],
        metavar="TEXT",
        help=f"text to measure perplexity on, in the forms of --calibration, without shares{shown}",
    )
    group.add_argument("--samples", type=int, metavar="N", help="use at most N windows (default: all)")
    add_sequence_length(group)
    add_text(group)


def add_text(group: argparse._ActionsContainer) -> None:
    """How text becomes windows."""
    group.add_argument(
        "--text-column",
        metavar="NAME",
        help="column or key to read (default: text, else content, else messages, else the only one with strings)",
    )
    group.add_argument(
        "--chat-template",
        default=config.TextConfig.chat_template,
        choices=config.CHAT_TEMPLATE,
        help="format messages with the tokenizer's chat template (default: auto, if there is no text)",
    )
    group.add_argument(
        "--bos",
        default=config.TextConfig.bos,
        choices=config.BOS,
        help="start each window with the beginning-of-text token (default: auto, if the tokenizer adds one)",
    )


def add_method(parser: argparse.ArgumentParser, *, one_ratio: bool = True) -> None:
    """What to remove, on which collecting and planning must agree."""
    group = parser.add_argument_group("what to remove")
    if one_ratio:
        group.add_argument(
            "--ratio",
            default=config.PlanConfig.ratio,
            metavar="SHARE",
            help="share of the prunable weights to remove, such as 0.2 or 20%% (default: %(default)s)",
        )
    how = "how to prune; reap removes whole experts, shortgpt whole layers (default: %(default)s)"
    group.add_argument("--method", default=config.PlanConfig.method, choices=config.METHODS, help=how)
    group.add_argument(
        "--min-heads",
        type=int,
        default=config.PlanConfig.min_heads,
        metavar="N",
        help="query heads that every layer keeps (default: %(default)s)",
    )
    group.add_argument(
        "--min-neurons",
        type=int,
        default=config.PlanConfig.min_neurons,
        metavar="N",
        help="neurons that every layer keeps (default: %(default)s)",
    )
    whole = "remove experts as a whole, too, where the loss says so (only --metric fisher; of a mixture of experts)"
    group.add_argument("--whole-experts", action="store_true", help=whole)
    group.add_argument("--depth", action="store_true", help="remove whole layers, too, likewise (only --metric fisher)")
    group.add_argument(
        "--round-heads-to",
        type=int,
        default=config.PlanConfig.round_heads_to,
        metavar="N",
        help="keep a multiple of N query heads in each layer (default: %(default)s)",
    )
    group.add_argument(
        "--round-neurons-to",
        type=int,
        metavar="N",
        help="keep a multiple of N neurons in each layer (default: 8, also for heads times head_dim, for GPU speed; 1 "
        "for the published sizes, implied by --statistics released; quantised formats need 32 or 256)",
    )
    group.add_argument(
        "--tensor-parallel",
        type=int,
        default=config.PlanConfig.tensor_parallel,
        metavar="N",
        help="keep sizes that N tensor-parallel ranks can divide evenly (default: %(default)s)",
    )


def add_targets(parser: argparse.ArgumentParser) -> None:
    """What the pruned model may have at most, in place of --ratio."""
    group = parser.add_argument_group("a target in place of --ratio: as little is removed as meets it")
    group.add_argument("--target-parameters", metavar="N", help="at most N parameters, such as 5B or 800M")
    group.add_argument("--target-size", metavar="SIZE", help="at most SIZE of weight files, such as 9GiB")
    group.add_argument(
        "--target-memory",
        metavar="SIZE",
        help="at most SIZE of weights and KV cache, in the checkpoint's dtype (needs --context)",
    )
    group.add_argument("--context", metavar="TOKENS", help="tokens of each text in that KV cache, such as 8192 or 32k")
    group.add_argument("--batch", type=int, metavar="N", help="texts in that KV cache (default: 1)")


def add_plan(parser: argparse.ArgumentParser) -> None:
    """The rest of the decision."""
    group = parser.add_argument_group("how to score and compare units")
    group.add_argument(
        "--metric",
        default=config.PlanConfig.metric,
        choices=config.METRICS,
        help="score of a unit (default: %(default)s)",
    )
    group.add_argument(
        "--structure",
        choices=config.STRUCTURES,
        help="al-am: one ranking over all layers, attention and MLP together; al-mm: separately; ul-mm, ul-um: every "
        "layer keeps the same numbers (default: al-am for flap and shortgpt, ul-um for the others)",
    )
    group.add_argument(
        "--head-score",
        default=config.PlanConfig.head_score,
        choices=config.HEAD_SCORES,
        help="how the channels of a KV group make one score (default: %(default)s)",
    )
    group.add_argument(
        "--statistics",
        default=config.PlanConfig.statistics,
        choices=config.STATISTICS,
        help="exact moments, or those of the released FLAP code (default: %(default)s)",
    )
    group.add_argument(
        "--min-experts", type=int, metavar="N", help="experts that every mixture keeps (default: what a token needs)"
    )
    experts = "keep a multiple of N experts in each mixture; with N above half of them, exactly N (default: 1)"
    group.add_argument("--round-experts-to", type=int, metavar="N", help=experts)
    group.add_argument(
        "--remove-heads", type=int, metavar="N", help="query heads to remove in total (only al-mm and ul-mm)"
    )


def add_rewrite(parser: argparse.ArgumentParser) -> None:
    """How the pruned checkpoint is made."""
    group = parser.add_argument_group("restoration and output")
    group.add_argument(
        "--restore",
        choices=config.RESTORATIONS,
        help="how to compensate for what was removed: by a bias, by refitting output projections, or by fitting whole "
        "layers to the dense model's hidden states (default: bias for flap, none for the others)",
    )
    fp8 = "fp8: the layers' matrices in FP8, by blocks of 128 x 128; prune then rounds neurons to 128 (default: auto)"
    group.add_argument("--output-dtype", default="auto", choices=config.OUTPUT_DTYPES, help=fp8)
    group.add_argument("--refit-target", type=_removed_target, help=argparse.SUPPRESS)
    group.add_argument(
        "--max-shard-size",
        default=config.RewriteConfig.max_shard_bytes,
        metavar="SIZE",
        help="size of a shard file (default: 5GB)",
    )


def _removed_target(target: str) -> None:
    """Accept the only target that is left."""
    if target != "own":
        raise argparse.ArgumentTypeError(f"{target!r} {REMOVED['refit_target']}")


@contextmanager
def loading(progress: Progress) -> Iterator[None]:
    """Modules are imported inside, which takes seconds; an interruption ends the process at once."""
    if sys.stderr.isatty():  # in a log nobody waits for it
        progress.say("loading torch and transformers")
    with interruption.loading():
        yield


def values(options: argparse.Namespace, kind: type) -> Any:
    """The config dataclass `kind`, filled from parsed arguments."""
    given = dict(vars(options))
    if "max_shard_size" in given:
        given["max_shard_bytes"] = given["max_shard_size"]
    return config.part_of(argparse.Namespace(**given), kind)


def check_text(options: Any) -> None:
    """Refuse unusable texts before torch is imported; with several ranks that is left to the stage."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return
    from flap_stream.text.windows import calibration_text, check_text, evaluation_text

    if isinstance(options, config.CollectConfig):
        if options.method != "magnitude-sp":
            check_text(calibration_text(options))
    elif sources := options.evaluate if isinstance(options, config.SweepConfig) else options.text:
        check_text(evaluation_text(sources, None, options.sequence_length, options))


def progress_of(options: argparse.Namespace) -> Progress:
    """Progress on stderr, unless --quiet; with several ranks only on the first."""
    is_first = interruption.is_first_rank()
    file, tool = getattr(options, "events", None), getattr(options, "track", None)
    events = Path(file) if is_first and file is not None else None
    listeners = [tracker(tool)] if is_first and tool is not None else []
    return Progress("auto" if is_first and not options.quiet else "silent", events, listeners)
