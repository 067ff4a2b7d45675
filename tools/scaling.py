"""Predicted times of large models on 1 to 64 GPUs, and the prediction held against real ranks on this machine.

    python tools/scaling.py                      # the table
    python tools/scaling.py --measure [--rounds 3]

What a GPU machine does is assumed (`MACHINE`), not measured. `--measure` times `prune` of a random model on 1, 2 and 4
processes with one thread each, and predicts 2 and 4 from what one process took.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_checkpoint import make
from transformers import LlamaConfig

from flap_stream import PruneConfig, checkpoint, forecast
from flap_stream.layers import StreamedModel
from flap_stream.scaling import Rates, Work, scale
from flap_stream.skeleton import Skeleton

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
    """Print a table in Markdown: minutes of both passes, and what pass 1 waits for."""
    for samples, length in ((1024, 128), (1024, 2048)):
        options = PruneConfig(samples=samples, sequence_length=length, device="cpu", ratio=0.2)
        print(f"\n{samples} windows of {length} tokens, minutes of pass 1 + pass 2, and what pass 1 waits for:\n")
        print(f"| model | {' | '.join(map(str, GPUS))} |\n|---|{'---|' * len(GPUS)}")
        for name, config in MODELS.items():
            work = work_of(config, options, batch_tokens=2048)
            cells = []
            for gpus in GPUS:
                found = scale(work, MACHINE, gpus, max(1, gpus // GPUS_PER_NODE))
                minutes = [seconds / 60 for seconds in found.seconds.values()]
                cells.append(f"{minutes[0]:.1f} + {minutes[1]:.1f} {found.bound[0]}")
            print(f"| {name} | {' | '.join(cells)} |")


def measure(rounds: int) -> None:
    """Print seconds of pass 1 and pass 2 on 1, 2 and 4 processes, and what was predicted from one."""
    counts, taken = (1, 2, 4), {}
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16}
        make(place / "model", LlamaConfig(num_hidden_layers=6, vocab_size=4096, **sizes), torch.bfloat16)
        np.save(place / "tokens.npy", np.random.default_rng(0).integers(0, 4096, size=(64, 128)))
        command = ["prune", str(place / "model"), "--calibration", str(place / "tokens.npy"), "--samples", "64"]
        command += ["--batch-size", "8", "--max-shard-size", "50MB", "--json", "--quiet"]
        for number in range(rounds):
            for count in counts:
                out = place / f"out-{number}-{count}"
                launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count)] if count > 1 else []
                run = [sys.executable, *launcher, "-m", "flap_stream", *command, str(out)]
                os.sync()
                said = subprocess.run(
                    run, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True, text=True
                )
                taken.setdefault(count, []).append(json.loads(said.stdout)["seconds"])
                print(f"round {number}, {count} processes: {taken[count][-1]}", file=sys.stderr, flush=True)
                time.sleep(1)
        options = PruneConfig(samples=64, batch_size=8, device="cpu", max_shard_bytes=50_000_000)
        with checkpoint.open_checkpoint(place / "model") as source:
            work = forecast.work_of(StreamedModel(source, options), options, 8)
    best = {n: {stage: min(s[stage] for s in found) for stage in found[0]} for n, found in taken.items()}
    product = work.operations / best[1]["collect"]
    rates = Rates(product=product, node_product=product * (os.cpu_count() or 1), disk_read=2e9, disk_write=1e9)
    print(f"| processes | pass 1, best of {rounds} | median | predicted | pass 2, best |\n|---|---|---|---|---|")
    for count in counts:
        predicted = scale(replace(work), rates, count).seconds["collect"]
        median = statistics.median(s["collect"] for s in taken[count])
        cells = f"{best[count]['collect']:.1f} | {median:.1f} | {predicted:.1f} | {best[count]['rewrite']:.2f}"
        print(f"| {count} | {cells} |")


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
