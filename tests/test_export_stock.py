"""Stock checkpoints compute what the pruned ones do, in classes of transformers alone."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import DENSE, FORMS, load, random_tokens, save, save_tokens, tiny_config, tiny_model
from safetensors.torch import load_file

import flap_stream
from flap_stream.cli import main
from flap_stream.config import ExportStockConfig, PruneConfig
from flap_stream.errors import OutputConflict, UnsupportedModel
from flap_stream.export.stock import export_stock
from flap_stream.model.families import FAMILIES

pytestmark = pytest.mark.slow

# Families whose own class in transformers has biases on o_proj and down_proj, or whose layers compute what Llama's do.
WITH_BIASES = {
    "arcee": "ArceeForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "granite": "GraniteForCausalLM",
    "granite_swa": "GraniteSWAForCausalLM",
    "hyperclovax": "HyperCLOVAXForCausalLM",
    "jais2": "Jais2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "minicpm3": "MiniCPM3ForCausalLM",
    "mistral": "LlamaForCausalLM",
    "nemotron": "NemotronForCausalLM",
    "persimmon": "PersimmonForCausalLM",
    "phi": "PhiForCausalLM",
    "qwen2": "LlamaForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
}
BESIDE = tempfile.TemporaryDirectory(prefix="flap-stream-stock-")
MIXTURES = [family for family, row in FAMILIES.items() if row.experts is not None]
FUSED = ("gpt_oss", "llama4_text")  # whose dense checkpoints have all experts of a layer in one tensor
ALL_HEADS = ("helium",)  # families whose class has no other number of heads, which padding restores


def pruned(place: Path, family: str, structure: str, restore: str, kv_heads: int = 2, **plan: Any) -> Path:
    run = collected(family, kv_heads)
    flap_stream.plan(run, structure=structure, **{"ratio": 0.5, **plan})
    flap_stream.rewrite(run, place / "out", restore=restore, max_shard_bytes=60_000)
    return place / "out"


@cache
def collected(family: str, kv_heads: int) -> Path:
    """A run directory beside its model, which serves all plans."""
    place = Path(tempfile.mkdtemp(prefix=f"{family}-", dir=BESIDE.name))
    model = tiny_model(tiny_config(family, kv_heads, family.startswith("gemma")), seed=3)
    tokens = save_tokens(place / "tokens.npy", random_tokens(8, 24))
    flap_stream.collect(save(model, place / "model"), place / "run", calibration=tokens)
    return place / "run"


def require_equal(out: Path, stock: Path) -> None:
    ours = load(out)
    theirs = load(stock, trust=False)
    ids = torch.from_numpy(random_tokens(2, 20, seed=6))
    with torch.no_grad():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() <= 1e-5
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **settings), theirs.generate(ids, **settings))


@pytest.mark.parametrize("family", FORMS)
def test_layers_of_one_size_without_biases_are_the_familys_own_class(family: str, tmp_path: Path) -> None:
    out = pruned(tmp_path, family, "ul-um", "none")
    result = export_stock(out, tmp_path / "stock", ExportStockConfig(max_shard_bytes=60_000))
    assert result.model_class == FAMILIES[family].causal_class
    assert result.parameters_after == result.parameters_before
    require_equal(out, tmp_path / "stock")


def test_layers_of_many_sizes_need_no_padding_where_the_class_lists_them(tmp_path: Path) -> None:
    out = pruned(tmp_path, "gemma3n_text", "al-am", "none", round_neurons_to=1, ratio=0.45)
    result = export_stock(out, tmp_path / "stock", ExportStockConfig())
    assert result.parameters_after == result.parameters_before
    widths = json.loads((tmp_path / "stock" / "config.json").read_text())["intermediate_size"]
    assert len(set(widths)) == 3 and max(widths) == result.neurons == 96  # of the layer that is kept whole
    require_equal(out, tmp_path / "stock")


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in DENSE if family != "gemma3n_text"])
def test_layers_of_one_size_need_padding_only_where_the_class_has_all_heads(family: str, tmp_path: Path) -> None:
    out = pruned(tmp_path, family, "ul-um", "none", kv_heads=4)
    if family in ALL_HEADS:
        with pytest.raises(UnsupportedModel, match="--pad"):
            export_stock(out, tmp_path / "stock")
    else:
        export_stock(out, tmp_path / "stock")
        require_equal(out, tmp_path / "stock")


@pytest.mark.parametrize("family", [family for family in DENSE if family != "gemma3n_text"])
def test_layers_of_many_sizes_are_padded(family: str, tmp_path: Path) -> None:
    out = pruned(tmp_path, family, "al-am", "none", kv_heads=4, round_neurons_to=1, ratio=0.45)
    with pytest.raises(UnsupportedModel, match="--pad"):
        export_stock(out, tmp_path / "stock", ExportStockConfig())
    assert not (tmp_path / "stock").exists()
    result = export_stock(out, tmp_path / "stock", ExportStockConfig(pad=True))
    assert result.parameters_after > result.parameters_before
    assert result.kv_cache_bytes_after >= result.kv_cache_bytes_before
    require_equal(out, tmp_path / "stock")


@pytest.mark.parametrize(
    ("family", "structure"),
    [*((family, "al-am") for family in DENSE), *((family, "ul-um") for family in ("llama", "granite", "gemma2"))],
)
def test_biases_find_a_class_or_are_refused(family: str, structure: str, tmp_path: Path) -> None:
    out = pruned(tmp_path, family, structure, "bias", kv_heads=4)
    options = ExportStockConfig(pad=structure == "al-am")
    if family in WITH_BIASES:
        result = export_stock(out, tmp_path / "stock", options)
        allowed = {WITH_BIASES[family], *(["SeedOssForCausalLM"] if WITH_BIASES[family] == "LlamaForCausalLM" else [])}
        assert result.model_class in allowed
        require_equal(out, tmp_path / "stock")
    else:
        with pytest.raises(UnsupportedModel, match=r"\.bias of .*; prune with --restore none"):
            export_stock(out, tmp_path / "stock", options)
        assert not (tmp_path / "stock").exists()


def test_the_command_says_what_padding_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = pruned(tmp_path, "llama", "al-am", "bias")
    (out / "LICENSE").write_text("terms")
    assert main(["export-stock", str(out), str(tmp_path / "stock"), "--pad", "--json", "--quiet"]) == 0
    result = json.loads(capsys.readouterr().out)
    sizes = [t.numel() for path in (tmp_path / "stock").glob("*.safetensors") for t in load_file(path).values()]
    assert sum(sizes) == result["parameters_after"] > result["parameters_before"]
    assert (tmp_path / "stock" / "LICENSE").read_text() == "terms"
    card = (tmp_path / "stock" / "README.md").read_text()
    assert "trust_remote_code" not in card and "custom_code" not in card
    assert not list((tmp_path / "stock").glob("*.py")) and not list(tmp_path.glob("*.partial"))


def test_what_is_there_already_stays(tmp_path: Path) -> None:
    out = pruned(tmp_path, "llama", "ul-um", "none")
    for name in ("stock", "other.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("x")
    for name in ("stock", "other"):
        with pytest.raises(OutputConflict, match="move it away"):
            export_stock(out, tmp_path / name, ExportStockConfig())
    assert (tmp_path / "stock" / "precious").exists() and (tmp_path / "other.partial" / "precious").exists()


# --- mixtures of experts ---


def mixture(place: Path, family: str, **options: Any) -> Path:
    """A pruned mixture of experts."""
    model = save(tiny_model(tiny_config(family), seed=3), place / "model")
    text = save_tokens(place / "tokens.npy", random_tokens(8, 24))
    given = {"ratio": 0.5, "calibration": (text,), "max_shard_bytes": 60_000}
    flap_stream.prune(model, place / "out", PruneConfig(**{**given, **options}))
    return place / "out"


def names_in(place: Path) -> set[str]:
    return {name for path in place.glob("*.safetensors") for name in load_file(path)}


@pytest.mark.parametrize("family", MIXTURES)
def test_what_reap_leaves_is_the_familys_own_class(family: str, tmp_path: Path) -> None:
    out = mixture(tmp_path, family, method="reap")
    if family in FUSED:
        with pytest.raises(UnsupportedModel, match=r"reads from one tensor for all; .* trust_remote_code=True"):
            export_stock(out, tmp_path / "stock")
        return
    result = export_stock(out, tmp_path / "stock", ExportStockConfig(max_shard_bytes=60_000))
    assert result.model_class == FAMILIES[family].causal_class and result.parameters_after == result.parameters_before
    assert names_in(tmp_path / "stock") <= names_in(tmp_path / "model")  # as dense checkpoints have them
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    counts = {config[key] for key in config if key.endswith(("num_experts", "num_local_experts", "n_routed_experts"))}
    assert counts == {result.experts} == {3 if family == "qwen3_moe" else 2}
    require_equal(out, tmp_path / "stock")


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_experts_of_many_sizes_are_padded(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = mixture(tmp_path, family, structure="ul-um", restore="none", round_neurons_to=1)
    with pytest.raises(UnsupportedModel, match=r"experts of \d+ to \d+ neurons.*; add --pad .*prune with --method r"):
        export_stock(out, tmp_path / "stock")
    assert main(["export-stock", str(out), str(tmp_path / "stock"), "--pad", "--quiet"]) == 0
    experts, width = (6, 40) if family == "qwen3_moe" else (4, 96)
    assert f"{experts} experts of " in capsys.readouterr().out
    require_equal(out, tmp_path / "stock")
    stock = load(tmp_path / "stock", trust=False).config
    assert max(getattr(stock, "moe_intermediate_size", 0), stock.intermediate_size) >= width // 2


def test_mixtures_of_one_number_of_experts_are_written_and_others_refused(tmp_path: Path) -> None:
    by_loss: dict[str, Any] = {"metric": "fisher", "whole_experts": True, "loss_windows": 5, "restore": "none"}
    for multiple in (None, 3):
        place = tmp_path / str(multiple)
        out = mixture(place, "mixtral", ratio=0.6, min_neurons=28, round_experts_to=multiple, **by_loss)
        kept = [len(layer["kept_experts"]) for layer in json.loads((out / "pruning.json").read_text())["layers"]]
        if multiple is None:
            assert len(set(kept)) > 1
            with pytest.raises(UnsupportedModel, match=r"has \d experts, others up to \d, .* --round-experts-to N, N"):
                export_stock(out, place / "stock", pad=True)
        else:
            assert set(kept) == {multiple}
            assert export_stock(out, place / "stock", pad=True).experts == multiple
            require_equal(out, place / "stock")


def test_shared_experts_that_a_class_has_as_wide_as_the_others_are_not(tmp_path: Path) -> None:
    out = mixture(tmp_path, "dots1", ratio=0.6, restore="none")
    assert max(width for layer in load(out).config.pruned_expert_sizes for width in layer) < 40
    with pytest.raises(UnsupportedModel, match="dots1 accepts 4 experts of 16 neurons beside what else is in its lay"):
        export_stock(out, tmp_path / "stock", pad=True)
