"""Everything to ask a machine with a GPU, in one run of under ten minutes; `summary.json` in OUT has the answers.

    python tools/gpu_check.py OUT [--seconds 540]
    python tools/gpu_check.py OUT --device cpu --tiny     # tries the script itself

The gpu tests; a random model of 65B geometry, pruned under `--device-memory 24GiB` next to the machine's rates of
matrix products, copies and uncached reads; statistics compared with the CPU's; a kill and a resume;
every refit; the backward pass; where the time goes and which lines wait for the device. A stage for which too little
time is left is skipped, and what fails in one is written down.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import IO, Any

import numpy as np
import torch
from gpu_profile import Collection, profile, waits
from random_checkpoint import make
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import flap_stream
from flap_stream.arithmetic.layer_shape import Sublayer
from flap_stream.config import REFITS, CollectConfig, EvaluateConfig, PlanConfig, PruneConfig
from flap_stream.engine.device import begin, card, choose_device, peak_bytes, release, synchronize
from flap_stream.storage.run_directory import RunDirectory

ROOT = Path(__file__).parents[1]
DEMO = Path(flap_stream.__file__).parent / "demo"
CALIBRATION, EVALUATION = str(DEMO / "calibration.txt"), str(DEMO / "evaluation.txt")


@dataclass(frozen=True)
class Geometry:
    """Sizes of the model, the most layers of it, and the calibration."""

    hidden: int
    intermediate: int
    heads: int
    vocabulary: int
    layers: int
    windows: int
    length: int

    @property
    def layer_bytes(self) -> int:
        """Bytes of a layer in bf16."""
        return 2 * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden)

    def config(self, layers: int) -> LlamaConfig:
        """The config with so many layers."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            head_dim=self.hidden // self.heads,
            vocab_size=self.vocabulary,
        )


LLAMA_65B = Geometry(8192, 22016, 64, 32000, 6, 1024, 128)
WHOLE_LAYERS = 80  # of LLaMA-65B
TINY = Geometry(64, 176, 4, 500, 3, 8, 16)


@dataclass
class Check:
    """The stages that have run, and what they found.

    only: names of the stages to run; None runs all. restorations: those that refit. samples: of the bundled text.
    start: how commands are started.
    """

    out: Path
    device: str
    geometry: Geometry
    seconds: float
    only: tuple[str, ...] | None = None
    restorations: tuple[str, ...] = REFITS
    samples: int = 128
    start: Callable[..., Any] = subprocess.Popen
    started: float = field(default_factory=time.monotonic)
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        """Where models and runs are."""
        return self.out / "work"

    def stage(self, name: str, needed: float, action: Callable[[], Any]) -> None:
        """Run a stage if at least so many seconds are left."""
        if self.only is not None and name not in self.only:
            return
        left = self.seconds - (time.monotonic() - self.started)
        if left < needed:
            self.found[name] = f"skipped: {left:.0f} s left, {needed:.0f} needed"
            return
        print(f"[{time.monotonic() - self.started:6.1f}] {name}", flush=True)
        began = time.monotonic()
        try:
            self.found[name] = action()
        except Exception as error:  # the next stages still have answers
            self.found[name] = {"failed": repr(error)[:2000]}
        self.found.setdefault("stage_seconds", {})[name] = round(time.monotonic() - began, 1)
        (self.out / "summary.json").write_text(json.dumps(self.found, indent=1, default=str))

    def command(self, *arguments: object, kill_when: Callable[[], bool] | None = None) -> dict[str, Any]:
        """Run a flap-stream command: its JSON, its exit code, and the end of what it said if it failed."""
        words = [sys.executable, "-m", "flap_stream", *map(str, arguments), "--json"]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        began, said = time.monotonic(), list[str]()
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

        def listen(lines: IO[str]) -> None:
            with open(self.out / "log.txt", "a") as log:
                for line in lines:
                    said.append(line)
                    log.write(f"{time.monotonic() - began:7.2f} {line}")

        with self.start(words, **pipes, errors="replace", env=environment) as process:
            assert process.stdout is not None and process.stderr is not None
            listener = threading.Thread(target=listen, args=(process.stderr,))
            listener.start()
            while kill_when is not None and process.poll() is None:
                if kill_when():
                    process.send_signal(signal.SIGKILL)
                time.sleep(0.01)
            text = process.stdout.read()
            listener.join()
        body = json.loads(text.strip().splitlines()[-1]) if text.strip() else {}
        body.pop("layers", None)
        body["wall"] = time.monotonic() - began
        return {"code": process.returncode, **body, **({"stderr": "".join(said)[-1500:]} if process.returncode else {})}

    def prune(self, model: str, out: str, *more: object, **how: Any) -> dict[str, Any]:
        """Prune a random model; with its peaks over the predictions."""
        memory = ["--device-memory", "24GiB"] if self.device != "cpu" else []
        arguments = ["--ratio", 0.2, "--calibration", self.work / "tokens.npy", "--device", self.device, *memory]
        body = self.command("prune", self.work / model, self.work / out, *arguments, *more, **how)
        for kind in ("device", "host"):
            peak, predicted = body.get(f"peak_{kind}_bytes"), (body.get("placement") or {}).get(f"{kind}_bytes")
            if peak and predicted:
                body[f"{kind}_peak_over_prediction"] = peak / predicted
        return body


