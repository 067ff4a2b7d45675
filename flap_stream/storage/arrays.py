"""Groups of arrays in a run directory, as zarr format 3: one checked chunk an array, without compression.

What is read must be exactly what is written here, metadata and sizes of files included, before zarr sees it: other
metadata could name codecs that run code, or arrays that no memory holds.
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
from flap_stream.storage.json_form import has_form, parsed

Form = tuple[str, tuple[int, ...]]  # dtype (int64 or float64) and shape of an array

METADATA_BYTES = 1 << 16  # at most, of a zarr.json
_CHECKSUM_BYTES = 4
_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
_FURTHER: dict[str, tuple[Any, ...]] = {
    "fill_value": (-1, "NaN"),
    "attributes": ({},),
    "storage_transformers": ([],),
    "dimension_names": (None,),
}


def write_group(
    path: Path, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any], groups: tuple[str, ...] = ()
) -> None:
    """Write a group to a new directory; it is not made durable. groups: names of empty groups in it."""
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


def read_group(path: Path, forms: Mapping[str, Form], attributes: Any = None) -> tuple[list[np.ndarray], Any]:
    """The arrays of a group, in the order of `forms`, and the group's attributes.

    attributes: their form, if there are any.
    Raises CorruptRun unless all is as it is written here.
    """
    found = _metadata(path)
    plain = {key: found.get(key) for key in ("zarr_format", "node_type")} == {"zarr_format": 3, "node_type": "group"}
    given = found.get("attributes", {})
    if not plain or set(found) - {"zarr_format", "node_type", "attributes"} or not has_form(given, attributes or {}):
        raise _not_ours(path)
    return [_read_array(path / name, form) for name, form in forms.items()], given


def most_bytes(forms: Mapping[str, Form]) -> int:
    """Most bytes of all files of a group."""
    chunks = sum(_chunk_bytes(form) for form in forms.values())
    return chunks + METADATA_BYTES * (2 * len(forms) + 1)


def _read_array(path: Path, form: Form) -> np.ndarray:
    dtype, shape = form
    found = _metadata(path)
    wanted = {
        **{"zarr_format": 3, "node_type": "array", "data_type": dtype, "shape": list(shape), "codecs": _CODECS},
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(_chunks(shape))}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
    }
    further = {key: value for key, value in found.items() if key not in wanted}
    is_same = json.dumps([found.get(key) for key in wanted], sort_keys=True) == json.dumps(
        list(wanted.values()), sort_keys=True
    )
    if not is_same or any(value not in _FURTHER.get(key, ()) for key, value in further.items()):
        raise _not_ours(path)
    if prod(shape) == 0:
        return np.zeros(shape, dtype)
    chunk = path.joinpath("c", *["0"] * len(shape))
    if not chunk.is_file() or chunk.stat().st_size != _chunk_bytes(form):  # zarr fills in what is missing
        raise _not_ours(path)
    try:
        return np.asarray(zarr.open_array(path, mode="r", zarr_format=3))
    except ValueError as error:
        raise _not_ours(path) from error


def _metadata(path: Path) -> dict[str, Any]:
    try:
        found = parsed(files.read_plain(path / "zarr.json", METADATA_BYTES))
    except (OSError, ValueError, NotPlain) as error:
        raise _not_ours(path) from error
    if not isinstance(found, dict):
        raise _not_ours(path)
    return found


def _not_ours(path: Path) -> CorruptRun:
    return CorruptRun(f"{path} is not what flap-stream writes; delete the run directory and collect again")


def _chunks(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(1, size) for size in shape)


def _chunk_bytes(form: Form) -> int:
    dtype, shape = form
    return prod(shape) * np.dtype(dtype).itemsize + _CHECKSUM_BYTES
