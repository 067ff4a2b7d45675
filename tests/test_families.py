"""One suite for every family: the pruned checkpoint computes what the masked dense model with biases computes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from masked import layer_inputs, masked_model
from models import DENSE, FAMILY_EXTRAS, load, random_tokens, save, save_tokens, tiny_config, tiny_model
from transformers import AutoModel

import flap_stream
from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.layer_shape import Sublayer
from flap_stream.config import CollectConfig, EvaluateConfig, PlanConfig, PruneConfig, RewriteConfig
from flap_stream.errors import UnsupportedModel
from flap_stream.model.architecture import FAMILIES, Family
from flap_stream.model.units import COLUMNS, ROWS, Projection, UnitKind
from flap_stream.storage.run_directory import RunDirectory

pytestmark = pytest.mark.slow

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip
FIRST = ("llama", "mistral", "qwen2", "qwen3")
CASES: dict[str, tuple[str, int, bool, dict[str, Any]]] = {
    f"{family}-kv{kv_heads}-{'tied' if tied else 'untied'}": (family, kv_heads, tied, {})
    for family in FIRST
    for kv_heads in (2, 4)
    for tied in (False, True)
}
CASES |= {family: (family, 2, family.startswith("gemma"), {}) for family in DENSE if family not in FIRST}
CASES |= {
    "llama3-rope": ("llama", 2, True, {"rope_parameters": LLAMA3_ROPE}),
    "phi3-multi-head": ("phi3", 4, False, {}),
    "llama-biases": ("llama", 2, False, {"attention_bias": True, "mlp_bias": True}),
    "mistral-sliding-window": ("mistral", 2, False, {"sliding_window": 7}),
    "qwen2-mixed-windows": (
        "qwen2",
        2,
        False,
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
}


def expected_model(model: Any, record: Any, tokens: Any) -> Any:
    """The masked dense model with biases from the whole array of its inputs."""
    groups = [layer["kept_kv_groups"] for layer in record["layers"]]
    neurons = [layer["kept_neurons"] for layer in record["layers"]]
    head_dim = model.model.layers[0].self_attn.head_dim
    repeats = model.config.num_attention_heads // model.config.num_key_value_heads
    biases = []
    for i, (layer, inputs) in enumerate(zip(model.model.layers, layer_inputs(model, tokens), strict=True)):
        pair = []
        for module, kind, kept, size in (
            (layer.self_attn.o_proj, "attention", groups[i], repeats * head_dim),
            (layer.mlp.down_proj, "mlp", neurons[i], 1),
        ):
            removed = torch.ones(module.weight.shape[1] // size, size, dtype=torch.bool)
            removed[kept] = False
            shift = module.weight.detach().double() @ (inputs[kind].mean(dim=0) * removed.flatten())
            pair.append((shift + (0 if module.bias is None else module.bias.detach().double())).float())
        biases.append(tuple(pair))
    return masked_model(model, groups, neurons, biases)


@pytest.fixture(scope="module", params=CASES)
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    family, kv_heads, tied, changes = CASES[request.param]
    place = tmp_path_factory.mktemp(family)
    model = tiny_model(tiny_config(family, kv_heads, tied, **changes), seed=3)
    tokens = random_tokens(8, 24)
    path = save(model, place / "model")
    options = PruneConfig(
        ratio=0.3,
        calibration=(save_tokens(place / "tokens.npy", tokens),),
        max_shard_bytes=60_000,
        batch_size=3,
        round_neurons_to=1,  # so that layers differ
    )
    record = flap_stream.prune(path, place / "out", options).record
    return place, expected_model(model, record, torch.from_numpy(tokens)), record


def test_layers_get_sizes_of_their_own(pruned: Any) -> None:
    _, _, record = pruned
    sizes = {(len(layer["kept_kv_groups"]), len(layer["kept_neurons"])) for layer in record["layers"]}
    assert len(sizes) > 1
    assert abs(record["realised_ratio"]["decoder"] - 0.3) < 0.02


def test_logits_equal_the_masked_dense_models(pruned: Any) -> None:
    place, expected, _ = pruned
    tokens = torch.from_numpy(random_tokens(3, 20, seed=5))
    with torch.no_grad():
        difference = load(place / "out")(tokens).logits - expected(tokens).logits
    assert difference.abs().max() <= 1e-5


def test_generation_with_a_cache_and_left_padding_is_equal(pruned: Any) -> None:
    place, expected, _ = pruned
    tokens = torch.from_numpy(random_tokens(2, 9, seed=6))
    mask = torch.ones_like(tokens)
    tokens[0, :4], mask[0, :4] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(load(place / "out").generate(tokens, **options), expected.generate(tokens, **options))
    with torch.no_grad():
        ours, theirs = (m(tokens, attention_mask=mask).logits for m in (load(place / "out"), expected))
    assert (ours - theirs)[mask.bool()].abs().max() <= 1e-5


def test_base_model_loads_alone(pruned: Any) -> None:
    place, expected, _ = pruned
    tokens = torch.from_numpy(random_tokens(2, 9, seed=7))
    with torch.no_grad():
        ours = load(place / "out", AutoModel)(tokens).last_hidden_state
        assert (ours - expected.model(tokens).last_hidden_state).abs().max() <= 1e-5


def test_saving_and_loading_again_changes_nothing(pruned: Any, tmp_path: Path) -> None:
    place, _, _ = pruned
    model = load(place / "out")
    model.save_pretrained(tmp_path / "again")
    tokens = torch.from_numpy(random_tokens(2, 9, seed=8))
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again")(tokens).logits, model(tokens).logits)


def test_device_map_auto_loads(pruned: Any) -> None:
    place, expected, _ = pruned
    tokens = torch.from_numpy(random_tokens(2, 9, seed=9))
    model = load(place / "out", device_map="auto")
    with torch.no_grad():
        assert (model(tokens.to(model.device)).logits.cpu() - expected(tokens).logits).abs().max() <= 1e-5


def test_streaming_perplexity_equals_the_in_memory_one(pruned: Any) -> None:
    place, expected, _ = pruned
    tokens = random_tokens(7, 20, seed=10)
    text = save_tokens(place / "evaluation.npy", tokens)
    for path, model in ((place / "model", load(place / "model")), (place / "out", expected)):
        with torch.no_grad():
            ids = torch.from_numpy(tokens)
            in_memory = model(ids, labels=ids).loss.exp().item()
        streamed = flap_stream.evaluate(str(path), EvaluateConfig(text=(text,), batch_size=2)).perplexity
        assert streamed == pytest.approx(in_memory, rel=1e-5)


def test_the_pruned_checkpoint_can_be_pruned_again(pruned: Any, tmp_path: Path) -> None:
    place, _, _ = pruned
    tokens = random_tokens(8, 24)
    options = PruneConfig(ratio=0.25, calibration=(str(place / "tokens.npy"),))
    record = flap_stream.prune(place / "out", tmp_path / "again", options).record
    first = load(place / "out")
    groups = [layer["kept_kv_groups"] for layer in record["layers"]]
    with torch.no_grad():
        for layer, inputs, kept in zip(
            first.model.layers, layer_inputs(first, torch.from_numpy(tokens)), record["layers"], strict=True
        ):
            head_dim, repeats = layer.self_attn.head_dim, layer.self_attn.num_key_value_groups
            for module, kind, units, size in (
                (layer.self_attn.o_proj, "attention", kept["kept_kv_groups"], repeats * head_dim),
                (layer.mlp.down_proj, "mlp", kept["kept_neurons"], 1),
            ):
                keep = torch.zeros(module.weight.shape[1] // size, size)
                keep[units] = 1
                mean = inputs[kind].mean(dim=0) * (1 - keep.flatten())
                module.bias += (module.weight.double() @ mean).float()
                module.weight *= keep.flatten()
        ids = torch.from_numpy(random_tokens(3, 20, seed=11))
        assert (load(tmp_path / "again")(ids).logits - first(ids).logits).abs().max() <= 1e-5
    assert all(groups)


def test_the_table_and_the_suite_have_the_same_families() -> None:
    assert set(FAMILIES) == set(FAMILY_EXTRAS)


def test_a_family_is_added_by_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_model(tiny_config("arcee"), seed=4)
    path, tokens = save(model, tmp_path / "model"), random_tokens(8, 24)
    options = PruneConfig(ratio=0.3, calibration=(save_tokens(tmp_path / "tokens.npy", tokens),))
    with pytest.raises(UnsupportedModel, match="'arcee'"):
        flap_stream.prune(path, tmp_path / "out", options)
    attention, _ = FAMILIES["llama"].kinds
    ungated = UnitKind(
        Sublayer.MLP, (Projection("mlp.up_proj", ROWS, ("neuron",)), Projection("mlp.down_proj", COLUMNS, ("neuron",)))
    )
    monkeypatch.setitem(FAMILIES, "arcee", Family("ArceeForCausalLM", kinds=(attention, ungated)))
    record = flap_stream.prune(path, tmp_path / "out", options).record
    expected = expected_model(model, record, torch.from_numpy(tokens))
    ids = torch.from_numpy(random_tokens(2, 9, seed=6))
    with torch.no_grad():
        assert (load(tmp_path / "out")(ids).logits - expected(ids).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("method", ["flap", "wanda-sp"])
def test_rounded_sizes_reach_the_checkpoint(method: str, tmp_path: Path) -> None:
    model, tokens = tiny_model(tiny_config("llama", 4), seed=5), random_tokens(8, 24)
    options = PruneConfig(
        ratio=0.4, method=method, round_neurons_to=16, tensor_parallel=2,
        calibration=(save_tokens(tmp_path / "tokens.npy", tokens),),
    )  # fmt: skip
    flap_stream.prune(save(model, tmp_path / "model"), tmp_path / "out", options)
    for layer in load(tmp_path / "out").model.layers:
        assert layer.mlp.up_proj.out_features % 16 == 0
        assert layer.self_attn.k_proj.out_features % (2 * layer.self_attn.head_dim) == 0


@pytest.mark.parametrize("restore", ["bias", "none"])
@pytest.mark.parametrize("family", DENSE)
def test_layers_without_heads_or_neurons_load_and_generate(family: str, restore: str, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(family), seed=2)
    tokens = random_tokens(8, 24)
    flap_stream.collect(
        save(model, tmp_path / "model"),
        tmp_path / "run",
        CollectConfig(calibration=(save_tokens(tmp_path / "tokens.npy", tokens),)),
    )
    flap_stream.plan(tmp_path / "run", PlanConfig(ratio=0.4))
    with RunDirectory(tmp_path / "run") as run:  # a decision that empties layers, made by hand
        plan_options, keeps = run.plan.read()
        nothing = np.zeros(0, dtype=np.int64)
        keeps = [LayerKeep(nothing, keeps[0].neurons), LayerKeep(keeps[1].kv_groups, nothing), keeps[2]]
        run.plan.write(plan_options, keeps)
    record = flap_stream.rewrite(tmp_path / "run", tmp_path / "out", RewriteConfig(restore=restore)).record
    expected = expected_model(model, record, torch.from_numpy(tokens))
    if restore == "none":
        groups = [layer["kept_kv_groups"] for layer in record["layers"]]
        neurons = [layer["kept_neurons"] for layer in record["layers"]]
        expected = masked_model(model, groups, neurons, [(None, None)] * 3)
    ours = load(tmp_path / "out")
    ids = torch.from_numpy(random_tokens(2, 9, seed=6))
    with torch.no_grad():
        assert (ours(ids).logits - expected(ids).logits).abs().max() <= 1e-5
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **settings), expected.generate(ids, **settings))
    held_out = random_tokens(5, 12, seed=7)
    ids = torch.from_numpy(held_out)
    with torch.no_grad():
        in_memory = expected(ids, labels=ids).loss.exp().item()
    text = (save_tokens(tmp_path / "evaluation.npy", held_out),)
    assert flap_stream.evaluate(tmp_path / "out", EvaluateConfig(text=text)).perplexity == pytest.approx(
        in_memory, rel=1e-5
    )
