"""Whether memory stays within its limit and its prediction, over limits, window lengths and places of hidden states.

Runs the real `flap-stream prune` in a separate process for every setting; a limit is `smallest + share * (largest -
smallest)` of what the job can make use of, found by asking for far too little and for everything.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_checkpoint import add_shape_arguments, config_of, make
from transformers import AutoModelForCausalLM

SHARES = (0.0, 0.1, 0.3, 0.6, 1.0)


def prune(model: Path, tokens: Path, place: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    """One run of the real command."""
    for leftover in place.glob("out*"):
        shutil.rmtree(leftover)
    samples, length = np.load(tokens, mmap_mode="r").shape
    command = [sys.executable, "-m", "flap_stream", "prune", str(model), str(place / "out"), "--calibration"]
    command += [str(tokens), "--samples", str(samples), "--sequence-length", str(length), "--json", "--quiet", *extra]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def measure(model: Path, tokens: Path, place: Path, *extra: str) -> dict[str, Any]:
    """What a run that must succeed reports."""
    result = prune(model, tokens, place, *extra)
    if result.returncode:
        raise SystemExit(result.stderr)
    return json.loads(result.stdout)


def smallest_limit(model: Path, tokens: Path, place: Path, *extra: str) -> int:
    """Bytes that the refusal of a hopeless limit names; checks that it refuses."""
    refused = prune(model, tokens, place, *extra, "--host-memory", "1MiB")
    found = re.search(r"--host-memory (\d+)MiB", refused.stderr)
    if refused.returncode != 2 or found is None:
        raise SystemExit(f"1MiB was not refused as it should: {refused.returncode} {refused.stderr}")
    return int(found[1]) << 20


def quantised(dense: Path, kind: str, place: Path) -> Path:
    """The same checkpoint in a quantised format. kind: one of `quantised_models`."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from quantised_models import write_quantised

    AutoModelForCausalLM.from_pretrained(dense).save_pretrained(place / "one-file", max_shard_size="1TB")
    write_quantised(kind, place / "one-file", place / "quantised", place / "decoded")
    return place / "quantised"


def main() -> None:
    """Print a line a setting; the exit code is 1 if a limit or a prediction was exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_arguments(parser)
    parser.set_defaults(layers=2)
    parser.add_argument("--tokens", type=int, default=1 << 16, help="in all windows together")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--loss-windows", type=int, default=0, help="of the backward pass; 0 is none")
    parser.add_argument("--restore", help="what makes up for what was removed")
    parser.add_argument("--quantised", metavar="KIND", help="the checkpoint's format, such as 'FP8 by block'")
    parser.add_argument("further", nargs="*", metavar="OPTION", help="of prune besides, after --")
    options = parser.parse_args()
    extra = [*(["--restore", options.restore] if options.restore else []), *options.further]
    extra += ["--metric", "fisher", "--loss-windows", str(options.loss_windows)] if options.loss_windows else []
    exceeded = False
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = place / "model"
        make(model, config_of(options, options.layers), getattr(torch, options.dtype))
        if options.quantised:
            model = quantised(model, options.quantised, place)
        print("length    limit MiB  predicted  measured  predicted/measured  batch  hidden states  prefetch")
        for length in options.lengths:
            shape = (options.tokens // length, length)
            np.save(place / "tokens.npy", np.random.default_rng(0).integers(0, options.vocabulary, shape))
            job = (model, place / "tokens.npy", place)
            free = measure(*job, *extra)
            smallest, largest = smallest_limit(*job, *extra), free["placement"]["host_bytes"]
            runs: list[tuple[int | None, dict[str, Any]]] = [(None, free)]
            for share in SHARES:
                tried = int(smallest + share * (largest - smallest)) + (8 << 20)  # the base differs by a few pages
                runs.append((tried, measure(*job, *extra, "--host-memory", f"{tried}B")))
            for limit, body in runs:
                placement, peak = body["placement"], body["peak_host_bytes"]
                exceeded |= peak > placement["host_bytes"] or (limit is not None and peak > limit)
                figures = (
                    f"{'none' if limit is None else limit >> 20!s:>12}",
                    placement["host_bytes"] >> 20,
                    peak >> 20,
                )
                ratio = placement["host_bytes"] / peak
                how = (placement["batch_size"], placement["hidden_place"], placement["prefetch"])
                print(f"{length:6d} {figures[0]} {figures[1]:10d} {figures[2]:9d} {ratio:19.3f}", *how, flush=True)
    if exceeded:
        sys.exit("a limit or a prediction was exceeded")


if __name__ == "__main__":
    main()
