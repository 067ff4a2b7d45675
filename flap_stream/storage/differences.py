"""Describes in words how an earlier job differs from the one requested now: in model, text or options."""

from collections.abc import Mapping
from typing import Any

from flap_stream.config import TARGETS
from flap_stream.config.values import option_name, written

_NAMES = {"sources": "calibration", "target": "refit-target"}
_MAX_FILES = 3  # named in a message


def run_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """How two manifests of a run directory differ in what determines the statistics; None if they do not.

    Returns what follows "was made ": `from the model a, not b`, `with other options: --dtype was ..., now ...`,
    `on an accelerator a, not b`.
    """
    if before["model"] != now["model"]:
        return model_differences(before, now)
    same_text = before["tokens"] == now["tokens"]
    texts = [{} if same_text else part["calibration"] for part in (before, now)]
    methods = [part["options"]["method"] for part in (before, now)]
    if methods[0] != methods[1]:  # all other differences follow from this one
        return f"with other options: {option_differences({'method': methods[0]}, {'method': methods[1]})}"
    asked = [dict(part["options"]) for part in (before, now)]
    cards = [options.pop("card", None) for options in asked]
    differences = option_differences({**asked[0], **texts[0]}, {**asked[1], **texts[1]})
    if differences:
        return f"with other options: {differences}"
    if None not in cards and cards[0] != cards[1]:  # earlier versions did not record it
        return f"on an accelerator {cards[0]}, not {cards[1]}, whose results differ in the last bits"
    return None if same_text else _text_differences(before, now)


def _text_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How two texts with the same names differ, worded as in `run_differences`."""
    names = written(now["calibration"].get("sources", ["the calibration text"]))
    shapes = [f"{' windows of '.join(map(str, part['tokens']['shape']))} tokens" for part in (before, now)]
    sizes = f" ({shapes[0]}, now {shapes[1]})" if shapes[0] != shapes[1] else ""
    return f"from another text or with another tokenizer: {names} produced different tokens then{sizes}"


def model_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How the models of two manifests differ, worded as in `run_differences`.

    before, now: `source`, `model` and `parameters` of each, as in run.json.
    """
    old, new = before["model"], now["model"]
    changed = ["config.json"] if old.get("config") != new.get("config") else []
    for kind in ("headers", "shard_bytes"):
        files = {**old.get(kind, {}), **new.get(kind, {})}
        changed += [name for name in files if old.get(kind, {}).get(name) != new.get(kind, {}).get(name)]
    names = list(dict.fromkeys(changed))
    more = f" and {len(names) - _MAX_FILES} more files" if len(names) > _MAX_FILES else ""
    which = f"{', '.join(names[:_MAX_FILES])}{more}"
    if before["source"] != now["source"]:
        then, here = (f"{part['source']} ({part['parameters']:,} parameters)" for part in (before, now))
        return f"from the model {then}, not {here}, which differs in {which}"
    return f"from the model {now['source']} before it was changed: its {which} differed"


def output_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """How two records of pruned checkpoints differ in what was requested; None if they do not.

    before, now: `base`, `options`, `restore`, `calibration` and, if there are any, `refit` and `output_dtype`, as in
    pruning.json.
    Returns what follows "was pruned ".
    """
    models = [part.get("base", {}) for part in (before, now)]
    if models[0].get("fingerprint") != models[1].get("fingerprint"):  # its name depends on the path
        names = [model.get("name") for model in models]
        if names[0] != names[1]:
            return f"from the model {names[0]}, not {names[1]}"
        return f"from another model named {names[0]}: its config.json or its tensors differed"
    is_same = before["restore"] == now["restore"]
    flat = [
        {
            **_asked(part["options"]),
            "restore": part["restore"],
            "output_dtype": part.get("output_dtype", "auto"),
            **(part.get("refit", {}) if is_same else {}),
            **part.get("calibration", {}),
        }
        for part in (before, now)
    ]
    options = option_differences(*flat)
    return f"with other options: {options}" if options else None


def _asked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without a ratio that only came of a target."""
    has_target = any(options.get(name) is not None for name in TARGETS)
    return {name: value for name, value in options.items() if name != "ratio" or not has_target}


def option_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """`--ratio was 0.2, now 0.3` for each option that differs, separated by commas; empty if none does."""
    found = []
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            then, here = (written(part.get(name)) for part in (before, now))
            found.append(f"--{_NAMES.get(name, option_name(name))} was {then}, now {here}")
    return ", ".join(found)
