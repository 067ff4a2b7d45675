"""Multimodal models: only their text decoder is pruned, under the names that a text model has."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flap_stream.errors import InvalidModel
from flap_stream.model.families import FAMILIES

# Text decoders without a causal class of their own, and the family that computes the same for text: with one position
# for each token, their rotary embeddings of three axes are the plain ones.
_RUN_AS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
# Models whose config.json may hold the decoder's keys itself, and whose files name its tensors like a text model's.
_FLAT = ("qwen2_vl", "qwen2_5_vl")
_FLAT_PREFIX, _NESTED_PREFIX = "model.", "model.language_model."
_BESIDE = ("vision", "visual", "multi_modal", "embed_vision", "audio", "embed_audio")  # the decoder, in newer files
_OF_BOTH = ("architectures", "model_type", "tie_word_embeddings", "dtype", "torch_dtype", "transformers_version")


@dataclass(frozen=True)
class Wrapper:
    """A multimodal model around a text decoder.

    config: its whole config.json. prefix: what the names of the decoder's tensors begin with in its files.
    """

    config: dict[str, Any]
    prefix: str

    def inner(self, name: str) -> str:
        """A tensor's name in a plain text model; names outside the decoder are unchanged."""
        if name.startswith(self.prefix):
            return "model." + name.removeprefix(self.prefix)
        return name.removeprefix("language_model.") if name.startswith("language_model.lm_head.") else name

    def outer(self, name: str) -> str:
        """The name, in files that transformers loads, of a tensor that `inner` calls `name`."""
        if name.startswith("model.") and not name.startswith(tuple(f"model.{part}" for part in _BESIDE)):
            prefix = _NESTED_PREFIX if self.prefix == _FLAT_PREFIX else self.prefix
            return prefix + name.removeprefix("model.")
        return f"model.{name}" if self.prefix == _FLAT_PREFIX and name.startswith("visual.") else name


def wrapper_of(config: dict[str, Any], names: Iterable[str]) -> Wrapper | None:
    """The multimodal model of a config.json; None for a plain language model. names: of all its tensors."""
    text = config.get("text_config")
    if not isinstance(text, dict) or config.get("model_type") in FAMILIES:
        return None
    if text.get("model_type") not in (*FAMILIES, *_RUN_AS):
        return None
    forms = ("language_model.model.", "language_model.layers.", _NESTED_PREFIX, f"{_FLAT_PREFIX}layers.")
    names = list(names)
    form = next((form for form in forms if any(name.startswith(form) for name in names)), _NESTED_PREFIX)
    return Wrapper(config, form.removesuffix("layers."))


def nested(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the text decoder's keys in `text_config`, where a multimodal model's has them itself."""
    if config.get("model_type") not in _FLAT or "text_config" in config:
        return config
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        text = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).text_config.to_dict()
    except Exception as error:  # a wrong value makes transformers raise anything
        reason = " ".join(str(error).split())
        raise InvalidModel(f"transformers cannot read this config.json of {config['model_type']}: {reason}") from error
    rest = {key: value for key, value in config.items() if key not in text or key in _OF_BOTH}
    return {**rest, "text_config": text}


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The text decoder's config, with the wrapper's settings that apply to both."""
    shared = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config")
    found = {**config["text_config"], **{key: config[key] for key in shared if key in config}}
    if found["model_type"] in _RUN_AS:
        found["model_type"] = _RUN_AS[found["model_type"]]
        rope = found.get("rope_parameters") or {}
        found["rope_parameters"] = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    return found
