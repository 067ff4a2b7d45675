"""How fast layers are read into host memory, beside fio with direct I/O and `cat`, on one random checkpoint.

    python tools/read_benchmark.py [--layers 8] [--hidden 4096] ... [--rounds 5]

Nothing is in the page cache. Each round runs all of them in turn; printed are medians, and medians of the ratios to fio
within a round. Needs `fio` on the path.
"""

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from gpu_check import drop_from_page_cache
from random_checkpoint import add_shape_arguments, config_of, make

from flap_stream.engine.weight_stream import stream_layers
from flap_stream.model.checked_tensors import CheckedTensors
from flap_stream.model.opening import open_checkpoint


def streamed(model: Path, dtype: torch.dtype) -> tuple[int, float]:
    """Bytes of all layers, and the seconds to stream them into the buffers that a CPU would use them from."""
    with open_checkpoint(model) as checkpoint:
        layers = CheckedTensors(checkpoint).layer_entries
        began = time.perf_counter()
        with stream_layers(checkpoint, layers, torch.device("cpu"), lambda _name: dtype, 1) as streamed_layers:
            for _ in streamed_layers:
                pass
        return checkpoint.bytes_read, time.perf_counter() - began


def fio(shards: list[Path]) -> tuple[int, float]:
    """Bytes and seconds of fio, which reads past the page cache, 32 blocks of 4 MiB at a time."""
    words = ["fio", "--name=read", f"--filename={':'.join(map(str, shards))}", "--rw=read", "--direct=1", "--bs=4m"]
    words += ["--iodepth=32", "--ioengine=libaio", "--readonly", "--output-format=json"]
    found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    read = found["jobs"][0]["read"]
    return read["io_bytes"], read["runtime"] / 1000


def cat(shards: list[Path]) -> tuple[int, float]:
    """Bytes and seconds of `cat`."""
    began = time.perf_counter()
    subprocess.run(["cat", *map(str, shards)], stdout=subprocess.DEVNULL, check=True)
    return sum(shard.stat().st_size for shard in shards), time.perf_counter() - began


def main() -> None:
    """Measure in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_arguments(parser)
    parser.set_defaults(layers=8, hidden=4096, intermediate=11008)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--place", type=Path, help="a directory on the disk to measure; default: the temporary one")
    options = parser.parse_args()
    if shutil.which("fio") is None:
        parser.error("fio is not installed")
    with tempfile.TemporaryDirectory(dir=options.place) as directory:
        model = Path(directory) / "model"
        make(model, config_of(options, options.layers), getattr(torch, options.dtype))
        os.sync()
        shards = sorted(model.glob("*.safetensors"))[: options.layers]
        ways: dict[str, Callable[[], tuple[int, float]]] = {
            "fio": lambda: fio(shards),
            "stream_layers": lambda: streamed(model, getattr(torch, options.dtype)),
            "cat": lambda: cat(shards),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                drop_from_page_cache(model)
                nbytes, seconds = way()
                rates[name].append(nbytes / seconds / 1e9)
        for name, found in rates.items():
            ratio = median(own / other for own, other in zip(found, rates["fio"], strict=True))
            print(f"{name:14s} {median(found):5.2f} GB/s, {ratio:.2f} times fio's")


if __name__ == "__main__":
    main()
