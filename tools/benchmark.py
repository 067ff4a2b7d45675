"""flap-stream compared with other ways to do the same, on the same model and tokens, in turn.

- plain: the released procedure (whole model in memory, one window at a time, buffers for 2048 windows), with saving;
- offload: the same forward driven by accelerate's disk offload, at batch 1 and at the batch that suits it;
- flap-stream: `flap-stream prune`, the real command; flap-stream-refit: the same with `--restore least-squares`;
  flap-stream-loss: the same with `--metric fisher`, swept by the loss over a quarter of the windows;
- forward: the floor of collection, decoder layers in memory, forward alone, at the best batch size;
- copy: the floor of rewriting, `cp` with fsync of the bytes that it reads and writes.

Every part runs in a separate process, the parts in turn, several rounds; medians are printed, and ratios within a
round. The model is made of random weights, layer by layer, unless one is given.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_checkpoint import add_shape_arguments, config_of, make
from torch import nn

from flap_stream.engine.device import synchronize
from flap_stream.progress import peak_device_bytes, peak_host_bytes

BUFFER_WINDOWS = 2048  # lib/prune.py:120 of the released code
FORWARD_BATCHES = {"cpu": (1, 8, 16, 32), "cuda": (16, 32, 64, 128)}
OFFLOAD_BATCHES = (1, 16)
OURS = {
    "flap-stream": [],
    "flap-stream-refit": ["--restore", "least-squares"],
    "flap-stream-loss": ["--metric", "fisher"],
}
Parts = dict[str, dict[str, Any]]  # what each part of one round took
PARTS = ("plain", "offload-1", "offload-16", "flap-stream-refit", "flap-stream-loss", "flap-stream", "forward", "copy")


@contextmanager
def timed(seconds: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Add the seconds that a block takes."""
    synchronize(device)
    started = time.monotonic()
    yield
    synchronize(device)
    seconds[name] = seconds.get(name, 0.0) + time.monotonic() - started


def load_model(path: Path, device: torch.device) -> Any:
    """The whole dense model in memory, in its own dtype."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    return model.to(device).eval()


class ReleasedStatistics:
    """BiasGPT of lib/layerwrapper.py, batch 1, for the default metric."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.windows = 0
        self.baseline = torch.zeros(channels, device=device)
        self.fluctuation = torch.zeros(channels, device=device)

    def add(self, inputs: torch.Tensor) -> None:
        """One window, `[1, token, channel]`."""
        flat, n = inputs.reshape(-1, inputs.shape[-1]).t(), self.windows
        self.baseline *= n / (n + 1)
        self.baseline += torch.mean(flat, dim=1) / (n + 1)
        if n:
            self.fluctuation *= (n - 1) / n
            centred = flat - self.baseline.unsqueeze(1)
            self.fluctuation += torch.sum(centred * centred, dim=1) / (n + 1)
        self.windows += 1


