"""The same code on CUDA: what the CPU decides, the GPU decides. Skipped where there is no CUDA device."""

from pathlib import Path

import pytest
import torch
from models import random_tokens, save, save_tokens, tiny_config, tiny_model

import flap_stream
from flap_stream.config import EvaluateConfig, PruneConfig

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_pruning_on_cuda_gives_a_checkpoint_like_the_cpus(dtype: str, tmp_path: Path) -> None:
    path = save(tiny_model(tiny_config()), tmp_path / "model", dtype=getattr(torch, dtype))
    text = save_tokens(tmp_path / "tokens.npy", random_tokens(9, 24))
    records, perplexities = [], []
    for device in ("cpu", "cuda"):
        options = PruneConfig(ratio=0.3, calibration=(text,), device=device, batch_size=4)
        records.append(flap_stream.prune(path, tmp_path / device, options).record)
        evaluation = flap_stream.evaluate(tmp_path / device, EvaluateConfig(text=(text,), device=device))
        perplexities.append(evaluation.perplexity)
    assert evaluation.peak_device_bytes > 0
    assert perplexities[1] == pytest.approx(perplexities[0], rel=1e-4 if dtype == "float32" else 0.05)
    if dtype == "float32":
        assert records[0]["layers"] == records[1]["layers"]
