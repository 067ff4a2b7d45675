"""Groups of arrays in a run directory, in zarr format 3: one uncompressed chunk per array, with a checksum.

A group passes through zarr in memory and at once: by its synchronous interface every array would wait twice for
another thread, and that took most of the time of small jobs.

Metadata and file sizes must be exactly what this module writes before zarr sees them: other metadata could name codecs
that run code, or arrays too large for any memory.
"""

import asyncio
import json
from collections.abc import Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from zarr.abc.buffer import Buffer
from zarr.api import asynchronous
from zarr.buffer import cpu
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from flap_stream.errors import CorruptRun
from flap_stream.storage.schema import Schema, matches, parse_json

_Found = TypeVar("_Found")
ArraySpec = tuple[str, tuple[int, ...]]  # dtype (int64 or float64) and shape of an array

_METADATA = "zarr.json"
_METADATA_BYTES = 1 << 16  # limit on a zarr.json; those written here have under 1 kB
_CHECKSUM_BYTES = 4
_GROUP = {"zarr_format": 3, "node_type": "group"}
_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
_OPTIONAL: dict[str, tuple[Any, ...]] = {
    "fill_value": (-1, "NaN"),
    "attributes": ({},),
    "storage_transformers": ([],),
    "dimension_names": (None,),
}


def group_files(
    arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any], groups: tuple[str, ...] = ()
) -> dict[str, memoryview]:
    """The files of a group, by their names in it. groups: names of empty groups in it."""
    made: dict[str, Buffer] = {}

    async def make() -> None:
        group = await asynchronous.create_group(store=MemoryStore(made), attributes=dict(attributes), zarr_format=3)
        for child in groups:
            await group.create_group(child)
        for name, values in arrays.items():
            stored = await group.create_array(
                name,
                shape=values.shape,
                dtype=values.dtype,
                chunks=_chunks(values.shape),
                fill_value=np.nan if values.dtype.kind == "f" else -1,
                serializer=BytesCodec(endian="little"),
                compressors=[Crc32cCodec()],
                config={"write_empty_chunks": True},
            )
            await stored.setitem(..., values)

    _finished(make())
    return {name: memoryview(buffer.as_numpy_array()) for name, buffer in made.items()}


def read_group(
    path: Path, found: Mapping[str, bytes], specs: Mapping[str, ArraySpec], attributes: Schema = None
) -> tuple[list[np.ndarray], Any]:
    """The arrays of a group, in the order of `specs`, and the group's attributes.

    path: names it in messages. found: its files, by their names in it. attributes: their schema, if there are any.
    Raises CorruptRun unless everything is as this module writes it.
    """
    metadata = _metadata(path, found, _METADATA)
    is_group = {key: metadata.get(key) for key in ("zarr_format", "node_type")} == _GROUP
    given = metadata.get("attributes", {})
    if not is_group or set(metadata) - {*_GROUP, "attributes"} or not matches(given, attributes or {}):
        raise _foreign(path)
    trusted: dict[str, bytes] = {}
    for name, spec in specs.items():
        trusted |= _array_files(path, found, name, spec)
    try:
        return _values(trusted, specs), given
    except ValueError as error:
        raise _foreign(path) from error


def max_bytes(specs: Mapping[str, ArraySpec]) -> int:
    """Maximum size of all files of a group together."""
    chunks = sum(_chunk_bytes(spec) for spec in specs.values())
    return chunks + _METADATA_BYTES * (2 * len(specs) + 1)


def _array_files(path: Path, found: Mapping[str, bytes], name: str, spec: ArraySpec) -> dict[str, bytes]:
    """The files of an array. Raises CorruptRun unless metadata and size are what this module writes."""
    dtype, shape = spec
    metadata = _metadata(path / name, found, f"{name}/{_METADATA}")
    wanted = {
        **{"zarr_format": 3, "node_type": "array", "data_type": dtype, "shape": list(shape), "codecs": _CODECS},
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(_chunks(shape))}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
    }
    optional = {key: value for key, value in metadata.items() if key not in wanted}
    is_same = json.dumps([metadata.get(key) for key in wanted], sort_keys=True) == json.dumps(
        list(wanted.values()), sort_keys=True
    )
    if not is_same or any(value not in _OPTIONAL.get(key, ()) for key, value in optional.items()):
        raise _foreign(path / name)
    names = [f"{name}/{_METADATA}"]
    if prod(shape):
        names.append("/".join([name, "c", *["0"] * len(shape)]))
        if len(found.get(names[1], b"")) != _chunk_bytes(spec):  # zarr would fill in a missing chunk
            raise _foreign(path / name)
    return {file: found[file] for file in names}


def _values(files: Mapping[str, bytes], names: Iterable[str]) -> list[np.ndarray]:
    """The values of arrays, read by zarr from the files of their group."""

    async def read() -> list[np.ndarray]:
        held: dict[str, Buffer] = {name: cpu.Buffer.from_bytes(data) for name, data in files.items()}
        store = MemoryStore(held, read_only=True)
        opened = [await asynchronous.open_array(store=store, path=name, zarr_format=3) for name in names]
        return [np.asarray(await array.getitem(...)) for array in opened]

    return _finished(read())


def _finished(work: Coroutine[Any, Any, _Found]) -> _Found:
    """What a coroutine returns; it runs in a thread, since the caller's may have an event loop, as in a notebook."""
    with ThreadPoolExecutor(1, thread_name_prefix="zarr") as thread:
        return thread.submit(asyncio.run, work).result()


def _metadata(path: Path, found: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """A zarr.json among the files of a group. path: of the group or array that it describes, for messages."""
    data = found.get(name, b"")
    try:
        metadata = parse_json(data if len(data) <= _METADATA_BYTES else b"")
    except ValueError as error:
        raise _foreign(path) from error
    if not isinstance(metadata, dict):
        raise _foreign(path)
    return metadata


def _foreign(path: Path) -> CorruptRun:
    return CorruptRun(f"{path} is not what flap-stream writes; delete the run directory and collect again")


def _chunks(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(1, size) for size in shape)


def _chunk_bytes(spec: ArraySpec) -> int:
    dtype, shape = spec
    return prod(shape) * np.dtype(dtype).itemsize + _CHECKSUM_BYTES
