"""Predicted times of large models on 1 to 64 GPUs, and predictions compared with real ranks on this machine.

    python tools/scaling.py                      # the table
    python tools/scaling.py --measure [--rounds 3]

What a GPU machine does is assumed (`MACHINE`), not measured. `--measure` times collection on a random model with 1, 2
and 4 processes of one thread each, and predicts 2 and 4 from what one process took.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_checkpoint import make
from transformers import LlamaConfig

from flap_stream import PruneConfig
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.model import checkpoint
from flap_stream.model.opening import open_checkpoint
from flap_stream.model.skeleton import Skeleton
from flap_stream.stages import forecast
from flap_stream.stages.scaling import Rates, Work, scale

# Eight GPUs of the H100 kind at 40 % of their peak, NVMe or its like, 200 Gbit/s; the last two were seen here.
MACHINE = Rates(
    product=400e12,
    disk_read=6e9,
    disk_write=3e9,
    shared_read=20e9,
    shared_write=10e9,
    link=40e9,
    network=25e9,
    merge=0.3e9,
    layer_seconds=0.1,
)
GPUS_PER_NODE = 8
GPUS = (1, 2, 4, 8, 16, 32, 64)
_COMMON = {"rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "tie_word_embeddings": False, "dtype": "bfloat16"}
MODELS: dict[str, dict[str, Any]] = {
    "65B": {
        **{"model_type": "llama", "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80},
        **{"num_attention_heads": 64, "num_key_value_heads": 64, "vocab_size": 32000},
    },
    "405B": {
        **{"model_type": "llama", "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126},
        **{"num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256},
    },
    "1T": {
        **{"model_type": "llama", "hidden_size": 24576, "intermediate_size": 81920, "num_hidden_layers": 136},
        **{"num_attention_heads": 192, "num_key_value_heads": 8, "vocab_size": 128256},
    },
}


def work_of(config: dict[str, Any], options: PruneConfig, batch_tokens: int) -> Work:
    """What pruning a model of these sizes means, of which there are no weights."""
    whole = {**_COMMON, **config}
    source = checkpoint.describe("model", Path("."), whole, Skeleton(whole, "model").tensors(), whole["dtype"])
    with source:
        windows = max(1, batch_tokens // options.sequence_length)
        return forecast.work_of(StreamedModel(source, options), options, windows)


def predictions() -> None:
    """Print a table in Markdown: minutes of collection and rewriting, and the bottleneck of collection."""
    for samples, length in ((1024, 128), (1024, 2048)):
        options = PruneConfig(samples=samples, sequence_length=length, device="cpu", ratio=0.2)
        print(f"\n{samples} windows of {length} tokens, minutes to collect + rewrite, and what limits collection:\n")
        print(f"| model | {' | '.join(map(str, GPUS))} |\n|---|{'---|' * len(GPUS)}")
        for name, config in MODELS.items():
            work = work_of(config, options, batch_tokens=2048)
            cells = []
            for gpus in GPUS:
                found = scale(work, MACHINE, gpus, max(1, gpus // GPUS_PER_NODE))
                minutes = [seconds / 60 for seconds in found.seconds.values()]
                cells.append(f"{minutes[0]:.1f} + {minutes[1]:.1f}, {found.bound}")
            print(f"| {name} | {' | '.join(cells)} |")


def measure(rounds: int) -> None:
    """Print seconds of collection on 1, 2 and 4 processes, and what was predicted for 2 and 4 from one process alone.

    One process takes all windows and an eighth of them: the difference is what windows take, the rest what layers do.
    """
    windows, batch, few = 128, 8, 16
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        config = LlamaConfig(
            num_hidden_layers=6, vocab_size=4096, hidden_size=1024, intermediate_size=2816, num_attention_heads=16,
            num_key_value_heads=16,
        )  # fmt: skip
        make(place / "model", config, torch.bfloat16)
        np.save(place / "tokens.npy", np.random.default_rng(0).integers(0, 4096, size=(windows, 128)))
        cases = [(1, few), (1, windows), (2, windows), (4, windows)]
        taken: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
        for number in range(rounds):
            for case in cases:
                taken[case].append(_seconds(place, number, *case, batch))
                print(f"round {number}, {case[0]} processes, {case[1]} windows: {taken[case][-1]:.2f}", file=sys.stderr)
        options = PruneConfig(samples=windows, batch_size=batch, device="cpu")
        with open_checkpoint(place / "model") as source:
            work = forecast.work_of(StreamedModel(source, options), options, batch)
    found = {case: statistics.median(seconds) for case, seconds in taken.items()}
    for_windows = (found[1, windows] - found[1, few]) * windows / (windows - few)
    rate, cores = work.operations / for_windows, os.cpu_count() or 1
    besides = (found[1, windows] - for_windows) / work.layers
    rates = Rates(rate, disk_read=2e9, disk_write=1e9, node_product=rate * cores, layer_seconds=besides)
    print(f"{rate / 1e9:.0f} GFLOP/s a process, {besides:.3f} s of overhead a layer; {cores} cores")
    print(f"| processes | collection, median of {rounds} | predicted |\n|---|---|---|")
    for count in (1, 2, 4):
        predicted = scale(work, rates, count).seconds["collect"]
        print(f"| {count} | {found[count, windows]:.1f} | {predicted:.1f} |")


def _seconds(place: Path, number: int, processes: int, windows: int, batch: int) -> float:
    """Seconds of collection in one job, each process with one thread."""
    out = place / f"out-{number}-{processes}-{windows}"
    command = ["prune", str(place / "model"), str(out), "--calibration", str(place / "tokens.npy"), "--json", "--quiet"]
    command += ["--samples", str(windows), "--batch-size", str(batch)]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    os.sync()
    said = subprocess.run(
        [sys.executable, *launcher, "-m", "flap_stream", *command],
        env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(said.stdout)["seconds"]["collect"]


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.measure:
        measure(options.rounds)
    else:
        predictions()


if __name__ == "__main__":
    main()
