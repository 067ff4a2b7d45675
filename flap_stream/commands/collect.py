"""`flap-stream collect MODEL RUN`."""

import argparse
from dataclasses import asdict

from flap_stream.commands import options as shared
from flap_stream.config import CollectConfig

EXAMPLES = (
    "collect ./model run --calibration text.txt",
    "collect ./model run --calibration prose.txt:0.7 code.txt:0.3 --loss-windows 256",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", help="dense model: a directory or a Hub id")
    parser.add_argument("run_directory", metavar="RUN", help="run directory to create or to continue")
    shared.add_calibration(parser)
    shared.add_method(parser)
    shared.add_revision(shared.add_engine(parser))
    shared.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Collect statistics and print the next command."""
    config = shared.values(options, CollectConfig)
    shared.check_text(config)
    progress = shared.progress_of(options)
    with shared.loading(progress):
        from flap_stream.stages.collect import collect

    model = shared.model_of(options.model, options)
    result = collect(model, options.run_directory, config, progress=progress)
    if options.json:
        measured = asdict(result.measured)
        shared.print_json({**asdict(result), "run": str(result.run), "measured": measured})
    else:
        shared.show(f"statistics of {result.layers} layers written to {result.run}")
        shared.show(f"next: flap-stream plan {result.run} --ratio {options.ratio} --method {options.method}")
