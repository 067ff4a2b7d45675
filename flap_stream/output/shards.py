"""Pass 2: the shard plan, a value decided before a byte is written; then the shards, streamed tensor by tensor."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.arithmetic.surgery import baseline_shift, removed_indices, select_columns
from flap_stream.model.architecture import COLUMNS, HOLE, ROWS, Family, Part, Projection
from flap_stream.model.checkpoint import SINGLE_NAME, Checkpoint, TensorEntry, row_ranges
from flap_stream.model.dtypes import stored_dtype, torch_dtype
from flap_stream.storage import files

_BLOCK_BYTES = 1 << 23


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the pruned checkpoint and how its bytes come about.

    source: the dense tensor it is copied or cut from; None for a bias that pruning adds, or for zeros.
    keep: int64 rows or columns of the source that stay, HOLE for zeros; None keeps everything.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source: TensorEntry | None
    axis: int | None = None
    keep: np.ndarray | None = None
    shift: "BaselineShift | None" = None


@dataclass(frozen=True)
class Restoration:
    """What makes up for what is removed: a bias from means, tensors that were refitted, or nothing.

    means: a layer's mean inputs by kind (`attention`, `mlp`), float64 `[channel]`; None adds no biases.
    refitted: name to the tensor that stands in its place, its file with the whole path.
    digests: of the files of the refitted tensors. how: what pruning.json says of the refit.
    """

    means: Sequence[dict[str, np.ndarray]] | None = None
    refitted: Mapping[str, TensorEntry] = field(default_factory=dict)
    digests: Sequence[str] = ()
    how: dict[str, Any] | None = None


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
    """All files with tensors, and their index."""

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
        """Contents of the index file; None if there is one shard, which needs none."""
        if len(self.shards) == 1:
            return None
        weight_map = {tensor.name: shard.name for shard in self.shards for tensor in shard.tensors}
        total = sum(tensor.nbytes for shard in self.shards for tensor in shard.tensors)
        body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        return json.dumps(body, indent=2).encode() + b"\n"


def plan_shards(
    checkpoint: Checkpoint,
    family: Family,
    shapes: Sequence[LayerShape],
    keeps: Sequence[LayerKeep],
    restoration: Restoration,
    max_shard_bytes: int,
) -> ShardPlan:
    """Decide every tensor of the pruned checkpoint, its size and its file."""
    means, refitted = restoration.means, restoration.refitted
    plans = [
        _plan_layer(checkpoint, family, i, shape, keep, means[i] if means else None, refitted)
        for i, (shape, keep) in enumerate(zip(shapes, keeps, strict=True))
    ]
    changed = {name: tensors for plan in plans for name, tensors in plan.items()}
    if family.head in refitted:
        changed[family.head] = [_whole(refitted[family.head])]
    outputs: list[OutputTensor] = []
    for entry in checkpoint.tensors.values():
        outputs.extend(changed.get(entry.name, [_whole(entry)]))
    if checkpoint.wrapper is not None:
        outputs = [replace(tensor, name=checkpoint.wrapper.outer(tensor.name)) for tensor in outputs]
    return group_shards(outputs, max_shard_bytes)


def group_shards(outputs: Iterable[OutputTensor], max_shard_bytes: int) -> ShardPlan:
    """The files that these tensors go to, in order, none larger unless it holds a single tensor."""
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


def _plan_layer(
    checkpoint: Checkpoint,
    family: Family,
    index: int,
    shape: LayerShape,
    keep: LayerKeep,
    means: dict[str, np.ndarray] | None,
    refitted: Mapping[str, TensorEntry],
) -> dict[str, list[OutputTensor]]:
    """Tensors of one layer that change: dense name to what stands in its place."""
    changed: dict[str, list[OutputTensor]] = {}
    prefix = f"{family.layers}.{index}."
    for part in family.parts(shape):
        kind = part.kind
        if f"{prefix}{kind.output.name}.weight" in checkpoint.tensors:  # else an earlier run left the bias alone
            mean = None if means is None else means[kind.name][part.channels(shape)]
            changed |= _plan_part(checkpoint, part, prefix, shape, part.own(keep.of(kind.name)), mean)
        readers = [f"{prefix}{projection.name}.weight" for projection in kind.readers]
        changed |= {name: [_whole(refitted[name])] for name in readers if name in refitted}
        weight, bias = (f"{prefix}{kind.output.name}.{name}" for name in ("weight", "bias"))
        if bias in refitted:
            changed |= {bias: [], weight: [_whole(refitted[name]) for name in (weight, bias) if name in refitted]}
    return changed


def _plan_part(
    checkpoint: Checkpoint, part: Part, prefix: str, shape: LayerShape, units: np.ndarray, mean: np.ndarray | None
) -> dict[str, list[OutputTensor]]:
    """Tensors of one part of a layer that change; without units, all of the module go but the bias.

    units: those that stay, counted from the part's first.
    """
    tensors, kind = checkpoint.tensors, part.kind
    changed: dict[str, list[OutputTensor]] = {}
    if len(units) == 0:
        changed = {name: [] for name in tensors if name.startswith(f"{prefix}{kind.module}.")}
    else:
        for projection in kind.projections:
            indices = projection.kept_indices(units, part.units, shape)
            for name_part in ("weight", "bias") if projection.axis == ROWS else ("weight",):
                if (name := f"{prefix}{projection.name}.{name_part}") in tensors:
                    changed[name] = [_cut(tensors[name], projection, indices)]
    weight, bias = (tensors.get(f"{prefix}{kind.output.name}.{name_part}") for name_part in ("weight", "bias"))
    assert weight is not None
    if mean is None:
        changed |= {bias.name: [_whole(bias)]} if bias is not None else {}
        return changed
    if bias is not None:
        changed[bias.name] = []  # it moves beside its weight, which is read for it
    kept = kind.output.kept_indices(units, part.units, shape)
    removed = removed_indices(kept, kind.output.size(part.units, shape))
    return {**changed, weight.name: [*changed[weight.name], _shifted_bias(removed, weight, bias, mean)]}


def _whole(entry: TensorEntry) -> OutputTensor:
    return OutputTensor(entry.name, entry.dtype, entry.shape, entry.nbytes, entry)


def _cut(entry: TensorEntry, projection: Projection, indices: np.ndarray) -> OutputTensor:
    axis = projection.axis
    shape = tuple(len(indices) if a == axis else n for a, n in enumerate(entry.shape))
    keep = None if len(indices) == entry.shape[axis] else indices
    return OutputTensor(entry.name, entry.dtype, shape, prod(shape) * entry.item_bytes, entry, axis, keep)


def _shifted_bias(removed: np.ndarray, weight: TensorEntry, bias: TensorEntry | None, mean: np.ndarray) -> OutputTensor:
    name = weight.name.removesuffix("weight") + "bias"
    dtype, item_bytes = (weight.dtype, weight.item_bytes) if bias is None else (bias.dtype, bias.item_bytes)
    rows = weight.shape[0]
    return OutputTensor(name, dtype, (rows,), rows * item_bytes, bias, shift=BaselineShift(weight, removed, mean))


def safetensors_header(tensors: Sequence[OutputTensor]) -> bytes:
    """Header of a safetensors file, its length in front, padded to 8 bytes as the safetensors library does."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    body = json.dumps(header, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body


