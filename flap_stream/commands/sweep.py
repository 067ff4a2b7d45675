"""`flap-stream sweep RUN --ratios 0.1:0.6:0.1`."""

import argparse
from dataclasses import asdict
from typing import Any

from flap_stream.commands import options as shared
from flap_stream.commands import printing
from flap_stream.config import SWEPT_RESTORATIONS, SweepConfig

EXAMPLES = (
    "sweep run --ratios 0.1:0.6:0.1 --evaluate test.txt",
    "sweep run --evaluate test.txt --max-perplexity-increase 5%",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("run_directory", metavar="RUN", help="run directory with complete statistics")
    group = parser.add_argument_group("ratios")
    group.add_argument(
        "--ratios",
        default=SweepConfig.ratios,
        metavar="LIST",
        help="start:stop:step, both ends included, or a list such as 0.2,0.3,0.5 (default: 0.1:0.6:0.1)",
    )
    group.add_argument(
        "--max-perplexity-increase",
        metavar="SHARE",
        help="also find the largest ratio whose perplexity rises by at most SHARE, such as 5%%",
    )
    group.add_argument(
        "--resolution",
        default=SweepConfig.resolution,
        metavar="SHARE",
        help="precision of that largest ratio (default: %(default)s)",
    )
    group.add_argument(
        "--predict",
        action="store_true",
        help="say how much the loss would rise, from the loss scores in RUN (collect --loss-windows), in seconds",
    )
    group = parser.add_argument_group("perplexity")
    shared.add_evaluation(group, "--evaluate", [])
    group.add_argument(
        "--restore",
        choices=SWEPT_RESTORATIONS,
        help="how to compensate for what was removed (default: bias for flap, none for the others)",
    )
    shared.add_method(parser, one_ratio=False)
    shared.add_plan(parser)
    group = shared.add_engine(parser)
    group.add_argument("--model", metavar="MODEL", help="the dense model, if it has moved (default: where it was)")
    shared.add_revision(group)
    shared.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Sweep and print a row for each ratio."""
    config = shared.values(options, SweepConfig)
    shared.check_text(config)
    progress = shared.progress_of(options)
    with shared.loading(progress):
        from flap_stream.stages.sweep import sweep

    model = shared.model_of(options.model, options)
    result = sweep(options.run_directory, config, model=model, progress=progress)
    if options.json:
        printing.print_json({**asdict(result), "run": str(result.run)})
        return
    dense = result.dense_perplexity
    heads = "   perplexity    rise" if dense else ""
    heads += "   predicted: nats a token, perplexity" if config.predict else ""
    print("ratio     of prunable  of model      parameters" + heads)
    print(f"dense          0.00 %    0.00 % {result.parameters:15,}" + (f"   {dense:10.4f}" if dense else ""))
    for point in result.points:
        row = f"{point.ratio:<8g} {100 * point.decoder_ratio:10.2f} % {100 * point.model_ratio:7.2f} %"
        row += f" {point.parameters:15,}"
        if dense and point.perplexity is not None:
            row += f"   {point.perplexity:10.4f}  {100 * (point.perplexity / dense - 1):+6.1f} %"
        if point.predicted is not None:
            row += f"   {point.predicted.token:+23.4g}  x {point.predicted.perplexity_factor:<10.4g}".rstrip()
        print(row)
    if result.limit is not None:
        print(_sentence(result.limit))


def _sentence(limit: Any) -> str:
    """The outcome of the search for the largest ratio."""
    within = f"within {limit.increase:.1%} of the dense perplexity ({limit.perplexity:.4f} at most)"
    if limit.ratio is None:
        return f"no ratio down to {limit.resolution:g} stays {within}"
    if limit.is_last:
        return f"all ratios tried stay {within}, up to {limit.ratio:g}; try larger ones"
    return f"up to ratio {limit.ratio:g} (found to {limit.resolution:g}) stays {within}"