def gpu_tests() -> dict[str, Any]:
    """The tests that need a CUDA device."""
    file, workers = ROOT / "tests" / "test_gpu.py", min(8, os.cpu_count() or 1)
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "timeout"]
    words += ["-p", "xdist", "-n", str(workers), str(file)]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # others that are installed may warn
    ended = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    return {"code": ended.returncode, "end": ended.stdout[-8000:] if ended.returncode else ended.stdout[-300:]}


def model(check: Check) -> dict[str, Any]:
    """Write a random model of as many layers as the disk has room for twice, one of two, and the tokens."""
    sizes, free = check.geometry, shutil.disk_usage(check.out).free
    layers = max(2, min(sizes.layers, int((free - (2 << 30)) / (2 * sizes.layer_bytes))))
    make(check.work / "model", sizes.config(layers), torch.bfloat16, device=check.device)
    make(check.work / "small", sizes.config(2), torch.bfloat16, device=check.device)
    tokens = np.random.default_rng(0).integers(3, sizes.vocabulary, (sizes.windows, sizes.length))
    np.save(check.work / "tokens.npy", tokens)
    return {"layers": layers, "layer_bytes": sizes.layer_bytes}


def rate(device: torch.device, action: Callable[[], object], times: int = 5) -> float:
    """Repetitions per second."""
    action()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        action()
    synchronize(device)
    return times / (time.perf_counter() - began)


def forward_rate(config: LlamaConfig, tokens: int, length: int, device: torch.device) -> float:
    """Tokens per second of transformers' own decoder layer, with random weights, so many tokens at once."""
    config._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(config, 0).to(device, torch.bfloat16).eval()
    hidden = torch.randn(tokens // length, length, config.hidden_size, dtype=torch.bfloat16, device=device)
    positions = torch.arange(length, device=device)[None]
    rotary = LlamaRotaryEmbedding(config).to(device)(hidden, positions)
    return tokens * rate(device, lambda: layer(hidden, attention_mask=None, position_embeddings=rotary))


def floors(check: Check) -> dict[str, float]:
    """What products, a layer and copies reach: the width of the MLP as it is, odd, and a multiple of 8."""
    device, sizes, found = choose_device(check.device), check.geometry, {}
    begin(device)
    try:
        with torch.inference_mode():
            for width in (sizes.intermediate, sizes.intermediate - 9, sizes.intermediate - 8):
                for count in (sizes.windows * 16, 512, 8, 1):
                    inputs = torch.randn(count, sizes.hidden, dtype=torch.bfloat16, device=device)
                    weight = torch.randn(width, sizes.hidden, dtype=torch.bfloat16, device=device)
                    times = rate(device, lambda a=inputs, b=weight: torch.nn.functional.linear(a, b))  # type: ignore[misc]
                    found[f"product_tflops_{width}_tokens_{count}"] = 2 * count * width * sizes.hidden * times / 1e12
            tokens = sizes.windows * 16
            speed = forward_rate(sizes.config(1), tokens, sizes.length, device)
            found["forward_layer_seconds"] = sizes.windows * sizes.length / speed
            double = torch.randn(1024, 1024, dtype=torch.float64, device=device)
            found["float64_tflops"] = 2 * 1024**3 * rate(device, lambda: double @ double) / 1e12
            for name, is_locked in (("locked", device.type != "cpu"), ("pageable", False)):
                host = torch.ones(1 << 26, dtype=torch.uint8, pin_memory=is_locked)
                there = torch.empty_like(host, device=device)
                times = rate(device, lambda a=host, b=there: b.copy_(a, non_blocking=True))  # type: ignore[misc]
                found[f"copy_gbps_{name}"] = host.nbytes * times / 1e9
        found["peak_reserved"], found["peak_allocated"] = peak_bytes(device)
    finally:
        release(device)
    return found


def disk(check: Check) -> dict[str, float]:
    """Bytes per second of shards, read past the page cache, four at once; and through it, once they are out of it."""
    shards = sorted((check.work / "model").glob("*.safetensors"))[:4]

    def read(path: Path) -> int:
        words = ["dd", f"if={path}", "of=/dev/null", "bs=4M", "iflag=direct"]
        return subprocess.run(words, stderr=subprocess.DEVNULL).returncode

    drop_from_page_cache(check.work / "model")
    began = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(read, shards))
    direct = time.perf_counter() - began
    began = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda path: subprocess.run(["cat", path], stdout=subprocess.DEVNULL), shards))
    buffered, nbytes = time.perf_counter() - began, sum(p.stat().st_size for p in shards)
    return {
        "direct_gbps": nbytes / direct / 1e9,
        "buffered_gbps": nbytes / buffered / 1e9,
        "failed": sum(map(bool, codes)),
    }


