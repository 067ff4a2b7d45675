"""`flap-stream collect MODEL RUN`."""

import argparse
from dataclasses import asdict
from shlex import quote

from flap_stream.commands import options as shared
from flap_stream.commands import printing
from flap_stream.config import CollectConfig, changed_options
from flap_stream.config.rules import FED_ON
from flap_stream.config.values import option_name

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
        printing.print_json({**asdict(result), "run": str(result.run)})
    else:
        printing.show(f"statistics of {result.layers} layers written to {result.run}")
        printing.show(f"next: flap-stream plan {quote(str(result.run))} {' '.join(_plan_options(config))}")


def _plan_options(config: CollectConfig) -> list[str]:
    """Options of `plan` that fit what was collected."""
    found = [f"--ratio {config.ratio:g}", f"--method {config.method}"]
    if config.method == "wanda-sp":
        changed = {name: value for name, value in changed_options(config).items() if name in FED_ON and name != "ratio"}
        found += [f"--{option_name(name)} {value}" for name, value in changed.items()]
    if config.loss_windows:
        found.append("--metric fisher")
    return found
