"""`flap-stream report RUN|OUT --html FILE`."""

import argparse
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from flap_stream.commands import interruption, printing
from flap_stream.commands import options as shared
from flap_stream.errors import InvalidOption

EXAMPLES = (
    "report run --html report.html",
    "report pruned.run --watch 8080",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("place", metavar="RUN|OUT", help="run directory, or pruned checkpoint (shows less)")
    parser.add_argument("--html", metavar="FILE", help="write one self-contained page")
    parser.add_argument("--png", metavar="DIR", help="write each figure as a PNG file, and all of them as overview.png")
    parser.add_argument(
        "--watch",
        type=int,
        nargs="?",
        const=0,
        metavar="PORT",
        help="serve the page of a job that runs, only to this machine, until interrupted (default port: a free one)",
    )
    shared.add_output(parser, runs_layers=False)


def run(options: argparse.Namespace) -> None:
    """Draw and print what was written and what is missing."""
    if options.watch is not None:
        _watch(options)
        return
    with interruption.loading():
        from flap_stream.report.page import write_report

    result = write_report(options.place, options.html, options.png)
    if options.json:
        files = {"html": options.html, "pngs": [str(path) for path in result.pngs]}
        printing.print_json({**asdict(result), **files})
        return
    for path in ([result.html] if result.html else []) + result.pngs:
        printing.show(f"written      {path}")
    for sentence in result.missing:
        printing.show(f"not shown    {sentence}")


def _watch(options: argparse.Namespace) -> None:
    """Serve the page of a run directory."""
    if options.html is not None or options.png is not None:
        raise InvalidOption("--watch serves the page, and writes no files; leave out --html and --png")
    with interruption.loading():
        from flap_stream.report.live import Watch

    with suppress(KeyboardInterrupt), Watch(Path(options.place), options.watch) as server:
        port = server.server_port
        print(f"{server.url} (from another machine: ssh -L {port}:127.0.0.1:{port} HOST); Ctrl-C ends it", flush=True)
        server.serve_forever()
