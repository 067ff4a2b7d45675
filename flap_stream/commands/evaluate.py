"""`flap-stream evaluate MODEL --text FILE`."""

import argparse
from dataclasses import asdict

from flap_stream.commands import options as shared
from flap_stream.commands import printing
from flap_stream.config import EvaluateConfig

EXAMPLES = (
    "evaluate pruned --text test.txt",
    "evaluate Qwen/Qwen2.5-7B --text test.txt --host-memory 8GiB",
    "evaluate pruned --text test.txt --save pruned",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", help="dense or pruned model: a directory or a Hub id")
    shared.add_evaluation(parser.add_argument_group("text"), "--text", ["wikitext2"])
    parser.add_argument("--save", metavar="OUT", help="note the result in a pruned checkpoint, for push")
    shared.add_revision(shared.add_engine(parser))
    shared.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Evaluate and print the perplexity."""
    config = shared.values(options, EvaluateConfig)
    shared.check_text(config)
    progress = shared.progress_of(options)
    with shared.loading(progress):
        from flap_stream.stages.evaluate import evaluate

    result = evaluate(shared.model_of(options.model, options), config, progress)
    if options.json:
        printing.print_json({"model": options.model, **asdict(result)})
    else:
        error = "" if result.standard_error is None else f" ± {result.standard_error:.4f} (standard error)"
        over = f"{result.windows} windows of {result.sequence_length} tokens"
        print(f"perplexity {result.perplexity:.4f}{error} over {over}")
