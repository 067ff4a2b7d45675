"""Whose code runs a model: that of transformers or this package; the model's own only where the user trusts it.

Every command decides it here. Code that a checkpoint names is compared and reported, never loaded.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from flap_stream.errors import InvalidModel, UnsupportedModel
from flap_stream.model.architecture import dense_type, is_pruned
from flap_stream.model.families import FAMILIES
from flap_stream.storage.files import file_digest

MODELING_NAME = "modeling_flap_stream.py"
_CUSTOM_GENERATE = "custom_generate/generate.py"  # run by transformers' from_pretrained where code is trusted

# Keys of a config.json that say where code is or how it is run. transformers chooses the implementations, which the
# keys could otherwise replace by any kernel on the Hub.
_NOT_THE_ARCHITECTURE = {
    *("auto_map", "architectures", "dtype", "attn_implementation", "_attn_implementation", "experts_implementation")
}


def modeling_file() -> bytes:
    """The modelling file that is copied into every pruned checkpoint."""
    return package_files("flap_stream.modeling").joinpath(MODELING_NAME).read_bytes()


def model_class(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """The class that runs the causal language model of a config.json, and its config in transformers.

    It is an auto class or, for a pruned checkpoint, a class of this package's own copy of the modelling file.
    Raises KeyError for a model_type that transformers does not know, and whatever it raises for a wrong config.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from flap_stream.modeling import modeling_flap_stream

    known = decoded({key: value for key, value in config.items() if key not in _NOT_THE_ARCHITECTURE})
    if not is_pruned(config):
        return AutoModelForCausalLM, CONFIG_MAPPING[config["model_type"]].from_dict(known)
    pruned = getattr(modeling_flap_stream, FAMILIES[config["model_type"]].pruned_classes["AutoModelForCausalLM"])
    return pruned, pruned.config_class.from_dict(known)


def decoded(value: Any) -> Any:
    """A value of a config.json, its infinities as numbers; transformers writes `{"__float__": "Infinity"}`."""
    if isinstance(value, Mapping):
        return float(value["__float__"]) if value.keys() == {"__float__"} else {k: decoded(v) for k, v in value.items()}
    return [decoded(item) for item in value] if isinstance(value, list) else value


def load_model(directory: Path, dtype: Any, trust_remote_code: bool) -> Any:
    """The causal language model of a directory, all of it in memory; its own code runs only if trusted.

    dtype: a torch dtype, or `auto` for that of the tensors.
    """
    if trust_remote_code:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, trust_remote_code=True)
    kind, config = model_class(dense_type(json.loads((directory / "config.json").read_bytes())))
    return kind.from_pretrained(directory, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True)


def tokenizer_config(directory: Path) -> Any:
    """The config from which transformers chooses the tokenizer of a pruned checkpoint; None for any other model.

    Without it, transformers would have to run the checkpoint's code to find out the family.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):  # reported by whatever needs it
        return None
    dense = dense_type(config) if isinstance(config, dict) else config
    if dense is config or dense["model_type"] not in CONFIG_MAPPING:
        return None
    return CONFIG_MAPPING[dense["model_type"]].from_dict({"tokenizer_class": dense.get("tokenizer_class")})


def require_known_code(config: Mapping[str, Any], directory: Path, where: str) -> None:
    """Raise InvalidModel if trusting a checkpoint would make transformers run code that this package did not write.

    Raises UnsupportedModel if there is no code for it at all.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    foreign = sorted(set(_foreign_code(config, directory)))
    if foreign:
        raise InvalidModel(
            f"{where} needs code that this version did not write ({', '.join(foreign)[:200]}); read it and allow it "
            "with --trust-remote-code"
        )
    known = FAMILIES if is_pruned(config) else CONFIG_MAPPING
    if config.get("model_type") not in known:
        raise UnsupportedModel(f"{where} has model_type {config.get('model_type')!r}, which transformers does not know")


def _foreign_code(config: Mapping[str, Any], directory: Path) -> Iterator[str]:
    """Names of code in config.json or the directory that is not this package's own."""
    auto_map = config.get("auto_map") or {}
    references = auto_map.values() if isinstance(auto_map, Mapping) else [auto_map]
    is_own = _is_own(directory / MODELING_NAME)
    for reference in references:
        module, dot, name = reference.partition(".") if isinstance(reference, str) else ("", "", "")
        if f"{module}.py" != MODELING_NAME or not dot or not name.isidentifier():
            yield str(reference)
        elif not is_own:
            yield MODELING_NAME
    if (directory / _CUSTOM_GENERATE).exists():
        yield _CUSTOM_GENERATE


def _is_own(path: Path) -> bool:
    """Whether a file is byte for byte the one that this package writes."""
    own = modeling_file()
    if not path.is_file() or path.stat().st_size != len(own):
        return False
    return file_digest(path) == hashlib.sha256(own).hexdigest()
