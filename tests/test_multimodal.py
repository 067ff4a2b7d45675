"""Multimodal models: the text decoder is pruned, the rest stays byte for byte."""

import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from masked import mask, separate, streamed
from models import LAYER_INPUTS, VOCABULARY, load, random_tokens, save, save_tokens, tiny_config, tiny_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3nConfig,
    Gemma4Config,
    LlavaConfig,
    Mistral3Config,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3VLConfig,
)

import flap_stream
from flap_stream.config import EvaluateConfig, ExportGgufConfig, ExportStockConfig, PruneConfig
from flap_stream.errors import UnsupportedModel
from flap_stream.export.gguf import export_gguf
from flap_stream.export.stock import export_stock
from flap_stream.model.families import FAMILIES
from flap_stream.stages.forecast import forecast

pytestmark = pytest.mark.slow

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
IMAGE = 96
CONFIGS: dict[str, Callable[[], Any]] = {
    "llava-llama": lambda: LlavaConfig(
        text_config=tiny_config("llama").to_dict(), image_token_index=IMAGE,
        vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **VISION},
    ),
    "llava-qwen2-tied": lambda: LlavaConfig(
        text_config=tiny_config("qwen2", 4, tied=True).to_dict(), image_token_index=IMAGE, tie_word_embeddings=True,
        vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **VISION},
    ),
    "gemma3": lambda: Gemma3Config(
        text_config=tiny_config("gemma3_text", tied=True).to_dict(), image_token_index=IMAGE, boi_token_index=95,
        eoi_token_index=94, mm_tokens_per_image=4, vision_config={"model_type": "siglip_vision_model", **VISION},
    ),
    "gemma3n": lambda: gemma3n(),
    "gemma4": lambda: gemma4(tiny_config("gemma4_text", tied=True)),
    "gemma4-small": lambda: gemma4(
        tiny_config("gemma4_text", tied=True, **{**LAYER_INPUTS, "vocab_size_per_layer_input": VOCABULARY}),
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 32,
         "subsampling_conv_channels": (8, 4)},
    ),
    "mistral3": lambda: Mistral3Config(
        text_config=tiny_config("mistral", head_dim=16).to_dict(), image_token_index=IMAGE, spatial_merge_size=1,
        vision_config={"model_type": "pixtral", "head_dim": 16, **VISION},
    ),
    "mistral3-ministral3": lambda: Mistral3Config(
        text_config=tiny_config("ministral3").to_dict(), image_token_index=IMAGE, spatial_merge_size=1,
        vision_config={"model_type": "pixtral", "head_dim": 16, **VISION},
    ),
    "qwen2_5_vl": lambda: qwen_vl(Qwen2_5_VLConfig, "qwen2"),
    "qwen3_vl": lambda: qwen_vl(Qwen3VLConfig, "qwen3"),
    "qwen3_5": lambda: qwen(Qwen3_5Config, tiny_config("qwen3_5_text").to_dict()),
    "qwen3_5_moe": lambda: qwen(Qwen3_5MoeConfig, tiny_config("qwen3_5_moe_text").to_dict()),
}  # fmt: skip


def gemma3n() -> Any:
    text = tiny_config("gemma3n_text", tied=True)
    audio = {
        "hidden_size": 32,
        "conf_num_hidden_layers": 1,
        "conf_num_attention_heads": 2,
        "sscp_conv_channel_size": (8, 4),
    }
    return Gemma3nConfig(
        text_config=text.to_dict(),
        audio_config=audio,
        vision_config={"hidden_size": 2048},
        image_token_id=IMAGE,
        boi_token_id=95,
        eoi_token_id=94,
        audio_token_id=93,
    )


def gemma4(text: Any, audio: dict[str, Any] | None = None) -> Any:
    vision = {
        "model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16, "patch_size": 8,
        "position_embedding_size": 64, "pooling_kernel_size": 2, "default_output_length": 4,
    }  # fmt: skip
    ids: dict[str, Any] = {"image_token_id": IMAGE, "boi_token_id": 95, "eoi_token_id": 94, "audio_token_id": 93}
    return Gemma4Config(text_config=text.to_dict(), vision_config=vision, audio_config=audio, **ids)


