"""What can be said of the vLLM plugin without vLLM; tools/check_vllm.sh runs it in a real one."""

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flap_stream.model.families import FAMILIES


def test_vllm_finds_the_plugin(pruned_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = entry_points(group="vllm.general_plugins", name="flap_stream")
    registered: dict[str, Any] = {}
    registry = SimpleNamespace(register_model=registered.__setitem__)
    with monkeypatch.context() as patched, patch.dict(CONFIG_MAPPING._extra_content):
        patched.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
        found.load()()
        assert CONFIG_MAPPING["flap_stream_llama"].__name__ == "PrunedLlamaConfig"
        assert AutoConfig.from_pretrained(pruned_demo).model_type == "llama"  # without the trust flag
    assert set(registered) <= {family.pruned_classes["AutoModelForCausalLM"] for family in FAMILIES.values()}
    assert {f"Pruned{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen2", "Qwen3")} <= set(registered)


def test_importing_the_plugin_loads_nothing_heavy() -> None:
    code = "import sys, json, flap_stream.integrations.vllm; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not {"torch", "transformers", "vllm", "zarr", "numpy"} & set(modules)
