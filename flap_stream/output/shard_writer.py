"""Writing shards: their bytes, streamed tensor by tensor from the dense checkpoint."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import numpy as np
import torch

from flap_stream.arithmetic.fp8 import fp8_blocks
from flap_stream.arithmetic.surgery import baseline_shift, select_columns
from flap_stream.config import FP8_BLOCK
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.model.dtypes import stored_dtype, torch_dtype
from flap_stream.model.safetensors_format import TensorEntry, row_ranges
from flap_stream.model.units import COLUMNS, HOLE
from flap_stream.output.shard_plan import BaselineShift, OutputTensor, Shard
from flap_stream.storage import files

_BLOCK_BYTES = 1 << 23  # read or written at a time; not measured
_CHUNKS_KEPT = 4  # until they are hashed


def write_shard(checkpoint: Checkpoint, shard: Shard, directory: Path) -> str:
    """Stream one shard into a directory, durably; returns the sha256 of its bytes."""
    return files.write_committed(directory / shard.name, _one_ahead(_shard_chunks(checkpoint, shard)), _CHUNKS_KEPT)


def _one_ahead(chunks: Iterator[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The same chunks; another thread makes the next one while one is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="shard") as thread:
        ahead = thread.submit(next, chunks, None)
        while (chunk := ahead.result()) is not None:
            ahead = thread.submit(next, chunks, None)
            yield chunk


def _shard_chunks(checkpoint: Checkpoint, shard: Shard) -> Iterator[bytes | memoryview]:
    yield shard.header
    shifts = {tensor.shift.weight.name: tensor.shift for tensor in shard.tensors if tensor.shift is not None}
    sums: dict[str, torch.Tensor] = {}  # computed while the weight is streamed; its bias comes after it
    scales: dict[str, list[torch.Tensor]] = {}  # in the same way; by the dense name of the values, as in `scales_of`
    for tensor in shard.tensors:
        if tensor.codes_of is not None:
            scales[tensor.codes_of.name] = []
            values = _values(checkpoint, tensor.codes_of, shifts, sums)
            for rows in _block_rows(values, tensor.codes_of):
                codes, scale = fp8_blocks(rows)
                scales[tensor.codes_of.name].append(scale)
                yield memoryview(codes.view(torch.uint8).numpy()).cast("B")
        elif tensor.scales_of is not None:
            found = scales.pop(tensor.scales_of.name, None)
            found = _scales(checkpoint, tensor.scales_of) if found is None else found
            yield memoryview(torch.cat(found).view(torch.uint8).numpy())
        else:
            yield from _values(checkpoint, tensor, shifts, sums)


def _values(
    checkpoint: Checkpoint, tensor: OutputTensor, shifts: Mapping[str, BaselineShift], sums: dict[str, torch.Tensor]
) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor that is no codes or scales.

    shifts: of biases that come after their weights. sums: those computed so far, by weight.
    """
    if tensor.shift is not None:
        shift_sum = sums.pop(tensor.shift.weight.name, None)
        shift_sum = _shift_sum(checkpoint, tensor.shift) if shift_sum is None else shift_sum
        yield _bias_bytes(checkpoint, tensor, shift_sum)
    elif tensor.source is None:
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


