"""`flap-stream collect MODEL RUN`."""

import argparse
from dataclasses import asdict

from flap_stream.commands import options as shared
from flap_stream.config import CollectConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", help="a directory or a Hub id")
    parser.add_argument("run_directory", metavar="RUN", help="the run directory to make or go on with")
    shared.add_calibration(parser)
    shared.add_method(parser)
    shared.add_engine(parser)
    shared.add_revision(parser)
    shared.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Collect, and say what can be done with it."""
    config = shared.values(options, CollectConfig)
    shared.check_text(config)
    progress = shared.progress_of(options)
    with progress.loading():
        from flap_stream.stages.collect import collect

    model = shared.model_of(options.model, options)
    result = collect(model, options.run_directory, config, progress=progress)
    if options.json:
        measured = asdict(result.measured)
        shared.print_json({**asdict(result), "run": str(result.run), "measured": measured})
    else:
        shared.show(f"statistics of {result.layers} layers are in {result.run}")
        shared.show(f"next: flap-stream plan {result.run} --ratio {options.ratio} --method {options.method}")
