"""GGUF files compute in the real llama.cpp what the pruned checkpoints compute in transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_cpp_model import greedy, llama_model, logits
from models import DEMO, load, random_tokens, save, save_tokens, tiny_config, tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

import flap_stream
from flap_stream.cli import main
from flap_stream.config import ExportGgufConfig, ExportStockConfig, PruneConfig
from flap_stream.errors import OutputConflict, UnsupportedModel
from flap_stream.export.gguf import export_gguf
from flap_stream.export.gguf_architecture import CONVERTIBLE_FROM_STOCK
from flap_stream.export.gguf_vocabulary import _PRE_TOKENIZERS, _TEKKEN
from flap_stream.export.stock import export_stock
from flap_stream.model.families import FAMILIES

pytestmark = pytest.mark.slow

CASES: dict[str, tuple[str, int, bool, dict[str, Any]]] = {
    "llama-grouped": ("llama", 2, False, {}),
    "llama-multi-head": ("llama", 4, False, {}),
    "llama-tied": ("llama", 2, True, {}),
    "llama-biases": ("llama", 2, False, {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", 2, True, {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8}}),
    "llama-linear-rope": ("llama", 2, False, {"rope_parameters": {
        "rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}}),
    "qwen2-yarn": ("qwen2", 2, False, {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}}),
    "mistral": ("mistral", 2, False, {}),
    "mistral-window": ("mistral", 2, False, {"sliding_window": 64}),
    "ministral": ("ministral", 2, False, {"sliding_window": 64}),
    "qwen2": ("qwen2", 2, False, {}),
    "seed_oss": ("seed_oss", 2, False, {}),
    "phi3": ("phi3", 2, False, {}),
    "granite-tied": ("granite", 2, True, {"attention_multiplier": 0.2}),
    "granite": ("granite", 4, False, {"attention_multiplier": 0.2}),
}  # fmt: skip
# Written for layers that compute what Llama's do, and for qwen3 when all have one size and no biases are added.
WRITTEN = {"granite", "llama", "ministral", "mistral", "phi3", "qwen2", "qwen3", "seed_oss"}


def pruned(place: Path, family: str, kv_heads: int = 2, tied: bool = False, **options: Any) -> Path:
    changes = options.pop("changes", {})
    tokens = save_tokens(place / "tokens.npy", random_tokens(8, 24))
    model = tiny_model(tiny_config(family, kv_heads, tied, **changes), seed=3)
    config = PruneConfig(
        **{"ratio": 0.4, "calibration": (tokens,), "round_neurons_to": 1, **options}
    )  # so that layers differ
    flap_stream.prune(save(model, place / "model"), place / "out", config)
    return place / "out"


def require_equal(out: Path, file: Path, ids: np.ndarray, bound: float = 1e-3) -> None:
    """Logits of every position and 32 greedy tokens."""
    model = load(out)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    settings = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    continuation = model.generate(torch.from_numpy(ids)[None], **settings, suppress_tokens=[])[0, len(ids) :].tolist()
    with llama_model(file) as theirs:
        assert np.abs(logits(theirs, ids) - expected).max() <= bound
        assert greedy(theirs, ids, 32) == continuation


@pytest.mark.parametrize("structure", ["al-am", "ul-um"])
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_transformers_does(case: str, structure: str, tmp_path: Path) -> None:
    family, kv_heads, tied, changes = CASES[case]
    out = pruned(tmp_path, family, kv_heads, tied, changes={**changes, "eos_token_id": None}, structure=structure)
    result = export_gguf(out, tmp_path / "model.gguf", ExportGgufConfig(type="f32"))
    assert result.architecture == ("deci" if structure == "al-am" else "llama")
    require_equal(out, tmp_path / "model.gguf", random_tokens(1, 20, seed=5)[0])


def test_an_export_writes_a_line_now_and_then_not_one_for_each_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(tiny_model(tiny_config(layers=9, eos_token_id=None)), tmp_path / "model")
    assert main(["export-gguf", str(model), str(tmp_path / "model.gguf")]) == 0
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("export: ")]
    assert "84 tensors" in printed.out
    assert 5 <= len(lines) <= 11 and lines[-1].startswith("export: 84/84, ")


def test_query_and_key_norms_go_with_one_size_and_no_biases(tmp_path: Path) -> None:
    changes = {"eos_token_id": None}
    out = pruned(tmp_path, "qwen3", changes=changes, structure="ul-um", restore="none")
    assert export_gguf(out, tmp_path / "model.gguf", ExportGgufConfig(type="f32")).architecture == "qwen3"
    require_equal(out, tmp_path / "model.gguf", random_tokens(1, 20, seed=5)[0])


@pytest.mark.parametrize("family", CONVERTIBLE_FROM_STOCK)
def test_families_that_go_through_stock_are_told_so_and_stock_takes_them(family: str, tmp_path: Path) -> None:
    """What llama.cpp's own converter then reads: the family's own class, all layers of one size, without biases."""
    out = pruned(tmp_path, family, structure="ul-um", restore="none")
    with pytest.raises(UnsupportedModel, match="prune with --structure ul-um --restore none, then export-stock"):
        export_gguf(out, tmp_path / "model.gguf", ExportGgufConfig())
    assert not (tmp_path / "model.gguf").exists()
    result = export_stock(out, tmp_path / "stock", ExportStockConfig())
    assert result.model_class == FAMILIES[family].causal_class
    assert result.parameters_after == result.parameters_before


@pytest.mark.parametrize("options", [{"structure": "ul-um"}, {"structure": "al-am", "restore": "none"}])
def test_query_and_key_norms_are_refused_otherwise(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="prune with --structure ul-um --restore none"):
        export_gguf(pruned(tmp_path, "qwen3", **options), tmp_path / "model.gguf", ExportGgufConfig())
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize("family", [*CONVERTIBLE_FROM_STOCK, "mixtral", "olmo", "olmo2", "qwen3_next"])
def test_other_families_are_refused_with_what_works(family: str, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(family, tied=family.startswith("gemma")))
    with pytest.raises(UnsupportedModel, match=r"then export-stock makes what|was not tried"):
        export_gguf(save(model, tmp_path / "model"), tmp_path / "model.gguf", ExportGgufConfig())


def test_rotary_embeddings_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    for i, parameters in enumerate(
        (
            {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
            {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        )
    ):
        family = ("llama", "phi3")[i]
        model = tiny_model(tiny_config(family, rope_parameters=parameters))
        with pytest.raises(UnsupportedModel, match=("dynamic rotary", "a part of each head")[i]):
            export_gguf(save(model, tmp_path / family), tmp_path / "model.gguf", ExportGgufConfig())


def test_the_window_bounds_the_context(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = pruned(tmp_path, "mistral", changes={"sliding_window": 48})
    export_gguf(out, tmp_path / "model.gguf", ExportGgufConfig())
    assert "the context length becomes its 48 tokens" in caplog.text
    with llama_model(tmp_path / "model.gguf") as model:
        assert model.metadata["deci.context_length"] == "48"


@pytest.fixture(scope="module")
def demo_files(pruned_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """The bundled model, dense and pruned, in float32 and in q8_0."""
    place, found = tmp_path_factory.mktemp("gguf"), {}
    for name, model in (("dense", DEMO / "model"), ("pruned", pruned_demo)):
        for kind in ("f32", "q8_0"):
            found[name, kind] = place / f"{name}-{kind}.gguf"
            export_gguf(model, found[name, kind], ExportGgufConfig(type=kind))
    return found


def demo_text() -> str:
    return (DEMO / "evaluation.txt").read_text()


def test_the_demo_model_generates_the_same(pruned_demo: Path, demo_files: dict[tuple[str, str], Path]) -> None:
    ids = np.array(AutoTokenizer.from_pretrained(pruned_demo, trust_remote_code=True)(demo_text()[:200])["input_ids"])
    require_equal(pruned_demo, demo_files["pruned", "f32"], ids)


def test_the_demo_tokenizer_is_the_same(pruned_demo: Path, demo_files: dict[tuple[str, str], Path]) -> None:
    text = demo_text()[:5000] + "  tabs\t and ünïcode 漢字 😶\u200d🌫️ 3.14159\r\n\n x"
    with llama_model(demo_files["pruned", "f32"]) as model:
        assert model.tokenize(text.encode(), add_bos=False) == AutoTokenizer.from_pretrained(
            pruned_demo, trust_remote_code=True
        ).encode(text)


def test_q8_0_errs_as_much_as_on_the_dense_model(demo_files: dict[tuple[str, str], Path]) -> None:
    ids = np.array(AutoTokenizer.from_pretrained(DEMO / "model")(demo_text()[:400])["input_ids"])[:100]
    errors = {}
    for name in ("dense", "pruned"):
        values = []
        for kind in ("f32", "q8_0"):
            with llama_model(demo_files[name, kind]) as model:
                values.append(logits(model, ids))
        errors[name] = np.sqrt(np.square(values[1] - values[0]).mean())
    assert 0 < errors["pruned"] <= 1.5 * errors["dense"]


def test_types_and_sizes(tmp_path: Path, pruned_demo: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {}
    for kind in ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", None):
        result = export_gguf(pruned_demo, tmp_path / f"{kind}.gguf", ExportGgufConfig(type=kind))
        sizes[kind] = result.nbytes
        assert result.file.stat().st_size > result.nbytes
        with llama_model(result.file, 16) as model:
            assert np.isfinite(logits(model, np.arange(5, 13))).all()
        odd = bool(kind and kind.startswith("q"))
        assert (result.unquantised > 0) is odd and ("stay f16" in caplog.text) is odd
        caplog.clear()
    assert sizes[None] == sizes["bf16"] == sizes["f16"] < sizes["f32"] and sizes["q4_0"] < sizes["q8_0"] < sizes["f16"]


def test_the_command_refuses_what_is_there(
    tmp_path: Path, pruned_demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "model.gguf"
    assert main(["export-gguf", str(pruned_demo), str(file), "--type", "q8_0", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["architecture"] == "deci"
    before = file.read_bytes()
    assert main(["export-gguf", str(pruned_demo), str(file), "--quiet"]) == 2
    assert "move it away" in capsys.readouterr().err and file.read_bytes() == before
    with pytest.raises(OutputConflict):
        export_gguf(pruned_demo, file, ExportGgufConfig())


def test_a_damaged_tokenizer_is_refused(tmp_path: Path, pruned_demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "pruned"
    shutil.copytree(pruned_demo, place)
    whole = (place / "tokenizer.json").read_bytes()
    for damaged in (whole[:-100], b"[]", b"{}"):
        (place / "tokenizer.json").write_bytes(damaged)
        assert main(["export-gguf", str(place), str(tmp_path / "model.gguf")]) == 2
        assert "tokenizer.json is truncated or damaged" in capsys.readouterr().err
    assert not (tmp_path / "model.gguf").exists()


def byte_level(*splits: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(splits))
    tokenizer.decoder = decoders.ByteLevel()
    return train(tokenizer, pre_tokenizers.ByteLevel.alphabet())


def split(pattern: str) -> Tokenizer:
    no_regex = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return byte_level(pre_tokenizers.Split(Regex(pattern), "isolated"), no_regex)


def sentencepiece_like() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return train(tokenizer, [], ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))])


def train(tokenizer: Tokenizer, alphabet: list[str], special: list[str] | None = None) -> Tokenizer:
    special = special or ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, limit_alphabet=300, show_progress=False
    )
    lines = demo_text()[:40_000].splitlines()
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


PATTERNS = [steps[0] for steps in _PRE_TOKENIZERS if len(steps) == 1 and steps[0] != "ByteLevel"]
TOKENIZERS = {
    "gpt-2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "sentencepiece": sentencepiece_like,
} | {_PRE_TOKENIZERS[(p,)][False]: lambda p=p: split(p) for p in PATTERNS}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_split_text_alike(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]()
    path = save(tiny_model(tiny_config(vocab_size=1000)), tmp_path / "model")
    if name == "sentencepiece":  # a byte is a token, no control token, as in Llama's own
        body = json.loads(tokenizer.to_str())
        body["added_tokens"] = body["added_tokens"][:3]
        tokenizer = Tokenizer.from_str(json.dumps(body))
    tokenizer.save(str(path / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": "{{ messages }}"}
    (path / "tokenizer_config.json").write_text(json.dumps(special))
    export_gguf(path, tmp_path / "model.gguf", ExportGgufConfig())
    text = demo_text()[50_000:52_000] + "\n\nIt's 1234567 o'clock, we'LL see;  3.5%!? naïve\n"
    with llama_model(tmp_path / "model.gguf") as model:
        assert model.tokenize(text.encode(), add_bos=False) == tokenizer.encode(text, add_special_tokens=False).ids
        assert (model.token_bos(), model.token_eos()) == (1, 2)
        assert model.metadata["tokenizer.chat_template"] == "{{ messages }}"


def test_an_unknown_pre_tokenizer_is_named_by_the_user(tmp_path: Path) -> None:
    path = save(tiny_model(tiny_config(vocab_size=1000)), tmp_path / "model")
    split(_TEKKEN + "|[0-9]").save(str(path / "tokenizer.json"))
    with pytest.raises(UnsupportedModel, match="--tokenizer-pre"):
        export_gguf(path, tmp_path / "model.gguf", ExportGgufConfig())
    export_gguf(path, tmp_path / "model.gguf", ExportGgufConfig(tokenizer_pre="tekken"))
    with llama_model(tmp_path / "model.gguf", 16) as model:
        assert model.metadata["tokenizer.ggml.pre"] == "tekken"


def test_a_layer_without_heads_is_refused(tmp_path: Path) -> None:
    out = pruned(tmp_path, "llama", min_heads=0, min_neurons=0, structure="al-mm", remove_heads=12)
    with pytest.raises(UnsupportedModel, match=r"layer \d.* has no attention left.*--min-heads 1"):
        export_gguf(out, tmp_path / "model.gguf", ExportGgufConfig())
