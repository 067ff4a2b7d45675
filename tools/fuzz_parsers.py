"""Many hostile files of every kind, for the parsers that read them.

    python tools/fuzz_parsers.py [--examples 100000] [--seed 0]

The examples are those of tests/hostile.py, shared out by their weight. Each parser runs in a separate process, which
may take half a GiB more than it begins with. Prints a line each; the exit code is 1 if anything but an error of ours
came out, or if one example took longer than two seconds.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import time
from collections import Counter
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from hostile import READERS
from hypothesis import HealthCheck, given, seed, settings

from flap_stream.errors import FlapStreamError

MORE_BYTES = 1 << 29


def fuzz(name: str, examples: int, number: int) -> None:
    """Give a parser that many examples, and print what came of them; raises whatever it does not withstand."""
    read, bodies, _ = READERS[name]
    outcomes: Counter[str] = Counter()
    longest = 0.0
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MORE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    @seed(number)
    @settings(max_examples=examples, deadline=2000, database=None, suppress_health_check=list(HealthCheck))
    @given(bodies)
    def check(body: bytes) -> None:
        nonlocal longest
        started = time.monotonic()
        try:
            read(body)
            outcomes["taken"] += 1
        except FlapStreamError as error:
            outcomes[type(error).__name__] += 1
        longest = max(longest, time.monotonic() - started)

    started = time.monotonic()
    check()
    found = ", ".join(f"{kind} {count:,}" for kind, count in outcomes.most_common())
    seconds = time.monotonic() - started
    print(f"{name:20} {outcomes.total():8,} in {seconds:5.0f} s, longest {longest * 1e3:4.0f} ms: {found}", flush=True)


def main() -> int:
    """Fuzz every parser; 1 if any gave way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    whole = sum(weight for _, _, weight in READERS.values())
    failed = []
    for name, (_, _, weight) in READERS.items():
        arguments = (name, int(options.examples * weight / whole) + 1, options.seed)
        process = multiprocessing.get_context("fork").Process(target=fuzz, args=arguments)
        process.start()
        process.join()
        failed += [name] if process.exitcode else []
    print(f"gave way: {', '.join(failed)}" if failed else "all withstood")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
