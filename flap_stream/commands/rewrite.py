"""`flap-stream rewrite RUN OUT`."""

import argparse

from flap_stream.commands import options as shared
from flap_stream.commands import printing
from flap_stream.config import RewriteConfig

EXAMPLES = (
    "rewrite run pruned",
    "rewrite run pruned --restore least-squares",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("run_directory", metavar="RUN", help="run directory with a plan")
    parser.add_argument("out", metavar="OUT", help="directory to write the pruned checkpoint to")
    parser.add_argument("--model", metavar="MODEL", help="the dense model, if it has moved (default: where it was)")
    shared.add_rewrite(parser)
    shared.add_revision(shared.add_engine(parser))
    shared.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Rewrite and print the result."""
    config = shared.values(options, RewriteConfig)
    progress = shared.progress_of(options)
    with shared.loading(progress):
        from flap_stream.stages.rewrite import rewrite

    model = shared.model_of(options.model, options)
    result = rewrite(options.run_directory, options.out, config, model=model, progress=progress)
    if options.json:
        printing.print_json(printing.totals(result))
    else:
        printing.print_result(result)
