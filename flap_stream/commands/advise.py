"""`flap-stream advise MODEL`."""

import argparse
from dataclasses import asdict
from typing import Any

from flap_stream.commands import options as shared
from flap_stream.commands import printing
from flap_stream.config import AdviseConfig
from flap_stream.progress import format_bytes

EXAMPLES = (
    "advise Qwen/Qwen2.5-7B --gpu 16GiB --context 32k",
    "advise ./model --gpu 24GiB --form bfloat16 --batch 8",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", help="dense model: a directory, a config.json or a Hub id")
    group = parser.add_argument_group("what it is to be served on")
    group.add_argument("--gpu", metavar="SIZE", help="memory of the card, such as 24GiB (default: this machine's)")
    group.add_argument(
        "--form", metavar="NAME", help="bfloat16, q8_0, ... (default: that for which least must be removed)"
    )
    group.add_argument(
        "--context",
        default=AdviseConfig.context,
        metavar="TOKENS",
        help="tokens of each text in the KV cache, such as 32k (default: %(default)s)",
    )
    group.add_argument(
        "--batch", type=int, default=AdviseConfig.batch, metavar="N", help="texts at once (default: %(default)s)"
    )
    shared.add_revision(group)
    shared.add_output(parser, runs_layers=False)


def run(options: argparse.Namespace) -> None:
    """Print what fits, and how to make it fit."""
    config = shared.values(options, AdviseConfig)
    with shared.loading(shared.progress_of(options)):
        from flap_stream.export.advice import USED, advise

    found = advise(shared.model_of(options.model, options), config)
    if options.json:
        job = None if found.forecast is None else found.forecast.record()
        printing.print_json({**asdict(found), "forecast": job})
        return
    size, limit = format_bytes(found.capacity), format_bytes(found.limit)
    printing.show(f"model    {found.parameters:,} parameters in {found.layers} layers of {found.model_type}")
    print(f"memory   {size}, of which {limit} ({USED:.0%}) are for weights and KV cache")
    print(f"         KV cache of {config.batch} x {config.context:,} tokens, 16 bits a value\n")
    print(f"{'form':10} {'weights':>10} {'KV cache':>10} {'to remove':>10}  runs in")
    for form in found.forms:
        needed = "too large" if form.ratio is None else f"about {form.ratio:.0%}" if form.ratio else "nothing"
        sizes = f"{format_bytes(form.weight_bytes):>10} {format_bytes(form.kv_bytes):>10}"
        print(f"{form.name:10} {sizes} {needed:>10}  {form.programs}")
    print()
    if found.chosen is None:
        print("That fits only if more than half of the prunable weights are removed: take a larger card, or several.")
        return
    if found.forecast is not None:
        _print_job(found.forecast, config.gpu is not None)
    elif any(form.name == found.chosen and form.ratio for form in found.forms):
        print("pruning  does not fit that card: add --device cpu\n")
    else:
        print(f"As {found.chosen} it fits without pruning.")
    for command in found.commands:
        printing.show(f"  {command}")


def _print_job(job: Any, is_elsewhere: bool) -> None:
    """What pruning takes. is_elsewhere: on a card that is not this machine's."""
    placement = job.placement
    device = f"{format_bytes(placement.device_bytes)} of GPU memory, " if placement.device_bytes else ""
    print(
        f"pruning  {device}{format_bytes(placement.host_bytes)} of host memory, {format_bytes(job.disk_bytes)} of disk"
    )
    assumed = " with 100 TFLOP/s and a disk of 1.5 GB/s" if is_elsewhere else " on this machine"
    print(f"         at best {sum(job.floor_seconds.values()) / 60:,.1f} minutes{assumed}\n")
