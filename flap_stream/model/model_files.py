"""Which files of a directory or a Hub repository are the model, by the rules of transformers.

Only names are looked at (and config.json and the index, which the caller reads), so that the same rules apply to a
directory and to a repository that has not been fetched yet.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from flap_stream.errors import CorruptCheckpoint, InvalidModel
from flap_stream.storage.files import read_plain

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
TEMPLATES_NAME = "additional_chat_templates"

_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_MAX_NAME_BYTES = 255
_CARRIED_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken")
_CARRIED_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
# Files of other formats or of a training run, and those that are written anew.
_LEFT_BEHIND = re.compile(
    r"config\.json|README\.md|pruning\.json|evaluations\.json|params\.json|model_index\.json|adapter_config\.json"
    r"|trainer_state\.json|(all|train|eval|test|predict)_results\.json|.*\.index(\..+)?\.json"
)
_POINTER_START = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a model.

    files: in the order in which transformers reads them; of two tensors with one name the later one counts.
    weight_map: tensor to file, from the index; empty without one.
    note: what to tell the user about the choice, if there was one.
    """

    files: tuple[str, ...]
    weight_map: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


def weight_files(
    where: str, names: Collection[str], config: Mapping[str, Any], read_index: Callable[[str], dict[str, Any]]
) -> WeightFiles:
    """The files that hold the weights: the one that config.json names, else a single file, an index, bare shards.

    names: of all files. read_index: contents of one of them, a JSON object.
    Raises InvalidModel, saying what is there instead, if there are none, CorruptCheckpoint for an index that names no
    files.
    Source: _get_resolved_checkpoint_files of transformers, except for bare shards, which it does not accept.
    """
    named = config.get("transformers_weights")
    if named is not None:
        if not isinstance(named, str) or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise InvalidModel(
                f"{where}/config.json has transformers_weights {named!r}; expected the name of a safetensors file"
            )
        return _indexed(where, named, read_index) if named.endswith(".json") else WeightFiles((_plain(where, named),))
    bare = {name for name in names if _SHARD.fullmatch(name)}
    if SINGLE_NAME in names:
        others = INDEX_NAME if INDEX_NAME in names else ", ".join(sorted(bare)[:1])
        note = f"{where} holds both {SINGLE_NAME} and {others}; the single file is used, as in transformers"
        return WeightFiles((SINGLE_NAME,), note=note if others else "")
    if INDEX_NAME in names:
        return _indexed(where, INDEX_NAME, read_index)
    if bare:
        return _bare_shards(where, bare)
    raise InvalidModel(instead_of_weights(where, names))


def has_weights(names: Collection[str]) -> bool:
    """Whether there are safetensors files under transformers' names."""
    return any(name in (SINGLE_NAME, INDEX_NAME) or _SHARD.fullmatch(name) for name in names)


