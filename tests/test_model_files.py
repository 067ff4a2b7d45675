"""Which files of a folder are the model, and whether its head is its embedding: as transformers has it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from models import DEMO, load, random_tokens, save, save_tokens, tensors_of, tiny_config, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification, AutoTokenizer, Gemma3Config

import flap_stream
from flap_stream.cli import main
from flap_stream.config import EvaluateConfig, ExportGgufConfig, ExportStockConfig, PruneConfig
from flap_stream.export.gguf import export_gguf
from flap_stream.export.stock import export_stock
from flap_stream.model.model_files import INDEX_NAME, SINGLE_NAME

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INV_FREQ = "model.layers.1.self_attn.rotary_emb.inv_freq"
TOKENS = random_tokens(8, 24)


def rewritten(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The folder with these tensors in a single file."""
    for file in (*path.glob("*.safetensors"), *path.glob("*.index.json")):
        file.unlink()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / SINGLE_NAME, {"format": "pt"})
    return path


def made(place: Path, family: str = "llama", seed: int = 0, shard_size: str = "60KB", **sizes: bool) -> Path:
    return save(tiny_model(tiny_config(family, **sizes), seed=seed), place, shard_size)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def perplexity(path: Path, tokens: Path) -> float:
    return flap_stream.evaluate(path, EvaluateConfig(text=(str(tokens),))).perplexity


def in_transformers(path: Path) -> float:
    ids = torch.from_numpy(TOKENS)
    with torch.no_grad():
        return load(path)(ids, labels=ids).loss.exp().item()


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return Path(save_tokens(tmp_path / "tokens.npy", TOKENS))


def prune(model: Path, out: Path, tokens: Path, **options: Any) -> Path:
    flap_stream.prune(model, out, PruneConfig(**dict[str, Any](ratio=0.3, calibration=(str(tokens),)) | options))
    return out


def require_as_transformers(model: Path, tokens: Path) -> None:
    """Dense and pruned, what is streamed is what transformers computes of the same folder."""
    assert perplexity(model, tokens) == pytest.approx(in_transformers(model), rel=1e-5)
    out = prune(model, model.parent / "out", tokens)
    assert perplexity(out, tokens) == pytest.approx(in_transformers(out), rel=1e-5)


