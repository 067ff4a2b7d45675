"""The standard error of a perplexity, from what transformers gives for each window."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import load, random_tokens, save, save_tokens, tiny_config, tiny_model
from test_cli import run
from torch.nn import functional


@pytest.mark.parametrize("windows", [1, 7])
def test_the_standard_error_is_that_of_transformers_losses(
    windows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokens = save(tiny_model(tiny_config()), tmp_path / "model"), random_tokens(windows, 16)
    text = save_tokens(tmp_path / "tokens.npy", tokens)
    with torch.no_grad():
        logits = load(model)(torch.from_numpy(tokens)).logits[:, :-1].double()
    targets = torch.from_numpy(tokens)[:, 1:]
    losses = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(dim=1).numpy()
    body = json.loads(run(capsys, "evaluate", model, "--text", text, "--json", "--quiet")[1])
    assert body["window_nll"] == pytest.approx(losses, rel=1e-5)
    printed = run(capsys, "evaluate", model, "--text", text, "--quiet")[1]
    if windows == 1:
        assert body["standard_error"] is None
        assert printed == f"perplexity {body['perplexity']:.4f} over 1 windows of 16 tokens\n"
    else:
        error = np.exp(losses.mean()) * np.sqrt(((losses - losses.mean()) ** 2).sum() / 6 / 7)
        assert body["standard_error"] == pytest.approx(error, rel=1e-4)
        assert f"{body['perplexity']:.4f} ± {body['standard_error']:.4f} (standard error) over 7 windows" in printed
