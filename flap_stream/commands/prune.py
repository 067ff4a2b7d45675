"""`flap-stream prune MODEL OUT`."""

import argparse

from flap_stream.commands import options as shared
from flap_stream.config import PruneConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", help="a directory or a Hub id")
    parser.add_argument("out", metavar="OUT", help="where the pruned checkpoint goes")
    parser.add_argument("--run", metavar="DIR", help="run directory, kept at the end (default: OUT.run, removed)")
    parser.add_argument("--keep-run", action="store_true", help="keep OUT.run at the end")
    shared.add_method(parser)
    shared.add_calibration(parser)
    shared.add_plan(parser)
    shared.add_rewrite(parser)
    shared.add_engine(parser)
    shared.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Prune, and print what came out."""
    config = shared.values(options, PruneConfig)
    from flap_stream.pipeline import prune

    result = prune(options.model, options.out, config, run=options.run, progress=shared.progress_of(options))
    if options.json:
        shared.print_json(shared.totals(result))
    else:
        shared.print_result(result)
