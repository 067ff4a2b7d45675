"""run.json, which says what a run directory is for, and what is trusted of it when it is read."""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import numpy as np

from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.arithmetic.target_prices import Fp8Sizes, ModelSizes
from flap_stream.config import DTYPES, METHODS
from flap_stream.errors import CorruptRun, RunMismatch
from flap_stream.storage import files
from flap_stream.storage.schema import finite, matches, natural, one_of, parse_json, within

FORMAT, VERSION = "flap-stream-run", 5
NAME = "run.json"
# Limits on what is read: all far beyond any known model, none measured.
_MAX_BYTES = 1 << 26  # of run.json, which has a line for each shard and layer
_BIAS_HEADER_BYTES = 256  # at most: of the entry of one bias in the header of a weight file
_MAX_CHANNELS, _MAX_TOKENS, _MAX_THREADS, _MAX_PARAMETERS = 1 << 24, 1 << 31, 1 << 14, 1 << 60


class TokensRecord(TypedDict):
    """The calibration windows. shape: windows, tokens in each."""

    sha256: str
    shape: list[int]


class SizesRecord(TypedDict):
    """Sizes of the model that planning needs besides those of its layers.

    unit_bytes, header_bytes, expert_bytes, fp8: see `ModelSizes`; older versions did not record them. state: elements
    that layers hand on for each token, where that is more than hidden states.
    """

    hidden: int
    vocabulary: int
    weight_bytes: int
    expert_share: float
    unit_bytes: NotRequired[list[list[int]]]
    header_bytes: NotRequired[list[int]]
    expert_bytes: NotRequired[list[int]]
    state: NotRequired[int]
    fp8: NotRequired[dict[str, Any]]


class Manifest(TypedDict):
    """The contents of a run.json; `model`, `tokens` and `options` determine the statistics.

    model: fingerprint. options: method and, unless only weights are read, dtype, device (of an accelerator also its
    model, as `card`) and batch size.
    source: where the model is. calibration: as asked for. left_whole: what of the layers has no units, in words.
    layers: the fields of each LayerShape.
    """

    format: str
    version: int
    model: dict[str, Any]
    tokens: TokensRecord
    options: dict[str, Any]
    source: str
    calibration: dict[str, Any]
    window_prefix: NotRequired[list[int]]
    threads: int
    parameters: int
    sizes: SizesRecord
    left_whole: NotRequired[list[str]]
    layers: list[dict[str, Any]]
    versions: dict[str, str]
    sha256: str


_channels = within(0, _MAX_CHANNELS)
# Fields of shapes that older versions did not record.
_LATER = ("expert_rest", "expert_added", "router_needs", "elements")
SHAPE = {
    f"{field.name}?" if field.name in _LATER else field.name: [_channels] if field.name == "experts" else natural
    for field in fields(LayerShape)
}
_OPTIONS = {
    "method": one_of(*METHODS),
    "dtype?": one_of(*(f"torch.{name}" for name in DTYPES[1:])),
    "device?": str,
    "card?": str,
    "batch_size?": within(1, _MAX_TOKENS),
}
_bytes = within(0, 1 << 50)
_SIZES = {
    "hidden": natural,
    "vocabulary": natural,
    "weight_bytes": natural,
    "expert_share": finite,
    "unit_bytes?": [(_bytes, _bytes)],
    "header_bytes?": (_bytes, _bytes),
    "expert_bytes?": [_bytes],
    "state?": natural,
    "fp8?": {"rest_bytes": _bytes, "unit_bytes": [(_bytes, _bytes)], "header_bytes": (_bytes, _bytes)},
}
_MANIFEST = {
    "format": str,
    "model": {"headers?": {str: str}, "shard_bytes?": {str: natural}},
    "tokens": {"sha256": str, "shape": (within(0, _MAX_TOKENS), within(0, _MAX_TOKENS))},
    "options": _OPTIONS,
    "source": str,
    "calibration": {"sources?": [str], "samples?": natural, "sequence_length?": natural},
    "window_prefix?": [natural],
    "threads": within(1, _MAX_THREADS),
    "parameters": within(1, _MAX_PARAMETERS),
    "sizes": _SIZES,
    "left_whole?": [str],
    "layers": [SHAPE],
    "versions": {str: str},
    "sha256": str,
}


def tokens_digest(tokens: np.ndarray) -> str:
    """Sha256 of int64 tokens and their shape."""
    data = np.ascontiguousarray(tokens, dtype="<i8")
    return hashlib.sha256(repr(data.shape).encode() + data.tobytes()).hexdigest()


def new_manifest(contents: dict[str, Any]) -> bytes:
    """The bytes of a run.json. contents: all of a Manifest but format, versions and digest."""
    versions = {name: version(name) for name in ("flap-stream", "torch", "transformers", "zarr")}
    versions = {"python": platform.python_version(), **versions}
    whole = {"format": FORMAT, "version": VERSION, **contents, "versions": versions}
    return json.dumps({**whole, "sha256": manifest_digest(whole)}, indent=1).encode()