def write_shard(checkpoint: Checkpoint, shard: Shard, directory: Path) -> str:
    """Stream one shard into a directory, durably; the sha256 of its bytes comes out."""
    return files.write_committed(directory / shard.name, _one_ahead(_shard_chunks(checkpoint, shard)))


def _one_ahead(chunks: Iterator[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The same chunks, the next being made by another thread while one is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="shard") as thread:
        ahead = thread.submit(next, chunks, None)
        while (chunk := ahead.result()) is not None:
            ahead = thread.submit(next, chunks, None)
            yield chunk


def _shard_chunks(checkpoint: Checkpoint, shard: Shard) -> Iterator[bytes | memoryview]:
    yield shard.header
    shifts = {tensor.shift.weight.name: tensor.shift for tensor in shard.tensors if tensor.shift is not None}
    sums: dict[str, torch.Tensor] = {}  # taken while the weight streams by; its bias stands after it
    for tensor in shard.tensors:
        if tensor.shift is not None:
            shift_sum = sums.pop(tensor.shift.weight.name, None)
            yield _bias_bytes(
                checkpoint, tensor, _shift_sum(checkpoint, tensor.shift) if shift_sum is None else shift_sum
            )
            continue
        if tensor.source is None:
            yield from _zeros(tensor.nbytes)
        elif tensor.axis == COLUMNS and tensor.keep is not None:
            shift = shifts.get(tensor.source.name)
            if shift is not None:
                sums[tensor.source.name] = torch.zeros(tensor.source.shape[0], dtype=torch.float64)
            yield from _column_blocks(checkpoint, tensor.source, tensor.keep, shift, sums.get(tensor.source.name))
        elif tensor.keep is not None:
            yield from _padded_row_blocks(checkpoint, tensor.source, tensor.keep)
        else:
            yield from _copied(checkpoint, tensor.source)


def _copied(checkpoint: Checkpoint, entry: TensorEntry) -> Iterator[memoryview]:
    for start in range(0, entry.nbytes, _BLOCK_BYTES):
        block = _new_buffer(min(_BLOCK_BYTES, entry.nbytes - start))
        checkpoint.read_into(entry, block, start)
        yield block


def _new_buffer(nbytes: int) -> memoryview:
    """Memory of its own for each chunk: the last one may still be on its way to the disk."""
    return memoryview(torch.empty(nbytes, dtype=torch.uint8).numpy())


def _zeros(nbytes: int) -> Iterator[memoryview]:
    zeros = memoryview(bytes(min(_BLOCK_BYTES, nbytes)))
    for start in range(0, nbytes, _BLOCK_BYTES):
        yield zeros[: nbytes - start]


def _padded_row_blocks(checkpoint: Checkpoint, entry: TensorEntry, keep: np.ndarray) -> Iterator[memoryview]:
    """The kept rows, and zeros in the place of holes."""
    row_bytes = prod(entry.shape[1:]) * entry.item_bytes
    for run in np.split(keep, np.flatnonzero(np.diff(keep == HOLE)) + 1):
        if len(run) and run[0] == HOLE:
            yield from _zeros(len(run) * row_bytes)
        else:
            yield from _row_blocks(checkpoint, entry, run)


def _row_blocks(checkpoint: Checkpoint, entry: TensorEntry, keep: np.ndarray) -> Iterator[memoryview]:
    """The kept rows, neighbours read together."""
    row_bytes = prod(entry.shape[1:]) * entry.item_bytes
    rows = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(0, len(keep), rows):
        chosen = keep[start : start + rows]
        block = _new_buffer(len(chosen) * row_bytes)
        checkpoint.read_ranges(entry, list(row_ranges(chosen, row_bytes)), block)
        yield block


def _column_blocks(
    checkpoint: Checkpoint,
    entry: TensorEntry,
    keep: np.ndarray,
    shift: BaselineShift | None,
    shift_sum: torch.Tensor | None,
) -> Iterator[memoryview]:
    """The kept columns, all rows being read a block at a time; `shift_sum` takes in what the others give."""
    columns, holes = torch.from_numpy(np.maximum(keep, 0)), torch.from_numpy(np.flatnonzero(keep == HOLE))
    for first, rows in _weight_rows(checkpoint, entry):
        if shift is not None and shift_sum is not None:
            _add_shift(shift_sum, first, rows, shift)
        selected = select_columns(rows, columns).index_fill_(1, holes, 0)
        yield memoryview(selected.view(torch.uint8).numpy()).cast("B")


def _shift_sum(checkpoint: Checkpoint, shift: BaselineShift) -> torch.Tensor:
    """The shift of a bias by itself, float64 `[row]`, for a weight that is not in the same shard or is unchanged."""
    total = torch.zeros(shift.weight.shape[0], dtype=torch.float64)
    if len(shift.removed):
        for first, rows in _weight_rows(checkpoint, shift.weight):
            _add_shift(total, first, rows, shift)
    return total


def _add_shift(total: torch.Tensor, first: int, rows: torch.Tensor, shift: BaselineShift) -> None:
    removed, mean = torch.from_numpy(shift.removed), torch.from_numpy(shift.mean)
    total[first : first + len(rows)] += baseline_shift(rows, removed, mean)


def _bias_bytes(checkpoint: Checkpoint, tensor: OutputTensor, shift_sum: torch.Tensor) -> memoryview:
    """The old bias, if there is one, plus the shift; float64 until it is stored."""
    bias = shift_sum
    if tensor.source is not None:
        raw = bytearray(tensor.source.nbytes)
        checkpoint.read_into(tensor.source, memoryview(raw))
        bias = bias + torch.frombuffer(raw, dtype=stored_dtype(tensor.source))
    stored = bias.to(torch_dtype(tensor.dtype))
    return memoryview(stored.view(torch.uint8).numpy())


def _weight_rows(checkpoint: Checkpoint, entry: TensorEntry) -> Iterator[tuple[int, torch.Tensor]]:
    """Blocks of rows `[row, column]` with the first row's index; a block is valid until the next."""
    row_bytes = entry.shape[1] * entry.item_bytes
    rows = max(1, min(entry.shape[0], _BLOCK_BYTES // row_bytes))
    raw = torch.empty(rows * row_bytes, dtype=torch.uint8)
    for first in range(0, entry.shape[0], rows):
        count = min(rows, entry.shape[0] - first)
        block = raw[: count * row_bytes]
        checkpoint.read_into(entry, memoryview(block.numpy()), first * row_bytes)
        yield first, block.view(stored_dtype(entry)).view(count, entry.shape[1])


def plan_digest(plan: ShardPlan) -> str:
    """Sha256 over all headers: what decides whether half-written shards are of this plan."""
    return hashlib.sha256(b"".join(shard.name.encode() + shard.header for shard in plan.shards)).hexdigest()
