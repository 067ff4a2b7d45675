"""`flap-stream recipe --preset NAME`."""

import argparse
from pathlib import Path

from flap_stream.config import RewriteConfig
from flap_stream.errors import InvalidOption

_COMMON = """\
# Give it to any verb: flap-stream prune MODEL OUT --recipe job.toml
# Options on the command line win. A table such as [evaluate] is for that verb only.
"""
_CALIBRATION = """
# What to calibrate on: text like what the model will be used for. Files, or wikitext2, c4 or ptb from the Hub.
calibration = ["wikitext2"]
"""
PRESETS = {
    "published": """\
# FLAP as published, to compare with other methods: selected by the fluctuation of inputs, compensated by biases.
method = "flap"
statistics = "released"  # as the authors' code computes them, one window at a time
ratio = 0.2
samples = 1024
sequence-length = 128
restore = "bias"
""",
    "fast": """\
# Much better than published at moderate cost: decided by the loss, refitted by least squares.
ratio = 0.2  # share of the prunable weights; or target-size = "9GiB", target-parameters = "5B", ...
metric = "fisher"
restore = "least-squares"
""",
    "quality": """\
# The best that was measured, and slow: decided by the loss, every layer fitted to what the dense one computes.
ratio = 0.2  # share of the prunable weights; or target-size = "9GiB", target-parameters = "5B", ...
metric = "fisher"
restore = "reconstruct"
""",
}


EXAMPLES = (
    "recipe --preset quality > job.toml",
    "recipe --run run > job.toml",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="published (FLAP as released), fast (the default) or quality (the best, slowly)",
    )
    parser.add_argument("--run", metavar="DIR", help="what a run directory was collected and last planned with")


def run(options: argparse.Namespace) -> None:
    """Print the recipe."""
    if options.run is None:
        print(f"{_COMMON}\n{PRESETS[options.preset or 'fast']}{_CALIBRATION}", end="")
        return
    if options.preset is not None:
        raise InvalidOption(
            f"--preset {options.preset} and --run {options.run} are different recipes; give one of them"
        )
    from flap_stream.output.recipe import collected_for, recipe
    from flap_stream.storage.run_directory import RunDirectory

    with RunDirectory(Path(options.run), is_writer=False) as run:
        plan = run.plan.read()[0] if run.plan.exists() else collected_for(run)
        print(recipe(run, plan, RewriteConfig(), run.manifest["source"]).decode(), end="")
