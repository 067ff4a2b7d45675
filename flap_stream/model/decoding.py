"""Making matrices of codes and scales, block of rows by block of rows, on the device that holds them.

Values are multiplied in float32 and rounded once, as in transformers.
Sources: OCP Microscaling Formats (MX) v1.0 for E2M1 and E8M0; compressed-tensors for packed integers and NVFP4.
"""

from collections.abc import Callable, Sequence

import torch

from flap_stream.model.dtypes import raw_view, stored_dtype
from flap_stream.model.safetensors_format import WORD_BITS, Encoding, TensorEntry
from flap_stream.model.shard_files import ShardFiles

WORKSPACE_BYTES = 40 << 20  # at most, of `decode`; 32 bytes for each value of a block

_BLOCK_VALUES = 1 << 20  # decoded at a time; not measured
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """E2M1 values, float32 `[row, 2 * byte]`: of a byte the low nibble is first."""
    packed = codes.view(torch.uint8).flatten(1)
    both = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    return torch.tensor(_E2M1, device=codes.device)[both.int()]


def _words(bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Signed integers of that many bits, float32 `[row, value]`: the lowest bits of a word are first."""

    def unpacked(codes: torch.Tensor) -> torch.Tensor:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=codes.device)
        return ((codes[..., None] >> shifts) & (1 << bits) - 1).flatten(1).float() - (1 << bits - 1)

    return unpacked


# Kinds of codes: from those of some rows to their values, float32 `[row, column]`.
KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "values": torch.Tensor.float,
    "nibbles": _nibbles,
    **{f"words of {bits} bits": _words(bits) for bits in WORD_BITS},
}


def decode(encoding: Encoding, stored: Sequence[torch.Tensor], out: torch.Tensor, first: int = 0) -> None:
    """Make rows of a matrix, beginning with number `first`.

    stored: the encoding's parts, of the codes those rows alone or, transposed, all. out: `[row, column]`, any dtype.
    """
    codes, *scales = stored
    if encoding.is_transposed:
        out.copy_(codes[:, first : first + len(out)].T)
        return
    offsets = _offsets(encoding, scales.pop()) if encoding.has_offsets else None
    factors, (block_rows, block_columns) = _factors(scales), encoding.block
    rows = max(1, _BLOCK_VALUES // out.shape[1])
    for start in range(0, len(out), rows):
        stop = min(start + rows, len(out))
        values = KINDS[encoding.codes](codes[start:stop])
        of_row = torch.arange(first + start, first + stop, device=out.device) // block_rows
        if offsets is not None:
            values.sub_(offsets[of_row].repeat_interleave(block_columns, dim=1)[:, : out.shape[1]])
        each = factors[of_row].repeat_interleave(block_columns, dim=1)
        out[start:stop] = values.mul_(each[:, : out.shape[1]])


def read_decoded(files: ShardFiles, entry: TensorEntry, ranges: Sequence[tuple[int, int]], buffer: memoryview) -> None:
    """Fill `buffer` with byte ranges `(start, stop)` of an encoded tensor, ascending, one after another.

    All rows from the first to the last are decoded.
    """
    encoding, row_bytes = entry.encoding, entry.shape[1] * entry.item_bytes
    assert encoding is not None
    first, last = ranges[0][0] // row_bytes, -(-ranges[-1][1] // row_bytes)
    stored = []
    for part in encoding.parts:
        begin, end = 0, part.nbytes
        if part is encoding.parts[0] and not encoding.is_transposed:
            begin, end = (n * part.nbytes // entry.shape[0] for n in (first, last))
        raw = torch.empty(end - begin, dtype=torch.uint8)
        files.read(part.file, part.offset + begin, [memoryview(raw.numpy())])
        stored.append(raw_view(raw, part))
    rows = torch.empty((last - first, entry.shape[1]), dtype=stored_dtype(entry))
    decode(encoding, stored, rows, first)
    made, at = memoryview(rows.view(torch.uint8).numpy()).cast("B"), 0
    for start, stop in ranges:
        buffer[at : at + stop - start] = made[start - first * row_bytes : stop - first * row_bytes]
        at += stop - start


def _offsets(encoding: Encoding, stored: torch.Tensor) -> torch.Tensor:
    """Offsets, float32 `[block of rows, block of columns]`, with rows more if words were not full."""
    if stored.dtype == torch.int32:
        return KINDS[encoding.codes](stored.T).T
    return stored.float().reshape(-1, stored.shape[-1] if stored.ndim > 1 else 1)


def _factors(scales: Sequence[torch.Tensor]) -> torch.Tensor:
    """Scales, float32 `[block of rows, block of columns]`; bytes are exponents of two, as E8M0 has them."""
    found = scales[0]
    if found.dtype == torch.uint8:
        found = found.view(torch.float8_e8m0fnu)
    found = found.float().reshape(-1, found.shape[-1] if found.ndim > 1 else 1)
    return found / scales[1].float() if len(scales) > 1 else found
