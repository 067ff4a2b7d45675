"""Least-squares restoration: streamed equals in-memory float64, survives kills, loads as any pruned checkpoint."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from faults import make_job
from fork_server import KILLED
from models import DEMO, contents, load, random_tokens, save, save_tokens, tiny_config, tiny_model
from placements import placed
from torch import nn
from torch.nn import functional
from transformers import AutoTokenizer

import flap_stream
from flap_stream import CollectConfig, EvaluateConfig, PlanConfig, PruneConfig, RewriteConfig
from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.layer_shape import Sublayer
from flap_stream.arithmetic.least_squares import DAMPING
from flap_stream.engine.layer_pass import LayerPass
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import InvalidOption, RunMismatch, UnsupportedModel
from flap_stream.model.families import FAMILIES
from flap_stream.model.opening import open_checkpoint
from flap_stream.progress import Stage
from flap_stream.restore.refit_pass import RefitPass
from flap_stream.storage.run_directory import RunDirectory

pytestmark = pytest.mark.slow

SAMPLES, LENGTH = 24, 32


def captured(model: Any, module: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and outputs of a linear over all windows, float64 [token, channel]."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = module.register_forward_hook(
        lambda _module, inputs, output: seen.append((inputs[0].flatten(0, 1), output.flatten(0, 1)))
    )
    model(input_ids=tokens, use_cache=False)
    handle.remove()
    return seen[0]


def keeps_of(record: dict[str, Any]) -> list[LayerKeep]:
    return [LayerKeep(np.array(layer["kept_kv_groups"]), np.array(layer["kept_neurons"])) for layer in record["layers"]]


@torch.no_grad()
def logits(model: Any, tokens: np.ndarray) -> torch.Tensor:
    return model(input_ids=torch.from_numpy(tokens), use_cache=False).logits


def perplexity(model: Any, tokens: np.ndarray) -> float:
    targets = torch.from_numpy(tokens[:, 1:]).flatten()
    return float(functional.cross_entropy(logits(model, tokens)[:, :-1].flatten(0, 1).double(), targets).exp())


def fit(linear: nn.Linear, kept: torch.Tensor, inputs: torch.Tensor, target: torch.Tensor, after: torch.Tensor) -> None:
    """Refit the kept columns and the bias, all `[token, channel]`. after: the dense model's hidden states."""
    exponents = torch.frexp(after.square().mean(1).sqrt()).exponent
    scales = 2.0 ** (exponents.double().mean().round() - exponents).clamp(-9, 2)[:, None]
    own, weights = inputs[:, kept], scales.square() / scales.square().sum()
    mean_in, mean_out = (weights * own).sum(0), (weights * target).sum(0)
    x, y = (own - mean_in) * scales, (target - mean_out) * scales
    gram = x.T @ x
    damping = DAMPING * gram.diagonal().mean() * torch.eye(len(kept), dtype=torch.float64)
    weight = torch.linalg.solve(gram + damping, x.T @ y + damping @ linear.weight[:, kept].T).T
    linear.weight.zero_()
    linear.weight[:, kept] = weight
    linear.bias = nn.Parameter(mean_out - weight @ mean_in)


