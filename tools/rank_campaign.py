"""One rank of a job killed at random times, many more than in the test suite.

    python tools/rank_campaign.py [--forked 200] [--torchrun 50] [--first 0]

Each time the others must end within 10 seconds, with one sentence; then the same command is called with another
number of ranks and must give the same bytes. `--forked`: ranks forked from a warm server, without a launcher, which
have to notice by themselves, half of them as two nodes. `--torchrun`: started by torchrun, on this machine.
Prints counts; the exit code is 1 if any failed.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ["HF_HUB_OFFLINE"] = "1"

from launchers import ALONE, ranks_of, start, torchrun
from models import contents, random_tokens, save, save_tokens, tiny_config, tiny_model
from rank_jobs import RankJob

SECONDS = 10.0


def forked(numbers: range) -> list[str]:
    """What became of each kill without a launcher."""
    with tempfile.TemporaryDirectory() as directory:
        job, found, slowest = RankJob(Path(directory)), [], 0.0
        for number in numbers:
            became, facts = job.trouble_after_kill(number, SECONDS)
            found.append(became)
            slowest = max(slowest, facts["took"])
            if became not in ("went on", "done before the kill"):
                print(number, became, facts, flush=True)
    print(f"the slowest of the others ended {slowest:.1f} s after the killed one")
    return found


def launched(numbers: range) -> list[str]:
    """What became of each kill of one that torchrun started, from the start of the ranks on."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        save(tiny_model(tiny_config(layers=16)), directory / "model", shard_size="200KB")
        tokens = save_tokens(directory / "tokens.npy", random_tokens(44, 32))
        command = ["prune", str(directory / "model"), "--calibration", tokens, "--samples", "44", "--quiet"]
        command += ["--sequence-length", "32", "--batch-size", "4", "--max-shard-size", "100KB"]
        whole: dict[int, float] = {}
        for ranks in (1, 2, 3, 4):
            started, out = time.monotonic(), directory / f"whole-{ranks}"
            with start(torchrun(ranks) if ranks > 1 else ALONE, [*command, str(out)]) as process:
                assert process.wait(600) == 0
            whole[ranks] = time.monotonic() - started
        expected = contents(directory / "whole-1")
        found, slowest = [], 0.0
        for number in numbers:
            draw, out = random.Random(number), directory / f"out-{number}"
            ranks, then = draw.choice([2, 3, 4]), draw.choice([1, 2, 3, 4])
            victim, seconds = draw.randrange(ranks), draw.uniform(0, 0.9 * whole[ranks])
            killed, took = kill_one(ranks, victim, seconds, [*command, str(out)])
            slowest = max(slowest, took)
            with start(torchrun(then) if then > 1 else ALONE, [*command, str(out)]) as process:
                said = process.communicate(timeout=600)[1]
            if process.returncode:
                found.append(f"exit code {process.returncode} of the second call: {said}")
            elif contents(out) != expected:
                found.append("other bytes")
            elif took > SECONDS:
                found.append(f"the others took {took:.1f} s to end")
            else:
                found.append("went on" if killed else "done before the kill")
            print(f"{number}: {found[-1]}, {ranks} ranks, then {then}, {took:.1f} s", flush=True)
            shutil.rmtree(out)
    print(f"the slowest of the others ended {slowest:.1f} s after the killed one")
    return found


def kill_one(ranks: int, victim: int, seconds: float, command: list[str]) -> tuple[bool, float]:
    """Whether one was killed in time, and how long the others and torchrun took to end."""
    with start(torchrun(ranks), command) as process:
        processes: dict[int, int] = {}
        while len(processes) < ranks and process.poll() is None:
            processes = ranks_of(process.pid)
            time.sleep(0.01)
        try:
            process.communicate(timeout=seconds)
            return False, 0.0
        except subprocess.TimeoutExpired:
            pass
        try:
            os.kill(processes[victim], signal.SIGKILL)
        except ProcessLookupError:
            process.communicate(timeout=60)
            return False, 0.0
        started = time.monotonic()
        while any(Path(f"/proc/{pid}").exists() for rank, pid in processes.items() if rank != victim):
            time.sleep(0.02)
        took = time.monotonic() - started
        process.communicate(timeout=60)
        return True, took


def main() -> int:
    """Run what was asked for; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forked", type=int, default=0)
    parser.add_argument("--torchrun", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first kill, which decides when it comes")
    options = parser.parse_args()
    if not options.forked + options.torchrun:
        options.forked, options.torchrun = 200, 50
    failed = 0
    for name, count, run in (("forked", options.forked, forked), ("torchrun", options.torchrun, launched)):
        if count:
            found = Counter(run(range(options.first, options.first + count)))
            good = found["went on"] + found["done before the kill"]
            failed += count - good
            print(f"{name}: {good} of {count} went on to the same bytes: {dict(found)}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