def _block_rows(chunks: Iterable[bytes | memoryview], tensor: OutputTensor) -> Iterator[torch.Tensor]:
    """A matrix `[FP8_BLOCK, column]` by matrix, each valid until the next one. chunks: the bytes of all its values."""
    raw = torch.empty(FP8_BLOCK * tensor.nbytes // tensor.shape[0], dtype=torch.uint8)
    buffer, filled = memoryview(raw.numpy()), 0
    for chunk in chunks:
        left = memoryview(chunk)
        while len(left):
            count = min(len(left), len(buffer) - filled)
            buffer[filled : filled + count] = left[:count]
            filled, left = filled + count, left[count:]
            if filled == len(buffer):
                yield raw.view(torch_dtype(tensor.dtype)).view(FP8_BLOCK, tensor.shape[1])
                filled = 0


def _scales(checkpoint: Checkpoint, tensor: OutputTensor) -> list[torch.Tensor]:
    """The scales of a tensor's values, whose codes are in another shard."""
    return [fp8_blocks(rows)[1] for rows in _block_rows(_values(checkpoint, tensor, {}, {}), tensor)]


def _copied(checkpoint: Checkpoint, entry: TensorEntry) -> Iterator[memoryview]:
    for start in range(0, entry.nbytes, _BLOCK_BYTES):
        block = _new_buffer(min(_BLOCK_BYTES, entry.nbytes - start))
        checkpoint.read_into(entry, block, start)
        yield block


def _new_buffer(nbytes: int) -> memoryview:
    """A new buffer for each chunk: the last one may not be on the disk yet."""
    return memoryview(torch.empty(nbytes, dtype=torch.uint8).numpy())


def _zeros(nbytes: int) -> Iterator[memoryview]:
    zeros = memoryview(bytes(min(_BLOCK_BYTES, nbytes)))
    for start in range(0, nbytes, _BLOCK_BYTES):
        yield zeros[: nbytes - start]


def _padded_row_blocks(checkpoint: Checkpoint, entry: TensorEntry, keep: np.ndarray) -> Iterator[memoryview]:
    """The kept rows, with zeros for holes."""
    row_bytes = prod(entry.shape[1:]) * entry.item_bytes
    for run in np.split(keep, np.flatnonzero(np.diff(keep == HOLE)) + 1):
        if len(run) and run[0] == HOLE:
            yield from _zeros(len(run) * row_bytes)
        else:
            yield from _row_blocks(checkpoint, entry, run)


def _row_blocks(checkpoint: Checkpoint, entry: TensorEntry, keep: np.ndarray) -> Iterator[memoryview]:
    """The kept rows; adjacent ones are read together."""
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
    """The kept columns, from blocks of whole rows; the removed ones are added up in `shift_sum`, float64 `[row]`."""
    columns, holes = torch.from_numpy(np.maximum(keep, 0)), torch.from_numpy(np.flatnonzero(keep == HOLE))
    for first, rows in _weight_rows(checkpoint, entry):
        if shift is not None and shift_sum is not None:
            _add_shift(shift_sum, first, rows, shift)
        selected = select_columns(rows, columns).index_fill_(1, holes, 0)
        yield memoryview(selected.view(torch.uint8).numpy()).cast("B")


def _shift_sum(checkpoint: Checkpoint, shift: BaselineShift) -> torch.Tensor:
    """The shift of a bias, float64 `[row]`, whose weight is in another shard or unchanged."""
    total = torch.zeros(shift.weight.shape[0], dtype=torch.float64)
    if len(shift.removed):
        for first, rows in _weight_rows(checkpoint, shift.weight):
            _add_shift(total, first, rows, shift)
    return total


def _add_shift(total: torch.Tensor, first: int, rows: torch.Tensor, shift: BaselineShift) -> None:
    removed, mean = torch.from_numpy(shift.removed), torch.from_numpy(shift.mean)
    total[first : first + len(rows)] += baseline_shift(rows, removed, mean)


def _bias_bytes(checkpoint: Checkpoint, tensor: OutputTensor, shift_sum: torch.Tensor) -> memoryview:
    """The old bias, if any, plus the shift, in float64 until it is stored."""
    bias = shift_sum
    if tensor.source is not None:
        raw = bytearray(tensor.source.nbytes)
        checkpoint.read_into(tensor.source, memoryview(raw))
        bias = bias + torch.frombuffer(raw, dtype=stored_dtype(tensor.source))
    stored = bias.to(torch_dtype(tensor.dtype))
    return memoryview(stored.view(torch.uint8).numpy())


def _weight_rows(checkpoint: Checkpoint, entry: TensorEntry) -> Iterator[tuple[int, torch.Tensor]]:
    """Blocks of rows `[row, column]` with the first row's index; a block is valid until the next one."""
    row_bytes = entry.shape[1] * entry.item_bytes
    rows = max(1, min(entry.shape[0], _BLOCK_BYTES // row_bytes))
    raw = torch.empty(rows * row_bytes, dtype=torch.uint8)
    for first in range(0, entry.shape[0], rows):
        count = min(rows, entry.shape[0] - first)
        block = raw[: count * row_bytes]
        checkpoint.read_into(entry, memoryview(block.numpy()), first * row_bytes)
        yield first, block.view(stored_dtype(entry)).view(count, entry.shape[1])
