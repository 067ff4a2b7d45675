"""The README.md of a pruned checkpoint, with the Hub's metadata."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from flap_stream.sizes import width_note

_CARRIED_KEYS = ("license", "license_name", "license_link", "language")


def model_card(
    base: str,
    base_directory: Path,
    record: dict[str, Any],
    stock_class: str | None = None,
    multimodal: bool = False,
) -> str:
    """Markdown with YAML metadata: base model, method, ratio, a row a layer, how to load.

    base: directory or Hub id of the dense model; its licence and language are carried over from its own card.
    record: the contents of pruning.json. stock_class: of transformers, for a checkpoint that needs no other.
    multimodal: images go in beside text, and only the text decoder is pruned.
    """
    options, parameters = record["options"], record["parameters"]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text" if multimodal else "text-generation",
        tags=["flap", "flap-stream", "structured-pruning"] + (["custom_code"] if stock_class is None else []),
        **_carried_metadata(base_directory, _CARRIED_KEYS if stock_class is None else (*_CARRIED_KEYS, "base_model")),
    )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists():
        data.base_model = base
        title = f"[`{base}`](https://huggingface.co/{base})"
    else:
        title = f"`{Path(base).name}`"
    name = Path(base).name
    if stock_class is None:
        sizes = "Every layer has its own size, so the\nmodelling file beside the weights is needed"
        flag, kept = ", trust_remote_code=True", "`pruning.json` lists what was kept, as indices into the dense model."
    else:
        sizes = f"Zeros fill up smaller layers, so that all\nhave one size and transformers' {stock_class} loads them"
        flag, kept = "", "What was kept of the dense model:"
    model_class, processor_class, processor = (
        ("AutoModelForImageTextToText", "AutoProcessor", "processor")
        if multimodal
        else ("AutoModelForCausalLM", "AutoTokenizer", "tokenizer")
    )
    ratio = record["realised_ratio"]
    note = width_note(record["width_multiple"]) if "width_multiple" in record else ""
    widths = f"\n{note[0].upper()}{note[1:]}.\n" if note else ""
    rows = "\n".join(
        f"| {i} | {len(layer['kept_kv_groups'])} of {layer['kv_groups']} | "
        f"{len(layer['kept_neurons'])} of {layer['neurons']} |"
        for i, layer in enumerate(record["layers"])
    )
    body = f"""
# {name}, pruned by {options["ratio"]:.0%} with {options["method"]}

{title} with whole KV groups of attention heads and MLP neurons removed, without retraining, by
[flap-stream](https://pypi.org/project/flap-stream/) (FLAP, [arXiv 2312.11983](https://arxiv.org/abs/2312.11983)).

| | dense | pruned |
|---|---|---|
| parameters | {parameters["before"]:,} | {parameters["after"]:,} |
| removed of the decoder layers' prunable weights | | {ratio["decoder"]:.2%} |
| removed of the whole model | | {ratio["model"]:.2%} |

Structure {options["structure"]}, metric {options["metric"]}, statistics {options["statistics"]}, restoration
{record["restore"]}.{widths} {sizes}:

```python
from transformers import {model_class}, {processor_class}

model = {model_class}.from_pretrained(PATH{flag})
{processor} = {processor_class}.from_pretrained(PATH)
```

{kept}

| layer | KV groups | neurons |
|---|---|---|
{rows}
"""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{body}"))


def _carried_metadata(directory: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    card = directory / "README.md"
    if not card.is_file():
        return {}
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, UnicodeDecodeError):  # a card that is not in the Hub's form has nothing to carry over
        return {}
    return {key: data[key] for key in keys if key in data}
