"""What a job takes is known before it runs, and a job that cannot fit is refused."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import random_tokens, save, save_tokens, tiny_config, tiny_model
from warm_commands import run_warm

import flap_stream
from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.cli import main
from flap_stream.config import EngineConfig, PruneConfig
from flap_stream.engine import memory
from flap_stream.engine.placement import Job
from flap_stream.engine.placement.choice import place
from flap_stream.engine.placement.prediction import predict
from flap_stream.engine.placement.workspace import Way, layer_workspace
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import InsufficientMemory, InvalidOption
from flap_stream.model.opening import open_checkpoint
from flap_stream.restore.requirements import refit_sizes
from flap_stream.stages.forecast import forecast

LLAMA_65B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float16",
}
MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(tiny_config(layers=4)), tmp_path_factory.mktemp("prediction") / "model")


@pytest.fixture
def job(model: Path) -> Job:
    with open_checkpoint(model) as checkpoint:
        return StreamedModel(checkpoint, EngineConfig(device="cpu")).job(4096, 128)


def test_room_for_all_gives_batches_that_suit_the_device(job: Job) -> None:
    placement = place(job, memory.Limits(1 << 40, 0))
    assert (placement.batch_size, placement.hidden_place, placement.prefetch) == (8, "host", 1)


def test_less_room_moves_hidden_states_to_disk_first(job: Job) -> None:
    roomy = place(job, memory.Limits(1 << 40, 0))
    tight = place(job, memory.Limits(roomy.host_bytes - job.hidden_bytes // 2, 0))
    assert (tight.batch_size, tight.hidden_place, tight.prefetch) == (8, "disk", 1)
    assert tight.host_bytes < roomy.host_bytes


def test_every_step_down_takes_less_memory(job: Job) -> None:
    for size, ahead in ((8, 1), (4, 1), (1, 0)):
        host, disk = (predict(job, size, place, ahead).host_bytes for place in ("host", "disk"))
        assert disk < host
    large, small = (predict(job, size, "host", 1).host_bytes for size in (64, 8))
    assert large - small > 50 * job.batch_bytes(8), "a batch has its workspace, ten times its hidden states"


def test_a_cuda_job_keeps_hidden_states_on_the_device_while_they_fit(job: Job) -> None:
    on_gpu = replace(job, device="cuda")
    roomy = place(on_gpu, memory.Limits(1 << 40, 1 << 40))
    assert roomy.hidden_place == "device" and roomy.device_bytes > on_gpu.hidden_bytes
    tight = place(on_gpu, memory.Limits(1 << 40, roomy.device_bytes - on_gpu.hidden_bytes))
    assert tight.hidden_place == "host" and tight.device_bytes < roomy.device_bytes


def test_wishes_are_kept_or_refused(job: Job) -> None:
    placement = place(job, memory.Limits(1 << 40, 0), batch_size=3, prefetch=0)
    assert (placement.batch_size, placement.prefetch) == (3, 0)
    limit = predict(job, 8, "disk", 1).host_bytes + 20 * MIB
    with pytest.raises(InsufficientMemory, match=r"--host-memory \d+MiB, if there is that much, or --batch-size 8$"):
        place(job, memory.Limits(limit, 0), batch_size=1024, prefetch=1)


def test_a_plan_narrows_what_a_refit_is_said_to_take(model: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        streamed = StreamedModel(checkpoint, EngineConfig(device="cpu"))
        whole, half = (
            [LayerKeep(np.arange(s.kv_groups // part), np.arange(s.neurons // part)) for s in streamed.shapes]
            for part in (1, 2)
        )
        unplanned, kept, planned = (
            streamed.job(64, 128, refit=refit_sizes(streamed, "least-squares", 64 * 128, keeps))
            for keeps in (None, whole, half)
        )
    assert kept.refit == unplanned.refit
    assert all(less < most for less, most in zip(planned.refit_bytes(8), unplanned.refit_bytes(8), strict=True))
    assert planned.batch_bytes(8) < unplanned.batch_bytes(8)


def test_long_windows_that_do_not_fit_are_told_to_be_shorter(model: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        job = StreamedModel(checkpoint, EngineConfig(device="cpu")).job(4, 1 << 17)
    with pytest.raises(InsufficientMemory, match=r"--sequence-length \d+"):
        place(job, memory.Limits(memory.resident_bytes() + 100 * MIB, 0))


def prune(model: Path, out: Path, *extra: str, is_warm: bool) -> subprocess.CompletedProcess[str]:
    """A job alone in its process, which imports everything first or, warm, has done so, as most of a small job is."""
    command = [sys.executable, "-m", "flap_stream", "prune", str(model), str(out), "--quiet", *extra]
    return run_warm(command) if is_warm else subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        (),
        ("--restore", "least-squares"),
        ("--restore", "reconstruct"),
        ("--metric", "fisher", "--loss-windows", "32"),
        ("--method", "shortgpt", "--ratio", "0.5"),
    ],
    ids=["bias", "refit", "reconstruct", "loss", "shortgpt"],
)
def test_the_limit_that_a_refusal_names_works_and_is_kept(tmp_path: Path, how: tuple[str, ...]) -> None:
    model = save(tiny_model(tiny_config(layers=2)), tmp_path / "model")
    fits = "reconstruct" in how  # which takes more than a collection with its hidden states on the host, and longer
    windows = 64 if fits else 128
    tokens = save_tokens(tmp_path / "tokens.npy", np.repeat(random_tokens(8, 512), windows // 8, axis=0))
    text = ("--calibration", tokens, "--samples", str(windows), "--sequence-length", "512", "--json", *how)
    refused = prune(model, tmp_path / "out", *text, "--host-memory", "50MiB", is_warm=bool(how))
    assert refused.returncode == 2 and refused.stdout == ""
    assert not (tmp_path / "out.run").exists()
    named = re.search(r"--host-memory (\d+)MiB", refused.stderr)
    assert named is not None
    limit = int(named[1]) * MIB
    fitting = prune(model, tmp_path / "out", *text, "--host-memory", f"{limit}B", is_warm=bool(how))
    assert fitting.returncode == 0, fitting.stderr
    body = json.loads(fitting.stdout)
    assert body["peak_host_bytes"] <= body["placement"]["host_bytes"] <= limit
    assert body["placement"]["hidden_place"] == ("host" if fits else "disk")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device_memory": 1 << 30}, "--device-memory is the limit of a GPU"),
        ({"prefetch": 2}, "--prefetch is 2"),
    ],
)
def test_limits_that_mean_nothing_are_refused(model: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidOption, match=words):
        forecast(model, tmp_path / "out", PruneConfig(device="cpu", **options))


@pytest.mark.slow
def test_a_dry_run_on_a_bare_config_predicts_llama_65b(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_65B))
    for model in (tmp_path, tmp_path / "config.json"):
        arguments = ["prune", str(model), str(tmp_path / "out"), "--dry-run", "--device", "cpu", "--json"]
        assert main([*arguments, "--host-memory", "8GiB"]) == 0
        body = json.loads(capsys.readouterr().out)
        assert body["parameters"] == 65_285_660_672 and body["layers"] == 80 and not body["has_headers"]
        layer = 4 * 8192**2 + 3 * 8192 * 22016
        tokens = 1024 * 128
        assert body["operations"] == 80 * tokens * (2 * layer + 4 * 128 * 8192)
        assert 0.75 * 2 * 65.3e9 < body["bytes_written"] < 0.85 * 2 * 65.3e9
        host = body["placement"]["host_bytes"]
        assert 2 * 2 * layer + tokens * 8192 * 2 < host < 8 << 30
        assert all(seconds > 0 for seconds in body["floor_seconds"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert main(["prune", str(tmp_path), str(tmp_path / "out"), "--dry-run", "--device", "cpu"]) == 0
    assert "65,285,660,672 parameters in 80 layers, from config.json only" in capsys.readouterr().out


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"restore": "least-squares"},
        {"restore": "reconstruct"},
        {"metric": "fisher", "loss_windows": 6},
    ],
)
def test_a_dry_run_says_what_the_run_then_takes(model: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    tokens = save_tokens(tmp_path / "tokens.npy", random_tokens(8, 16))
    options = PruneConfig(calibration=(tokens,), samples=8, sequence_length=16, ratio=0.3, device="cpu", **how)
    found = forecast(model, tmp_path / "out", options)
    assert not (tmp_path / "out").exists() and found.has_headers
    result = flap_stream.prune(model, tmp_path / "out", options)
    placement = result.measured.placement
    assert placement is not None
    assert (placement.batch_size, placement.hidden_place) == (found.placement.batch_size, found.placement.hidden_place)
    assert result.record["parameters"]["before"] == found.parameters
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    inputs = 5 * options.loss_windows * 16 * 64 * 4  # of four layers, and the last one's output
    assert found.bytes_written == pytest.approx(written + inputs, rel=0.05)
    # Rows of so narrow an embedding are read with all that lies between them.
    assert found.bytes_read == pytest.approx(result.measured.bytes_read + inputs, rel=0.15)


def test_a_dry_run_needs_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", str(tmp_path), str(tmp_path / "out"), "--dry-run"]) == 2
    assert f"{tmp_path}/config.json does not exist" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("restore", ["bias", "least-squares"])
def test_what_a_mixture_takes_is_predicted(restore: str, tmp_path: Path) -> None:
    config = tiny_config(
        "mixtral", layers=2, hidden_size=128, num_local_experts=64, num_experts_per_tok=8, intermediate_size=64
    )
    path = save(tiny_model(config), tmp_path / "model", dtype=torch.bfloat16)  # of which oneDNN compiles the products
    tokens = save_tokens(tmp_path / "tokens.npy", random_tokens(64, 64))
    text = ("--calibration", tokens, "--samples", "64", "--sequence-length", "64", "--json", "--restore", restore)
    result = prune(path, tmp_path / "out", *text, is_warm=restore != "bias")
    assert result.returncode == 0, result.stderr
    body = json.loads(result.stdout)
    assert body["peak_host_bytes"] <= body["placement"]["host_bytes"]


@pytest.mark.parametrize("way", ["forward", "backward", "fit"])
def test_weights_do_not_count_as_workspace(way: Way) -> None:
    """They are counted elsewhere. One token through weights of 2 MiB; a fit has gradients as large."""
    config = tiny_config(layers=1, hidden_size=256, intermediate_size=512)
    weights = (3 * 256 * 512 + 3 * 256 * 256) * 2
    peak, _ = layer_workspace({**config.to_dict(), "dtype": "bfloat16"}, (1, 1), torch.bfloat16, "cpu", way)
    assert peak < (1.1 * weights if way == "fit" else weights / 20)
