"""`flap-stream report RUN|OUT --html FILE`."""

import argparse
from dataclasses import asdict

from flap_stream.commands import options as shared

EXAMPLES = ("report run --html report.html",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("place", metavar="RUN|OUT", help="run directory, or pruned checkpoint (shows less)")
    parser.add_argument("--html", metavar="FILE", help="write one self-contained page")
    parser.add_argument("--png", metavar="DIR", help="write each figure as a PNG file, and all of them as overview.png")
    shared.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Draw and print what was written and what is missing."""
    with shared.loading(shared.progress_of(options)):
        from flap_stream.report.page import write_report

    result = write_report(options.place, options.html, options.png)
    if options.json:
        files = {"html": options.html, "pngs": [str(path) for path in result.pngs]}
        shared.print_json({**asdict(result), **files})
        return
    for path in ([result.html] if result.html else []) + result.pngs:
        shared.show(f"written      {path}")
    for sentence in result.missing:
        shared.show(f"not shown    {sentence}")
