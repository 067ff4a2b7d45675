"""`flap-stream push OUT REPO`."""

import argparse
import os
from dataclasses import asdict

from flap_stream.commands import options as shared
from flap_stream.commands import printing
from flap_stream.config import PushConfig
from flap_stream.progress import format_bytes

EXAMPLES = (
    "push pruned name/model-pruned --private",
    "push pruned name/model-pruned --base-model Qwen/Qwen2.5-7B",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("out", metavar="OUT", help="pruned checkpoint")
    parser.add_argument("repository", metavar="REPO", help="repository on the Hub, such as name/model-pruned")
    parser.add_argument("--private", action="store_true", help="if it is created, make it private")
    parser.add_argument(
        "--base-model", metavar="ID", help="Hub id of the dense model, if it was pruned from a directory"
    )
    shared.add_output(parser, runs_layers=False)


def run(options: argparse.Namespace) -> None:
    """Upload, and print where it is."""
    config = shared.values(options, PushConfig)
    if options.quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    with shared.loading(shared.progress_of(options)):
        from flap_stream.export.hub_upload import push

    result = push(options.out, options.repository, config)
    if options.json:
        printing.print_json(asdict(result))
        return
    print(f"uploaded     {result.files} files, {format_bytes(result.nbytes)}, all of them compared by digest")
    printing.show(f"result       {result.url}")