def residual_streams(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The hidden states before and after each attention and MLP, `[token, hidden]`."""
    streams = []
    for layer in model.model.layers:
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        streams += [captured(model, norm, tokens)[0] for norm in norms]
    return [*streams, captured(model, model.model.norm, tokens)[0]]


@torch.no_grad()
def refitted_in_memory(dense: Any, keeps: list[LayerKeep], tokens: torch.Tensor) -> Any:
    """The model with refitted weights, zeros in the columns that go, everything in float64."""
    dense = copy.deepcopy(dense).double()
    model, config, streams = copy.deepcopy(dense), dense.config, residual_streams(dense, tokens)
    for i, (layer, keep) in enumerate(zip(model.model.layers, keeps, strict=True)):
        per_group = config.num_attention_heads // config.num_key_value_heads * layer.self_attn.head_dim
        head_channels = (torch.from_numpy(keep.kv_groups)[:, None] * per_group + torch.arange(per_group)).flatten()
        for half, (linear, kept) in enumerate((
            (layer.self_attn.o_proj, head_channels), (layer.mlp.down_proj, torch.from_numpy(keep.neurons)),
        )):  # fmt: skip
            after, (inputs, output) = streams[2 * i + half + 1], captured(model, linear, tokens)
            missing = after - residual_streams(model, tokens)[2 * i + half] - output
            share = 0.8 * len(inputs) / (len(inputs) + 16 * len(kept))
            fit(linear, kept, inputs, output + share * missing, after)
    return model


def nearly_equal(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool(torch.linalg.norm(found - wanted) < 1e-3 * torch.linalg.norm(wanted) + 1e-5)


@pytest.mark.parametrize("varied", [False, True])
def test_streaming_refit_equals_the_one_in_memory(tmp_path: Path, varied: bool) -> None:
    config = tiny_config(attention_bias=varied, mlp_bias=varied, tie_word_embeddings=varied)
    dense, tokens = tiny_model(config), random_tokens(SAMPLES, LENGTH)
    save(dense, tmp_path / "model")
    options = PruneConfig(
        ratio=0.4, calibration=(save_tokens(tmp_path / "t.npy", tokens),), samples=SAMPLES, sequence_length=LENGTH,
        restore="least-squares", batch_size=5,
    )  # fmt: skip
    record = flap_stream.prune(tmp_path / "model", tmp_path / "out", options).record
    keeps = keeps_of(record)
    expected, pruned = refitted_in_memory(dense, keeps, torch.from_numpy(tokens)), load(tmp_path / "out")
    for layer, wanted, keep in zip(pruned.model.layers, expected.model.layers, keeps, strict=True):
        head_dim, heads = wanted.self_attn.head_dim, config.num_attention_heads // config.num_key_value_heads
        key_rows = (torch.from_numpy(keep.kv_groups)[:, None] * head_dim + torch.arange(head_dim)).flatten()
        width = heads * head_dim
        query_rows = (torch.from_numpy(keep.kv_groups)[:, None] * width + torch.arange(width)).flatten()
        kept = {"q_proj": query_rows, "k_proj": key_rows, "v_proj": key_rows, "o_proj": query_rows}
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            module = "self_attn" if name in kept else "mlp"
            found, linear = (getattr(getattr(one, module), name) for one in (layer, wanted))
            units = kept.get(name, torch.from_numpy(keep.neurons))
            is_output = name in ("o_proj", "down_proj")
            assert nearly_equal(found.weight, linear.weight[:, units] if is_output else linear.weight[units])
            assert not is_output or nearly_equal(found.bias, linear.bias)
    assert torch.equal(pruned.lm_head.weight.float(), dense.lm_head.weight.float())


def test_streaming_refit_has_the_perplexity_of_the_one_in_memory(tmp_path: Path) -> None:
    dense = load(DEMO / "model", trust=False)
    save(dense, tmp_path / "model", shard_size="4MB")
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    text, held_out = (
        np.array(tokenizer((DEMO / name).read_text()[:4000])["input_ids"])[: 10 * 64].reshape(10, 64)
        for name in ("calibration.txt", "evaluation.txt")
    )
    options = PruneConfig(
        ratio=0.4, calibration=(save_tokens(tmp_path / "t.npy", text),), samples=10, sequence_length=64,
        restore="least-squares", batch_size=4,
    )  # fmt: skip
    record = flap_stream.prune(tmp_path / "model", tmp_path / "out", options).record
    expected = refitted_in_memory(dense, keeps_of(record), torch.from_numpy(text))
    found, wanted, before = (perplexity(model, held_out) for model in (load(tmp_path / "out"), expected, dense))
    assert found == pytest.approx(wanted, rel=1e-3)
    assert wanted > 1.2 * before


IN_ORDER = [name for name, family in FAMILIES.items() if family.attention is not None and not family.is_parallel]


@pytest.mark.parametrize("family", IN_ORDER)
def test_a_layer_is_its_attention_and_its_mlp_one_after_the_other(tmp_path: Path, family: str) -> None:
    save(tiny_model(tiny_config(family)), tmp_path / "model")
    tokens = random_tokens(3, 12)
    with open_checkpoint(tmp_path / "model") as checkpoint, torch.inference_mode():
        model = StreamedModel(checkpoint, EvaluateConfig())
        whole: Any
        halves: Any
        whole, halves = (model.hidden_states("host", *tokens.shape) for _ in range(2))
        placement = model.place(EvaluateConfig(batch_size=3), model.job(*tokens.shape))
        batches = LayerPass(model, placement, tokens, [whole, halves])
        refit = RefitPass(batches, cast(RunDirectory, None), len(tokens), 0)
        for i, weights in batches.layers(Stage("test", len(model.layers))):
            batches.run_all(i, weights, whole)
            for other in reversed(Sublayer):
                for _ in batches.run(i, weights, halves, stand_ins=refit.silenced(other, model.shapes[i])):
                    pass
            assert torch.equal(whole.values, halves.values)


@pytest.mark.parametrize("family", ["gemma2", "granite", "hyperclovax", "minicpm3", "phi3", "qwen2", "qwen3_5_text"])
def test_refitted_families_load_and_are_nearer_to_the_dense_model(tmp_path: Path, family: str) -> None:
    dense, tokens = tiny_model(tiny_config(family)), random_tokens(64, 24)
    save(dense, tmp_path / "model")
    calibration = (save_tokens(tmp_path / "t.npy", tokens),)
    flap_stream.collect(
        tmp_path / "model", tmp_path / "run", CollectConfig(calibration=calibration, sequence_length=24)
    )
    flap_stream.plan(tmp_path / "run", PlanConfig(ratio=0.4))
    wanted, errors = logits(dense, tokens), {}
    for restore in ("bias", "least-squares"):
        flap_stream.rewrite(tmp_path / "run", tmp_path / restore, RewriteConfig(restore=restore))
        errors[restore] = float((logits(load(tmp_path / restore), tokens) - wanted).norm())
    assert errors["least-squares"] < 0.95 * errors["bias"]


def test_a_killed_refit_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    job = make_job(tmp_path, restore="least-squares")
    begun = job.first_step("out.run/refit")
    ended = job.first_step("out.partial")
    points = sorted({*range(begun - 3, ended, 11), *(n + 1 for n in job.records() if begun < n < ended)})
    assert len(points) > 12
    assert job.troubles(points) == []


def test_a_damaged_refit_is_made_again(tmp_path: Path) -> None:
    job = make_job(tmp_path, restore="least-squares")
    place = job.place("damaged")
    assert job.run(place, job.first_step("refit/0002")) == KILLED
    path = place / "out.run" / "refit" / "0001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert job.trouble_in(place) is None


def test_another_refit_begins_anew_and_another_dtype_is_refused(tmp_path: Path) -> None:
    save(tiny_model(tiny_config()), tmp_path / "model")
    calibration = (save_tokens(tmp_path / "t.npy", random_tokens(8, 16)),)
    flap_stream.collect(
        tmp_path / "model", tmp_path / "run", CollectConfig(calibration=calibration, samples=8, sequence_length=16)
    )
    flap_stream.plan(tmp_path / "run", PlanConfig(ratio=0.4))

    def rewrite(name: str, restore: str = "least-squares", **options: Any) -> dict[str, bytes]:
        flap_stream.rewrite(tmp_path / "run", tmp_path / name, RewriteConfig(restore=restore, **options))
        return contents(tmp_path / name)

    first = rewrite("first")
    assert rewrite("other", "reconstruct") != first
    assert rewrite("again") == first
    with pytest.raises(RunMismatch, match="collected in float32"):
        rewrite("bfloat16", dtype="bfloat16")


def test_a_pruned_checkpoint_is_pruned_and_refitted_again(tmp_path: Path) -> None:
    save(tiny_model(tiny_config(layers=2)), tmp_path / "model")
    calibration = (save_tokens(tmp_path / "t.npy", random_tokens(8, 16)),)
    emptied: dict[str, Any] = {"min_heads": 0, "min_neurons": 0}
    unrounded: dict[str, Any] = {"round_neurons_to": 1}
    for start, out, limits in (("model", "once", emptied), ("once", "twice", unrounded)):
        options = PruneConfig(ratio=0.5, calibration=calibration, samples=8, sequence_length=16, **limits)
        flap_stream.prune(tmp_path / start, tmp_path / out, replace(options, restore="least-squares"))
    assert torch.isfinite(logits(load(tmp_path / "twice"), random_tokens(2, 16))).all()


def test_parallel_layers_and_baselines_are_refused_before_pass_1(tmp_path: Path) -> None:
    save(tiny_model(tiny_config("cohere2_moe")), tmp_path / "model")
    calibration = (save_tokens(tmp_path / "t.npy", random_tokens(8, 16)),)
    options = PruneConfig(calibration=calibration, samples=8, sequence_length=16, restore="least-squares")
    with pytest.raises(UnsupportedModel, match="--restore reconstruct or bias"):
        flap_stream.prune(tmp_path / "model", tmp_path / "out", options)
    assert not (tmp_path / "out.run").exists()
    with pytest.raises(InvalidOption, match="only valid with --method flap"):
        PruneConfig(method="wanda-sp", restore="least-squares")


def test_hidden_states_on_disk_give_the_same_refit(tmp_path: Path) -> None:
    save(tiny_model(tiny_config()), tmp_path / "model")
    calibration = (save_tokens(tmp_path / "t.npy", random_tokens(8, 16)),)
    options = PruneConfig(calibration=calibration, samples=8, sequence_length=16, batch_size=3, restore="least-squares")
    flap_stream.prune(tmp_path / "model", tmp_path / "host", options)
    with pytest.MonkeyPatch.context() as patch:
        placed(patch, hidden_place="disk")
        flap_stream.prune(tmp_path / "model", tmp_path / "disk", options)
    assert contents(tmp_path / "disk") == contents(tmp_path / "host")
