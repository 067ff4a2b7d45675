"""`flap-stream doctor [DIR]`."""

import argparse
from dataclasses import asdict
from pathlib import Path

from flap_stream.commands import options as shared
from flap_stream.commands import printing
from flap_stream.errors import FlapStreamError

EXAMPLES = (
    "doctor",
    "doctor /mnt/scratch",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "directory", metavar="DIR", nargs="?", default=".", help="where results will be (default: here)"
    )
    shared.add_output(parser, runs_layers=False)


def run(options: argparse.Namespace) -> None:
    """Print what was found, and fail if something keeps jobs from running."""
    with shared.loading(shared.progress_of(options)):
        from flap_stream.stages.doctor import examine

    found = []
    for finding in examine(Path(options.directory)):
        found.append(finding)
        if not options.json:
            printing.show(f"{finding.level:5} {finding.name:9} {finding.text}")
    if options.json:
        printing.print_json({"findings": [asdict(finding) for finding in found]})
    faults = sum(finding.level == "fault" for finding in found)
    if faults:
        raise FlapStreamError(f"{faults} fault{'s' * (faults > 1)} found, which jobs would fail by; see above")
