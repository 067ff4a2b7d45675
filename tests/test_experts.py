"""Mixtures of experts: KV groups, and each expert's neurons by the tokens that were routed to it."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import load, random_tokens, save, save_tokens, tensors_of, tiny_config, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, PreTrainedModel

import flap_stream
from flap_stream.config import EngineConfig, EvaluateConfig, PlanConfig, PruneConfig
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import InvalidOption
from flap_stream.model.opening import open_checkpoint

pytestmark = pytest.mark.slow

FAMILIES = ("mixtral", "qwen3_moe")
TOKENS = random_tokens(8, 24)


class MaskedExperts(nn.Module):
    """The dense experts, one after another, in transformers' single tensor, with masks and biases.

    inputs: what each expert's down projection has read, float64 `[token, neuron]`.
    """

    def __init__(self, dense: Any) -> None:
        super().__init__()
        self.dense = dense
        self.biases: dict[int, Any] = {}
        self.inputs: list[list[torch.Tensor]] = [[] for _ in range(dense.num_experts)]

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(hidden)
        for expert in range(self.dense.num_experts):
            token, choice = torch.where(index == expert)
            gate, up = linear(hidden[token], self.dense.gate_up_proj[expert]).chunk(2, dim=-1)
            inputs = self.dense.act_fn(gate) * up
            self.inputs[expert].append(inputs.detach().double())
            output = linear(inputs, self.dense.down_proj[expert], self.biases.get(expert))
            result.index_add_(0, token, output * weights[token, choice, None])
        return result


def with_masked_experts(model: PreTrainedModel) -> PreTrainedModel:
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = MaskedExperts(layer.mlp.experts)
    return model


def apply_record(model: PreTrainedModel, record: dict[str, Any], bias: bool) -> PreTrainedModel:
    """Mask what the record says is gone and, from the dense model's own inputs, add the biases."""
    dense_inputs: list[torch.Tensor] = []
    hooks = []
    for layer in model.model.layers:
        for module in (layer.self_attn.o_proj, getattr(layer.mlp, "down_proj", None)):
            if module is not None:
                hooks.append(module.register_forward_pre_hook(lambda _, x: dense_inputs.append(x[0].double())))
    with torch.no_grad():
        model(torch.from_numpy(TOKENS), use_cache=False)
    for hook in hooks:
        hook.remove()
    means = iter([inputs.flatten(0, 1).mean(dim=0) for inputs in dense_inputs])

    def cut(module: Any, mean: torch.Tensor, keep: torch.Tensor) -> None:
        if bias:
            module.bias = nn.Parameter((module.weight.double() @ (mean * ~keep)).float())
        module.weight.mul_(keep)

    with torch.no_grad():
        for layer, kept in zip(model.model.layers, record["layers"], strict=True):
            attention = layer.self_attn
            heads = torch.zeros(kept["kv_groups"], dtype=torch.bool)
            heads[kept["kept_kv_groups"]] = True
            cut(
                attention.o_proj,
                next(means),
                heads.repeat_interleave(attention.num_key_value_groups * attention.head_dim),
            )
            neurons = torch.zeros(kept["neurons"], dtype=torch.bool)
            neurons[kept["kept_neurons"]] = True
            if "experts" not in kept:
                cut(layer.mlp.down_proj, next(means), neurons)
                continue
            experts = layer.mlp.experts
            for number, keep in enumerate(neurons.split(kept["experts"])):
                weight, inputs = experts.dense.down_proj[number], torch.cat(experts.inputs[number])
                if bias and len(inputs):
                    experts.biases[number] = (weight.double() @ (inputs.mean(dim=0) * ~keep)).float()
                weight.mul_(keep)
    return model


@pytest.fixture(scope="module", params=[(family, restore) for family in FAMILIES for restore in ("bias", "none")])
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    family, restore = request.param
    place = tmp_path_factory.mktemp(family)
    path = save(tiny_model(tiny_config(family), seed=3), place / "model")
    options = PruneConfig(
        ratio=0.4, calibration=(save_tokens(place / "tokens.npy", TOKENS),), restore=restore, max_shard_bytes=60_000
    )
    record = flap_stream.prune(path, place / "out", options).record
    return place, apply_record(with_masked_experts(load(path)), record, restore == "bias"), record


