"""The shard plan: every tensor of the pruned checkpoint, its size and its file, decided before a byte is written."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.config import FP8_BLOCK
from flap_stream.model.architecture import Family
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.model.model_files import SINGLE_NAME
from flap_stream.model.safetensors_format import TensorEntry, safetensors_header
from flap_stream.model.units import ROWS, Part
from flap_stream.output.pruned_model import PrunedModel


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the pruned checkpoint and how its bytes are made.

    source: the dense tensor it is copied or cut from; None for a bias that pruning adds, or for zeros.
    axis, keep: int64 rows or columns of the source that are kept, HOLE for zeros; None keeps everything.
    shift: what is added to a bias. codes_of, scales_of: the tensor of values whose FP8 codes or scales these are.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source: TensorEntry | None
    axis: int | None = None
    keep: np.ndarray | None = None
    shift: "BaselineShift | None" = None
    codes_of: "OutputTensor | None" = None
    scales_of: "OutputTensor | None" = None


@dataclass(frozen=True)
class BaselineShift:
    """What is added to a bias: weight[:, removed] @ mean[removed].

    mean: float64 `[channel]`; removed: int64 `[removed channel]`.
    """

    weight: TensorEntry
    removed: np.ndarray
    mean: np.ndarray


@dataclass(frozen=True)
class Shard:
    """One file of the pruned checkpoint: name, header bytes (length included) and tensors in order."""

    name: str
    header: bytes
    tensors: tuple[OutputTensor, ...]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class ShardPlan:
    """All files with tensors; their index can be derived."""

    shards: tuple[Shard, ...]

    @property
    def nbytes(self) -> int:
        """Size of all shards."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(prod(tensor.shape) for shard in self.shards for tensor in shard.tensors)

    def index(self) -> bytes | None:
        """Contents of the index file; None for a single shard, which needs none."""
        if len(self.shards) == 1:
            return None
        weight_map = {tensor.name: shard.name for shard in self.shards for tensor in shard.tensors}
        total = sum(tensor.nbytes for shard in self.shards for tensor in shard.tensors)
        body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        return json.dumps(body, indent=2).encode() + b"\n"


def plan_shards(pruned: PrunedModel, max_shard_bytes: int) -> ShardPlan:
    """Decide every tensor of the pruned checkpoint, its size and its file."""
    source = pruned.source
    changed: dict[str, list[OutputTensor]] = {}
    for index in range(len(pruned.shapes)):
        changed |= _plan_layer(pruned, index)
    outputs: list[OutputTensor] = []
    for entry in source.tensors.values():
        outputs.extend(changed.get(entry.name, [_whole(entry)]))
    if pruned.linears is not None:
        outputs = list(in_fp8(outputs, pruned.linears))
    outputs = _renumbered(outputs, pruned)
    if source.wrapper is not None:
        outputs = [replace(tensor, name=source.wrapper.outer(tensor.name)) for tensor in outputs]
    return group_shards(outputs, max_shard_bytes)


def _renumbered(outputs: list[OutputTensor], pruned: PrunedModel) -> list[OutputTensor]:
    """The same tensors, those of the layers after one that is removed as a whole under that many numbers less."""
    gone = [number for number, keep in enumerate(pruned.keeps) if keep.is_gone]
    if not gone:
        return outputs
    family, found = pruned.family, []
    for tensor in outputs:
        number = family.layer_of(tensor.name)
        if number is not None:  # also of layers that predict further ahead, which come after all others
            own = tensor.name.removeprefix(family.layer_prefix(number))
            number -= sum(other < number for other in gone)
            tensor = replace(tensor, name=f"{family.layer_prefix(number)}{own}")
        found.append(tensor)
    return found


