"""`flap-stream plan RUN --ratio R`."""

import argparse
from dataclasses import asdict

from flap_stream.commands import interruption, printing
from flap_stream.commands import options as shared
from flap_stream.config import PlanConfig

EXAMPLES = (
    "plan run --ratio 0.3",
    "plan run --target-memory 12GiB --context 32k --metric fisher",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("run_directory", metavar="RUN", help="run directory with complete statistics")
    shared.add_method(parser)
    shared.add_targets(parser)
    shared.add_plan(parser)
    shared.add_output(parser, runs_layers=False)


def run(options: argparse.Namespace) -> None:
    """Plan and print what each layer would keep."""
    config = shared.values(options, PlanConfig)
    with interruption.loading():
        from flap_stream.arithmetic.sizes import width_note
        from flap_stream.stages.plan import plan
        from flap_stream.storage.plan import recorded_layers

    result = plan(options.run_directory, config)
    sizes = {**result.sizes.record(), **({} if result.target is None else {"target": result.target})}
    if result.left_whole:
        sizes["left_whole"] = list(result.left_whole)
    if options.json:
        printing.print_json(
            {
                "run": str(result.run),
                **sizes,
                **({} if result.predicted is None else {"predicted_rise": asdict(result.predicted)}),
                "layers": [
                    {"kept_kv_groups": keep.kv_groups.tolist(), "kept_neurons": keep.neurons.tolist()}
                    for keep in result.layers
                ],
                **recorded_layers(result.layers),
            }
        )
        return
    printing.print_layers(
        (len(keep.kv_groups), groups, len(keep.neurons), neurons, not keep.is_gone)
        for keep, groups, neurons in zip(result.layers, result.kv_groups, result.neurons, strict=True)
    )
    printing.print_sizes(sizes)
    printing.print_target(sizes)
    printing.print_left_whole(sizes)
    if result.predicted is not None:
        print(f"loss         predicted to rise by {result.predicted}")
    print(f"widths       {width_note(result.sizes.width_multiple)}")
    printing.show(f"next: flap-stream rewrite {result.run} OUT")
