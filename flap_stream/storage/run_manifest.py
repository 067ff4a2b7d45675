"""run.json, which says what a run directory is for, and plan.json: what is believed of them when they are read."""

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.config import DTYPES, METHODS, PlanConfig
from flap_stream.errors import CorruptRun, InvalidOption, RunMismatch
from flap_stream.storage import files
from flap_stream.storage.json_form import finite, has_form, natural, one_of, parsed, within

FORMAT, VERSION = "flap-stream-run", 5
NAME = "run.json"
MOST_BYTES = 1 << 26  # of run.json; shards and layers have a line each
_MOST_CHANNELS, _MOST_TOKENS, _MOST_THREADS = 1 << 24, 1 << 31, 1 << 14

_channels = within(0, _MOST_CHANNELS)
SHAPE = {field.name: [_channels] if field.name == "experts" else natural for field in fields(LayerShape)}
_OPTIONS = {
    "method": one_of(*METHODS),
    "dtype?": one_of(*(f"torch.{name}" for name in DTYPES[1:])),
    **{"device?": str, "batch_size?": within(1, _MOST_TOKENS)},
}
_SIZES = {"hidden": natural, "vocabulary": natural, "weight_bytes": natural, "expert_share": finite}
_MANIFEST = {
    **{"format": str, "model": {"headers?": {str: str}, "shard_bytes?": {str: natural}}, "options": _OPTIONS},
    "tokens": {"sha256": str, "shape": (within(0, _MOST_TOKENS), within(0, _MOST_TOKENS))},
    "calibration": {"sources?": [str], "samples?": natural, "sequence_length?": natural},
    **{"source": str, "versions": {str: str}, "threads": within(1, _MOST_THREADS), "parameters": within(1, 1 << 60)},
    **{"sizes": _SIZES, "layers": [SHAPE], "sha256": str},
}


def tokens_digest(tokens: np.ndarray) -> str:
    """Sha256 of int64 tokens and their shape."""
    data = np.ascontiguousarray(tokens, dtype="<i8")
    return hashlib.sha256(repr(data.shape).encode() + data.tobytes()).hexdigest()


def new_manifest(contents: dict[str, Any]) -> bytes:
    """The bytes of a run.json."""
    versions = {name: version(name) for name in ("flap-stream", "torch", "transformers", "zarr")}
    versions = {"python": platform.python_version(), **versions}
    whole = {"format": FORMAT, "version": VERSION, **contents, "versions": versions}
    return json.dumps({**whole, "sha256": manifest_digest(whole)}, indent=1).encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """The contents of a run.json.

    Raises RunMismatch for one of another version, CorruptRun for one that is not as it was written, or cannot be.
    """
    damaged = f"{path} is damaged; delete the run directory and collect again"
    try:
        manifest = parsed(files.read_plain(path, MOST_BYTES))
        if not isinstance(manifest, dict) or not {"format", "version"} <= manifest.keys():
            raise ValueError("no run.json")
    except ValueError as error:
        raise CorruptRun(damaged) from error
    found = (manifest["format"], manifest["version"])
    if found != (FORMAT, VERSION):
        raise RunMismatch(
            f"{path} has format {str(found[0])[:80]} {str(found[1])[:80]}, this version writes {FORMAT} {VERSION}; "
            "go on with the version that made it, or delete it and collect again"
        )
    if not _is_sound(manifest) or manifest["sha256"] != manifest_digest(manifest):
        raise CorruptRun(damaged)
    return manifest


def _is_sound(manifest: dict[str, Any]) -> bool:
    if not has_form(manifest, _MANIFEST):
        return False
    options, (samples, length) = manifest["options"], manifest["tokens"]["shape"]
    measured = options["method"] == "magnitude-sp" or {"dtype", "batch_size"} <= options.keys()
    shapes = layer_shapes(manifest)
    sound = all(map(_is_sound_shape, shapes)) and sum(shape.prunable for shape in shapes) > 0
    return measured and sound and samples * length <= _MOST_TOKENS


