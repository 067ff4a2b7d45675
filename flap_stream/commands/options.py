"""Options that several verbs share, and what they print."""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flap_stream import config
from flap_stream.config.values import dtype_name
from flap_stream.errors import InvalidOption
from flap_stream.progress import Progress, format_bytes, printable


def batch_size(text: str) -> str | None:
    """`auto` or a number of windows."""
    return None if text == "auto" else text


def add_output(parser: argparse.ArgumentParser) -> None:
    """--json and --quiet."""
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout at the end")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def add_revision(parser: argparse.ArgumentParser) -> None:
    """--revision, beside MODEL."""
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub id (also MODEL@REV)")


def model_of(model: Any, options: argparse.Namespace) -> Any:
    """The model as the API takes it: a directory, `name` or `name@revision`; None if none is named."""
    if options.revision is None:
        return model
    if model is None or Path(model).exists() or "@" in model:
        what = "no MODEL is named" if model is None else f"{model} is not the Hub id of a model without one"
        raise InvalidOption(f"--revision {options.revision}: {what}; give it beside a Hub id such as name/model")
    return f"{model}@{options.revision}"


def add_engine(parser: argparse.ArgumentParser) -> None:
    """How layers are run."""
    group = parser.add_argument_group("how layers are run")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    group.add_argument(
        "--dtype", type=dtype_name, default="auto", choices=config.DTYPES, help="of the forward (default: the model's)"
    )
    group.add_argument("--batch-size", type=batch_size, default=None, metavar="auto|N", help="windows at once")
    group.add_argument("--host-memory", metavar="SIZE", help="most to take, such as 8GiB (default: what is free)")
    group.add_argument("--device-memory", metavar="SIZE", help="the same of the GPU's memory")
    group.add_argument("--prefetch", type=int, metavar="0|1", help="layers to read ahead (default: 1 if it fits)")
    group.add_argument("--trust-remote-code", action="store_true", help="let the tokenizer run the model's own code")


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """What statistics are collected from."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration",
        nargs="+",
        default=["wikitext2"],
        metavar="TEXT",
        help="wikitext2, c4, ptb; or .txt, .jsonl, .json, .parquet files (.gz, .bz2, .xz, .zst, too) or directories "
        "of them; or one .npy of int tokens [sample, token], used in order (default: wikitext2)",
    )
    group.add_argument("--samples", type=int, default=1024, help="calibration windows (default: 1024)")
    group.add_argument("--sequence-length", type=int, default=128, help="tokens a window (default: 128)")
    group.add_argument("--seed", type=int, default=0, help="of the window sampling (default: 0)")
    group.add_argument(
        "--loss-windows",
        type=int,
        default=0,
        metavar="N",
        help=f"windows whose loss is swept back, for --metric fisher (default: 0, of prune {config.LOSS_WINDOWS})",
    )
    add_text(group)


def add_text(group: argparse._ActionsContainer) -> None:
    """How text becomes windows."""
    group.add_argument(
        "--bos",
        default="auto",
        choices=config.BOS,
        help="begin every window with the beginning-of-text token (default: auto, where the tokenizer adds one)",
    )
    group.add_argument(
        "--text-column",
        metavar="NAME",
        help="of files with rows (default: text, else content, else messages, else the only one of strings)",
    )
    group.add_argument(
        "--chat-template",
        default="auto",
        choices=config.CHAT_TEMPLATE,
        help="put messages through the tokenizer's chat template (default: auto, where there is no text)",
    )


def add_method(parser: argparse.ArgumentParser, *, one_ratio: bool = True) -> None:
    """What collecting and planning must agree on."""
    group = parser.add_argument_group("decision")
    if one_ratio:
        group.add_argument(
            "--ratio", default=0.2, metavar="SHARE", help="share of the prunable weights to remove (default: 0.2)"
        )
    group.add_argument("--method", default="flap", choices=config.METHODS, help="default: flap")
    group.add_argument("--min-heads", type=int, default=1, help="query heads that stay in every layer (default: 1)")
    group.add_argument("--min-neurons", type=int, default=1, help="neurons that stay in every layer (default: 1)")
    group.add_argument("--round-heads-to", type=int, default=1, metavar="N", help="a multiple of N heads in each layer")
    group.add_argument(
        "--round-neurons-to",
        type=int,
        metavar="N",
        help="the same of neurons (default: 8, and heads times head_dim too, as GPUs need it; 1: the published sizes, "
        "which --statistics released implies; quantised formats need 32 or 256)",
    )
    group.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="sizes that N ranks can divide among themselves"
    )


def add_plan(parser: argparse.ArgumentParser) -> None:
    """The rest of the decision."""
    group = parser.add_argument_group("decision, in detail")
    group.add_argument("--metric", default="wifv", choices=config.METRICS, help="default: wifv")
    group.add_argument("--structure", choices=config.STRUCTURES, help="default: al-am (flap), ul-um (the baselines)")
    group.add_argument("--head-score", default="mean-z", choices=config.HEAD_SCORES, help="default: mean-z")
    group.add_argument("--statistics", default="exact", choices=config.STATISTICS, help="default: exact")
    group.add_argument("--remove-heads", type=int, metavar="N", help="query heads to remove in all (al-mm, ul-mm)")


def add_rewrite(parser: argparse.ArgumentParser) -> None:
    """How the output is written."""
    group = parser.add_argument_group("output")
    group.add_argument("--restore", choices=config.RESTORATIONS, help="default: bias (flap), none (the baselines)")
    group.add_argument(
        "--refit-target",
        default="own",
        choices=config.REFIT_TARGETS,
        help="what least-squares refits to; each is better than the one before and takes longer (default: own)",
    )
    group.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default: 5GB")


def values(options: argparse.Namespace, kind: type) -> Any:
    """The config dataclass `kind`, filled from parsed arguments."""
    given = dict(vars(options))
    if "max_shard_size" in given:
        given["max_shard_bytes"] = given["max_shard_size"]
    return config.part_of(argparse.Namespace(**given), kind)


def check_text(options: Any) -> None:
    """Refuse texts that cannot serve, before torch is imported; ranks, which start together, do it once they know."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return
    from flap_stream.text.windows import calibration_text, check_text, evaluation_text

    if isinstance(options, config.CollectConfig):
        if options.method != "magnitude-sp":
            check_text(calibration_text(options))
    elif sources := options.evaluate if isinstance(options, config.SweepConfig) else options.text:
        check_text(evaluation_text(sources, None, options.sequence_length, options))


