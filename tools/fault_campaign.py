"""Faults at every moment of a whole `prune` of a tiny model of three layers: more than the test suite has time for.

    python tools/fault_campaign.py [--only NAME] [--restore least-squares] [--metric fisher [--depth]]
    python tools/fault_campaign.py --family qwen3_moe [--method reap | --metric fisher --whole-experts]

Each time the same command is called again and must give the same bytes, of the output and of the statistics. Prints
counts; the exit code is 1 if any failed.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import campaign
from faults import Job, make_job

from flap_stream.config import METHODS, METRICS, RESTORATIONS

CAMPAIGNS: dict[str, Callable[[Job, Job], list[str]]] = {
    "killed at every file operation": campaign.kills_at_operations,
    "killed at random times": lambda job, _: campaign.kills_at_random_times(job, 200),
    "killed in the backward pass": lambda job, _: campaign.kills_in_a_backward_pass(job, 100),
    "killed, and killed again": lambda job, _: campaign.second_kills(job, 50),
    "power cut at every fsync": lambda _, removing: campaign.power_cuts(removing, draws=3),
    "errors at every third operation": lambda _, removing: campaign.errors_at_operations(removing, stride=3),
}


def main() -> int:
    """Run the campaigns; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CAMPAIGNS)
    parser.add_argument("--family", default="llama", help="of the tiny model (default llama)")
    parser.add_argument("--method", choices=METHODS, default="flap")
    parser.add_argument("--restore", choices=RESTORATIONS)
    parser.add_argument("--metric", choices=METRICS, default="wifv", help="fisher has the backward pass")
    parser.add_argument("--whole-experts", action="store_true")
    parser.add_argument("--depth", action="store_true")
    parser.add_argument("--ratio", type=float, default=0.3)
    options = parser.parse_args()
    how = {name: value for name, value in vars(options).items() if name != "only"}
    if options.metric == "fisher":
        how["loss_windows"] = 5
    with tempfile.TemporaryDirectory() as directory:
        job, removing = (
            make_job(Path(directory, name), keep_run=name == "kept", **how) for name in ("kept", "removing")
        )
        syncs = sum("fsync" in step for step in job.steps)
        print(f"a job of {len(job.steps)} file operations, {syncs} of them fsyncs; {len(removing.steps)} with removal")
        failed = 0
        for name, run in CAMPAIGNS.items():
            if options.only not in (None, name) or ("backward" in name and options.metric != "fisher"):
                continue
            started = time.monotonic()
            found = Counter(run(job, removing))
            good = sum(n for what, n in found.items() if what.startswith(campaign.SURVIVED))
            failed += found.total() - good
            seconds = time.monotonic() - started
            print(f"{name}: {good} of {found.total()} went on to the same bytes ({seconds:.0f} s)", flush=True)
            for what, n in found.most_common():
                print(f"    {n:5d} {what}")
        return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
