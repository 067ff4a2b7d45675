"""Groups of arrays in a run directory, in zarr format 3: one uncompressed chunk per array, with a checksum.

Metadata and file sizes must be exactly what this module writes before zarr sees them: other metadata could name codecs
that run code, or arrays too large for any memory.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from flap_stream.errors import CorruptRun, NotPlain
from flap_stream.storage import files
from flap_stream.storage.schema import Schema, matches, parse_json

ArraySpec = tuple[str, tuple[int, ...]]  # dtype (int64 or float64) and shape of an array

_METADATA_BYTES = 1 << 16  # limit on a zarr.json; those written here have under 1 kB
_CHECKSUM_BYTES = 4
_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
_OPTIONAL: dict[str, tuple[Any, ...]] = {
    "fill_value": (-1, "NaN"),
    "attributes": ({},),
    "storage_transformers": ([],),
    "dimension_names": (None,),
}


def write_group(
    path: Path, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any], groups: tuple[str, ...] = ()
) -> None:
    """Write a group to a new directory, without making it durable. groups: names of empty groups to create in it."""
    path.mkdir()  # does not follow a link
    group = zarr.create_group(path, attributes=dict(attributes), zarr_format=3)
    for child in groups:
        group.create_group(child)
    for name, values in arrays.items():
        stored = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=_chunks(values.shape),
            fill_value=np.nan if values.dtype.kind == "f" else -1,
            serializer=BytesCodec(endian="little"),
            compressors=[Crc32cCodec()],
            config={"write_empty_chunks": True},
        )
        stored[...] = values


def read_group(path: Path, specs: Mapping[str, ArraySpec], attributes: Schema = None) -> tuple[list[np.ndarray], Any]:
    """The arrays of a group, in the order of `specs`, and the group's attributes.

    attributes: their schema, if there are any.
    Raises CorruptRun unless everything is as this module writes it.
    """
    found = _metadata(path)
    is_group = {key: found.get(key) for key in ("zarr_format", "node_type")} == {"zarr_format": 3, "node_type": "group"}
    given = found.get("attributes", {})
    if not is_group or set(found) - {"zarr_format", "node_type", "attributes"} or not matches(given, attributes or {}):
        raise _foreign(path)
    return [_read_array(path / name, spec) for name, spec in specs.items()], given


def max_bytes(specs: Mapping[str, ArraySpec]) -> int:
    """Maximum size of all files of a group together."""
    chunks = sum(_chunk_bytes(spec) for spec in specs.values())
    return chunks + _METADATA_BYTES * (2 * len(specs) + 1)


def _read_array(path: Path, spec: ArraySpec) -> np.ndarray:
    dtype, shape = spec
    found = _metadata(path)
    wanted = {
        **{"zarr_format": 3, "node_type": "array", "data_type": dtype, "shape": list(shape), "codecs": _CODECS},
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(_chunks(shape))}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
    }
    optional = {key: value for key, value in found.items() if key not in wanted}
    is_same = json.dumps([found.get(key) for key in wanted], sort_keys=True) == json.dumps(
        list(wanted.values()), sort_keys=True
    )
    if not is_same or any(value not in _OPTIONAL.get(key, ()) for key, value in optional.items()):
        raise _foreign(path)
    if prod(shape) == 0:
        return np.zeros(shape, dtype)
    chunk = path.joinpath("c", *["0"] * len(shape))
    if not chunk.is_file() or chunk.stat().st_size != _chunk_bytes(spec):  # zarr would fill in a missing chunk
        raise _foreign(path)
    try:
        return np.asarray(zarr.open_array(path, mode="r", zarr_format=3))
    except ValueError as error:
        raise _foreign(path) from error


def _metadata(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(files.read_plain(path / "zarr.json", _METADATA_BYTES))
    except (OSError, ValueError, NotPlain) as error:
        raise _foreign(path) from error
    if not isinstance(found, dict):
        raise _foreign(path)
    return found


def _foreign(path: Path) -> CorruptRun:
    return CorruptRun(f"{path} is not what flap-stream writes; delete the run directory and collect again")


def _chunks(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(1, size) for size in shape)


def _chunk_bytes(spec: ArraySpec) -> int:
    dtype, shape = spec
    return prod(shape) * np.dtype(dtype).itemsize + _CHECKSUM_BYTES