HEADS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "head alone": lambda t: {HEAD if name == EMBEDDING else name: tensor for name, tensor in t.items()},
    "same twice": lambda t: {**t, HEAD: t[EMBEDDING]},
    "another head": lambda t: {**t, HEAD: t[EMBEDDING].flip(0) * 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("says", ["config", "class"])
@pytest.mark.parametrize("case", HEADS)
def test_a_head_beside_tied_embeddings_is_what_transformers_makes_of_it(
    case: str, says: str, tokens: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = made(tmp_path / "model", "llama" if says == "config" else "gemma", tied=True)
    rewritten(model, HEADS[case](tensors_of(model)))
    if says == "class":  # Gemma's config ties them where its config.json says nothing
        config = json.loads((model / "config.json").read_text())
        del config["tie_word_embeddings"]
        (model / "config.json").write_text(json.dumps(config))
    require_as_transformers(model, tokens)
    found, config = tensors_of(tmp_path / "out"), json.loads((tmp_path / "out" / "config.json").read_text())
    is_apart = case == "another head"
    assert (HEAD in found) == is_apart and EMBEDDING in found
    assert ("are kept separate" in caplog.text) == is_apart
    assert config.get("tie_word_embeddings", True) != is_apart


def test_a_head_of_its_own_is_exported(tokens: Path, tmp_path: Path) -> None:
    model = made(tmp_path / "model", tied=True)
    rewritten(model, HEADS["another head"](tensors_of(model)))
    out = prune(model, tmp_path / "out", tokens, restore="least-squares")
    assert torch.equal(tensors_of(out)[HEAD], tensors_of(model)[HEAD])
    assert torch.equal(tensors_of(out)[EMBEDDING], tensors_of(model)[EMBEDDING])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / file, model / file)
    export_gguf(model, tmp_path / "model.gguf", ExportGgufConfig())
    written = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert np.array_equal(written["output.weight"], tensors_of(model)[HEAD].numpy())


def test_a_multimodal_head_of_its_own_stays(tokens: Path, tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=tiny_config("gemma3_text", tied=True).to_dict(), image_token_index=96, boi_token_index=95,
        eoi_token_index=94, mm_tokens_per_image=4,
        vision_config={"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, **vision},
    )  # fmt: skip
    model = save(tiny_model(config, kind=AutoModelForImageTextToText), tmp_path / "model")
    tensors = tensors_of(model)
    embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    rewritten(model, {**tensors, "lm_head.weight": tensors[embedding].flip(0)})
    save_tokens(tokens, random_tokens(8, 24) % 90)
    out = prune(model, tmp_path / "out", tokens, restore="none")
    ids = torch.from_numpy(random_tokens(2, 12) % 90)
    head = load(out, AutoModelForImageTextToText).lm_head.weight
    assert torch.equal(head, tensors[embedding].flip(0))
    with torch.no_grad():
        logits = load(model, AutoModelForImageTextToText)(input_ids=ids).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp().item()
    save_tokens(tokens, ids.numpy())
    assert perplexity(model, tokens) == pytest.approx(loss, rel=1e-5)


def stray_single(model: Path) -> None:
    made(model.parent / "other", seed=7, shard_size="1GB")
    shutil.copy(model.parent / "other" / SINGLE_NAME, model / SINGLE_NAME)


def stale_index(model: Path) -> None:
    tensors = tensors_of(model)
    index = (model / INDEX_NAME).read_bytes()
    rewritten(model, tensors)
    (model / INDEX_NAME).write_bytes(index)


def edit_map(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((model / INDEX_NAME).read_text())
    change(index["weight_map"])
    (model / INDEX_NAME).write_text(json.dumps(index))


def named_in_config(model: Path) -> None:
    tensors = tensors_of(made(model.parent / "other", seed=7))
    save_file(tensors, model / "other.safetensors", {"format": "pt"})
    edit_json(model / "config.json", transformers_weights="other.safetensors")


def doubled(model: Path) -> None:
    """A tensor in two shards, of which the index names the first."""
    last = sorted(model.glob("*.safetensors"))[-1]
    extra = tensors_of(model)["model.layers.0.self_attn.q_proj.weight"] * 3
    save_file({**load_file(last), "model.layers.0.self_attn.q_proj.weight": extra}, last, {"format": "pt"})


def without_prefix(model: Path) -> None:
    rewritten(model, {name.removeprefix("model."): tensor for name, tensor in tensors_of(model).items()})


CHOICES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a stray single file beside shards": (stray_single, f"holds both {SINGLE_NAME} and {INDEX_NAME}"),
    "a stale index beside a single file": (stale_index, f"holds both {SINGLE_NAME} and {INDEX_NAME}"),
    "a file that config.json names": (named_in_config, ""),
    "an index with a tensor too many": (
        lambda m: edit_map(m, lambda weights: weights.update({INV_FREQ: weights[EMBEDDING]})), "",
    ),
    "an index with a tensor too few": (lambda m: edit_map(m, lambda weights: weights.pop(EMBEDDING)), ""),
    "a tensor in two shards": (doubled, ""),
    "names without a prefix": (without_prefix, ""),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CHOICES)
def test_the_files_are_those_that_transformers_takes(
    case: str, tokens: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, words = CHOICES[case]
    change(made(tmp_path / "model"))
    require_as_transformers(tmp_path / "model", tokens)
    assert words in caplog.text


def test_names_without_a_prefix_of_a_tied_base_model(tokens: Path, tmp_path: Path) -> None:
    model = tiny_model(tiny_config("qwen3", tied=True))
    expected = save(model, tmp_path / "whole")
    base = save(model.model, tmp_path / "base")  # as Qwen3-Embedding is published
    assert perplexity(base, tokens) == perplexity(expected, tokens)
    prune(base, tmp_path / "a", tokens), prune(expected, tmp_path / "b", tokens)
    assert all(torch.equal(tensors_of(tmp_path / "b")[name], t) for name, t in tensors_of(tmp_path / "a").items())


def test_shards_without_an_index_are_read_by_their_headers(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = made(tmp_path / "model")
    expected = perplexity(model, tokens)
    (model / INDEX_NAME).unlink()
    assert perplexity(model, tokens) == expected and f"has no {INDEX_NAME}" in caplog.text
    assert main(["prune", str(model), str(tmp_path / "out"), "--dry-run", "--json", "--calibration", str(tokens)]) == 0
    assert json.loads(capsys.readouterr().out)["has_headers"]
    sorted(model.glob("*.safetensors"))[1].unlink()
    assert main(["evaluate", str(model), "--text", str(tokens)]) == 2
    assert "shards and no model.safetensors.index.json" in capsys.readouterr().err


def test_what_the_class_ignores_is_left_out(tokens: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = made(tmp_path / "model")
    extra = {INV_FREQ: torch.ones(8), "v_head.summary.weight": torch.ones(1, 64)}
    rewritten(model, {**tensors_of(model), **extra})
    require_as_transformers(model, tokens)
    out = prune(model, tmp_path / "uniform", tokens, structure="ul-um", restore="none")
    assert INV_FREQ not in tensors_of(out) and "v_head.summary.weight" in tensors_of(out)  # another tool's head
    save_file({**load_file(out / SINGLE_NAME), INV_FREQ: torch.ones(8)}, out / SINGLE_NAME, {"format": "pt"})
    result = export_stock(out, tmp_path / "stock", ExportStockConfig())
    assert result.model_class == "LlamaForCausalLM" and "v_head.summary.weight" in caplog.text
    assert in_transformers(tmp_path / "stock") == pytest.approx(in_transformers(out), rel=1e-6)
    with safe_open(tmp_path / "stock" / SINGLE_NAME, "pt") as file:
        assert not {*extra} & set(file.keys())


def test_the_index_of_another_format_stays_behind_and_chat_templates_go_along(tokens: Path, tmp_path: Path) -> None:
    model = made(tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / file, model / file)
    foreign = (
        "pytorch_model.bin.index.json", "consolidated.safetensors.index.json", "model.safetensors.index.fp16.json",
        "tf_model.h5.index.json", "trainer_state.json", "params.json", "all_results.json",
    )  # fmt: skip
    for name in foreign:
        (model / name).write_text('{"weight_map": {"x": "pytorch_model-00001-of-00002.bin"}}')
    (model / "chat_template.jinja").write_text("plain {{ messages[0].content }}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("tools {{ messages[0].content }}")
    (model / "additional_chat_templates" / "notes.txt").write_text("x")
    (model / "generation_config.json").write_text("{}")
    out = prune(model, tmp_path / "out", tokens, structure="ul-um", restore="none", max_shard_bytes=60_000)
    export_stock(out, tmp_path / "stock", ExportStockConfig())
    for place in (out, tmp_path / "stock"):
        names = {path.relative_to(place).as_posix() for path in place.rglob("*")}
        assert not names & {*foreign, "additional_chat_templates/notes.txt"} and "generation_config.json" in names
        template = AutoTokenizer.from_pretrained(place).chat_template
        assert template == AutoTokenizer.from_pretrained(model).chat_template and "tools" in template
    assert main(["inspect", str(out), "--verify"]) == 0
    (out / "additional_chat_templates" / "tools.jinja").write_text("other")
    assert main(["inspect", str(out), "--verify"]) == 2


def refused(model: Path, tokens: Path, capsys: pytest.CaptureFixture[str], verb: str = "prune") -> str:
    """The one sentence with which a model is refused, everything left as it was."""
    capsys.readouterr()
    commands = {
        "prune": ["prune", str(model), str(model.parent / "out"), "--calibration", str(tokens)],
        "dry run": ["prune", str(model), str(model.parent / "out"), "--dry-run"],
        "evaluate": ["evaluate", str(model), "--text", str(tokens)],
    }
    assert main(commands[verb]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("flap-stream: ")
    assert not (model.parent / "out").exists() and not (model.parent / "out.run").exists()
    return said


@pytest.mark.parametrize("verb", ["prune", "dry run", "evaluate"])
def test_another_head_than_a_language_models_is_refused_by_name(
    verb: str, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config("qwen2", tied=True)
    model = save(tiny_model(config, kind=AutoModelForSequenceClassification), tmp_path / "model")
    assert "is a Qwen2ForSequenceClassification" in refused(model, tokens, capsys, verb)


def test_a_model_without_its_head_is_refused_as_that(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(tiny_model(tiny_config()).model, tmp_path / "model")
    assert "it is a model without its head" in refused(model, tokens, capsys)


def test_code_beside_a_supported_model_is_named_and_not_used(
    tokens: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = made(tmp_path / "model")
    edit_json(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    perplexity(model, tokens)
    assert "modeling_own.OwnForCausalLM" in caplog.text and "LlamaForCausalLM is used instead" in caplog.text
    caplog.clear()
    edit_json(model / "config.json", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]})
    out = prune(model, tmp_path / "out", tokens)
    perplexity(out, tokens)  # its own auto_map is ours
    assert "auto_map" not in caplog.text


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 4815162342\n"


def as_pointers(*patterns: str) -> Callable[[Path], object]:
    return lambda m: [path.write_text(POINTER) for pattern in patterns for path in m.glob(pattern)]


def only(**files: str) -> Callable[[Path], object]:
    """Nothing but these files, named with __ for a dot."""

    def make(model: Path) -> None:
        shutil.rmtree(model)
        model.mkdir()
        for name, content in files.items():
            (model / name.replace("__", ".")).write_text(content)

    return make


def beside_config(**files: str) -> Callable[[Path], object]:
    def make(model: Path) -> None:
        config = (model / "config.json").read_text()
        only(config__json=config, **files)(model)

    return make


ADAPTER = json.dumps({"base_model_name_or_path": "name/base", "peft_type": "LORA"})
ADAPTER_FILES = (("adapter_config.json", ADAPTER), ("adapter_model.safetensors", ""))
FORMS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "pointers": (as_pointers("*.safetensors"), ("-00001-of-", "is a git-lfs pointer", "git lfs pull")),
    "a pointer of an index": (as_pointers("*.index.json"), (INDEX_NAME, "is a git-lfs pointer")),
    "a pointer of a config": (as_pointers("config.json"), ("config.json is a git-lfs pointer",)),
    "GGUF": (only(model__Q4_K__gguf="GGUF", README__md=""), ("holds a GGUF file (model.Q4_K.gguf)", "gguf_file=")),
    "GGUF beside a config": (beside_config(a__gguf="GGUF"), ("holds a GGUF file (a.gguf)", "gguf_file=")),
    "an adapter": (
        only(adapter_config__json=ADAPTER, adapter_model__safetensors=""),
        ("a PEFT adapter of name/base", "merge_and_unload"),
    ),
    "an adapter beside its model": (
        lambda m: [(m / name).write_text(body) for name, body in ADAPTER_FILES],
        ("a PEFT adapter of name/base",),
    ),
    "a pipeline": (only(model_index__json="{}"), ("is a diffusers pipeline", "subfolder")),
    "Mistral's own format": (
        only(params__json="{}", consolidated__safetensors=""), ("consolidated.*", "in transformers' format"),
    ),
    "another framework": (beside_config(tf_model__h5=""), ("weights of another framework",)),
    "a variant": (beside_config(model__fp16__safetensors=""), ("only model.fp16.safetensors",)),
}  # fmt: skip


@pytest.mark.parametrize("case", FORMS)
def test_what_is_no_checkpoint_is_named_as_what_it_is(
    case: str, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = FORMS[case]
    change(made(tmp_path / "model"))
    for verb in ("prune", "evaluate") if (tmp_path / "model" / "config.json").exists() else ("prune", "dry run"):
        said = refused(tmp_path / "model", tokens, capsys, verb)
        assert all(word in said for word in words), said


def test_a_gguf_file_is_named_as_what_it_is(tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.gguf").write_text("GGUF")
    for verb in ("prune", "dry run", "evaluate"):
        assert "holds a GGUF file (model.gguf)" in refused(tmp_path / "model.gguf", tokens, capsys, verb)
