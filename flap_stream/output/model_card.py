"""The README.md of a pruned checkpoint, with the Hub's metadata."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from flap_stream.arithmetic.sizes import width_note
from flap_stream.model.hub import base_name, split_revision

_FRONT_MATTER = re.compile(r"\s*---[\r\n]+([\S\s]*?)[\r\n]+---(?:[\r\n]|$)")  # as huggingface_hub finds it
_READ_CHARACTERS = 1 << 20  # far more than front matter takes
_LONGEST = 500  # characters of a quoted line, and lines of a list
_CARRIED_KEYS = ("license", "license_name", "license_link", "language")


def model_card(
    base: str,
    base_directory: Path,
    record: dict[str, Any],
    stock_class: str | None = None,
    multimodal: bool = False,
) -> str:
    """Markdown with YAML metadata: base model, method, ratio, how to load, and the kept units of each layer.

    base: directory or Hub id of the dense model; its licence and language are carried over from its own card.
    record: the contents of pruning.json. stock_class: of transformers, for a checkpoint that it can hold.
    multimodal: the model reads images besides text, and only its text decoder is pruned.
    """
    keys = _CARRIED_KEYS if stock_class is None else (*_CARRIED_KEYS, "base_model")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text" if multimodal else "text-generation",
        tags=["flap", "flap-stream", "structured-pruning"] + (["custom_code"] if stock_class is None else []),
        **_carried_metadata(base_directory, keys),
    )
    title = f"`{base_name(base)}`"
    repository, revision = split_revision(base)
    if re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", repository) and not Path(base).exists():
        data.base_model = repository
        tree = "" if revision is None else f"/tree/{revision}"
        title = f"[`{base}`](https://huggingface.co/{repository}{tree})"
    body = f"""
# {base_name(base)}, pruned by {100 * record["options"]["ratio"]:.3g}% with {record["options"]["method"]}

{title} with {_what_is_removed(record)} removed, without retraining, by
[flap-stream](https://pypi.org/project/flap-stream/) (FLAP, [arXiv 2312.11983](https://arxiv.org/abs/2312.11983)).

{_sizes_table(record)}

{_options_sentence(record)} {_loading(stock_class, multimodal)}{"" if stock_class else _fp8_note(record)}

{_layers_table(record)}
"""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{body}"))


def _what_is_removed(record: dict[str, Any]) -> str:
    options = record["options"]
    if options["method"] in ("shortgpt", "reap"):
        return "whole decoder layers" if options["method"] == "shortgpt" else "whole experts"
    what = ["whole decoder layers"] * ("kept_layers" in record) + ["whole experts"] * bool(options.get("whole_experts"))
    what += ["KV groups of attention heads"] * any(layer["kv_groups"] for layer in record["layers"])
    return " and ".join([", ".join(what), "MLP neurons"] if what else ["MLP neurons"])


def _sizes_table(record: dict[str, Any]) -> str:
    parameters, ratio, experts = record["parameters"], record["realised_ratio"], record.get("experts")
    row = "" if experts is None else f"\n| experts of all layers | {experts['before']:,} | {experts['after']:,} |"
    return f"""| | dense | pruned |
|---|---|---|
| parameters | {parameters["before"]:,} | {parameters["after"]:,} |{row}
| removed of the decoder layers' prunable weights | | {ratio["decoder"]:.2%} |
| removed of the whole model | | {ratio["model"]:.2%} |"""


def _options_sentence(record: dict[str, Any]) -> str:
    options = record["options"]
    note = width_note(record["width_multiple"]) if "width_multiple" in record else ""
    widths = f"\n{note[0].upper()}{note[1:]}.\n" if note else ""
    named = ("structure", "metric", "statistics") if options["method"] == "flap" else ("structure",)
    decided = ", ".join(f"{name} {options[name]}" for name in named)
    return f"""{decided[0].upper()}{decided[1:]}, restoration
{record["restore"]}.{widths}"""


def _loading(stock_class: str | None, multimodal: bool) -> str:
    """How the checkpoint is loaded, up to the heading of the table of layers."""
    if stock_class is None:
        sizes = "Layers differ in size, so the modelling\nfile next to the weights is needed"
        flag, kept = ", trust_remote_code=True", "`pruning.json` lists what was kept, as indices into the dense model."
    else:
        sizes = f"Smaller layers are padded with zeros to\none size, so transformers' {stock_class} loads them"
        flag, kept = "", "What was kept of the dense model:"
    model_class, processor_class, processor = (
        ("AutoModelForImageTextToText", "AutoProcessor", "processor")
        if multimodal
        else ("AutoModelForCausalLM", "AutoTokenizer", "tokenizer")
    )
    return f"""{sizes}:

```python
from transformers import {model_class}, {processor_class}

model = {model_class}.from_pretrained(PATH{flag})
{processor} = {processor_class}.from_pretrained(PATH{flag})
```

{kept}"""


def _fp8_note(record: dict[str, Any]) -> str:
    """What a user of a checkpoint in FP8 must know."""
    if record.get("output_dtype") != "fp8":
        return ""
    return """

Matrices of the decoder layers are in FP8 (E4M3, with a float32 scale for each block of 128 x 128). transformers runs
them so on GPUs of compute capability 8.9 or later; elsewhere it decodes them while loading, as
`quantization_config=FineGrainedFP8Config(dequantize=True)` does anywhere."""


def _layers_table(record: dict[str, Any]) -> str:
    kept = record.get("kept_layers", range(len(record["layers"])))
    rows = (
        f"| {i}{'' if i in kept else ' (removed)'} | {len(layer['kept_kv_groups'])} of {layer['kv_groups']} | "
        f"{len(layer['kept_neurons'])} of {layer['neurons']} |"
        for i, layer in enumerate(record["layers"])
    )
    whole = f"\n\nNothing was removed of the {' and '.join(record['left_whole'])}." if "left_whole" in record else ""
    return "\n".join(("| layer | KV groups | neurons |", "|---|---|---|", *rows)) + whole


def unusable_metadata(directory: Path) -> list[str]:
    """Names, for the user, of metadata in a model's own card that cannot be carried over."""
    return _read_metadata(directory)[1]


def _carried_metadata(directory: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in _read_metadata(directory)[0].items() if key in keys}


def _read_metadata(directory: Path) -> tuple[dict[str, Any], list[str]]:
    """Values of the card's front matter that can be carried over, and names of those that cannot."""
    card = directory / "README.md"
    if not card.is_file():
        return {}, []
    try:
        with open(card, encoding="utf-8") as file:
            found = _FRONT_MATTER.match(file.read(_READ_CHARACTERS))
        data = yaml.load(found[1], yaml.BaseLoader) if found else {}  # text, lists and dicts only
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}, ["the front matter"]
    if not isinstance(data, dict):
        return {}, ["the front matter"]
    given = {key: data[key] for key in (*_CARRIED_KEYS, "base_model") if data.get(key)}
    usable = {key: value for key, value in given.items() if _is_plain(value)}
    return usable, [f"the {key}" for key in given if key not in usable]


def _is_plain(value: Any) -> bool:
    """Whether a value is a line of text, or a list of them."""
    lines = value if isinstance(value, list) else [value]
    return len(lines) <= _LONGEST and all(isinstance(s, str) and s.isprintable() and len(s) <= _LONGEST for s in lines)