def drop_from_page_cache(folder: Path) -> None:
    """Put a folder's files out of the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main_job(check: Check) -> dict[str, Any]:
    """Prune the whole model, from the disk; beside the floors."""
    drop_from_page_cache(check.work / "model")
    body = check.prune("model", "pruned", "--run", check.work / "run")
    shutil.rmtree(check.work / "pruned", ignore_errors=True)
    floor, layers = check.found.get("floors", {}), check.found.get("model", {}).get("layers", 0)
    if "seconds" in body and "forward_layer_seconds" in floor:
        with RunDirectory(check.work / "run") as run:
            seconds = [cost.seconds for cost in run.statistics.costs() if cost is not None]
        compute, rate = layers * floor["forward_layer_seconds"], check.found.get("disk", {}).get("direct_gbps")
        read = 0.0 if rate is None else layers * check.geometry.layer_bytes / 1e9 / rate  # unknown without that stage
        body["floor_seconds"] = {"compute": compute, "read": read}
        body["collect_over_floor"] = body["seconds"]["collect"] / max(compute, read)
        body["layer_seconds"] = median(seconds[1:])  # the first waits for the embedding and the first reads
        body["layer_over_floor"] = body["layer_seconds"] * layers / max(compute, read)
        start = body["seconds"]["collect"] - layers * body["layer_seconds"]
        whole = start + WHOLE_LAYERS * body["layer_seconds"]
        body["collect_over_floor_of_the_whole_model"] = whole * layers / WHOLE_LAYERS / max(compute, read)
    shutil.rmtree(check.work / "run", ignore_errors=True)
    return body


def small_jobs(check: Check) -> dict[str, Any]:
    """The jobs that hold more than a collection, on two layers of the width: peaks, predictions and seconds."""
    jobs: dict[str, tuple[object, ...]] = {
        "by_the_loss": ("--metric", "fisher", "--loss-windows", min(128, check.geometry.windows)),
        **{restore: ("--restore", restore) for restore in check.restorations},
    }
    found = {}
    for name, options in jobs.items():
        left = check.seconds - (time.monotonic() - check.started)
        found[name] = check.prune("small", name, *options) if left > 40 else f"skipped: {left:.0f} s left"
        for place in (check.work / name, check.work / f"{name}.run"):
            shutil.rmtree(place, ignore_errors=True)
    return found


def statistics(check: Check) -> dict[str, Any]:
    """How far the bundled model's statistics are from the CPU's, and how many units are decided otherwise."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        values, kept = list[list[np.ndarray]](), list[list[set[int]]]()
        for device in ("cpu", check.device):
            run = check.work / f"statistics-{dtype}-{len(values)}"
            how: dict[str, Any] = {"calibration": (CALIBRATION,), "samples": check.samples, "batch_size": 16}
            flap_stream.collect(DEMO / "model", run, CollectConfig(device=device, dtype=dtype, **how))
            plan = flap_stream.plan(run, PlanConfig(ratio=0.3))
            kept.append([set(layer.of(kind).tolist()) for layer in plan.layers for kind in Sublayer])
            with RunDirectory(run) as directory:
                layers = [directory.statistics.read(i) for i in range(len(plan.layers))]
            values.append([getattr(layer.mlp, name) for layer in layers for name in ("mean", "m2")])
        far = [float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in zip(*values, strict=True)]
        found[dtype] = {
            "relative_error": max(far),
            "decided_otherwise": sum(len(a ^ b) for a, b in zip(*kept, strict=True)),
            "kept": sum(map(len, kept[0])),
        }
    return found


