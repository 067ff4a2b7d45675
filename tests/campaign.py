"""Faults at every moment of a job, by the hundred; the outcome of each begins with SURVIVED, or is the trouble."""

import os
import random
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from faults import DISK_FULL, INPUT_OUTPUT, NO_ACCESS, Fault, Job
from fork_server import KILLED

WORKERS = os.cpu_count() or 2
SURVIVED = "survived"
Item = TypeVar("Item")


def in_parallel(check: Callable[[Item], str | None], items: Iterable[Item]) -> list[str]:
    """What each check says, `survived` where it says nothing."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return [said or SURVIVED for said in pool.map(check, items)]


def kills_at_operations(job: Job, removing: Job, stride: int = 1) -> list[str]:
    """At every stride-th file operation, at each that writes a record, and at the one after it.

    `removing` does not keep its run directory: its last steps are another job's.
    """
    beside = {n + after for n in job.records() for after in (0, 1)}
    steps = [(job, n) for n in sorted({*range(1, len(job.steps) + 1, stride)} | beside)]
    steps += [(removing, n) for n in range(len(job.steps) - 5, len(removing.steps) + 1, stride)]
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
        return trouble or (None if code == KILLED else f"{SURVIVED}, done before the kill")

    return in_parallel(check, range(count))


def kills_in_a_backward_pass(job: Job, count: int) -> list[str]:
    """At random file operations of the backward pass: what a kill between two leaves, one at the second does."""
    steps = random.Random(0).choices(job.backward_steps(), k=count)
    return in_parallel(lambda n: job.trouble_after(steps[n], f"backward-{n}", (KILLED,)), range(count))


def second_kills(job: Job, count: int) -> list[str]:
    """One at any operation, one soon after the job is taken up."""

    def check(number: int) -> str | None:
        draw, place = random.Random(number), job.place(f"double-{number}")
        codes = [job.run(place, draw.randrange(1, len(job.steps)))]
        codes.append(job.run(place, draw.randrange(1, 300)))
        trouble = job.trouble_in(place)
        shutil.rmtree(place)
        return trouble or (None if codes == [KILLED, KILLED] else f"{SURVIVED}, done before the second kill")

    return in_parallel(check, range(count))


def power_cuts(job: Job, draws: int, every: int = 1) -> list[str]:
    """At the fsyncs, in the forms of tests/faults.py: of all states that may be found, every n-th."""

    def became(share: int) -> list[str]:
        cuts = job.power_cuts(f"power-{share}", 1, draws, (share * every, WORKERS * every))
        return [what or SURVIVED for _, what in cuts]

    with ThreadPoolExecutor(WORKERS) as pool:
        return [what for part in pool.map(became, range(WORKERS)) for what in part]


def errors_at_operations(job: Job, stride: int) -> list[str]:
    """Of three kinds, at every stride-th operation each."""
    kinds = {"full": (DISK_FULL, True), "EIO": (INPUT_OUTPUT, False), "EACCES": (NO_ACCESS, False)}
    tried = [(kind, n) for kind in kinds for n in range(1, len(job.steps) + 1, stride)]

    def check(item: tuple[str, int]) -> str | None:
        kind, step = item
        return job.trouble_after(Fault(step, *kinds[kind]), f"{kind}-{step}", (0, 1))

    return in_parallel(check, tried)
