"""pruning.json: how a checkpoint was pruned and what was kept of each layer."""

import hashlib
import json
from pathlib import Path
from typing import Any

from flap_stream.arithmetic.sizes import pruned_sizes
from flap_stream.config import TARGETS, PlanConfig
from flap_stream.config.options import removes_experts
from flap_stream.errors import NotPlain, OutputConflict
from flap_stream.model.hub import base_name
from flap_stream.output.pruned_model import PrunedModel
from flap_stream.storage import files
from flap_stream.storage.plan import recorded_layers, recorded_options
from flap_stream.storage.schema import finite, matches, natural, one_of, parse_json

RECORD_NAME = "pruning.json"
RECORD_FORMAT, RECORD_VERSION = "flap-stream-pruning", 1

_RECORD = {
    "format": one_of(RECORD_FORMAT),
    "base": {"name": str},
    "options": {"method": str, "structure": str, "metric": str, "statistics": str, "ratio": finite},
    "restore": str,
    "realised_ratio": {"decoder": finite, "model": finite},
    "parameters": {"before": natural, "after": natural},
    "layers": [
        {
            **{"kv_groups": natural, "neurons": natural, "kept_kv_groups": [natural], "kept_neurons": [natural]},
            **{"experts?": [natural], "kept_experts?": [natural]},
        }
    ],
    "kept_layers?": [natural],
    "experts?": {"before": natural, "after": natural},
    "calibration?": dict,
    "left_whole?": [str],
    "target?": {"name": one_of(*TARGETS), "limit": natural, "reached": natural},
}


def read_record(out: Path) -> dict[str, Any] | None:
    """Contents of pruning.json of a complete output; None if `out` does not exist or is an empty directory.

    Raises OutputConflict for anything else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    record = record_of(out)
    if record is None:
        raise OutputConflict(f"{out} exists and was not made by flap-stream; name another OUT or move it away")
    return record


def record_of(out: Path) -> dict[str, Any] | None:
    """Contents of pruning.json of a pruned checkpoint; None if `out` is none."""
    try:
        record = parse_json(files.read_plain(out / RECORD_NAME))
    except (OSError, ValueError, NotPlain):
        return None
    return record if matches(record, _RECORD) else None


def options_record(options: PlanConfig) -> dict[str, Any]:
    """The options of a plan as pruning.json holds them."""
    return json.loads(json.dumps(recorded_options(options)))


def output_dtype_record(is_fp8: bool) -> dict[str, str]:
    """What a pruning.json records of the output's dtype."""
    return {"output_dtype": "fp8"} if is_fp8 else {}


def fingerprint_digest(fingerprint: dict[str, Any]) -> str:
    """One sha256 over everything that identifies a model."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def pruning_record(pruned: PrunedModel) -> dict[str, Any]:
    """The contents of pruning.json."""
    refit = pruned.restoration.how
    sizes = pruned_sizes(pruned.shapes, pruned.keeps, pruned.source.parameters, pruned.restore)
    fingerprint = fingerprint_digest(pruned.source.fingerprint)
    whole = pruned.family.left_whole(pruned.source.tensors, pruned.shapes)
    of_experts = removes_experts(pruned.options)
    came_of_it = {} if pruned.options.target is None else {"ratio": sizes.decoder_ratio}
    return {
        "format": RECORD_FORMAT,
        "version": RECORD_VERSION,
        "base": {"name": base_name(pruned.source.source), "fingerprint": fingerprint},
        "options": {**options_record(pruned.options), **came_of_it},
        **({} if pruned.target is None else {"target": pruned.target}),
        "restore": pruned.restore,
        **({} if refit is None else {"refit": refit}),
        **output_dtype_record(pruned.linears is not None),
        "calibration": pruned.calibration,
        **sizes.record(),
        **({"left_whole": whole} if whole else {}),
        "layers": [
            {
                "kv_groups": shape.kv_groups,
                "neurons": shape.neurons,
                "kept_kv_groups": keep.kv_groups.tolist(),
                "kept_neurons": keep.neurons.tolist(),
                **({"experts": list(shape.experts)} if shape.experts else {}),
                **({"kept_experts": shape.kept_experts(keep.neurons)} if of_experts and shape.experts else {}),
            }
            for shape, keep in pruned.layers
        ],
        **recorded_layers(pruned.keeps),
    }


def without_name(record: dict[str, Any]) -> dict[str, Any]:
    """A record without the name of the model's directory: the same model may be reached by another path."""
    return {**record, "base": {**record["base"], "name": ""}}