def in_fp8(outputs: Iterable[OutputTensor], linears: frozenset[str]) -> Iterator[OutputTensor]:
    """The same tensors where those of these names whose blocks are whole are FP8 codes, followed by their scales.

    Others stay, for transformers would decode them with blocks of another size.
    """
    for tensor in outputs:
        if tensor.name not in linears or any(size % FP8_BLOCK for size in tensor.shape):
            yield tensor
            continue
        grid = tuple(size // FP8_BLOCK for size in tensor.shape)
        yield OutputTensor(tensor.name, "F8_E4M3", tensor.shape, prod(tensor.shape), None, codes_of=tensor)
        yield OutputTensor(f"{tensor.name}_scale_inv", "F32", grid, 4 * prod(grid), None, scales_of=tensor)


def _filled(entry: TensorEntry, linears: frozenset[str]) -> tuple[int, ...]:
    """A tensor's shape, in whole blocks where it is in FP8."""
    return tuple(-(-n // FP8_BLOCK) * FP8_BLOCK for n in entry.shape) if entry.name in linears else entry.shape


def group_shards(outputs: Iterable[OutputTensor], max_shard_bytes: int) -> ShardPlan:
    """Fill files with these tensors in order; none is larger than the limit unless it holds a single tensor."""
    groups: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in outputs:
        if groups[-1] and size + tensor.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    count = len(groups)
    names = [SINGLE_NAME] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return ShardPlan(
        tuple(Shard(name, safetensors_header(group), tuple(group)) for name, group in zip(names, groups, strict=True))
    )


def header_bytes(
    source: Checkpoint, family: Family, shapes: Sequence[LayerShape], linears: frozenset[str] = frozenset()
) -> tuple[int, int]:
    """Size of the header if all tensors were in one file, and of one with the output biases that pruning adds.

    linears: the weights that are in FP8, as if all of their blocks were whole.
    """
    filled = (replace(_whole(entry), shape=_filled(entry, linears)) for entry in source.tensors.values())
    dense = list(in_fp8(filled, linears))
    if source.wrapper is not None:
        dense = [replace(tensor, name=source.wrapper.outer(tensor.name)) for tensor in dense]
    added = []
    for i, shape in enumerate(shapes):
        for part in family.parts(shape):
            weight = source.tensors.get(f"{family.layer_prefix(i)}{part.kind.output.name}.weight")
            bias = f"{family.layer_prefix(i)}{part.kind.output.name}.bias"
            if weight is not None and bias not in source.tensors:
                nbytes = weight.shape[0] * weight.item_bytes
                name = source.wrapper.outer(bias) if source.wrapper else bias
                added.append(OutputTensor(name, weight.dtype, (weight.shape[0],), nbytes, None))
    return len(safetensors_header(dense)), len(safetensors_header([*dense, *added]))


def _plan_layer(pruned: PrunedModel, index: int) -> dict[str, list[OutputTensor]]:
    """Tensors of one layer that change: dense name to the tensors that replace it."""
    tensors, refitted = pruned.source.tensors, pruned.restoration.refitted
    prefix, (shape, keep) = pruned.family.layer_prefix(index), pruned.layers[index]
    if keep.is_gone:
        return {name: [] for name in tensors if name.startswith(prefix)}
    changed: dict[str, list[OutputTensor]] = {}
    for part, units in pruned.family.kept_parts(shape, keep):
        if f"{prefix}{part.kind.output.name}.weight" in tensors:  # else an earlier pruning left only the bias
            changed |= _plan_part(pruned, index, part, units)
    changed |= {name: [_whole(entry)] for name, entry in refitted.items() if name.startswith(prefix)}
    for part in pruned.family.parts(shape):
        weight, bias = (f"{prefix}{part.kind.output.name}.{name}" for name in ("weight", "bias"))
        if bias in refitted and weight in tensors:  # the bias comes right after it
            changed |= {bias: [], weight: [_whole(refitted[name]) for name in (weight, bias) if name in refitted]}
    kept = shape.kept_experts(keep.neurons)
    if len(kept) < len(shape.experts):
        changed |= _without_experts(pruned, prefix, kept, changed)
    return changed


def _without_experts(
    pruned: PrunedModel, prefix: str, kept: Sequence[int], changed: dict[str, list[OutputTensor]]
) -> dict[str, list[OutputTensor]]:
    """The tensors of a mixture that loses experts: the others numbered anew, and of the router what belongs to them.

    prefix: of the layer. kept: ascending. changed: what replaces each tensor if the experts had their old numbers.
    """
    experts, tensors = f"{prefix}{pruned.family.experts_path}.each.", pruned.source.tensors
    found: dict[str, list[OutputTensor]] = {}
    for name in [name for name in tensors if name.startswith(experts)]:
        number = int(name.removeprefix(experts).partition(".")[0])
        before, after = f"{experts}{number}.", f"{experts}{kept.index(number) if number in kept else None}."
        outputs = changed.get(name, [_whole(tensors[name])]) if number in kept else []
        found[name] = [replace(out, name=after + out.name.removeprefix(before)) for out in outputs]
    own = {name.removeprefix(prefix): entry for name, entry in tensors.items() if name.startswith(prefix)}
    for name, axis in pruned.family.router_axes({name: entry.shape for name, entry in own.items()}).items():
        entry = changed[prefix + name][0].source if prefix + name in changed else own[name]
        assert entry is not None
        found[prefix + name] = [_selected(entry, axis, np.array(kept, dtype=np.int64))]
    return found


def _plan_part(pruned: PrunedModel, index: int, part: Part, units: np.ndarray) -> dict[str, list[OutputTensor]]:
    """Tensors of one part of a layer that change; without units, only the bias of the module is kept.

    units: those kept, counted from the part's first.
    """
    tensors, shape, kind = pruned.source.tensors, pruned.shapes[index], part.kind
    prefix = pruned.family.layer_prefix(index)
    changed: dict[str, list[OutputTensor]] = {}
    if len(units) == 0:
        changed = {name: [] for name in tensors if name.startswith(f"{prefix}{kind.module}.")}
    else:
        for projection in kind.projections:
            indices = projection.kept_indices(units, part.units, shape)
            for name_part in ("weight", "bias") if projection.axis == ROWS else ("weight",):
                if (name := f"{prefix}{projection.name}.{name_part}") in tensors:
                    changed[name] = [_selected(tensors[name], projection.axis, indices)]
    weight, bias = (tensors.get(f"{prefix}{kind.output.name}.{name_part}") for name_part in ("weight", "bias"))
    assert weight is not None
    if pruned.restoration.means is None:
        changed |= {bias.name: [_whole(bias)]} if bias is not None else {}
        return changed
    if bias is not None:
        changed[bias.name] = []  # written right after its weight, which is read for it
    mean = pruned.restoration.means[index][kind.name][part.channels(shape)]
    shift = BaselineShift(weight, part.removed_channels(units, shape), mean)
    return {**changed, weight.name: [*changed[weight.name], _shifted_bias(shift, bias)]}


def _whole(entry: TensorEntry) -> OutputTensor:
    return OutputTensor(entry.name, entry.dtype, entry.shape, entry.nbytes, entry)


def _selected(entry: TensorEntry, axis: int, indices: np.ndarray) -> OutputTensor:
    shape = tuple(len(indices) if a == axis else n for a, n in enumerate(entry.shape))
    keep = None if len(indices) == entry.shape[axis] else indices
    return OutputTensor(entry.name, entry.dtype, shape, prod(shape) * entry.item_bytes, entry, axis, keep)


def _shifted_bias(shift: BaselineShift, bias: TensorEntry | None) -> OutputTensor:
    weight = shift.weight
    name = weight.name.removesuffix("weight") + "bias"
    dtype, item_bytes = (weight.dtype, weight.item_bytes) if bias is None else (bias.dtype, bias.item_bytes)
    rows = weight.shape[0]
    return OutputTensor(name, dtype, (rows,), rows * item_bytes, bias, shift=shift)


def plan_digest(plan: ShardPlan) -> str:
    """Sha256 over all headers, which tells whether unfinished shards belong to this plan."""
    return hashlib.sha256(b"".join(shard.name.encode() + shard.header for shard in plan.shards)).hexdigest()