def capture_first_inputs(model: Any, tokens: torch.Tensor, buffer: torch.Tensor) -> dict[str, Any]:
    """Fill `buffer` with what enters the first layer, and give back what the layers are called with."""
    captured: dict[str, Any] = {}

    class Stop(Exception):
        pass

    def hook(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        captured["hidden"], captured["keywords"] = arguments[0], keywords
        raise Stop

    handle = model.model.layers[0].register_forward_pre_hook(hook, with_kwargs=True)
    for i, window in enumerate(tokens):
        try:
            model(window[None].to(buffer.device), use_cache=False)
        except Stop:
            buffer[i] = captured["hidden"]
    handle.remove()
    return captured["keywords"]


def measure_plain(model_path: Path, tokens: torch.Tensor, device: torch.device, place: Path) -> dict[str, float]:
    """The released procedure from loading to saving; seconds a stage."""
    seconds: dict[str, float] = {}
    with timed(seconds, "load", device):
        model = load_model(model_path, device)
    config, layers = model.config, model.model.layers
    with timed(seconds, "collect", device):
        shape = (BUFFER_WINDOWS, tokens.shape[1], config.hidden_size)
        inputs = torch.zeros(shape, dtype=model.dtype, device=device)
        keywords = capture_first_inputs(model, tokens, inputs)
        outputs = torch.zeros_like(inputs)
        metrics, baselines = [], []
        for layer in layers:
            modules = {"attention": layer.self_attn.o_proj, "mlp": layer.mlp.down_proj}
            found = {name: ReleasedStatistics(module.in_features, device) for name, module in modules.items()}
            handles = [
                module.register_forward_hook(lambda _m, x, _y, own=found[name]: own.add(x[0].data))
                for name, module in modules.items()
            ]
            for j in range(len(tokens)):
                outputs[j] = layer(inputs[j].unsqueeze(0), **keywords)[0]
            for handle in handles:
                handle.remove()
            norms = {name: torch.sum(module.weight.data.pow(2), dim=0) for name, module in modules.items()}
            metrics.append({name: found[name].fluctuation * norms[name] for name in modules})
            baselines.append({name: found[name].baseline for name in modules})
            inputs, outputs = outputs, inputs
    with timed(seconds, "decide", device):
        masks = released_masks(metrics, config.head_dim)
    with timed(seconds, "rewrite", device):
        for layer, keep, baseline in zip(layers, masks, baselines, strict=True):
            compress(layer, keep, baseline)
        model.save_pretrained(place / "plain")
    shutil.rmtree(place / "plain")
    return seconds


def released_masks(metrics: list[dict[str, torch.Tensor]], head_dim: int) -> list[dict[str, torch.Tensor]]:
    """Channels that stay at ratio 0.2, al-am (lib/prune.py:366-393)."""

    def standardise(rows: torch.Tensor) -> torch.Tensor:
        return (rows - rows.mean(dim=1, keepdim=True)) / rows.std(dim=1, keepdim=True)

    attention = standardise(torch.stack([m["attention"].float() for m in metrics]) ** 2)
    attention = attention.reshape(len(metrics), -1, head_dim).mean(dim=2)
    mlp = standardise(torch.stack([m["mlp"].float() for m in metrics]))
    ordered, indices = torch.sort(torch.cat([attention.view(-1), mlp.view(-1)]), descending=True)
    cost = torch.where(indices < attention.numel(), 4 * head_dim // 3, 1)
    threshold = ordered[torch.argmin((torch.cumsum(cost, 0) - cost.sum() * 0.8).abs())]
    return [
        {"attention": (a > threshold).repeat_interleave(head_dim), "mlp": m > threshold}
        for a, m in zip(attention, mlp, strict=True)
    ]


def compress(layer: Any, keep: dict[str, torch.Tensor], baseline: dict[str, torch.Tensor]) -> None:
    """Cut one layer in memory and set its biases (lib/prune.py:142-222)."""
    attention, mlp = layer.self_attn, layer.mlp
    for kind, rows, output in (
        ("attention", (attention.q_proj, attention.k_proj, attention.v_proj), attention.o_proj),
        ("mlp", (mlp.gate_proj, mlp.up_proj), mlp.down_proj),
    ):
        kept = torch.where(keep[kind])[0]
        weight = output.weight.data
        bias = (baseline[kind].to(weight.dtype) * ~keep[kind]) @ weight.T
        for linear in rows:
            linear.weight.data = linear.weight.data[kept]
        output.weight.data = weight[:, kept].contiguous()
        output.bias = nn.Parameter(bias, requires_grad=False)


def run_layers(model: Any, tokens: torch.Tensor, batch: int, device: torch.device) -> None:
    """Forward of all decoder layers over all windows, nothing kept."""
    for chunk in tokens.split(batch):
        model.model(chunk.to(device), use_cache=False)


def measure_forward(model_path: Path, tokens: torch.Tensor, device: torch.device, place: Path) -> dict[str, float]:
    """Seconds of the in-memory forward for several batch sizes, and the best of them."""
    model = load_model(model_path, device)
    run_layers(model, tokens[:1], 1, device)
    seconds: dict[str, float] = {}
    for batch in FORWARD_BATCHES[device.type]:
        with timed(seconds, f"batch {batch}", device):
            run_layers(model, tokens, batch, device)
    return {**seconds, "best": min(seconds.values())}


def measure_offload(batch: int) -> Callable[[Path, torch.Tensor, torch.device, Path], dict[str, float]]:
    """The forward through accelerate's disk offload at one batch size."""

    def measure(model_path: Path, tokens: torch.Tensor, device: torch.device, place: Path) -> dict[str, float]:
        from accelerate import disk_offload

        model = load_model(model_path, torch.device("cpu"))
        disk_offload(model, place / "offload", execution_device=device, offload_buffers=False)
        seconds: dict[str, float] = {}
        with timed(seconds, "forward", device):
            run_layers(model, tokens, batch, device)
        shutil.rmtree(place / "offload")
        return seconds

    return measure


def measure_copy(model_path: Path, out: Path, place: Path) -> dict[str, float]:
    """`cp` with fsync of as many bytes as rewriting writes, and a read of the others that it reads."""
    target = place / "copy"
    target.mkdir()
    shards = sorted(out.glob("*.safetensors"))
    extra = sum(f.stat().st_size for f in model_path.glob("*.safetensors")) - sum(f.stat().st_size for f in shards)
    started = time.monotonic()
    subprocess.run(["cp", *map(str, shards), str(target)], check=True)
    for file in target.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    for file in sorted(model_path.glob("*.safetensors")):
        count = min(extra, file.stat().st_size)
        subprocess.run(["head", "-c", str(count), str(file)], check=True, stdout=subprocess.DEVNULL)
        extra -= count
    seconds = time.monotonic() - started
    shutil.rmtree(target)
    return {"copy": seconds}


MEASURES: dict[str, Callable[[Path, torch.Tensor, torch.device, Path], dict[str, float]]] = {
    "plain": measure_plain,
    "forward": measure_forward,
    **{f"offload-{batch}": measure_offload(batch) for batch in OFFLOAD_BATCHES},
}


def run_part(part: str, options: argparse.Namespace, model: Path, tokens: Path, place: Path) -> dict[str, Any]:
    """One part in a separate process: its seconds by stage and its peak memory in MiB."""
    out = place / "out"
    if part == "copy":
        return {"seconds": measure_copy(model, out, place)}
    if part in OURS:
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "flap_stream", "prune", str(model), str(out), "--json", "--quiet", *OURS[part]]
        command += ["--calibration", str(tokens), "--samples", str(options.windows), "--device", options.device]
        if part == "flap-stream-loss":
            command += ["--loss-windows", str(options.windows // 4)]
    else:
        command = [sys.executable, __file__, "--part", part, "--model", str(model), "--tokens", str(tokens)]
        command += ["--place", str(place), "--device", options.device]
    body = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    peaks = {name: body[f"peak_{name}_bytes"] / 2**20 for name in ("host", "device")}
    result = {"seconds": body["seconds"], **{f"peak_{name}_mib": value for name, value in peaks.items()}}
    if part in OURS:
        result["predicted_host_mib"] = body["placement"]["host_bytes"] / 2**20
    return result


def part_main(options: argparse.Namespace) -> None:
    """Inside the process of one part."""
    device = torch.device(options.device)
    tokens = torch.from_numpy(np.load(options.tokens))
    with torch.no_grad():
        seconds = MEASURES[options.part](options.model, tokens, device, options.place)
    peaks = {"peak_host_bytes": peak_host_bytes(), "peak_device_bytes": peak_device_bytes(device)}
    print(json.dumps({"seconds": seconds, **peaks}))


def summary(rounds: list[Parts]) -> dict[str, Any]:
    """Medians over the rounds, and medians of the ratios within each round."""

    def median(value: Callable[[Parts], float]) -> float:
        return statistics.median(value(parts) for parts in rounds)

    def peak(part: str, key: str) -> float:
        return median(lambda parts: parts[part].get(key, 0.0))

    measured = rounds[0].keys()
    rows = {
        part: {
            "seconds": median(partial(_total, part=part)),
            **{key: peak(part, key) for key in ("peak_host_mib", "peak_device_mib")},
        }
        for part in measured
    }
    ratios = {name: median(ratio) for name, (needed, ratio) in RATIOS.items() if needed <= measured}
    return {"parts": rows, "ratios": ratios}


def _total(parts: Parts, part: str) -> float:
    """Seconds of all stages of a part, or of its best batch size."""
    seconds = parts[part]["seconds"]
    return seconds.get("best", sum(seconds.values()))


def _collection(parts: Parts) -> float:
    return parts["flap-stream"]["seconds"]["collect"]


def _per_collection(parts: Parts, part: str) -> float:
    return _total(parts, part) / _collection(parts)


def _after_collection(parts: Parts) -> float:
    """Seconds of refitting and rewriting relative to the collection before them."""
    collection = parts["flap-stream-refit"]["seconds"]["collect"]
    return (_total(parts, "flap-stream-refit") - collection) / collection


def _predicted(parts: Parts, part: str) -> float:
    return parts[part]["predicted_host_mib"] / parts[part]["peak_host_mib"]


# By name: the parts that must have been measured, and the ratio in one round.
RATIOS: dict[str, tuple[set[str], Callable[[Parts], float]]] = {
    "prune / plain, seconds": ({"flap-stream", "plain"}, lambda p: _total(p, "flap-stream") / _total(p, "plain")),
    "prune / plain, peak host": (
        {"flap-stream", "plain"},
        lambda p: p["flap-stream"]["peak_host_mib"] / p["plain"]["peak_host_mib"],
    ),
    "peak host, predicted / measured": ({"flap-stream"}, partial(_predicted, part="flap-stream")),
    "collect / forward": ({"flap-stream", "forward"}, lambda p: _collection(p) / _total(p, "forward")),
    "refit and rewrite / collect": ({"flap-stream-refit"}, _after_collection),
    "peak host with refit, predicted / measured": (
        {"flap-stream-refit"},
        partial(_predicted, part="flap-stream-refit"),
    ),
    "collect with the backward pass / collect": (
        {"flap-stream", "flap-stream-loss"},
        lambda p: p["flap-stream-loss"]["seconds"]["collect"] / _collection(p),
    ),
    "peak host with the backward pass, predicted / measured": (
        {"flap-stream-loss"},
        partial(_predicted, part="flap-stream-loss"),
    ),
    "rewrite / copy": (
        {"flap-stream", "copy"},
        lambda p: p["flap-stream"]["seconds"]["rewrite"] / _total(p, "copy"),
    ),
    **{
        f"offload at batch {batch} / collect": (
            {"flap-stream", f"offload-{batch}"},
            partial(_per_collection, part=f"offload-{batch}"),
        )
        for batch in OFFLOAD_BATCHES
    },
}


def main() -> None:
    """Run all parts in rounds, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_arguments(parser)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="copy needs flap-stream before it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", type=Path, help="measure this model instead of a random one")
    parser.add_argument("--place", type=Path, help="folder for the model and outputs (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--part", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part_main(options)
        return
    with tempfile.TemporaryDirectory(dir=options.place) as folder:
        place = Path(folder)
        model = options.model or place / "model"
        if options.model is None:
            make(model, config_of(options, options.layers), getattr(torch, options.dtype))
        words = json.loads((model / "config.json").read_text())["vocab_size"]
        tokens = np.random.default_rng(0).integers(3, words, (options.windows, options.length))
        np.save(place / "tokens.npy", tokens)
        rounds = []
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            rounds.append({part: run_part(part, options, model, place / "tokens.npy", place) for part in options.parts})
    result = {"machine": f"{os.cpu_count()} cores, {platform.machine()}, {options.device}", **summary(rounds)}
    result["rounds"] = rounds
    print(f"{'part':18s} {'seconds':>9s} {'host MiB':>9s} {'device MiB':>10s}")
    for part, row in result["parts"].items():
        print(f"{part:18s} {row['seconds']:9.1f} {row['peak_host_mib']:9.0f} {row['peak_device_mib']:10.0f}")
    for name, ratio in result["ratios"].items():
        print(f"{name:44s} {ratio:6.3f}")
    if options.json:
        options.json.write_text(json.dumps({"options": {k: str(v) for k, v in vars(options).items()}, **result}))


if __name__ == "__main__":
    main()
