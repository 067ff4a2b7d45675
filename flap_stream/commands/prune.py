"""`flap-stream prune MODEL OUT`."""

import argparse

from flap_stream.commands import options as shared
from flap_stream.commands import printing
from flap_stream.config import PruneConfig
from flap_stream.config.values import parse_size
from flap_stream.errors import InvalidOption
from flap_stream.progress import format_bytes

EXAMPLES = (
    "prune Qwen/Qwen2.5-7B pruned --ratio 20% --calibration text.txt",
    "prune ./model pruned --target-size 9GiB --metric fisher --restore least-squares",
    "prune ./model pruned --dry-run",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", help="dense model: a directory or a Hub id")
    parser.add_argument("out", metavar="OUT", help="directory to write the pruned checkpoint to")
    shared.add_method(parser)
    shared.add_targets(parser)
    shared.add_calibration(parser)
    shared.add_rewrite(parser)
    shared.add_plan(parser)
    shared.add_revision(shared.add_engine(parser))
    group = parser.add_argument_group("run directory")
    group.add_argument("--run", metavar="DIR", help="run directory, kept at the end (default: OUT.run, removed)")
    group.add_argument("--keep-run", action="store_true", help="keep OUT.run at the end")
    group = parser.add_argument_group("dry run")
    group.add_argument(
        "--dry-run", action="store_true", help="only predict memory, disk and time (config.json is enough)"
    )
    group.add_argument("--ranks", type=int, metavar="N", help="processes that the job would use (default: 1)")
    group.add_argument("--nodes", type=int, metavar="N", help="machines like this one with these ranks (default: 1)")
    group.add_argument("--network", metavar="SIZE", help="bytes per second of each machine (default: 1.25GB)")
    shared.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Prune and print the result."""
    config = shared.values(options, PruneConfig)
    shared.check_text(config)
    if options.dry_run:
        _dry_run(options, config)
        return
    for name in ("ranks", "nodes", "network"):
        if (value := getattr(options, name)) is not None:
            raise InvalidOption(f"--{name} {value} would have no effect: it is only valid with --dry-run")
    progress = shared.progress_of(options)
    with shared.loading(progress):
        from flap_stream.stages.prune import prune

    model = shared.model_of(options.model, options)
    result = prune(model, options.out, config, run=options.run, progress=progress)
    if options.json:
        printing.print_json(printing.totals(result))
    else:
        printing.print_result(result)


def _dry_run(options: argparse.Namespace, config: PruneConfig) -> None:
    with shared.loading(shared.progress_of(options)):
        from flap_stream.stages.forecast import NETWORK_RATE, Machines, forecast

    network = NETWORK_RATE if options.network is None else parse_size(options.network, "network")
    ranks, nodes = (1 if given is None else given for given in (options.ranks, options.nodes))
    model = shared.model_of(options.model, options)
    found = forecast(model, options.out, config, Machines(ranks, nodes, network))
    if options.json:
        printing.print_json(found.record())
        return
    placement, limits, rates = found.placement, found.limits, found.rates
    origin = "tensor headers" if found.has_headers else "config.json only"
    print(f"model          {found.parameters:,} parameters in {found.layers} layers, from {origin}")
    each = ""
    if found.ranks > 1:
        each = " to each rank"
        idle = found.ranks - found.busy_ranks
        shares = f"; {idle} would have no windows; lower --batch-size" if idle and placement.batch_size > 1 else ""
        print(f"ranks          {found.ranks} on {found.nodes} machines like this one{shares}")
        print(f"network        {format_bytes(found.network_bytes)} sent by each machine")
    host = format_bytes(placement.host_bytes)
    print(f"host memory    {host} at its peak; {format_bytes(limits.host)} available{each}")
    if limits.device:
        device = format_bytes(placement.device_bytes)
        print(f"device memory  {device} at its peak; {format_bytes(limits.device)} available{each}")
    how = f"{placement.prefetch} layer read ahead, hidden states on the {placement.hidden_place}"
    print(f"run as         {placement.batch_size} windows at once, {how}")
    print(f"read, written  {format_bytes(found.bytes_read)}, {format_bytes(found.bytes_written)}")
    print(f"free disk      {format_bytes(found.disk_bytes)} needed; {format_bytes(found.free_disk_bytes)} available")
    print(f"run directory  {format_bytes(found.run_directory_bytes)} at most, while the job runs")
    print(f"operations     {found.operations / 1e12:,.2f} TFLOP")
    disk = f"disk {format_bytes(rates.disk_read)}/s read, {format_bytes(rates.disk_write)}/s written"
    print(f"rates here     {rates.product / 1e12:.2f} TFLOP/s, {disk}")
    floor = ", ".join(f"{name} {seconds:,.0f} s" for name, seconds in found.floor_seconds.items())
    print(f"time at best   {floor}")
