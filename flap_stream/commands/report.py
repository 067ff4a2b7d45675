"""`flap-stream report RUN|OUT --html FILE`."""

import argparse
from dataclasses import asdict

from flap_stream.commands import options as shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("place", metavar="RUN|OUT", help="a run directory, or a pruned checkpoint (shows less)")
    parser.add_argument("--html", metavar="FILE", help="one page with everything in it")
    parser.add_argument("--png", metavar="DIR", help="the figures as PNG files, and overview.png")
    shared.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Draw, and say what was written and what is missing."""
    with shared.progress_of(options).loading():
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
