"""Faults at every moment of a whole `prune` of a tiny model, many times those of the test suite.

    python tools/fault_campaign.py [--kills] [--times 200] [--doubles 50] [--power] [--errors]

Without options, all of it: a kill at every file operation; kills at random times; second kills while a killed job
goes on; a power cut at every fsync, in every form; errors at every third operation. Each time the same command is
called again and must give the same bytes, of the output and of the statistics. Prints counts; the exit code is 1 if
any failed.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import faults
from faults import KILLED, Fault, Job, make_job

WORKERS = 2
Item = TypeVar("Item")


def in_parallel(check: Callable[[Item], str | None], items: Iterable[Item]) -> list[str]:
    """What each check says, `survived` where it says nothing."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return [said or "survived" for said in pool.map(check, items)]


def kills_at_every_operation(job: Job, removing: Job) -> list[str]:
    """`removing` does not keep its run directory: its last steps are another job's."""
    first = len(job.steps) - 5
    steps = [(job, n) for n in range(1, len(job.steps) + 1)] + [
        (removing, n) for n in range(first, len(removing.steps) + 1)
    ]
    return in_parallel(lambda s: s[0].trouble_after(s[1], f"kill-{id(s[0])}-{s[1]}", (KILLED,)), steps)


def kills_at_random_times(job: Job, count: int) -> list[str]:
    """From the start of the process to half as long again as a job takes."""
    started = time.monotonic()
    job.run(job.place("timed"))
    whole = time.monotonic() - started

    def check(number: int) -> str | None:
        place = job.place(f"time-{number}")
        code = job.run(place, seconds=random.Random(number).uniform(0, 1.5 * whole))
        trouble = job.trouble_in(place)
        shutil.rmtree(place)
        return trouble or (None if code == KILLED else "survived, done before the kill")

    return in_parallel(check, range(count))


def second_kills(job: Job, count: int) -> list[str]:
    """One at any operation, one soon after the job is taken up."""

    def check(number: int) -> str | None:
        draw, place = random.Random(number), job.place(f"double-{number}")
        codes = [job.run(place, draw.randrange(1, len(job.steps)))]
        codes.append(job.run(place, draw.randrange(1, 300)))
        trouble = job.trouble_in(place)
        shutil.rmtree(place)
        return trouble or (None if codes == [KILLED, KILLED] else "survived, done before the second kill")

    return in_parallel(check, range(count))


def power_cuts(job: Job, draws: int) -> list[str]:
    """At every fsync, in every form of tests/faults.py."""

    def became(share: int) -> list[str]:
        return [what for _, what in job.power_cuts(f"power-{share}", 1, draws, (share, WORKERS))]

    with ThreadPoolExecutor(WORKERS) as pool:
        return [what for part in pool.map(became, range(WORKERS)) for what in part]


def errors_at_operations(job: Job) -> list[str]:
    """Of three kinds, at every third operation each."""
    kinds = {"full": (faults.DISK_FULL, True), "EIO": (faults.INPUT_OUTPUT, False), "EACCES": (faults.NO_ACCESS, False)}
    tried = [(kind, n) for kind in kinds for n in range(1, len(job.steps) + 1, 3)]

    def check(item: tuple[str, int]) -> str | None:
        kind, step = item
        return job.trouble_after(Fault(step, *kinds[kind]), f"{kind}-{step}", (0, 1))

    return in_parallel(check, tried)


def main() -> int:
    """Run what was asked for; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", action="store_true")
    parser.add_argument("--times", type=int, default=0)
    parser.add_argument("--doubles", type=int, default=0)
    parser.add_argument("--power", action="store_true")
    parser.add_argument("--errors", action="store_true")
    options = parser.parse_args()
    if not any(vars(options).values()):
        options = argparse.Namespace(kills=True, times=200, doubles=50, power=True, errors=True)
    with tempfile.TemporaryDirectory() as directory:
        job, removing = (make_job(Path(directory, name), keep_run=name == "kept") for name in ("kept", "removing"))
        print(f"a job of {len(job.steps)} file operations, {sum('fsync' in step for step in job.steps)} of them fsyncs")
        campaigns: dict[str, tuple[object, Callable[[], list[str]]]] = {
            "killed at every file operation": (options.kills, lambda: kills_at_every_operation(job, removing)),
            "killed at random times": (options.times, lambda: kills_at_random_times(job, options.times)),
            "killed, and killed again": (options.doubles, lambda: second_kills(job, options.doubles)),
            "power cut at every fsync": (options.power, lambda: power_cuts(removing, draws=3)),
            "errors at every third operation": (options.errors, lambda: errors_at_operations(removing)),
        }
        failed = 0
        for name, (wanted, run) in campaigns.items():
            if wanted:
                started, found = time.monotonic(), Counter(run())
                good = sum(n for what, n in found.items() if what.startswith(("survived", "recovered")))
                failed += found.total() - good
                print(
                    f"{name}: {good} of {found.total()} went on to the same bytes ({time.monotonic() - started:.0f} s)"
                )
                for what, n in found.most_common():
                    print(f"    {n:5d} {what}")
        return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
