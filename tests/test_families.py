"""One suite for every family: the pruned checkpoint computes what the masked dense model with biases computes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed_jobs import require_same_after_a_kill
from masked import decoder_of, masked_model
from models import FAMILY_EXTRAS, FORMS, GEMMA4_EXPERTS, load, random_tokens, save, save_tokens, tiny_config, tiny_model
from transformers import AutoModel

import flap_stream
from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.layer_shape import Sublayer
from flap_stream.cli import main
from flap_stream.config import CollectConfig, EvaluateConfig, PlanConfig, PruneConfig, RewriteConfig
from flap_stream.errors import InvalidOption, UnsupportedModel
from flap_stream.model.families import FAMILIES
from flap_stream.storage.run_directory import RunDirectory

pytestmark = pytest.mark.slow

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip
CASES: dict[str, tuple[str, int, bool, dict[str, Any]]] = {
    family: (family, 2, family.startswith("gemma"), {}) for family in FAMILIES
}
CASES |= {
    "llama-multi-head": ("llama", 4, False, {}),
    "llama-tied": ("llama", 2, True, {}),
    "qwen3-multi-head-tied": ("qwen3", 4, True, {}),
    "llama3-rope": ("llama", 2, True, {"rope_parameters": LLAMA3_ROPE}),
    "phi3-multi-head": ("phi3", 4, False, {}),
    "cohere-norms-per-head": ("cohere", 2, True, {"use_qk_norm": True}),
    "gemma4-small": (
        "gemma4_text",
        2,
        True,
        {
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 97,
            "num_kv_shared_layers": 1,
            "use_double_wide_mlp": True,
        },
    ),
    "gemma4-experts": ("gemma4_text", 2, True, GEMMA4_EXPERTS),
    "stablelm-parallel": ("stablelm", 2, False, {"use_parallel_residual": True, "qk_layernorm": True}),
    "llama-biases": ("llama", 2, False, {"attention_bias": True, "mlp_bias": True}),
    "mistral-sliding-window": ("mistral", 2, False, {"sliding_window": 7}),
    "qwen2-mixed-windows": (
        "qwen2",
        2,
        False,
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
}


@dataclass(frozen=True)
class Pruned:
    """A tiny `model`, pruned into `out`. ours: what was written; expected: what it must compute."""

    place: Path
    record: dict[str, Any]
    ours: Any
    expected: Any


def options_of(place: Path) -> PruneConfig:
    return PruneConfig(
        ratio=0.3,
        calibration=(str(place / "tokens.npy"),),
        max_shard_bytes=60_000,
        batch_size=3,
        round_neurons_to=1,  # so that layers differ
    )


@pytest.fixture(scope="module", params=CASES)
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    family, kv_heads, tied, changes = CASES[request.param]
    place = tmp_path_factory.mktemp(family)
    model = tiny_model(tiny_config(family, kv_heads, tied, **changes), seed=3)
    tokens = random_tokens(8, 24)
    path = save(model, place / "model")
    save_tokens(place / "tokens.npy", tokens)
    record = flap_stream.prune(path, place / "out", options_of(place)).record
    return Pruned(place, record, load(place / "out"), masked_model(path, record, torch.from_numpy(tokens)))


def test_layers_get_sizes_of_their_own(pruned: Pruned) -> None:
    sizes = {(len(layer["kept_kv_groups"]), len(layer["kept_neurons"])) for layer in pruned.record["layers"]}
    assert len(sizes) > 1
    assert abs(pruned.record["realised_ratio"]["decoder"] - 0.3) < 0.02


def test_a_config_has_layers_of_its_own_only_where_heads_are_removed(pruned: Pruned) -> None:
    """vLLM takes latent attention only from a config whose layers are alike."""
    ours, dense = pruned.ours.config, pruned.expected.config
    removes_heads = FAMILIES[ours.model_type].prunes(Sublayer.ATTENTION)
    assert ours.is_heterogeneous == (removes_heads or dense.is_heterogeneous)


def test_logits_equal_the_masked_dense_models(pruned: Pruned) -> None:
    tokens = torch.from_numpy(random_tokens(3, 20, seed=5))
    with torch.no_grad():
        assert (pruned.ours(tokens).logits - pruned.expected(tokens).logits).abs().max() <= 1e-5


def test_generation_with_a_cache_and_left_padding_is_equal(pruned: Pruned) -> None:
    tokens = torch.from_numpy(random_tokens(2, 9, seed=6))
    mask = torch.ones_like(tokens)
    tokens[0, :4], mask[0, :4] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(pruned.ours.generate(tokens, **options), pruned.expected.generate(tokens, **options))
    with torch.no_grad():
        ours, theirs = (m(tokens, attention_mask=mask).logits for m in (pruned.ours, pruned.expected))
    assert (ours - theirs)[mask.bool()].abs().max() <= 1e-5


def test_base_model_loads_alone(pruned: Pruned) -> None:
    tokens = torch.from_numpy(random_tokens(2, 9, seed=7))
    with torch.no_grad():
        ours = load(pruned.place / "out", AutoModel)(tokens).last_hidden_state
        assert (ours - decoder_of(pruned.expected)(tokens).last_hidden_state).abs().max() <= 1e-5


def test_saving_and_loading_again_changes_nothing(pruned: Pruned, tmp_path: Path) -> None:
    pruned.ours.save_pretrained(tmp_path / "again")
    tokens = torch.from_numpy(random_tokens(2, 9, seed=8))
    again = load(tmp_path / "again")
    for ours, theirs in zip(pruned.ours.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():  # products round by where in memory a mapped file puts the weights
        assert (again(tokens).logits - pruned.ours(tokens).logits).abs().max() <= 1e-5


def test_device_map_auto_loads(pruned: Pruned) -> None:
    tokens = torch.from_numpy(random_tokens(2, 9, seed=9))
    model = load(pruned.place / "out", device_map="auto")
    with torch.no_grad():
        assert (model(tokens.to(model.device)).logits.cpu() - pruned.expected(tokens).logits).abs().max() <= 1e-5


def test_streaming_perplexity_equals_the_in_memory_one(pruned: Pruned) -> None:
    tokens = random_tokens(7, 24, seed=10)
    text, ids = save_tokens(pruned.place / "evaluation.npy", tokens), torch.from_numpy(tokens)
    with torch.no_grad():
        in_memory = pruned.expected(ids, labels=ids).loss.exp().item()
    streamed = flap_stream.evaluate(str(pruned.place / "out"), EvaluateConfig(text=(text,), batch_size=2)).perplexity
    assert streamed == pytest.approx(in_memory, rel=1e-5)


def test_the_pruned_checkpoint_can_be_pruned_again(pruned: Pruned, tmp_path: Path) -> None:
    tokens, out = random_tokens(8, 24), pruned.place / "out"
    # Batches of the size above, of which it is known how much memory they take.
    options = PruneConfig(ratio=0.25, calibration=(str(pruned.place / "tokens.npy"),), batch_size=2)
    record = flap_stream.prune(out, tmp_path / "again", options).record
    expected, ids = masked_model(out, record, torch.from_numpy(tokens)), torch.from_numpy(random_tokens(3, 20, seed=11))
    with torch.no_grad():
        assert (load(tmp_path / "again")(ids).logits - expected(ids).logits).abs().max() <= 1e-5


def test_a_killed_job_goes_on_to_the_same_bytes(pruned: Pruned, tmp_path: Path) -> None:
    options = options_of(pruned.place)
    require_same_after_a_kill(pruned.place / "model", pruned.place / "out", options, tmp_path / "out")


def test_the_table_and_the_suite_have_the_same_families() -> None:
    assert set(FAMILIES) == set(FAMILY_EXTRAS)


def test_a_family_is_added_by_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, tokens = save(tiny_model(tiny_config("arcee"), seed=4), tmp_path / "model"), random_tokens(8, 24)
    options = PruneConfig(ratio=0.3, calibration=(save_tokens(tmp_path / "tokens.npy", tokens),))
    row = FAMILIES["arcee"]
    monkeypatch.delitem(FAMILIES, "arcee")
    with pytest.raises(UnsupportedModel, match="'arcee'"):
        flap_stream.prune(path, tmp_path / "out", options)
    monkeypatch.setitem(FAMILIES, "arcee", row)
    flap_stream.prune(path, tmp_path / "out", options)


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


@pytest.mark.parametrize(("family", "restore"), [*((family, "bias") for family in FORMS), ("llama", "none")])
def test_layers_without_heads_or_neurons_load_and_generate(family: str, restore: str, tmp_path: Path) -> None:
    path, tokens = save(tiny_model(tiny_config(family), seed=2), tmp_path / "model"), random_tokens(8, 24)
    flap_stream.collect(
        path,
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
    expected = masked_model(path, record, torch.from_numpy(tokens) if restore == "bias" else None)
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


def test_what_stays_whole_is_said_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tiny_model(tiny_config("qwen3_next"), seed=2), tmp_path / "model")
    out, text = tmp_path / "out", save_tokens(tmp_path / "tokens.npy", random_tokens(8, 24))
    record = flap_stream.prune(path, out, PruneConfig(ratio=0.3, calibration=(text,))).record
    assert record["left_whole"] == ["attention", "shared experts"]
    assert "Nothing was removed of the attention and shared experts." in (out / "README.md").read_text()
    flap_stream.collect(path, tmp_path / "run", CollectConfig(calibration=(text,)))
    assert main(["inspect", str(out)]) == main(["plan", str(tmp_path / "run"), "--ratio", "0.3"]) == 0
    assert capsys.readouterr().out.count("left whole   attention, shared experts\n") == 2


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("cohere", {"restore": "least-squares"}, "side by side"),
        ("olmo2", {"target_memory": 1 << 20, "context": 64, "batch": 1}, "attention is left whole; use --target-size"),
    ],
)
def test_what_is_not_defined_for_a_family_is_refused(
    family: str, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = save(tiny_model(tiny_config(family), seed=2), tmp_path / "model")
    calibration = (save_tokens(tmp_path / "tokens.npy", random_tokens(8, 24)),)
    with pytest.raises((InvalidOption, UnsupportedModel), match=words):
        flap_stream.prune(path, tmp_path / "out", PruneConfig(calibration=calibration, **options))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()
