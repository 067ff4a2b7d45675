"""A pruned checkpoint in transformers: without the trust flag it asks for it, with it nothing is said."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import load, random_tokens, save, save_tokens, tiny_config, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import flap_stream
from flap_stream.config import EvaluateConfig, PruneConfig
from flap_stream.model.architecture import PRUNED_TYPE
from flap_stream.model.families import FAMILIES
from flap_stream.modeling import modeling_flap_stream

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.tensor([[3, 4, 5]])
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)
model.save_pretrained(sys.argv[2])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loading")


def pruned(place: Path, family: str) -> Path:
    out = place / f"{family}-pruned"
    if not out.exists():
        save(tiny_model(tiny_config(family)), place / family)
        tokens = save_tokens(place / "tokens.npy", random_tokens(4, 16))
        flap_stream.prune(place / family, out, PruneConfig(ratio=0.4, calibration=(tokens,)))
    return out


@pytest.mark.parametrize("trust", [None, False])
@pytest.mark.parametrize("auto", [AutoConfig, AutoModel, AutoModelForCausalLM])
def test_without_the_flag_loading_asks_for_it(auto: Any, trust: bool | None, pruned_demo: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        auto.from_pretrained(pruned_demo, trust_remote_code=trust)


@pytest.mark.slow
def test_as_documented_loading_generating_and_saving_warn_of_nothing(pruned_demo: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOAD, str(pruned_demo), str(tmp_path / "saved")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "[transformers]" not in done.stderr and "arn" not in done.stderr, done.stderr
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(load(pruned_demo)(ids).logits, load(tmp_path / "saved")(ids).logits)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=False)


@pytest.mark.parametrize("family", ["gemma3_text", "llama", "mistral", "phi3", "qwen3_moe"])
def test_the_type_is_our_own_in_the_file_alone(family: str, place: Path) -> None:
    out = pruned(place, family)
    assert json.loads((out / "config.json").read_text())["model_type"] == PRUNED_TYPE + family
    config = load(out).config
    dense = AutoConfig.from_pretrained(place / family)
    assert config.model_type == config.to_dict()["model_type"] == dense.model_type
    assert isinstance(config, type(dense)) and config.intermediate_size == dense.intermediate_size
    config.save_pretrained(place / f"{family}-config")
    assert json.loads((place / f"{family}-config" / "config.json").read_text())["model_type"] == PRUNED_TYPE + family


def test_every_family_has_a_config_of_that_name() -> None:
    assert modeling_flap_stream.OWN_TYPE == PRUNED_TYPE
    for name, family in FAMILIES.items():
        for pruned_class in family.pruned_classes.values():
            kind = getattr(modeling_flap_stream, pruned_class)
            assert kind.config_class.__name__ == f"Pruned{type(tiny_config(name)).__name__}"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # asked for by PEFT
@pytest.mark.parametrize("family", ["gemma2", "llama", "mistral", "qwen2"])
def test_peft_knows_what_to_adapt(family: str, place: Path) -> None:
    model = get_peft_model(load(pruned(place, family)), LoraConfig(r=2, task_type="CAUSAL_LM"))
    dense = get_peft_model(load(place / family), LoraConfig(r=2, task_type="CAUSAL_LM"))
    adapted = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert adapted and adapted == {name for name, _ in dense.named_parameters() if "lora_" in name}


def test_a_pruned_model_is_pruned_again_and_one_of_an_earlier_version_too(place: Path) -> None:
    out = pruned(place, "llama")
    config = json.loads((out / "config.json").read_text())
    tokens = (str(place / "tokens.npy"),)
    flap_stream.prune(out, place / "twice", PruneConfig(ratio=0.2, calibration=tokens))
    assert json.loads((place / "twice" / "config.json").read_text())["model_type"] == "flap_stream_llama"
    load(place / "twice")
    found = flap_stream.evaluate(out, EvaluateConfig(text=tokens)).perplexity
    del config["auto_map"]["AutoConfig"]
    (out / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert flap_stream.evaluate(out, EvaluateConfig(text=tokens)).perplexity == found
    flap_stream.prune(out, place / "thrice", PruneConfig(ratio=0.2, calibration=tokens))
    load(place / "thrice")