def _indexed(where: str, index: str, read_index: Callable[[str], dict[str, Any]]) -> WeightFiles:
    weight_map = read_index(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpoint(f"{where}/{index} has no weight_map; download it again")
    files = {_plain(f"{where}/{index}", file) for file in weight_map.values()}
    return WeightFiles(tuple(sorted(files)), weight_map)


def _plain(where: str, file: object) -> str:
    """The name of a file in the directory of the index."""
    is_name = isinstance(file, str) and file.isprintable() and Path(file).name == file
    if not is_name or len(os.fsencode(str(file))) > _MAX_NAME_BYTES:
        raise CorruptCheckpoint(f"{where} names shard {file!r}, which is not a file in its directory")
    return str(file)


def _bare_shards(where: str, names: Collection[str]) -> WeightFiles:
    """Shards without an index: a set that is complete by its own numbering."""
    sets: dict[str, list[str]] = {}
    for name in sorted(names):
        sets.setdefault(name[-len("00001.safetensors") :], []).append(name)
    whole = [files for end, files in sets.items() if len(files) == int(end[:5])]
    if len(whole) != 1:
        found = " and ".join(f"{len(files)} of {int(end[:5])} shards" for end, files in sets.items())
        raise CorruptCheckpoint(
            f"{where} holds {found} and no {INDEX_NAME} to say which are the model; download it again"
        )
    note = f"{where} has no {INDEX_NAME}; its tensors are taken from the headers of its {len(whole[0])} shards"
    return WeightFiles(tuple(whole[0]), note=note)


def require_model(where: str, names: Collection[str], read_adapter: Callable[[], dict[str, Any]]) -> None:
    """Raise InvalidModel, saying what it is and what to do, for something that is not a transformers checkpoint.

    names: of all its files. read_adapter: contents of adapter_config.json.
    """
    is_adapter = any(name.startswith("adapter_model.") for name in names) or CONFIG_NAME not in names
    if is_adapter and "adapter_config.json" in names:
        base = read_adapter().get("base_model_name_or_path")
        raise InvalidModel(
            f"{where} holds a PEFT adapter of {base or 'a model that it does not name'}; merge the two with "
            "AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW_DIR), then prune "
            "NEW_DIR"
        )
    if CONFIG_NAME in names:
        return
    if "model_index.json" in names:
        raise InvalidModel(
            f"{where} is a diffusers pipeline; only causal language models are pruned, so name the subfolder of one "
            "(such as text_encoder) or another model"
        )
    if any(name.endswith(".gguf") or name.startswith("consolidated.") for name in names):
        raise InvalidModel(instead_of_weights(where, names))
    raise InvalidModel(
        f"{where}/{CONFIG_NAME} does not exist; a model directory needs it next to its safetensors shards"
    )


def instead_of_weights(where: str, names: Collection[str]) -> str:
    """Says what a place without transformers' safetensors files holds, and what to do about it."""
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if ggufs:
        return (
            f"{where} holds a GGUF file ({ggufs[0]}), which is for llama.cpp; name the safetensors checkpoint "
            "that it was made from, or convert it once with AutoModelForCausalLM.from_pretrained(DIR, "
            f"gguf_file={ggufs[0]!r}).save_pretrained(NEW_DIR)"
        )
    if any(name.startswith("consolidated.") for name in names):
        return (
            f"{where} holds weights in the format of Meta's or Mistral's own code (consolidated.*) and none in that of "
            "transformers; name the repository or folder in transformers' format"
        )
    if any(name.endswith((".bin", ".pth", ".pt")) for name in names):
        return (
            f"{where} holds PyTorch pickles but no safetensors; convert it once with "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    if any(name.endswith((".h5", ".msgpack", ".onnx")) for name in names):
        return f"{where} holds weights of another framework but no safetensors; name a safetensors checkpoint"
    others = sorted(name for name in names if name.endswith(".safetensors"))
    found = f" under the names of transformers, only {others[0]}" if others else ""
    return (
        f"{where} holds no safetensors{found} ({SINGLE_NAME} or {INDEX_NAME}); save the model there with "
        "save_pretrained, which writes safetensors"
    )


def is_carried(name: str) -> bool:
    """Whether a file is copied into everything made from the model: tokenizer, templates, licence.

    name: relative to the model, with slashes.
    """
    path = PurePosixPath(name)
    if len(path.parts) > 1:
        return len(path.parts) == 2 and path.parts[0] == TEMPLATES_NAME and path.suffix == ".jinja"
    return not _LEFT_BEHIND.fullmatch(name) and (
        path.suffix in _CARRIED_SUFFIXES or path.name.startswith(_CARRIED_NAMES)
    )


def require_no_pointer(path: Path, start: bytes) -> None:
    """Raise CorruptCheckpoint if a file is what git leaves in place of a large one. start: its first bytes."""
    if start.startswith(_POINTER_START):
        raise CorruptCheckpoint(
            f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` in {path.parent}, or fetch the "
            "model with `hf download`"
        )


def read_json(path: Path, need: str) -> dict[str, Any]:
    """The object in a JSON file. need: what the message of InvalidModel, raised without one, says of it."""
    if not path.is_file():
        raise InvalidModel(f"{path} does not exist; {need}")
    raw = read_plain(path)
    require_no_pointer(path, raw)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidModel(f"{path} is not JSON ({error}); {need}") from error
    if not isinstance(value, dict):
        raise InvalidModel(f"{path} is not a JSON object; {need}")
    return value