def test_experts_get_sizes_of_their_own_at_the_ratio(pruned: Any) -> None:
    place, _, record = pruned
    sizes = [len(widths) and widths for widths in load(place / "out").config.pruned_expert_sizes]
    assert any(len(set(widths)) > 1 for widths in sizes if widths)
    assert abs(record["realised_ratio"]["decoder"] - 0.4) < 0.02
    names = [name for path in (place / "out").glob("*.safetensors") for name in safe_open(path, "pt").keys()]  # noqa: SIM118
    assert any(name.endswith("mlp.experts.each.3.down.weight") for name in names)


def test_logits_and_generation_equal_the_masked_dense_models(pruned: Any) -> None:
    place, expected, _ = pruned
    ours, ids = load(place / "out"), torch.from_numpy(random_tokens(3, 20, seed=5))
    with torch.no_grad():
        assert (ours(ids).logits - expected(ids).logits).abs().max() <= 1e-5
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **settings), expected.generate(ids, **settings))


def test_streaming_perplexity_equals_the_in_memory_one(pruned: Any) -> None:
    place, expected, _ = pruned
    tokens = random_tokens(7, 20, seed=10)
    ids, text = torch.from_numpy(tokens), save_tokens(place / "evaluation.npy", tokens)
    for path, model in ((place / "model", load(place / "model")), (place / "out", expected)):
        with torch.no_grad():
            in_memory = model(ids, labels=ids).loss.exp().item()
        streamed = flap_stream.evaluate(path, EvaluateConfig(text=(text,), batch_size=2)).perplexity
        assert streamed == pytest.approx(in_memory, rel=1e-5)


def test_saving_and_loading_again_changes_nothing(pruned: Any, tmp_path: Path) -> None:
    model = load(pruned[0] / "out")
    model.save_pretrained(tmp_path / "again")
    ids = torch.from_numpy(random_tokens(2, 9, seed=8))
    again = load(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    with torch.no_grad():  # products round by where in memory a mapped file puts the weights
        assert (again(ids).logits - model(ids).logits).abs().max() <= 1e-5


def test_the_pruned_checkpoint_can_be_pruned_again(pruned: Any, tmp_path: Path) -> None:
    place, _, first = pruned
    options = PruneConfig(ratio=0.25, calibration=(str(place / "tokens.npy"),), restore=first["restore"])
    record = flap_stream.prune(place / "out", tmp_path / "again", options).record
    for before, after in zip(first["layers"], record["layers"], strict=True):
        assert after["neurons"] == len(before["kept_neurons"])
    assert load(tmp_path / "again")(torch.from_numpy(TOKENS)).logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_that_no_token_reached_stays_whole(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(tiny_config(family), seed=3)
    ids = np.full((4, 8), 5)  # one token again and again: few experts see any
    options = PruneConfig(ratio=0.2, calibration=(save_tokens(tmp_path / "tokens.npy", ids),))
    record = flap_stream.prune(save(model, tmp_path / "model"), tmp_path / "out", options).record
    sizes = load(tmp_path / "out").config.pruned_expert_sizes
    told = re.findall(r"no calibration token reached experts ([\d, ]+) of layer (\d)", caplog.text)
    assert told
    for experts, layer in told:
        whole = record["layers"][int(layer)]["experts"]
        assert all(sizes[int(layer)][int(expert)] == whole[int(expert)] for expert in experts.split(", "))
    with pytest.raises(InvalidOption, match="experts that no token reached"):
        flap_stream.prune(
            tmp_path / "model", tmp_path / "other", PruneConfig(ratio=0.7, calibration=options.calibration)
        )


@pytest.mark.parametrize("options", [{"method": "wanda-sp"}, {"statistics": "released"}, {"tensor_parallel": 2}])
def test_what_is_not_defined_with_experts_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    path = save(tiny_model(tiny_config("mixtral")), tmp_path / "model")
    config = PruneConfig(ratio=0.4, calibration=(save_tokens(tmp_path / "tokens.npy", TOKENS),), **options)
    with pytest.raises(InvalidOption, match="experts"):
        flap_stream.prune(path, tmp_path / "out", config)
    assert not (tmp_path / "out.run").exists()


def test_magnitude_needs_no_tokens(tmp_path: Path) -> None:
    path = save(tiny_model(tiny_config("mixtral")), tmp_path / "model")
    record = flap_stream.prune(path, tmp_path / "out", PruneConfig(ratio=0.4, method="magnitude-sp")).record
    assert load(tmp_path / "out")(torch.from_numpy(TOKENS)).logits.isfinite().all()
    assert PlanConfig(**record["options"]).method == "magnitude-sp"


@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "qwen3_moe"])
def test_experts_in_one_tensor_are_pruned_as_those_in_many(family: str, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(family), seed=3)
    many, one = save(model, tmp_path / "many"), tmp_path / "one"
    one.mkdir()
    shutil.copy(many / "config.json", one)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, one / "model.safetensors")
    options = PruneConfig(ratio=0.4, calibration=(save_tokens(tmp_path / "tokens.npy", TOKENS),))
    outputs = []
    for path in (many, one):
        flap_stream.prune(path, tmp_path / f"out-{path.name}", options)
        outputs.append(tensors_of(tmp_path / f"out-{path.name}"))
    assert outputs[0].keys() == outputs[1].keys()
    assert all(torch.equal(tensor, outputs[1][name]) for name, tensor in outputs[0].items())


