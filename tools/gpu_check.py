"""Everything to ask a machine with a GPU, in one run of under ten minutes; `summary.json` in OUT has the answers.

    python tools/gpu_check.py OUT [--seconds 540]
    python tools/gpu_check.py OUT --device cpu --tiny     # tries the script itself

The gpu tests; a random model of 65B geometry, pruned under `--device-memory 24GiB` beside what products, copies and the
disk of the machine reach; statistics held against the CPU's; a kill and a resume; every refit. A stage for which too
little time is left is skipped, and what fails in one is written down.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_checkpoint import make
from transformers import LlamaConfig

import flap_stream
from flap_stream.arithmetic.layer_shape import Sublayer
from flap_stream.config import REFIT_TARGETS, CollectConfig, EvaluateConfig, PlanConfig, PruneConfig
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
TINY = Geometry(64, 176, 4, 500, 3, 8, 16)


@dataclass
class Check:
    """The stages that have run, and what they found.

    only: names of the stages to run; None runs all. targets: of refits. samples: windows for the bundled model.
    """

    out: Path
    device: str
    geometry: Geometry
    seconds: float
    only: tuple[str, ...] | None = None
    targets: tuple[str, ...] = REFIT_TARGETS
    samples: int = 32
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
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        with open(self.out / "log.txt", "a+") as log:
            process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
            while kill_when is not None and process.poll() is None:
                if kill_when():
                    process.send_signal(signal.SIGKILL)
                time.sleep(0.01)
            text = process.communicate()[0]
            log.seek(0)
            said = log.read()[-1500:]
        body = json.loads(text.strip().splitlines()[-1]) if text.strip() else {}
        body.pop("layers", None)
        return {"code": process.returncode, **body, **({"stderr": said} if process.returncode else {})}

    def prune(self, out: str, *more: object, **how: Any) -> dict[str, Any]:
        """Prune the random model."""
        memory = ["--device-memory", "24GiB"] if self.device != "cpu" else []
        arguments = ["--ratio", 0.2, "--calibration", self.work / "tokens.npy", "--device", self.device, *memory]
        return self.command("prune", self.work / "model", self.work / out, *arguments, *more, **how)


def gpu_tests() -> dict[str, Any]:
    """The tests that need a CUDA device."""
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests" / "test_gpu.py")]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240)
    return {"code": ended.returncode, "end": ended.stdout[-1500:]}


def model(check: Check) -> dict[str, Any]:
    """Write the random model, as many layers as the disk has room for twice, and the tokens."""
    sizes, free = check.geometry, shutil.disk_usage(check.out).free
    layers = max(2, min(sizes.layers, int((free - (2 << 30)) / (2 * sizes.layer_bytes))))
    make(check.work / "model", sizes.config(layers), torch.bfloat16)
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


def floors(check: Check) -> dict[str, float]:
    """What products and copies reach: the width of the MLP as it is, odd, and a multiple of 8."""
    device, sizes, found = choose_device(check.device), check.geometry, {}
    begin(device)
    try:
        with torch.inference_mode():
            for width in (sizes.intermediate, sizes.intermediate - 9, sizes.intermediate - 8):
                inputs = torch.ones(sizes.windows * 16, sizes.hidden, dtype=torch.bfloat16, device=device)
                weight = torch.ones(width, sizes.hidden, dtype=torch.bfloat16, device=device)
                operations = 2 * len(inputs) * width * sizes.hidden
                times = rate(device, lambda a=inputs, b=weight: torch.nn.functional.linear(a, b))  # type: ignore[misc]
                found[f"product_tflops_{width}"] = operations * times / 1e12
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
    """Bytes per second of shards, read past the page cache, four at once."""
    shards = sorted((check.work / "model").glob("*.safetensors"))[:4]

    def read(path: Path) -> int:
        words = ["dd", f"if={path}", "of=/dev/null", "bs=4M", "iflag=direct"]
        return subprocess.run(words, stderr=subprocess.DEVNULL).returncode

    began = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(read, shards))
    return {
        "direct_gbps": sum(p.stat().st_size for p in shards) / (time.perf_counter() - began) / 1e9,
        "failed": sum(map(bool, codes)),
    }


def main_job(check: Check) -> dict[str, Any]:
    """Prune the whole model; with predictions beside peaks."""
    body = check.prune("pruned", "--run", check.work / "run")
    for kind in ("device", "host"):
        peak, said = body.get(f"peak_{kind}_bytes"), (body.get("placement") or {}).get(f"{kind}_bytes")
        if peak and said:
            body[f"{kind}_peak_over_prediction"] = peak / said
    shutil.rmtree(check.work / "pruned", ignore_errors=True)
    return body


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

    codes = [check.prune("whole", *options)["code"]]
    codes.append(check.prune("killed", *options, kill_when=is_midway)["code"])
    codes.append(check.prune("killed", *options)["code"])
    return {"codes": codes, "same_bytes": digests(check.work / "whole") == digests(check.work / "killed")}


def refits(check: Check) -> dict[str, Any]:
    """Refit the bundled model to every target, and evaluate it."""
    found: dict[str, Any] = {}
    for target in check.targets:
        out = check.work / f"refit-{target}"
        how: dict[str, Any] = {"device": check.device, "samples": check.samples}
        wanted = PruneConfig(calibration=(CALIBRATION,), restore="least-squares", refit_target=target, ratio=0.3, **how)
        pruned = flap_stream.prune(DEMO / "model", out, wanted)
        options = EvaluateConfig(text=(EVALUATION,), device=check.device, samples=check.samples)
        evaluation = flap_stream.evaluate(out, options)
        found[target] = {"seconds": pruned.measured.seconds, "perplexity": evaluation.perplexity}
    return found


def run(check: Check) -> dict[str, Any]:
    """All stages; returns what they found."""
    check.work.mkdir(parents=True)
    device = choose_device(check.device)
    check.found |= {"device": str(device), "card": card(device), "torch": torch.__version__}
    check.found |= {"geometry": asdict(check.geometry), "cpus": os.cpu_count()}
    if device.type != "cpu":
        check.stage("gpu_tests", 60, gpu_tests)
    check.stage("model", 60, lambda: model(check))
    check.stage("floors", 30, lambda: floors(check))
    check.stage("disk", 20, lambda: disk(check))
    check.stage("main", 60, lambda: main_job(check))
    check.stage("statistics", 40, lambda: statistics(check))
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
