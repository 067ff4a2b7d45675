"""Every kind of rotary embedding of transformers, in windows within and beyond what the model was trained with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import load, random_tokens, save, save_tokens, tiny_config, tiny_model
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import flap_stream
from flap_stream.config import EvaluateConfig, PruneConfig

pytestmark = pytest.mark.slow

POSITIONS, WITHIN, BEYOND = 16, 8, 40
_LONG = {
    "factor": 4.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.5] * 8,
    "original_max_position_embeddings": POSITIONS,
}
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": POSITIONS},
    "longrope": _LONG,
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": POSITIONS,
    },
    "proportional": {"partial_rotary_factor": 1.0},
}


def config_of(kind: str, family: str = "llama") -> Any:
    rope = {"rope_type": kind, "rope_theta": 10_000.0, **KINDS[kind]}
    if family == "gemma3_text":
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
    # head_dim is said, since transformers' own `dynamic` of a Mixtral without one fails beyond its positions.
    return tiny_config(family, rope_parameters=rope, max_position_embeddings=POSITIONS, head_dim=16)


def test_every_kind_is_tested() -> None:
    assert set(KINDS) == {"default", *ROPE_INIT_FUNCTIONS}


CASES = [("llama", kind, BEYOND) for kind in KINDS]
CASES += [("llama", "dynamic", WITHIN), ("llama", "longrope", WITHIN), ("phi3", "longrope", BEYOND)]
CASES += [("gemma3_text", "dynamic", BEYOND), ("mixtral", "dynamic", BEYOND)]


@pytest.mark.parametrize(("family", "kind", "length"), CASES)
def test_a_model_is_evaluated_and_pruned_whatever_its_rotary_embedding(
    family: str, kind: str, length: int, tmp_path: Path
) -> None:
    model = tiny_model(config_of(kind, family), seed=3)
    path, tokens = save(model, tmp_path / "model"), random_tokens(6, length)
    text = (save_tokens(tmp_path / "tokens.npy", tokens),)
    options = PruneConfig(calibration=text, samples=6, sequence_length=length, batch_size=4, ratio=0.3, device="cpu")
    flap_stream.prune(path, tmp_path / "out", options)
    ids = torch.from_numpy(tokens)
    for checkpoint in (path, tmp_path / "out"):
        with torch.no_grad():
            in_memory = load(checkpoint)(ids, labels=ids).loss.exp().item()
        streamed = flap_stream.evaluate(checkpoint, EvaluateConfig(text=text, batch_size=4, device="cpu")).perplexity
        assert streamed == pytest.approx(in_memory, rel=1e-5)