def qwen(kind: Any, text: dict[str, Any]) -> Any:
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 2, "out_hidden_size": 64, "patch_size": 8,
        "temporal_patch_size": 1, "spatial_merge_size": 1, "num_position_embeddings": 4, "fullatt_block_indexes": [1],
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    ids = {"image_token_id": IMAGE, "vision_start_token_id": 95, "vision_end_token_id": 94}
    return kind(text_config=text, vision_config=vision, **ids)


def qwen_vl(kind: Any, family: str) -> Any:
    text = {key: value for key, value in tiny_config(family).to_dict().items() if key != "model_type"}
    text["rope_parameters"] |= {"mrope_section": [4, 2, 2]}
    return qwen(kind, text)


def load_multimodal(path: Path) -> Any:
    return load(path, AutoModelForImageTextToText)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, Any] = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return found


NEEDS_TIMM = pytest.mark.skipif(find_spec("timm") is None, reason="its vision tower needs timm")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[NEEDS_TIMM] * (name == "gemma3n")) for name in CONFIGS]
)
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp(request.param)
    model = tiny_model(CONFIGS[request.param](), seed=3, kind=AutoModelForImageTextToText)
    calibration = (save_tokens(place / "tokens.npy", random_tokens(8, 24) % 90),)
    options = PruneConfig(ratio=0.4, calibration=calibration, restore="none", max_shard_bytes=60_000)
    record = flap_stream.prune(save(model, place / "model"), place / "out", options).record
    return place, model, record


def masked(path: Path, record: dict[str, Any]) -> Any:
    """The dense model, its decoder masked as the record says."""
    model = load_multimodal(path)
    opened = streamed(path)
    separate(model, model.model.language_model)
    mask(model.model.language_model.layers, opened.family, opened.shapes, record)
    return model


def test_everything_but_the_decoder_is_the_same(pruned: Any) -> None:
    place, dense, record = pruned
    before, after = tensors(place / "model"), tensors(place / "out")
    family = FAMILIES.get(dense.config.text_config.model_type)
    before = {name if family is None else family.canonical(name): tensor for name, tensor in before.items()}
    if dense.config.model_type == "qwen2_5_vl":  # whose files have the names of a text model
        before = {re.sub(r"^model\.", "model.language_model.", name): tensor for name, tensor in before.items()}
        before = {re.sub(r"^visual\.", "model.visual.", name): tensor for name, tensor in before.items()}
    if "language_model.lm_head.weight" in before:  # the pruned class has it where transformers has it in memory
        before["lm_head.weight"] = before.pop("language_model.lm_head.weight")
    assert set(before) == set(after) and record["realised_ratio"]["decoder"] > 0.35
    counted = {"before": before, "after": after}
    assert all(sum(t.numel() for t in counted[key].values()) == record["parameters"][key] for key in counted)
    changed = {name for name in before if before[name].shape != after[name].shape}
    assert changed and all("language_model" in name and ".layers." in name for name in changed)
    others = [name for name in before if ".layers." not in name or "language_model" not in name]
    assert any("visi" in name or "visual" in name for name in others)
    assert all(torch.equal(before[name], after[name]) for name in others)


def test_text_and_images_give_the_masked_models_logits(pruned: Any) -> None:
    place, dense, record = pruned
    ours, expected = load_multimodal(place / "out"), masked(place / "model", record)
    ids = torch.from_numpy(random_tokens(2, 20, seed=5) % 90)
    with torch.no_grad():
        assert (ours(input_ids=ids).logits - expected(input_ids=ids).logits).abs().max() <= 1e-5
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **settings), expected.generate(ids, **settings))
    count = getattr(dense.config, "vision_soft_tokens_per_image", 4)
    ids = torch.cat([ids[:, :3], torch.full((2, count), IMAGE), ids[:, 7:]], dim=1)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}
    if dense.config.model_type.startswith("qwen"):  # rows of pixels, a patch each
        grid = torch.tensor([[1, 2, 2], [1, 2, 2]])
        inputs |= {"pixel_values": torch.randn(8, 3 * 8 * 8), "image_grid_thw": grid}
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    if dense.config.model_type == "gemma4":
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).repeat(2, 1, 1)
        inputs |= {"pixel_values": torch.rand(2, 16, 3 * 8 * 8), "image_position_ids": places}
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    if dense.config.model_type == "mistral3":
        inputs["image_sizes"] = torch.tensor([[16, 16], [16, 16]])
    if dense.config.model_type == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    with torch.no_grad():
        assert (ours(**inputs).logits - expected(**inputs).logits).abs().max() <= 1e-5


