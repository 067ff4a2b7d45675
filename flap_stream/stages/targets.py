"""Targets of a model or a run directory, and the sizes that they are counted in.

Without torch, which `plan` has no other need of.
"""

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from flap_stream.arithmetic.allocation import LayerKeep, allocate
from flap_stream.arithmetic.layer_shape import LayerShape, Sublayer
from flap_stream.arithmetic.scoring import LayerScores
from flap_stream.arithmetic.sizes import pruned_sizes
from flap_stream.arithmetic.target_prices import Fp8Sizes, ModelSizes, fp8_bytes, target_of
from flap_stream.arithmetic.targets import Target
from flap_stream.config import FP8_BLOCK, PlanConfig, PruneConfig, RewriteConfig, part_of, require_restoration
from flap_stream.config.options import removes_experts
from flap_stream.errors import RunMismatch
from flap_stream.model.safetensors_format import TensorEntry
from flap_stream.model.units import ROWS, Projection
from flap_stream.output.shard_plan import header_bytes
from flap_stream.storage.run_directory import RunDirectory
from flap_stream.storage.run_manifest import model_sizes

if TYPE_CHECKING:
    from flap_stream.engine.streamed_model import StreamedModel


def sizes_of(model: "StreamedModel") -> ModelSizes:
    """Sizes of a dense checkpoint, from the headers of its files."""
    source = model.checkpoint
    units = [_unit_bytes(model, i) for i in range(len(model.shapes))]
    headers, experts = header_bytes(source, model.family, model.shapes), range(len(model.shapes))
    expert_bytes = [_expert_bytes(model, i) for i in experts]
    return ModelSizes(source.parameters, source.nbytes, units, headers, expert_bytes, _fp8_sizes(model))


def _fp8_sizes(model: "StreamedModel") -> Fp8Sizes | None:
    """The sizes in FP8; None if the model does not allow it."""
    from flap_stream.model.linears import linear_weights  # which needs torch

    source = model.checkpoint
    if source.config["hidden_size"] % FP8_BLOCK:
        return None
    linears = linear_weights(model.skeleton)
    units = [_unit_bytes(model, i, linears) for i in range(len(model.shapes))]
    in_units = {
        f"{model.family.layer_prefix(i)}{projection.name}.{name}"
        for i, shape in enumerate(model.shapes)
        for part in model.family.parts(shape)
        for projection in part.kind.projections
        for name in _unit_tensors(projection)
    }
    rest = sum(
        _written_bytes(entry, linears, entry.shape) for name, entry in source.tensors.items() if name not in in_units
    )
    return Fp8Sizes(rest, units, header_bytes(source, model.family, model.shapes, linears))


def _written_bytes(entry: TensorEntry, linears: frozenset[str], sizes: tuple[int, ...]) -> int:
    """Bytes of a tensor where these are in FP8. sizes: of its axes, those that must fill blocks for that."""
    is_packed = entry.name in linears and not any(size % FP8_BLOCK for size in sizes)
    return fp8_bytes(prod(entry.shape)) if is_packed else entry.nbytes


def _unit_tensors(projection: Projection) -> tuple[str, ...]:
    """The tensors of a projection that have rows or columns of units."""
    return ("weight", "bias") if projection.axis == ROWS else ("weight",)


def _unit_bytes(model: "StreamedModel", index: int, linears: frozenset[str] = frozenset()) -> tuple[int, int]:
    """Bytes of one KV group and of one neuron of a layer, rounded down; up where tensors of these names are in FP8."""
    shape, entries = model.shapes[index], model.layer_entries[index]
    total = dict.fromkeys(Sublayer, 0)
    for part in model.family.parts(shape):
        for projection in part.kind.projections:
            for name in _unit_tensors(projection):
                entry = entries.get(f"{projection.name}.{name}")
                other = () if entry is None else entry.shape[: projection.axis] + entry.shape[projection.axis + 1 :]
                total[part.kind.name] += 0 if entry is None else _written_bytes(entry, linears, other)
    rounding = -1 if linears else 1
    group, neuron = (rounding * (rounding * n // max(shape.units(kind), 1)) for kind, n in total.items())
    return group, neuron


def _expert_bytes(model: "StreamedModel", index: int) -> int:
    """Bytes that go with one expert of a layer besides its neurons: the router's for it, and its output bias."""
    shape, entries = model.shapes[index], model.layer_entries[index]
    if not shape.experts:
        return 0
    router = model.family.router_axes({name: entry.shape for name, entry in entries.items()})
    bias = entries.get(f"{model.family.parts(shape)[-1].kind.output.name}.bias")
    return sum(entries[n].nbytes for n in router) // len(shape.experts) + (0 if bias is None else bias.nbytes)


def counts_of(shapes: Sequence[LayerShape], keeps: Sequence[LayerKeep]) -> list[tuple[int, int, int]]:
    """How many KV groups, neurons and experts of each layer are kept."""
    return [
        (len(keep.kv_groups), len(keep.neurons), len(shape.kept_experts(keep.neurons)))
        for shape, keep in zip(shapes, keeps, strict=True)
    ]


def run_target(run: RunDirectory, options: PlanConfig, rewrite: RewriteConfig) -> Target | None:
    """The target of a plan, with the biases that a rewrite adds; None if it has none.

    Raises RunMismatch if it is to be written in FP8, but the run does not know the sizes.
    """
    restore, sizes = require_restoration(options.method, rewrite.restore), model_sizes(run.manifest)
    if options.target is not None and rewrite.output_dtype == "fp8":
        if sizes.fp8 is None:
            raise RunMismatch(
                f"{run.path} holds no sizes in FP8, for --output-dtype fp8: it is of an earlier version, or of a model "
                "that allows none; collect again, into a new directory"
            )
        sizes = sizes.in_fp8(run.layer_shapes, options)
    return target_of(options, run.layer_shapes, sizes, restore, rewrite.max_shard_bytes)


def rehearse(model: "StreamedModel", options: PruneConfig) -> list[LayerKeep]:
    """A decision of the sizes that the real one will have, or nearly, before there are scores.

    Raises InvalidOption if the options cannot be met whatever the scores.
    """
    target, shapes = None, model.shapes
    if options.target is not None:
        restore = require_restoration(options.method, options.restore)
        sizes = sizes_of(model)
        sizes = sizes.in_fp8(shapes, options) if options.output_dtype == "fp8" else sizes
        target = target_of(options, shapes, sizes, restore, options.max_shard_bytes)
    return allocate(unscored(shapes, options), shapes, part_of(options, PlanConfig), target)


def unscored(shapes: Sequence[LayerShape], options: PlanConfig) -> list[LayerScores]:
    """Scores that tell no unit from another, and of whole layers prefer to remove the smallest.

    A ratio that is less than these can be met by no scores.
    """
    found = []
    for shape in shapes:
        experts = np.zeros(len(shape.experts)) if removes_experts(options) else None
        found.append(LayerScores(np.zeros(shape.kv_groups), np.zeros(shape.neurons), experts, float(shape.prunable)))
    return found


def expected_ratio(model: "StreamedModel", options: PruneConfig) -> float:
    """About the share of the prunable weights that will be removed. Raises InvalidOption for an unmet target."""
    if options.target is None:
        return options.ratio
    keeps = rehearse(model, options)
    return pruned_sizes(model.shapes, keeps, model.checkpoint.parameters, "none").decoder_ratio
