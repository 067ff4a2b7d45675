"""`--statistics released` decides as the released code does, head for head and neuron for neuron."""

import copy
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import random_tokens, save, save_tokens, tensors_of, tiny_config, tiny_model
from released_reference import ReleasedDecision, released_baseline, released_flap, released_statistics
from transformers import AutoModelForCausalLM, AutoTokenizer

import flap_stream
from flap_stream.config import PlanConfig, PruneConfig
from flap_stream.storage.run_directory import RunDirectory

pytestmark = pytest.mark.slow

SAMPLES, LENGTH = 12, 16


def trained_multi_head_model() -> Any:
    """The bundled demo model, its KV heads written out once per query head: the same function, multi-head."""
    demo = files("flap_stream") / "demo"
    model = AutoModelForCausalLM.from_pretrained(str(demo / "model"), dtype=torch.float32).eval()
    grouped, heads = model.config.num_key_value_heads, model.config.num_attention_heads
    model.config.num_key_value_heads = heads
    for layer in model.model.layers:
        layer.self_attn.num_key_value_groups = 1
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            rows = projection.weight.data.unflatten(0, (grouped, -1))  # [KV head, head_dim, hidden]
            projection.weight.data = rows.repeat_interleave(heads // grouped, dim=0).flatten(0, 1)
            projection.out_features = len(projection.weight)
    tokenizer = AutoTokenizer.from_pretrained(str(demo / "model"))
    ids = tokenizer((demo / "calibration.txt").read_text()[:20_000])["input_ids"]
    return model, np.asarray(ids[: SAMPLES * 32]).reshape(SAMPLES, 32)


@pytest.fixture(scope="module", params=["random", "trained"])
def model_and_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("released")
    model, tokens = tiny_model(tiny_config(kv_heads=4, layers=4)), random_tokens(SAMPLES, LENGTH)
    if request.param == "trained":
        model, tokens = trained_multi_head_model()
    path = save(model, place / "model")
    config = flap_stream.CollectConfig(calibration=(save_tokens(place / "tokens.npy", tokens),), dtype="float32")
    flap_stream.collect(path, place / "run", config)
    return model, tokens, place


@pytest.fixture(scope="module")
def theirs_of(model_and_run: Any) -> Callable[..., ReleasedDecision]:
    """Their decision; what it is computed from is accumulated once."""
    model, tokens, _ = model_and_run
    return partial(released_flap, model, released_statistics(model, tokens))


def masks(result: flap_stream.PlanResult) -> tuple[list[list[int]], list[list[int]]]:
    return [keep.kv_groups.tolist() for keep in result.layers], [keep.neurons.tolist() for keep in result.layers]


def indices(keep: list[torch.Tensor]) -> list[list[int]]:
    return [mask.nonzero().flatten().tolist() for mask in keep]


@pytest.mark.parametrize("metric", ["wifv", "ifv", "wifn"])
@pytest.mark.parametrize(
    ("structure", "ratio", "remove_heads"),
    [
        *[("al-am", ratio, None) for ratio in (0.1, 0.2, 0.3, 0.5)],
        *[("ul-um", ratio, None) for ratio in (0.1, 0.25, 0.5)],
        *[("al-mm", 0.3, heads) for heads in (1, 3, 5)],
        *[("ul-mm", 0.3, heads) for heads in (4, 8)],
    ],
)
def test_decision_equals_the_released_codes(
    model_and_run: Any,
    theirs_of: Callable[..., ReleasedDecision],
    metric: str,
    structure: str,
    ratio: float,
    remove_heads: int | None,
) -> None:
    place = model_and_run[2]
    options = PlanConfig(
        ratio=ratio, metric=metric, structure=structure, remove_heads=remove_heads, statistics="released",
        min_heads=0, min_neurons=0,
    )  # fmt: skip
    ours = masks(flap_stream.plan(place / "run", options))
    theirs = theirs_of(ratio, structure, metric, remove_heads or 0)
    assert ours == (indices(theirs.attention), indices(theirs.mlp))


@pytest.mark.parametrize("structure", ["al-am", "ul-um"])
def test_biases_equal_the_released_codes(
    model_and_run: Any, theirs_of: Callable[..., ReleasedDecision], tmp_path: Path, structure: str
) -> None:
    model, _, place = model_and_run
    text = (str(place / "tokens.npy"),)
    options = PruneConfig(ratio=0.3, structure=structure, statistics="released", dtype="float32", calibration=text)
    flap_stream.prune(place / "model", tmp_path / "out", options)
    tensors = tensors_of(tmp_path / "out")
    theirs = theirs_of(0.3, structure)
    for i in range(model.config.num_hidden_layers):
        for name, expected in (("self_attn.o_proj", theirs.attention_bias[i]), ("mlp.down_proj", theirs.mlp_bias[i])):
            ours = tensors[f"model.layers.{i}.{name}.bias"]
            assert torch.linalg.norm(ours - expected) <= 1e-5 * torch.linalg.norm(expected)


def test_exact_and_released_differ_where_the_recurrences_do(model_and_run: Any) -> None:
    _, tokens, place = model_and_run
    with RunDirectory(place / "run") as run:
        mlp = run.statistics.read(0).mlp
    exact, released = mlp.m2 / (mlp.count - 1), mlp.released_fluctuation / (mlp.samples - 1)
    # Divided by windows, not tokens; the first window gives nothing, and those after it less than their share.
    assert np.all((2 * exact < released) & (released < exact * tokens.shape[1]))


@pytest.mark.parametrize("ratio", [0.2, 0.5])
@pytest.mark.parametrize("method", ["wanda-sp", "magnitude-sp"])
def test_baselines_equal_the_released_codes(model_and_run: Any, tmp_path: Path, method: str, ratio: float) -> None:
    model, tokens, place = model_and_run
    text = (str(place / "tokens.npy"),)
    published: dict[str, Any] = {"round_neurons_to": 1} if method == "wanda-sp" else {}
    flap_stream.collect(
        place / "model",
        tmp_path / "run",
        flap_stream.CollectConfig(method=method, ratio=ratio, calibration=text, **published),
    )
    ours = masks(flap_stream.plan(tmp_path / "run", PlanConfig(method=method, ratio=ratio, round_neurons_to=1)))
    theirs = released_baseline(copy.deepcopy(model), tokens if method == "wanda-sp" else None, ratio)
    assert ours == (indices(theirs[0]), indices(theirs[1]))
