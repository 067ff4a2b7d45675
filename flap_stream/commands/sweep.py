"""`flap-stream sweep RUN --ratios 0.1:0.6:0.1`."""

import argparse
from dataclasses import asdict
from typing import Any

from flap_stream.commands import options as shared
from flap_stream.config import SWEPT_RESTORATIONS, SweepConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("run_directory", metavar="RUN", help="a run directory whose collection is complete")
    parser.add_argument(
        "--ratios",
        default="0.1:0.6:0.1",
        metavar="LIST",
        help="start:stop:step, both ends included, or 0.2,0.3,0.5 (default: 0.1:0.6:0.1)",
    )
    parser.add_argument("--model", metavar="MODEL", help="where the dense model is now (default: where it was)")
    group = parser.add_argument_group("perplexity")
    group.add_argument("--evaluate", nargs="+", default=[], metavar="TEXT", help="as --calibration of prune")
    group.add_argument("--sequence-length", type=int, default=128, help="tokens a window (default: 128)")
    group.add_argument("--samples", type=int, help="at most so many windows (default: all)")
    shared.add_text(group)
    group.add_argument("--restore", choices=SWEPT_RESTORATIONS, help="default: bias (flap), none (the baselines)")
    group.add_argument(
        "--max-perplexity-increase", metavar="SHARE", help="find the largest ratio that stays within, such as 5%%"
    )
    group.add_argument("--resolution", default=0.005, metavar="SHARE", help="how closely to find it (default: 0.005)")
    shared.add_method(parser, one_ratio=False)
    shared.add_plan(parser)
    shared.add_engine(parser)
    shared.add_revision(parser)
    shared.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Sweep, and print a row a ratio."""
    config = shared.values(options, SweepConfig)
    shared.check_text(config)
    progress = shared.progress_of(options)
    with progress.loading():
        from flap_stream.stages.sweep import sweep

    model = shared.model_of(options.model, options)
    result = sweep(options.run_directory, config, model=model, progress=progress)
    if options.json:
        shared.print_json({**asdict(result), "run": str(result.run)})
        return
    dense = result.dense_perplexity
    print("ratio     of prunable  of model      parameters" + ("   perplexity    rise" if dense else ""))
    print(f"dense          0.00 %    0.00 % {result.parameters:15,}" + (f"   {dense:10.4f}" if dense else ""))
    for point in result.points:
        row = f"{point.ratio:<8g} {100 * point.decoder_ratio:10.2f} % {100 * point.model_ratio:7.2f} %"
        row += f" {point.parameters:15,}"
        if dense and point.perplexity is not None:
            row += f"   {point.perplexity:10.4f}  {100 * (point.perplexity / dense - 1):+6.1f} %"
        print(row)
    if result.limit is not None:
        print(_sentence(result.limit))


def _sentence(limit: Any) -> str:
    """What the search for the largest ratio came to."""
    within = f"within {limit.increase:.1%} of the dense perplexity ({limit.perplexity:.4f} at most)"
    if limit.ratio is None:
        return f"no ratio down to {limit.resolution:g} stays {within}"
    if limit.is_last:
        return f"all ratios tried stay {within}, up to {limit.ratio:g}; try larger ones"
    return f"up to ratio {limit.ratio:g} (found to {limit.resolution:g}) stays {within}"