def digests(folder: Path) -> dict[str, str]:
    """Sha256 of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def kill_and_resume(check: Check) -> dict[str, Any]:
    """Prune, and once more killed in the middle and resumed: the same bytes?"""
    options = ("--samples", max(4, check.geometry.windows // 8))
    journal = check.work / "killed.run" / "journal"

    def is_midway() -> bool:
        return journal.exists() and journal.read_bytes().count(b'"statistics"') >= 1

    codes = [check.prune("small", "whole", *options)["code"]]
    codes.append(check.prune("small", "killed", *options, kill_when=is_midway)["code"])
    codes.append(check.prune("small", "killed", *options)["code"])
    return {"codes": codes, "same_bytes": digests(check.work / "whole") == digests(check.work / "killed")}


def refits(check: Check) -> dict[str, Any]:
    """Refit the bundled model in every way, and evaluate it."""
    found: dict[str, Any] = {}
    for restore in check.restorations:
        out = check.work / f"refit-{restore}"
        how: dict[str, Any] = {"device": check.device, "samples": check.samples}
        wanted = PruneConfig(calibration=(CALIBRATION,), restore=restore, ratio=0.3, **how)
        pruned = flap_stream.prune(DEMO / "model", out, wanted)
        options = EvaluateConfig(text=(EVALUATION,), device=check.device, samples=check.samples)
        evaluation = flap_stream.evaluate(out, options)
        found[restore] = {"seconds": pruned.measured.seconds, "perplexity": evaluation.perplexity}
    return found


def run(check: Check) -> dict[str, Any]:
    """All stages; returns what they found."""
    check.work.mkdir(parents=True)
    device = choose_device(check.device)
    check.device = str(device)  # what `auto` means here
    check.found |= {"device": str(device), "card": card(device), "torch": torch.__version__}
    check.found |= {"geometry": asdict(check.geometry), "cpus": os.cpu_count()}
    if device.type != "cpu":
        check.stage("gpu_tests", 60, gpu_tests)
    check.stage("model", 60, lambda: model(check))
    check.stage("floors", 30, lambda: floors(check))
    check.stage("disk", 20, lambda: disk(check))
    check.stage("main", 60, lambda: main_job(check))
    check.stage("statistics", 40, lambda: statistics(check))
    collection = Collection(check.work / "small", check.work / "tokens.npy", check.work, check.device)
    check.stage("profile", 40, lambda: profile(collection, check.out / "profile.txt"))
    if device.type != "cpu":
        check.stage("waits", 30, lambda: waits(collection))
    check.stage("small_jobs", 60, lambda: small_jobs(check))
    check.stage("kill_and_resume", 60, lambda: kill_and_resume(check))
    check.stage("refits", 60, lambda: refits(check))
    shutil.rmtree(check.work, ignore_errors=True)
    return check.found


def main() -> None:
    """Run all stages and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new directory for the answers")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="a model of a few kilobytes")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="model, floors, disk, main, ...")
    options = parser.parse_args()
    sizes, only = TINY if options.tiny else LLAMA_65B, tuple(options.only) if options.only else None
    found = run(Check(options.out, options.device, sizes, options.seconds, only))
    print(json.dumps(found, indent=1, default=str))


if __name__ == "__main__":
    main()