def test_it_saves_evaluates_and_is_pruned_again(pruned: Any, tmp_path: Path) -> None:
    place, _, _ = pruned
    model, tokens = load_multimodal(place / "out"), random_tokens(6, 20, seed=9) % 90
    model.save_pretrained(tmp_path / "saved")
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert (load_multimodal(tmp_path / "saved")(input_ids=ids).logits - logits).abs().max() <= 1e-6
    text = (save_tokens(tmp_path / "text.npy", tokens),)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    streamed = flap_stream.evaluate(place / "out", EvaluateConfig(text=text, dtype="float32"))
    assert np.log(streamed.perplexity) == pytest.approx(loss, rel=1e-5)
    options = PruneConfig(ratio=0.2, calibration=text)
    flap_stream.prune(place / "out", tmp_path / "again", options)
    with torch.no_grad():
        assert load_multimodal(tmp_path / "again")(input_ids=ids).logits.isfinite().all()


def test_the_model_card_names_the_multimodal_classes(pruned: Any) -> None:
    place, _, _ = pruned
    card = ModelCard.load(place / "out" / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "AutoModelForImageTextToText.from_pretrained" in card.text and "AutoModelForCausalLM" not in card.text


def test_exports_are_refused(pruned: Any, tmp_path: Path) -> None:
    place, _, _ = pruned
    with pytest.raises(UnsupportedModel, match="multimodal"):
        export_stock(place / "out", tmp_path / "stock", ExportStockConfig(pad=True))
    with pytest.raises(UnsupportedModel, match="multimodal"):
        export_gguf(place / "out", tmp_path / "model.gguf", ExportGgufConfig())


def test_a_config_without_one_for_the_text_gives_the_same_model(tmp_path: Path) -> None:
    """As Qwen2.5-VL is on the Hub."""
    model = tiny_model(CONFIGS["qwen2_5_vl"](), seed=3, kind=AutoModelForImageTextToText)
    new, old = save(model, tmp_path / "new"), tmp_path / "old"
    old.mkdir()
    config = json.loads((new / "config.json").read_text())
    text = config.pop("text_config")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": text.pop("rope_parameters")["mrope_section"]}
    (old / "config.json").write_text(json.dumps({**text, "rope_theta": 10_000.0, **config}))
    save_file(tensors(new), old / "model.safetensors")
    options = PruneConfig(ratio=0.4, calibration=(save_tokens(tmp_path / "t.npy", random_tokens(8, 24) % 90),))
    for path in (new, old):
        flap_stream.prune(path, tmp_path / f"out-{path.name}", options)
    ours, theirs = (tensors(tmp_path / f"out-{name}") for name in ("old", "new"))
    assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in ours.items())
    ids = torch.from_numpy(random_tokens(2, 20, seed=5) % 90)
    with torch.no_grad():
        logits = [load_multimodal(tmp_path / f"out-{name}")(input_ids=ids).logits for name in ("old", "new")]
    assert torch.equal(*logits)


def test_a_dry_run_on_a_bare_config_is_of_the_decoder(tmp_path: Path) -> None:
    model = tiny_model(CONFIGS["qwen2_5_vl"](), kind=AutoModelForImageTextToText)
    save(model, tmp_path / "model")
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "bare")
    whole, bare = (forecast(tmp_path / name, tmp_path / "out", PruneConfig(device="cpu")) for name in ("model", "bare"))
    vision = sum(tensor.numel() for name, tensor in tensors(tmp_path / "model").items() if "visual" in name)
    assert whole.parameters - bare.parameters == vision and not bare.has_headers
