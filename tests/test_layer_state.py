"""What layers hand on besides hidden states: laid side by side, and nothing of it lost."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import LAYER_INPUTS, VOCABULARY, random_tokens, save, save_tokens, tiny_config, tiny_model

import flap_stream
from flap_stream.config import CollectConfig, EngineConfig, PlanConfig
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import UnsupportedModel
from flap_stream.model.layer_state import LayerState
from flap_stream.model.opening import open_checkpoint
from flap_stream.storage.run_directory import RunDirectory

SMALL = {**LAYER_INPUTS, "vocab_size_per_layer_input": VOCABULARY}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3n": ("gemma3n_text", {}),
    "gemma4-small": ("gemma4_text", SMALL),
    "gemma4-inputs-alone": ("gemma4_text", {**SMALL, "num_kv_shared_layers": 0}),
}


def test_of_a_plain_model_it_is_the_hidden_states() -> None:
    state, hidden = LayerState.of(tiny_config("llama"), "the model"), torch.randn(2, 3, 64)
    assert state.is_plain and state.width == 64
    assert state.first(hidden, []) is state.after(0, hidden, hidden, {}) is hidden
    assert torch.equal(state.hidden(hidden), hidden) and state.arguments(1, hidden) == {}


def test_a_transformers_that_does_not_tell_which_layers_share_is_refused() -> None:
    config = tiny_config("llama")  # has no modes, as Gemma 3n's had none before 5.23
    config.num_kv_shared_layers = 1
    with pytest.raises(UnsupportedModel, match=r"layers of ./model read keys .* needs transformers 5\.23 or later; "):
        LayerState.of(config, "./model")


def test_everything_comes_back_from_it() -> None:
    state = LayerState.of(tiny_config("gemma3n_text"), "the model")
    streams, inputs = torch.randn(3, 2, 5, 64), [torch.randn(2, 5, 8) for _ in range(3)]
    assert state.width == 3 * 64 + 3 * 8 + 2 * 2 * 2 * 16  # of two types, keys and values of two heads
    first = state.first(streams, inputs)
    assert torch.equal(state.hidden(first), streams)
    for i, own in enumerate(inputs):
        assert torch.equal(state.arguments(i, first)["per_layer_input"], own)
    both = tuple(torch.randn(2, 2, 5, 16) for _ in range(2))  # [sample, head, token, size]
    after = state.after(1, first, streams + 1, {"shared_kv_states": {"full_attention": both}})
    assert torch.equal(state.hidden(after), streams + 1)
    found = state.arguments(2, after)
    assert torch.equal(found["per_layer_input"], inputs[2])
    assert all(map(torch.equal, found["shared_kv_states"]["full_attention"], both))
    assert not any(values.any() for values in found["shared_kv_states"]["sliding_attention"])


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_the_base_model_is_read(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    model = tiny_model(tiny_config(family, tied=True, **changes))
    save(model, tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "base")
    with open_checkpoint(tmp_path / "whole") as whole, open_checkpoint(tmp_path / "base") as base:
        assert base.tensors.keys() == whole.tensors.keys()


@pytest.mark.parametrize("case", CASES)
def test_layers_one_by_one_give_the_logits_of_the_whole_model(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    dense, tokens = tiny_model(tiny_config(family, **changes)), random_tokens(3, 20)
    with open_checkpoint(save(dense, tmp_path / "model")) as checkpoint, torch.inference_mode():
        model = StreamedModel(checkpoint, EngineConfig(device="cpu"))
        assert not model.skeleton.state.is_plain
        with model.hidden_states("host", 3, 20) as hidden:
            model.embed(tokens, 2, hidden)
            with model.stream() as layers:
                for i, weights in layers:
                    for start, values in hidden.stream(2):
                        hidden.put(start, model.run_batch(i, weights, values, {}))
            states = torch.cat([values.clone() for _, values in hidden.stream(2)]).flatten(0, 1)
        found = torch.cat([logits for _, logits in model.head()(states)])
        wanted = dense(input_ids=torch.from_numpy(tokens)).logits.flatten(0, 1)
    assert (found - wanted).abs().max() <= 1e-5


def test_layers_with_sparse_activations_keep_their_neurons_and_do_not_count(tmp_path: Path) -> None:
    path = save(tiny_model(tiny_config("gemma3n_text")), tmp_path / "model")
    calibration = (save_tokens(tmp_path / "tokens.npy", random_tokens(8, 24)),)
    flap_stream.collect(path, tmp_path / "run", CollectConfig(calibration=calibration, loss_windows=4))
    for options in (
        PlanConfig(ratio=0.5),
        PlanConfig(ratio=0.5, metric="fisher"),
        PlanConfig(ratio=0.5, round_neurons_to=1),
        PlanConfig(ratio=0.5, round_neurons_to=16),
        PlanConfig(ratio=0.5, structure="ul-um"),
        PlanConfig(ratio=0.5, structure="ul-um", round_neurons_to=1),
        PlanConfig(ratio=0.5, structure="al-mm", remove_heads=0, round_neurons_to=1),
        PlanConfig(ratio=0.5, structure="ul-mm", remove_heads=0, round_neurons_to=1),
    ):
        result = flap_stream.plan(tmp_path / "run", options)
        with RunDirectory(tmp_path / "run") as run:
            kept = [len(keep.neurons) for keep in run.plan.read()[1]]
            widths = [shape.neurons for shape in run.layer_shapes]
        assert kept[0] == widths[0]
        assert sum(kept[1:]) == pytest.approx(0.5 * sum(widths[1:]), abs=8)
        assert "MLP of layers 0 to 0, whose active neurons depend on one another" in result.left_whole


def test_a_word_beyond_the_layers_table_has_its_first_row(tmp_path: Path) -> None:
    dense = tiny_model(tiny_config("gemma3n_text"))
    assert dense.config.vocab_size_per_layer_input < VOCABULARY
    tokens = np.full((1, 6), VOCABULARY - 1, dtype=np.int64)
    with open_checkpoint(save(dense, tmp_path / "model")) as checkpoint, torch.inference_mode():
        model = StreamedModel(checkpoint, EngineConfig(device="cpu"))
        with model.hidden_states("host", 1, 6) as hidden:
            model.embed(tokens, 1, hidden)
            ((_, state),) = hidden.stream(1)
        ids = torch.from_numpy(tokens)
        inputs = dense.model.project_per_layer_inputs(
            dense.model.embed_tokens(ids), dense.model.get_per_layer_inputs(torch.zeros_like(ids))
        )
        found = model.skeleton.state.arguments(1, state)["per_layer_input"]
    assert torch.allclose(found, inputs[:, :, 1], atol=1e-6)