@pytest.mark.parametrize("family", ["ernie4_5_moe", "flint", "glm4_moe", "qwen3_next"])
def test_tensors_run_in_the_dtypes_that_transformers_gives_them(family: str, tmp_path: Path) -> None:
    """Routers choose by differences that bf16 does not have, so that many models keep a part of them in float32."""
    model = tiny_model(tiny_config(family), seed=3)
    path = save(model, tmp_path / "model", dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    expected = {name: tensor.dtype for name, tensor in loaded.state_dict().items() if ".experts." not in name}
    with open_checkpoint(path) as checkpoint:
        opened = StreamedModel(checkpoint, EngineConfig(device="cpu", dtype="bfloat16"))
        with opened.stream() as layers:
            for i, weights in layers:
                found = {f"model.layers.{i}.{name}": w.dtype for name, w in weights.items() if ".experts." not in name}
                assert found == {name: expected[name] for name in found}
    assert (torch.float32 in set(expected.values())) is (family != "qwen3_next")
    text = save_tokens(tmp_path / "text.npy", random_tokens(7, 20, seed=10))
    ids = torch.from_numpy(np.load(text))
    with torch.no_grad():
        in_memory = loaded(ids, labels=ids).loss.exp().item()
    streamed = flap_stream.evaluate(path, EvaluateConfig(text=(text,), dtype="bfloat16", batch_size=7)).perplexity
    assert streamed == pytest.approx(in_memory, rel=2e-2)
    options = PruneConfig(ratio=0.3, calibration=(text,), dtype="bfloat16")
    flap_stream.prune(path, tmp_path / "out", options)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, trust_remote_code=True)
    assert all(expected[name] == tensor.dtype for name, tensor in pruned.state_dict().items() if name in expected)
    with torch.no_grad():
        assert pruned(ids).logits.isfinite().all()


def test_layers_that_predict_further_tokens_are_carried_as_they_are(tmp_path: Path) -> None:
    """As GLM-4.5 and DeepSeek-V3 have one after the last; transformers leaves it out."""
    model = tiny_model(tiny_config("glm4_moe", num_nextn_predict_layers=1), seed=3)
    path = save(model, tmp_path / "model", shard_size="10MB")
    stored = load_file(path / "model.safetensors")
    further = {name.replace(".layers.2.", ".layers.3."): t + 1 for name, t in stored.items() if ".layers.2." in name}
    save_file({**stored, **further, "model.layers.3.eh_proj.weight": torch.ones(64, 128)}, path / "model.safetensors")
    options = PruneConfig(ratio=0.4, calibration=(save_tokens(tmp_path / "tokens.npy", TOKENS),))
    record = flap_stream.prune(path, tmp_path / "out", options).record
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert len(record["layers"]) == 3 and "model.layers.3.eh_proj.weight" in written
    assert all(torch.equal(written[name], tensor) for name, tensor in further.items())
    with torch.no_grad():
        assert load(tmp_path / "out")(torch.from_numpy(TOKENS)).logits.isfinite().all()
    again = PruneConfig(ratio=0.2, calibration=options.calibration)
    assert len(flap_stream.prune(tmp_path / "out", tmp_path / "again", again).record["layers"]) == 3
