"""Multimodal models: only their text decoder is pruned, under the names that a text model has."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flap_stream.model.architecture import FAMILIES


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
        others = (
            "model.vision",
            "model.visual",
            "model.multi_modal",
            "model.embed_vision",
        )  # of newer files, not the decoder's
        is_decoder = name.startswith("model.") and not name.startswith(others)
        return self.prefix + name.removeprefix("model.") if is_decoder else name


def wrapper_of(config: dict[str, Any], names: Iterable[str]) -> Wrapper | None:
    """The multimodal model of a config.json; None for a plain language model. names: of all its tensors."""
    text = config.get("text_config")
    if not isinstance(text, dict) or text.get("model_type") not in FAMILIES or config.get("model_type") in FAMILIES:
        return None
    forms, names = ("language_model.model.", "language_model.layers.", "model.language_model."), list(names)
    form = next((form for form in forms if any(name.startswith(form) for name in names)), forms[-1])
    return Wrapper(config, form.removesuffix("layers."))


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The text decoder's config, with the wrapper's settings that apply to both."""
    shared = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config")
    return {**config["text_config"], **{key: config[key] for key in shared if key in config}}