def progress_of(options: argparse.Namespace) -> Progress:
    """Progress on stderr, unless --quiet; of several ranks, the first one's."""
    is_first = int(os.environ.get("RANK", 0)) == 0
    return Progress("auto" if is_first and not options.quiet else "silent")


def show(line: str) -> None:
    """Print a line that may quote a name from a file or a folder: no terminal takes it for a command."""
    print(printable(line))


def print_json(body: dict[str, Any]) -> None:
    """The one object that --json promises."""
    print(json.dumps(body))


def print_sizes(record: dict[str, Any]) -> None:
    """Parameters and ratios of a pruning.json, or of what has the same form, for people."""
    parameters, ratios = record["parameters"], record["realised_ratio"]
    added = parameters.get("added_biases", 0)
    biases = f", {added:,} of them in biases that make up for what is gone" if added else ""
    print(f"parameters   {parameters['before']:,} -> {parameters['after']:,}{biases}")
    print(f"removed      {ratios['decoder']:.2%} of the prunable weights, {ratios['model']:.2%} of the model")


def totals(result: Any) -> dict[str, Any]:
    """Totals of a PruneResult, as `--json` gives them."""
    record, measured = result.record, result.measured
    return {
        "out": str(result.out),
        "realised_ratio": record["realised_ratio"],
        "parameters": record["parameters"],
        "seconds": measured.seconds,
        "bytes_read": measured.bytes_read,
        "node_bytes_read": measured.node_bytes_read,
        "bytes_written": measured.bytes_written,
        "peak_host_bytes": measured.peak_host_bytes,
        "peak_device_bytes": measured.peak_device_bytes,
        "placement": asdict(measured.placement) if measured.placement else None,
    }


def print_result(result: Any) -> None:
    """A PruneResult, for people."""
    print_sizes(result.record)
    if result.measured.seconds:
        spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.measured.seconds.items())
        print(f"time         {spent}")
        print(f"peak memory  {format_bytes(result.measured.peak_host_bytes)}")
    show(f"result       {result.out}")
