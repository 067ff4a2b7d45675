"""The same code on CUDA: what the CPU decides, the GPU decides. Skipped where there is no CUDA device."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import DEMO, FAMILY_EXTRAS, random_tokens, save, save_tokens, tiny_config, tiny_model
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING

import flap_stream
from flap_stream.config import (
    BenchInferenceConfig,
    CollectConfig,
    EngineConfig,
    EvaluateConfig,
    PlanConfig,
    PruneConfig,
    RewriteConfig,
    SweepConfig,
    TryConfig,
)
from flap_stream.engine import placement
from flap_stream.engine.hidden_states import PLACES
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.engine.weight_stream import slab_bytes
from flap_stream.errors import InsufficientMemory, UnsupportedModel
from flap_stream.model.layer_state import LayerState
from flap_stream.model.opening import open_checkpoint

pytestmark = pytest.mark.gpu


def on_both(path: Path, text: str, place: Path, **options: Any) -> tuple[list[Any], list[float]]:
    """What each layer keeps and the perplexity, of the model as pruned on the CPU and on the GPU."""
    layers, perplexities = [], []
    for device in ("cpu", "cuda"):
        given = {"ratio": 0.3, "calibration": (text,), "batch_size": 4, "round_neurons_to": 1, **options}
        wanted = PruneConfig(**given, device=device)
        layers.append(flap_stream.prune(path, place / device, wanted).record["layers"])
        evaluation = flap_stream.evaluate(place / device, EvaluateConfig(text=(text,), device=device))
        perplexities.append(evaluation.perplexity)
    assert evaluation.peak_device_bytes > 0
    return layers, perplexities


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_pruning_on_cuda_gives_a_checkpoint_like_the_cpus(dtype: str, tmp_path: Path) -> None:
    path = save(tiny_model(tiny_config()), tmp_path / "model", dtype=getattr(torch, dtype))
    text = save_tokens(tmp_path / "tokens.npy", random_tokens(9, 24))
    layers, perplexities = on_both(path, text, tmp_path)
    assert perplexities[1] == pytest.approx(perplexities[0], rel=1e-4 if dtype == "float32" else 0.05)
    if dtype == "float32":
        assert layers[0] == layers[1]


@pytest.mark.parametrize("metric", ["wifv", "fisher"])
@pytest.mark.parametrize("family", [family for family in FAMILY_EXTRAS if family in CONFIG_MAPPING])
def test_every_family_is_decided_on_cuda_as_on_the_cpu(family: str, metric: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    try:
        LayerState.of(config, family)
    except UnsupportedModel as refusal:  # this transformers is too old
        pytest.skip(str(refusal))
    path = save(tiny_model(config), tmp_path / "model")
    text = save_tokens(tmp_path / "tokens.npy", random_tokens(9, 24))
    layers, perplexities = on_both(path, text, tmp_path, metric=metric)
    attends_to_chosen_tokens = family == "deepseek_v32"  # whose scores tie at zero; devices choose others of a tie
    assert perplexities[1] == pytest.approx(perplexities[0], rel=0.05 if attends_to_chosen_tokens else 1e-3)
    if not attends_to_chosen_tokens:
        assert layers[0] == layers[1]


AS_A_WHOLE: dict[str, Any] = {"ratio": 0.74, "metric": "fisher", "whole_experts": True, "min_neurons": 3}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3", "nemotron_h"])
@pytest.mark.parametrize(
    "options",
    [
        AS_A_WHOLE,
        AS_A_WHOLE | {"restore": "reconstruct"},
        {"method": "reap"},
        {"restore": "least-squares"},
    ],
    ids=["whole experts", "reconstruction", "reap", "least squares"],
)
def test_experts_are_removed_and_refitted_on_cuda_as_on_the_cpu(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    path = save(tiny_model(tiny_config(family), seed=3), tmp_path / "model")
    text = save_tokens(tmp_path / "tokens.npy", random_tokens(24, 32))
    layers, perplexities = on_both(path, text, tmp_path, **options)
    assert perplexities[1] == pytest.approx(perplexities[0], rel=1e-3)
    assert layers[0] == layers[1]


@pytest.mark.parametrize("kind", ["FP8 by block", "INT4 with offsets", "MXFP4", "NVFP4"])
def test_on_cuda_codes_are_decoded_as_their_library_decodes_them(kind: str, tmp_path: Path) -> None:
    from quantised_models import write_quantised

    dense = save(tiny_model(tiny_config()), tmp_path / "dense", "1GB", torch.bfloat16)
    write_quantised(kind, dense, tmp_path / "quantised", tmp_path / "decoded")
    text = save_tokens(tmp_path / "tokens.npy", random_tokens(9, 24))
    options = PruneConfig(ratio=0.3, calibration=(text,), device="cuda", batch_size=4)
    written = []
    for model in ("quantised", "decoded"):
        flap_stream.prune(tmp_path / model, tmp_path / f"pruned-{model}", options)
        written.append(load_file(tmp_path / f"pruned-{model}" / "model.safetensors"))
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(tensor, written[1][name]) for name, tensor in written[0].items())


def test_text_and_tokens_per_second_on_cuda(tmp_path: Path) -> None:
    model = DEMO / "model"
    texts = []
    for device in ("cpu", "cuda"):
        wanted = TryConfig(device=device, dtype="float32", new_tokens=8)
        texts.append(next(flap_stream.generate([model], "The cat", wanted)).text)
    assert texts[0] == texts[1]
    calibration = (str(DEMO / "calibration.txt"),)
    flap_stream.prune(model, tmp_path / "out", PruneConfig(ratio=0.3, calibration=calibration, device="cuda"))
    options = BenchInferenceConfig(prompt_lengths=(32,), generate=8, rounds=2, device="cuda")
    for row in flap_stream.bench_inference(model, tmp_path / "out", options).rows:
        assert row.dense.peak_device_bytes > 0 and row.pruned.peak_device_bytes > 0


def test_on_cuda_neither_reading_ahead_nor_the_place_of_hidden_states_matters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = save(tiny_model(tiny_config(layers=5)), tmp_path / "model", dtype=torch.bfloat16)
    text = save_tokens(tmp_path / "tokens.npy", random_tokens(9, 24))
    options = PruneConfig(ratio=0.3, calibration=(text,), device="cuda", batch_size=4)
    place, outs = placement.place, []
    for hidden_place in PLACES:
        for prefetch in (0, 1):
            how = {"hidden_place": hidden_place, "prefetch": prefetch}
            monkeypatch.setattr(placement, "place", lambda *a, how=how: replace(place(*a), **how))
            outs.append(tmp_path / f"{hidden_place}-{prefetch}")
            flap_stream.prune(path, outs[-1], options)
    for out in outs[1:]:
        for file in outs[0].iterdir():
            assert (out / file.name).read_bytes() == file.read_bytes()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_on_a_second_cuda_device_peaks_are_that_devices(tmp_path: Path) -> None:
    path = save(tiny_model(tiny_config()), tmp_path / "model")
    text = save_tokens(tmp_path / "tokens.npy", random_tokens(9, 24))
    options = PruneConfig(ratio=0.3, calibration=(text,), device="cuda:1")
    assert flap_stream.prune(path, tmp_path / "out", options).measured.peak_device_bytes > 0
    assert flap_stream.evaluate(path, EvaluateConfig(text=(text,), device="cuda:1")).peak_device_bytes > 0


def test_on_cuda_weights_wait_for_kernels_that_still_use_their_memory(tmp_path: Path) -> None:
    path = save(tiny_model(tiny_config()), tmp_path / "model", "1GB")
    expected = load_file(path / "model.safetensors")
    with open_checkpoint(path) as checkpoint, torch.inference_mode():
        model = StreamedModel(checkpoint, EngineConfig(device="cuda"))
        size = slab_bytes([entry.nbytes for entry in model.layer_entries[0].values()])
        freed = [torch.empty(size, dtype=torch.uint8, device=model.device) for _ in range(2)]
        torch.cuda._sleep(1 << 31)  # a second or so
        for memory in freed:
            memory.fill_(1)
        del freed, memory
        with model.stream(prefetch=1) as layers:
            for i, weights in layers:
                for name, tensor in weights.items():
                    assert torch.equal(tensor.cpu(), expected[f"model.layers.{i}.{name}"])


def test_on_cuda_a_sweep_gives_what_the_written_checkpoints_give(tmp_path: Path) -> None:
    path = save(tiny_model(tiny_config()), tmp_path / "model")
    text = save_tokens(tmp_path / "tokens.npy", random_tokens(9, 24))
    flap_stream.collect(path, tmp_path / "run", CollectConfig(calibration=(text,), device="cuda", batch_size=4))
    options = SweepConfig(ratios=(0.2, 0.5), evaluate=(text,), device="cuda", batch_size=4)
    for point in flap_stream.sweep(tmp_path / "run", options).points:
        flap_stream.plan(tmp_path / "run", PlanConfig(ratio=point.ratio))
        out = tmp_path / f"{point.ratio}"
        flap_stream.rewrite(tmp_path / "run", out, RewriteConfig())
        written = flap_stream.evaluate(out, EvaluateConfig(text=(text,), device="cuda", batch_size=4))
        assert point.perplexity == pytest.approx(written.perplexity, rel=1e-4)


def test_on_cuda_the_allocator_is_held_to_the_limit(tmp_path: Path) -> None:
    path = save(tiny_model(tiny_config(hidden_size=1024, intermediate_size=4096)), tmp_path / "model", "1GB")
    text = save_tokens(tmp_path / "tokens.npy", random_tokens(256, 128))
    limit = 400 << 20
    options = PruneConfig(ratio=0.3, calibration=(text,), samples=256, device="cuda", device_memory=limit)
    result = flap_stream.prune(path, tmp_path / "out", options)
    placement = result.measured.placement
    assert placement is not None
    assert 0 < result.measured.peak_device_bytes <= placement.device_bytes <= limit
    with pytest.raises(InsufficientMemory, match="--device-memory"):
        flap_stream.prune(path, tmp_path / "other", replace(options, device_memory=64 << 20))
