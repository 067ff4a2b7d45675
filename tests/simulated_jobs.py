"""Jobs on a simulated device, and what they measure, for the tests of the path through an accelerator."""

from pathlib import Path

import numpy as np
import pytest
import torch
from models import random_tokens, save, tiny_config, tiny_model

from flap_stream.config import EngineConfig
from flap_stream.engine import weight_stream
from flap_stream.engine.layer_pass import LayerPass
from flap_stream.engine.memory import page_locked
from flap_stream.engine.placement import Placement, landing_bytes
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.model.opening import open_checkpoint
from flap_stream.progress import Stage
from flap_stream.stages.layer_statistics import input_moments

TOKENS = random_tokens(9, 16)
BATCH = 4
LAYERS = 3
RING_BLOCK_BYTES = 1 << 15  # a layer's weights take several, so that the ring is reused within it
Statistics = list[dict[str, np.ndarray]]  # by layer, then by projection


def made_model(place: Path) -> Path:
    """A model of `LAYERS` layers."""
    return save(tiny_model(tiny_config(layers=LAYERS)), place / "model")


def use_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reuse of buffers and groups of channels, which a tiny model would otherwise be too small for."""
    monkeypatch.setattr(weight_stream, "RING_BLOCK_BYTES", RING_BLOCK_BYTES)
    monkeypatch.setattr("flap_stream.stages.layer_statistics._MERGED_CHANNELS", 16)  # several groups, and threads


def measured(model: Path, device: str, place: str = "host", prefetch: int = 1, batch: int = BATCH) -> Statistics:
    """What collection measures, without storing it."""
    found = []
    with open_checkpoint(model) as checkpoint, torch.inference_mode():
        streamed = StreamedModel(checkpoint, EngineConfig(device=device))
        with (
            streamed.hidden_states(place, *TOKENS.shape) as hidden,
            page_locked(streamed.device, landing_bytes(streamed.shapes, batch)) as landing,
        ):
            batches = LayerPass(streamed, Placement(batch, place, prefetch, 0, 0), TOKENS, [hidden])
            for i, weights in batches.layers(Stage("collect", LAYERS)):
                with input_moments(streamed, i, weights, landing) as merger:
                    for _ in batches.run(i, weights):
                        merger.take_batch()
                found.append({name: np.stack([m.mean, m.m2]) for name, m in merger.finish().items()})
    return found


def differ(found: Statistics, expected: Statistics) -> bool:
    pairs = [(f[name], e[name]) for f, e in zip(found, expected, strict=True) for name in e]
    return not all(np.allclose(f, e, rtol=1e-4, atol=1e-6) for f, e in pairs)
