"""`flap-stream prune MODEL OUT`."""

import argparse
from dataclasses import asdict
from math import isfinite

from flap_stream.commands import options as shared
from flap_stream.config import PruneConfig
from flap_stream.config.values import parse_size
from flap_stream.errors import InvalidOption
from flap_stream.progress import format_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", help="a directory or a Hub id")
    parser.add_argument("out", metavar="OUT", help="where the pruned checkpoint goes")
    parser.add_argument("--run", metavar="DIR", help="run directory, kept at the end (default: OUT.run, removed)")
    parser.add_argument("--keep-run", action="store_true", help="keep OUT.run at the end")
    parser.add_argument("--dry-run", action="store_true", help="say what it would take (config.json is enough)")
    ranks = parser.add_argument_group("with --dry-run")
    ranks.add_argument("--ranks", type=int, metavar="N", help="processes that it would be launched as")
    ranks.add_argument("--nodes", type=int, metavar="M", help="machines, all like this one, that have them")
    ranks.add_argument("--network", metavar="SIZE", help="a second, of each (default: 1.25GB)")
    shared.add_method(parser)
    shared.add_calibration(parser)
    shared.add_plan(parser)
    shared.add_rewrite(parser)
    shared.add_engine(parser)
    shared.add_revision(parser)
    shared.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Prune, and print what came out."""
    config = shared.values(options, PruneConfig)
    shared.check_text(config)
    if options.dry_run:
        _dry_run(options, config)
        return
    for name in ("ranks", "nodes", "network"):
        if (value := getattr(options, name)) is not None:
            raise InvalidOption(f"--{name} {value} would have no effect: it goes with --dry-run")
    progress = shared.progress_of(options)
    with progress.loading():
        from flap_stream.stages.prune import prune

    model = shared.model_of(options.model, options)
    result = prune(model, options.out, config, run=options.run, progress=progress)
    if options.json:
        shared.print_json(shared.totals(result))
    else:
        shared.print_result(result)


def _dry_run(options: argparse.Namespace, config: PruneConfig) -> None:
    with shared.progress_of(options).loading():
        from flap_stream.stages.forecast import NETWORK_RATE, forecast

    network = NETWORK_RATE if options.network is None else parse_size(options.network)
    ranks, nodes = (1 if given is None else given for given in (options.ranks, options.nodes))
    model = shared.model_of(options.model, options)
    found = forecast(model, options.out, config, ranks, nodes, network)
    if options.json:
        known = {name: rate for name, rate in asdict(found.rates).items() if isfinite(rate)}
        shared.print_json({**asdict(found), "rates": known})
        return
    placement, limits, rates = found.placement, found.limits, found.rates
    origin = "headers" if found.has_headers else "config.json alone"
    print(f"model          {found.parameters:,} parameters in {found.layers} layers, from {origin}")
    each = ""
    if found.ranks > 1:
        each = " by each rank"
        idle = found.ranks - found.busy_ranks
        shares = f"; {idle} have no windows, so lower --batch-size" if idle and placement.batch_size > 1 else ""
        print(f"ranks          {found.ranks} on {found.nodes} machines like this one{shares}")
        print(f"network        {format_bytes(found.network_bytes)} out of each machine")
    host = format_bytes(placement.host_bytes)
    print(f"host memory    {host} at its peak; {format_bytes(limits.host)} may be used{each}")
    if limits.device:
        device = format_bytes(placement.device_bytes)
        print(f"device memory  {device} at its peak; {format_bytes(limits.device)} may be used{each}")
    how = f"{placement.prefetch} layer read ahead, hidden states on the {placement.hidden_place}"
    print(f"run as         {placement.batch_size} windows at once, {how}")
    print(f"read, written  {format_bytes(found.bytes_read)}, {format_bytes(found.bytes_written)}")
    print(f"free disk      {format_bytes(found.disk_bytes)} needed; {format_bytes(found.free_disk_bytes)} are there")
    print(f"run directory  {format_bytes(found.run_directory_bytes)} at most, while the job runs")
    print(f"operations     {found.operations / 1e12:,.2f} TFLOP")
    disk = f"disk {format_bytes(rates.disk_read)}/s read, {format_bytes(rates.disk_write)}/s written"
    print(f"rates here     {rates.product / 1e12:.2f} TFLOP/s, {disk}")
    floor = ", ".join(f"{name} {seconds:,.0f} s" for name, seconds in found.floor_seconds.items())
    print(f"time at best   {floor}")