def read_manifest(path: Path) -> Manifest:
    """The contents of a run.json.

    Raises RunMismatch if it is of another version, CorruptRun if it was altered or holds impossible values.
    """
    damaged = f"{path} is damaged; delete the run directory and collect again"
    try:
        found = parse_json(files.read_plain(path, _MAX_BYTES))
    except ValueError as error:
        raise CorruptRun(damaged) from error
    if not isinstance(found, dict) or not {"format", "version"} <= found.keys():
        raise CorruptRun(damaged)
    if (found["format"], found["version"]) != (FORMAT, VERSION):
        raise RunMismatch(
            f"{path} has format {str(found['format'])[:80]} {str(found['version'])[:80]}, this version writes "
            f"{FORMAT} {VERSION}; resume with the version that made it, or delete it and collect again"
        )
    if not matches(found, _MANIFEST):
        raise CorruptRun(damaged)
    manifest = cast(Manifest, found)
    if not _is_possible(manifest) or manifest["sha256"] != manifest_digest(manifest):
        raise CorruptRun(damaged)
    return manifest


def _is_possible(manifest: Manifest) -> bool:
    """Whether the values of a manifest that matches the schema fit together."""
    options, (samples, length) = manifest["options"], manifest["tokens"]["shape"]
    has_options = options["method"] == "magnitude-sp" or {"dtype", "batch_size"} <= options.keys()
    shapes = layer_shapes(manifest)
    sizes = manifest["sizes"]
    has_units = len(sizes.get("unit_bytes", shapes)) == len(sizes.get("expert_bytes", shapes)) == len(shapes)
    has_units = has_units and len(sizes.get("fp8", {}).get("unit_bytes", shapes)) == len(shapes)
    has_units = has_units and all(map(_is_possible_shape, shapes)) and sum(shape.prunable for shape in shapes) > 0
    return has_options and has_units and samples * length <= _MAX_TOKENS


def _is_possible_shape(shape: LayerShape) -> bool:
    """Whether arrays of that many channels can be allocated, and the experts' neurons add up to the layer's."""
    channels = shape.attention_channels
    fits = max(channels, shape.neurons) <= _MAX_CHANNELS and shape.kv_groups <= channels
    return fits and shape.prunable < _MAX_PARAMETERS and sum(shape.experts) in (shape.neurons, 0)


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Sha256 of everything else in a run.json."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def layer_shapes(manifest: Manifest) -> list[LayerShape]:
    """Sizes of the model's decoder layers; 0 is what an older version did not record."""
    names = [field.name for field in fields(LayerShape)]
    layers = [{name: shape[name] for name in names if name in shape} for shape in manifest["layers"]]
    return [LayerShape(**{**shape, "experts": tuple(shape["experts"])}) for shape in layers]


def has_shapes(manifest: Manifest, shapes: Sequence[LayerShape]) -> bool:
    """Whether the sizes that are recorded are those of these layers."""
    found = [json.loads(json.dumps(asdict(shape))) for shape in shapes]
    recorded = manifest["layers"]
    return len(found) == len(recorded) and all(
        own == {**own, **then} for own, then in zip(found, recorded, strict=True)
    )


def model_sizes(manifest: Manifest) -> ModelSizes:
    """Sizes of the dense checkpoint; where an older version did not record them, such that no target is exceeded."""
    sizes, parameters = manifest["sizes"], manifest["parameters"]
    weight_bytes, shapes = sizes["weight_bytes"], layer_shapes(manifest)
    item_bytes = weight_bytes // parameters
    unit_bytes = sizes.get("unit_bytes") or [
        [
            item_bytes * (shape.group_cost + shape.group_biases),
            item_bytes * (shape.neuron_cost + shape.neuron_biases),
        ]
        for shape in shapes
    ]
    files_bytes = sum(manifest["model"].get("shard_bytes", {}).values())
    plain = max(files_bytes - weight_bytes, 0)
    biases = sum(shape.added_biases for shape in shapes) // max(sizes["hidden"], 1)
    header_bytes = sizes.get("header_bytes") or [plain, plain + _BIAS_HEADER_BYTES * biases]
    units = [(group, neuron) for group, neuron in unit_bytes]
    expert_bytes = sizes.get("expert_bytes") or [0] * len(shapes)
    found, fp8 = sizes.get("fp8"), None
    if found is not None:
        fp8 = Fp8Sizes(found["rest_bytes"], found["unit_bytes"], found["header_bytes"])
    return ModelSizes(parameters, weight_bytes, units, (header_bytes[0], header_bytes[1]), expert_bytes, fp8)
