"""`flap-stream export-stock OUT DIR`."""

import argparse
from dataclasses import asdict

from flap_stream.commands import options as shared
from flap_stream.commands import printing
from flap_stream.config import ExportStockConfig
from flap_stream.progress import format_bytes

EXAMPLES = ("export-stock pruned stock --pad",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("out", metavar="OUT", help="pruned checkpoint")
    parser.add_argument("directory", metavar="DIR", help="directory to write the checkpoint without remote code to")
    parser.add_argument("--pad", action="store_true", help="pad all layers with zeros to the size of the largest")
    parser.add_argument(
        "--max-shard-size",
        default=ExportStockConfig.max_shard_bytes,
        metavar="SIZE",
        help="size of a shard file (default: 5GB)",
    )
    shared.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Export and print what padding costs."""
    config = shared.values(options, ExportStockConfig)
    progress = shared.progress_of(options)
    with shared.loading(progress):
        from flap_stream.export.stock import export_stock

    result = export_stock(options.out, options.directory, config, progress)
    if options.json:
        printing.print_json(asdict(result) | {"directory": str(result.directory)})
        return
    before, after = result.kv_cache_bytes_before, result.kv_cache_bytes_after
    mixtures = f"{result.experts} experts of {result.expert_neurons} neurons" if result.experts else ""
    sizes = " or ".join(filter(None, (f"{result.neurons} neurons" if result.neurons else "", mixtures)))
    print(f"class        {result.model_class}, {result.kv_groups} KV groups and {sizes} in every layer")
    print(f"parameters   {result.parameters_before:,} -> {result.parameters_after:,}")
    print(f"KV cache     {format_bytes(before)} -> {format_bytes(after)} per token")
    printing.show(f"result       {result.directory}")