def _is_sound_shape(shape: LayerShape) -> bool:
    """Whether arrays of so many channels can be had, and experts make up the neurons."""
    channels = shape.kv_groups * shape.heads_per_group * shape.head_dim
    sound = max(channels, shape.neurons) <= _MOST_CHANNELS and shape.kv_groups <= channels
    return sound and shape.prunable < 1 << 60 and sum(shape.experts) in (shape.neurons, 0)


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Sha256 over all that run.json says besides."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def layer_shapes(manifest: dict[str, Any]) -> list[LayerShape]:
    """Sizes of the model's decoder layers."""
    names = [field.name for field in fields(LayerShape)]
    layers = [{name: shape[name] for name in names} for shape in manifest["layers"]]
    return [LayerShape(**{**shape, "experts": tuple(shape["experts"])}) for shape in layers]


# --- plan.json ---


def plan_contents(options: PlanConfig, layers: Sequence[LayerKeep]) -> bytes:
    """The bytes of a plan.json."""
    kept = [{"kept_kv_groups": keep.kv_groups.tolist(), "kept_neurons": keep.neurons.tolist()} for keep in layers]
    return json.dumps({"options": asdict(options), "layers": kept}).encode()


def most_plan_bytes(shapes: Sequence[LayerShape]) -> int:
    """Most bytes of a plan.json: ten for every unit."""
    return sum(10 * (shape.kv_groups + shape.neurons) + 100 for shape in shapes) + 10_000


def parse_plan(data: bytes, shapes: Sequence[LayerShape]) -> tuple[PlanConfig, list[LayerKeep]]:
    """Options and decision in the bytes of a plan.json for layers of these shapes.

    Raises ValueError, saying what is wrong, unless every layer keeps some of its own units, each once and in order, and
    every expert one at least.
    """
    body = parsed(data)
    if not has_form(body, {"options": dict, "layers": [{"kept_kv_groups": list, "kept_neurons": list}]}):
        raise ValueError("it has another form")
    if len(body["layers"]) != len(shapes):
        raise ValueError(f"it has {len(body['layers'])} layers, the model {len(shapes)}")
    keeps = []
    for i, (layer, shape) in enumerate(zip(body["layers"], shapes, strict=True)):
        groups = _indices(layer["kept_kv_groups"], shape.kv_groups, f"KV groups of layer {i}")
        neurons = _indices(layer["kept_neurons"], shape.neurons, f"neurons of layer {i}")
        bounds = np.cumsum((0, *shape.experts))
        if np.any(np.diff(np.searchsorted(neurons, bounds)) == 0):
            raise ValueError(f"an expert of layer {i} keeps no neuron")
        keeps.append(LayerKeep(groups, neurons))
    return plan_options(body["options"]), keeps


def _indices(values: list[Any], units: int, what: str) -> np.ndarray:
    """Ascending indices of units, int64."""
    if not has_form(values, [within(0, units - 1)]):
        raise ValueError(f"the {what} are not all from 0 to {units - 1}")
    indices = np.array(values, dtype=np.int64)
    if np.any(np.diff(indices) <= 0):
        raise ValueError(f"the {what} are not in order, each once")
    return indices


def plan_options(values: dict[str, Any]) -> PlanConfig:
    """Options of a plan as a file has them. Raises ValueError for any that could not be given."""
    for name, kind in get_type_hints(PlanConfig).items():
        given = values.get(name)
        suits = finite(given) if kind is float else isinstance(given, kind) and not isinstance(given, bool)
        if name in values and not suits:
            raise ValueError(f"its option {name} is {str(given)[:80]}")
    try:
        return PlanConfig(**values)
    except (TypeError, InvalidOption) as error:  # another option, or a value out of range
        raise ValueError(str(error)) from error
