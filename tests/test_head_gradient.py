"""Gradients through the final norm and the head, in chunks, are autograd's of all logits at once."""

from pathlib import Path

import pytest
import torch
from models import load, save, tiny_config, tiny_model
from torch.nn import functional

from flap_stream.config import EngineConfig
from flap_stream.engine import head_gradient
from flap_stream.engine.head_gradient import HeadGradient, fisher_slopes
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.model.opening import open_checkpoint

TOKENS = 11


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])  # the last two scale their logits
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_divergence_and_its_gradient_are_those_of_all_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, chunk: int
) -> None:
    config = tiny_config(family)
    path = save(tiny_model(config), tmp_path / "model")
    whole = load(path, trust=False).double()
    draw = torch.Generator().manual_seed(0)
    hidden, target = (torch.randn(TOKENS, config.hidden_size, generator=draw) for _ in range(2))
    monkeypatch.setattr(head_gradient, "chunk_tokens", lambda _vocabulary: chunk)

    def logits(values: torch.Tensor) -> torch.Tensor:
        found = whole.lm_head(whole.model.norm(values)) / getattr(config, "logits_scaling", 1)
        cap = getattr(config, "final_logit_softcapping", None)
        return (found / cap).tanh() * cap if cap else found

    leaf = hidden.double().requires_grad_()
    expected = functional.kl_div(
        logits(leaf).log_softmax(-1), logits(target.double()).log_softmax(-1), reduction="sum", log_target=True
    )
    (gradient,) = torch.autograd.grad(expected, leaf)
    with open_checkpoint(path) as checkpoint, torch.no_grad():
        head = HeadGradient(StreamedModel(checkpoint, EngineConfig(device="cpu")))
        assert float(head.divergence(hidden, target)) == pytest.approx(float(expected), rel=1e-5)
        assert torch.allclose(head.of_divergence(hidden, target).double(), gradient, rtol=1e-4, atol=1e-6)
        assert float(head.divergence(hidden, hidden)) == 0 and not head.of_divergence(hidden, hidden).any()


@pytest.mark.parametrize("words", [1, 6, 8, 11])
def test_the_covariance_of_the_draws_is_the_fisher_information(words: int) -> None:
    logits = torch.randn(words, generator=torch.Generator().manual_seed(words)).mul(3)
    numbers = torch.arange(1 << words)  # whose bits are all patterns of signs
    signs = torch.stack([numbers & 255, numbers >> 8], dim=1)[:, : -(-words // 8)].to(torch.uint8)
    draws = fisher_slopes(logits.expand(len(signs), -1), signs).double()
    p = logits.double().softmax(dim=-1)
    assert draws.mean(dim=0).abs().max() < 1e-6
    assert torch.allclose(draws.T @ draws / len(draws), p.diag() - torch.outer(p, p), atol=1e-6)
