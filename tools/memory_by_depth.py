"""Peak memory of `flap-stream prune` on models that differ in depth alone: it should not grow with the layers.

Runs the real command in a process of its own for every depth, several times, and prints medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from random_checkpoint import add_shape_arguments, config_of, make


def prune(model: Path, tokens: Path, out: Path) -> tuple[float, float]:
    """Peak host MiB and seconds of one run."""
    command = [sys.executable, "-m", "flap_stream", "prune", str(model), str(out), "--calibration", str(tokens)]
    result = subprocess.run([*command, "--json", "--quiet"], check=True, capture_output=True, text=True)
    body = json.loads(result.stdout)
    subprocess.run(["rm", "-rf", str(out)], check=True)
    return body["peak_host_bytes"] / 2**20, sum(body["seconds"].values())


def main() -> None:
    """Print a table of depth, peak memory and seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_shape_arguments(parser)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        np.save(place / "tokens.npy", np.random.default_rng(0).integers(0, options.vocabulary, (options.windows, 128)))
        config = config_of(options, 1)
        layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
        print(f"one layer has {layer * getattr(torch, options.dtype).itemsize / 2**20:.1f} MiB")
        for depth in options.depths:
            make(place / "model", config_of(options, depth), getattr(torch, options.dtype))
            runs = [prune(place / "model", place / "tokens.npy", place / "out") for _ in range(options.runs)]
            peaks, seconds = zip(*runs, strict=True)
            peak = f"{statistics.median(peaks):.1f} MiB ({min(peaks):.1f} to {max(peaks):.1f})"
            print(f"{depth:3d} layers: peak {peak}, {statistics.median(seconds):.1f} s")
            subprocess.run(["rm", "-rf", str(place / "model")], check=True)


if __name__ == "__main__":
    main()
