"""`flap-stream evaluate MODEL --text FILE`."""

import argparse
from dataclasses import asdict

from flap_stream.commands import options as shared
from flap_stream.config import EvaluateConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", help="a directory or a Hub id, dense or pruned")
    parser.add_argument("--text", nargs="+", default=["wikitext2"], metavar="TEXT", help="as --calibration of prune")
    parser.add_argument("--sequence-length", type=int, default=128, help="tokens a window (default: 128)")
    parser.add_argument("--samples", type=int, help="at most so many windows (default: all)")
    shared.add_text(parser)
    shared.add_engine(parser)
    shared.add_revision(parser)
    shared.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Evaluate, and print the perplexity."""
    config = shared.values(options, EvaluateConfig)
    shared.check_text(config)
    progress = shared.progress_of(options)
    with progress.loading():
        from flap_stream.stages.evaluate import evaluate

    result = evaluate(shared.model_of(options.model, options), config, progress)
    if options.json:
        shared.print_json({"model": options.model, **asdict(result)})
    else:
        error = "" if result.standard_error is None else f" ± {result.standard_error:.4f} (standard error)"
        over = f"{result.windows} windows of {result.sequence_length} tokens"
        print(f"perplexity {result.perplexity:.4f}{error} over {over}")
