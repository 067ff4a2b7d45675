"""Seconds and peak memory of `flap-stream prune` against depth, width, number of windows and their length.

One of them grows while the others are fixed; every point is the real command in a separate process on a random
LLaMA-shaped model, medians over the runs, all points in turn. Prints a table; `--figure` draws it (needs matplotlib).
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_checkpoint import add_shape_arguments, config_of, make

AXES = ("depth", "width", "samples", "length")


def settings(options: argparse.Namespace, axis: str, factor: int) -> tuple[argparse.Namespace, int, int]:
    """Sizes of the model, windows and tokens a window with one of them `factor` times as large."""
    sizes = argparse.Namespace(**vars(options))
    windows, length = options.windows, options.length
    if axis == "depth":
        sizes.layers *= factor
    elif axis == "width":
        for name in ("hidden", "intermediate", "heads", "kv_heads"):
            setattr(sizes, name, getattr(sizes, name) * factor)
    elif axis == "samples":
        windows *= factor
    else:
        windows, length = max(1, windows // factor), length * factor  # as many tokens in all
    return sizes, windows, length


def prune(place: Path, options: argparse.Namespace, axis: str, factor: int) -> dict[str, Any]:
    """One run of the real command on a model made for it."""
    sizes, windows, length = settings(options, axis, factor)
    make(place / "model", config_of(sizes, sizes.layers), getattr(torch, options.dtype))
    np.save(place / "tokens.npy", np.random.default_rng(0).integers(0, options.vocabulary, (windows, length)))
    command = [sys.executable, "-m", "flap_stream", "prune", str(place / "model"), str(place / "out"), "--json"]
    command += ["--calibration", str(place / "tokens.npy"), "--samples", str(windows), "--quiet"]
    command += ["--sequence-length", str(length), "--device", options.device]
    command += ["--host-memory", options.host_memory] if options.host_memory else []
    body = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    for leftover in ("model", "out"):
        shutil.rmtree(place / leftover)
    return body


def point(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of one point."""
    return {
        **{stage: statistics.median(r["seconds"][stage] for r in runs) for stage in ("collect", "rewrite")},
        "peak_host_mib": statistics.median(r["peak_host_bytes"] for r in runs) / 2**20,
        "peak_device_mib": statistics.median(r["peak_device_bytes"] for r in runs) / 2**20,
        "predicted_host_mib": statistics.median(r["placement"]["host_bytes"] for r in runs) / 2**20,
        "hidden_place": runs[0]["placement"]["hidden_place"],
    }


def draw(curves: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    """Seconds above, memory below, one column an axis."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(2, len(curves), figsize=(3.2 * len(curves), 5.2), squeeze=False, sharey="row")
    for column, (axis, points) in enumerate(curves.items()):
        factors = list(points)
        for name, style in (("collect", "o-"), ("rewrite", "s-")):
            rows[0][column].plot(factors, [points[f][name] for f in factors], style, label=name)
        for name, style in (("peak_host_mib", "o-"), ("predicted_host_mib", "x--")):
            rows[1][column].plot(factors, [points[f][name] for f in factors], style, label=name.removesuffix("_mib"))
        rows[0][column].set(title=axis, xscale="log", ylim=(0, None))
        rows[1][column].set(xlabel=f"{axis}, times the first", xscale="log", ylim=(0, None))
        for row in rows:
            row[column].set_xticks(factors, [str(f) for f in factors])
            row[column].minorticks_off()
    rows[0][0].set_ylabel("seconds")
    rows[1][0].set_ylabel("peak host memory, MiB")
    rows[0][0].legend()
    rows[1][0].legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_arguments(parser)
    parser.set_defaults(layers=8, hidden=1024, intermediate=2816, heads=16, kv_heads=16)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES)
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--host-memory", help="limit for all runs, such as 1GiB")
    parser.add_argument("--place", type=Path, help="folder for models and outputs (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--figure", type=Path, help="draw them here, .svg or .png")
    options = parser.parse_args()
    points = [(axis, factor) for axis in options.axes for factor in options.factors]
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {at: [] for at in points}
    with tempfile.TemporaryDirectory(dir=options.place) as folder:
        for _ in range(options.runs):
            for axis, factor in points:
                runs[axis, factor].append(prune(Path(folder), options, axis, factor))
    curves = {axis: {factor: point(runs[axis, factor]) for factor in options.factors} for axis in options.axes}
    print("axis     times   collect s  rewrite s   host MiB  predicted  device MiB  hidden states")
    for axis, factor in points:
        p = curves[axis][factor]
        memory = f"{p['peak_host_mib']:10.0f} {p['predicted_host_mib']:10.0f} {p['peak_device_mib']:11.0f}"
        print(f"{axis:8s} {factor:5d}  {p['collect']:10.2f} {p['rewrite']:10.2f} {memory}  {p['hidden_place']}")
    if options.json:
        options.json.write_text(json.dumps(curves))
    if options.figure:
        draw(curves, options.figure)


if __name__ == "__main__":
    main()
