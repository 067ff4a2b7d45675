"""`flap-stream export-gguf OUT FILE.gguf`."""

import argparse
from dataclasses import asdict

from flap_stream.commands import options as shared
from flap_stream.commands import printing
from flap_stream.config import GGUF_TYPES, ExportGgufConfig
from flap_stream.config.values import gguf_type
from flap_stream.progress import format_bytes

EXAMPLES = ("export-gguf pruned pruned.gguf --type q8_0",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("out", metavar="OUT", help="pruned checkpoint, or a dense one to compare with")
    parser.add_argument("file", metavar="FILE.gguf", help="file to write")
    parser.add_argument(
        "--type",
        type=gguf_type,
        choices=GGUF_TYPES,
        help="type of the matrices (default: the checkpoint's; for K-quants, run llama-quantize on bf16 or f16)",
    )
    parser.add_argument(
        "--tokenizer-pre",
        metavar="NAME",
        help="llama.cpp's pre-tokenizer (default: found from tokenizer.json)",
    )
    shared.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Export and print what was written."""
    config = shared.values(options, ExportGgufConfig)
    progress = shared.progress_of(options)
    with shared.loading(progress):
        from flap_stream.export.gguf import export_gguf

    result = export_gguf(options.out, options.file, config, progress)
    if options.json:
        printing.print_json(asdict(result) | {"file": str(result.file)})
        return
    print(f"architecture {result.architecture}, {result.type}, {result.tensors} tensors")
    print(f"size         {format_bytes(result.nbytes)}")
    printing.show(f"result       {result.file}")
