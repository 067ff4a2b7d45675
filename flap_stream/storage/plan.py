"""The plan of a run directory, and the format of plan.json: what is trusted of it when it is read."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from flap_stream.arithmetic.allocation import LayerKeep, kept_layers
from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.config import TARGET_FIELDS, TARGETS, PlanConfig
from flap_stream.config.options import removes_experts
from flap_stream.errors import CorruptRun, InvalidOption, RunMismatch
from flap_stream.storage import files
from flap_stream.storage.run_files import Committed, RunFiles
from flap_stream.storage.schema import finite, matches, parse_json, within

_NAME = "plan.json"


@dataclass(frozen=True)
class PlanStore:
    """The current plan: which units each layer keeps, in plan.json.

    shapes: those of all layers.
    """

    run_files: RunFiles
    shapes: list[LayerShape]

    def write(self, options: PlanConfig, layers: Iterable[LayerKeep]) -> None:
        """Store a plan, replacing any earlier one."""
        digest = files.write_committed(self.run_files.path / _NAME, _contents(options, list(layers)))
        self.run_files.journal.append("plan", "plan", digest=digest)

    def exists(self) -> bool:
        """Whether a plan is stored."""
        return self.run_files.journal.find("plan", "plan") is not None

    def read(self) -> tuple[PlanConfig, list[LayerKeep]]:
        """The options of the current plan and what it keeps of each layer.

        Raises RunMismatch if there is none, CorruptRun if it is altered.
        """
        path = self.run_files.path / _NAME
        found = self.committed()
        if not found:
            raise no_plan(self.run_files.path)
        remedy = f"make it again with flap-stream plan {self.run_files.path} --ratio R"
        self.run_files.require_intact(found[0], remedy)
        try:
            return _parse(files.read_plain(path), self.shapes)
        except ValueError as error:
            raise CorruptRun(f"{path} is not a plan for this model: {error}; {remedy}") from error

    def committed(self) -> list[Committed]:
        """The plan, if one is stored."""
        entry = self.run_files.journal.find("plan", "plan")
        return [] if entry is None else [Committed(_NAME, entry["digest"], _max_bytes(self.shapes))]


def no_plan(run: Path) -> RunMismatch:
    """The error for a run directory without a plan."""
    return RunMismatch(f"{run} holds no plan yet; make one with flap-stream plan {run} --ratio R")


def _contents(options: PlanConfig, layers: Sequence[LayerKeep]) -> bytes:
    """The bytes of a plan.json."""
    kept = [{"kept_kv_groups": keep.kv_groups.tolist(), "kept_neurons": keep.neurons.tolist()} for keep in layers]
    body = {"options": recorded_options(options), "layers": kept, **recorded_layers(layers)}
    return json.dumps(body).encode()


def recorded_layers(keeps: Sequence[LayerKeep]) -> dict[str, list[int]]:
    """Which layers are kept, as a plan, pruning.json and `--json` record it: only where one is removed as a whole."""
    kept = kept_layers(keeps)
    return {} if len(kept) == len(keeps) else {"kept_layers": kept}


def recorded_options(options: PlanConfig) -> dict[str, Any]:
    """The options of a plan as they are recorded: those that came with targets and whole experts only if used.

    With a target, the ratio is left out.
    """
    values = asdict(options)
    left_out = [name for name in TARGET_FIELDS if values[name] is None] + ([] if options.target is None else ["ratio"])
    left_out += [name for name in ("whole_experts", "depth") if not values[name]]
    left_out += [name for name in ("min_experts", "round_experts_to") if values[name] is None]
    return {name: value for name, value in values.items() if name not in left_out}


def _max_bytes(shapes: Sequence[LayerShape]) -> int:
    """Maximum size of a plan.json: ten bytes for every unit (an index has at most 8 digits), and some for the rest."""
    return sum(10 * (shape.kv_groups + shape.neurons) + 100 for shape in shapes) + 10_000


def _parse(data: bytes, shapes: Sequence[LayerShape]) -> tuple[PlanConfig, list[LayerKeep]]:
    """Options and kept units from the bytes of a plan.json for layers of these shapes.

    Raises ValueError, saying what is wrong, unless each layer's kept units exist, are listed once and in ascending
    order, and include at least one neuron of every expert or, if they are removed as a whole, of those that the router
    needs. A layer that is removed as a whole keeps none; at least one layer is kept.
    """
    body = parse_json(data)
    layer_form = {"kept_kv_groups": list, "kept_neurons": list}
    if not matches(body, {"options": dict, "layers": [layer_form], "kept_layers?": list}):
        raise ValueError("it does not have the form of a plan")
    if len(body["layers"]) != len(shapes):
        raise ValueError(f"it has {len(body['layers'])} layers, the model has {len(shapes)}")
    options, keeps = parse_plan_options(body["options"]), []
    stay = _indices(body.get("kept_layers", list(range(len(shapes)))), len(shapes), "kept layers")
    if not len(stay):
        raise ValueError("it keeps no layer")
    for i, (layer, shape) in enumerate(zip(body["layers"], shapes, strict=True)):
        groups = _indices(layer["kept_kv_groups"], shape.kv_groups, f"KV groups of layer {i}")
        neurons = _indices(layer["kept_neurons"], shape.neurons, f"neurons of layer {i}")
        if i not in stay:
            if len(groups) or len(neurons):
                raise ValueError(f"layer {i} is removed, but units of it are kept")
            keeps.append(LayerKeep(groups, neurons, is_gone=True))
            continue
        kept = len(shape.kept_experts(neurons))
        if kept < len(shape.experts) and not removes_experts(options):
            raise ValueError(f"an expert of layer {i} keeps no neuron")
        if kept < shape.router_needs:
            raise ValueError(f"layer {i} keeps {kept} experts, its router needs {shape.router_needs}")
        keeps.append(LayerKeep(groups, neurons))
    return options, keeps


def _indices(values: list[Any], units: int, what: str) -> np.ndarray:
    """Indices of units as int64 `[kept]`. Raises ValueError unless they are in range and strictly ascending."""
    if not matches(values, [within(0, units - 1)]):
        raise ValueError(f"the {what} are not all from 0 to {units - 1}")
    indices = np.array(values, dtype=np.int64)
    if np.any(np.diff(indices) <= 0):
        raise ValueError(f"the {what} are not in strictly ascending order")
    return indices


def parse_plan_options(values: dict[str, Any]) -> PlanConfig:
    """The options of a plan, from the values in a file; a ratio next to a target is what came of it.

    Raises ValueError for any value that is not allowed.
    """
    for name, kind in get_type_hints(PlanConfig).items():
        value = values.get(name)
        has_type = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        has_type = finite(value) if kind is float else has_type
        if name in values and not has_type:
            raise ValueError(f"its option {name} is {str(value)[:80]}")
    if any(values.get(name) is not None for name in TARGETS):
        values = {name: value for name, value in values.items() if name != "ratio"}
    try:
        return PlanConfig(**values)
    except (TypeError, InvalidOption) as error:  # an unknown option, or a value out of range
        raise ValueError(str(error)) from error
