"""Reading a checkpoint directory: config.json, the index, safetensors headers and byte ranges.

Headers are parsed and checked here, once; tensors are read with `preadv` into buffers that the caller owns, so that
nothing is mapped and nothing is held.
"""

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import google_crc32c
import numpy as np

from flap_stream.errors import CorruptCheckpoint, InvalidModel, StorageFailure, UnsupportedModel
from flap_stream.model import hub
from flap_stream.model.architecture import FAMILIES, dense_type, require_causal
from flap_stream.model.model_files import CONFIG_NAME, WeightFiles, has_weights, require_model, require_no_pointer
from flap_stream.model.model_files import INDEX_NAME as INDEX_NAME
from flap_stream.model.model_files import SINGLE_NAME as SINGLE_NAME
from flap_stream.model.model_files import weight_files as weight_files_of
from flap_stream.model.tying import settle_head
from flap_stream.storage.files import read_plain, require_plain_folder

logger = logging.getLogger(__name__)

DTYPE_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1},
}
FORWARD_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

_MAX_BUFFERS = 1024  # IOV_MAX on Linux
_READ_THREADS = 2
_READ_BYTES = 1 << 25
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
# A buffer of older checkpoints, which transformers makes anew and leaves unread.
_IGNORED = re.compile(r"^model\..*rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor's bytes are: `nbytes` bytes at `offset` of `file`, row-major.

    file: name in the checkpoint's directory, or a whole path.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Block:
    """Neighbouring bytes of one file: parts `(entry, start, stop)` of tensors, one right after another."""

    file: str
    offset: int
    parts: tuple[tuple[TensorEntry, int, int], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(stop - start for _, start, stop in self.parts)


@dataclass(frozen=True)
class Wrapper:
    """A multimodal model around a text decoder.

    config: its whole config.json. prefix: what the names of the decoder's tensors begin with in its files.
    """

    config: dict[str, Any]
    prefix: str

    def inner(self, name: str) -> str:
        """The name that a text model by itself has for a tensor; other tensors keep theirs."""
        if name.startswith(self.prefix):
            return "model." + name.removeprefix(self.prefix)
        return name.removeprefix("language_model.") if name.startswith("language_model.lm_head.") else name

    def outer(self, name: str) -> str:
        """The name, in files that transformers loads, of a tensor that `inner` calls `name`."""
        others = ("model.vision", "model.multi_modal", "model.embed_vision")  # of newer files, not the decoder's
        is_decoder = name.startswith("model.") and not name.startswith(others)
        return self.prefix + name.removeprefix("model.") if is_decoder else name


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers have been read and checked; no tensor has been.

    source: what the user named (a directory or a Hub id).
    config: of the language model; in a multimodal model, of its text decoder.
    tensors: name to entry, in the order of files and offsets.
    header_digests: shard file to sha256 of its header.
    stamps: shard file to its size in bytes and its time of change in nanoseconds, when it was opened.
    wrapper: the multimodal model, if there is one; `tensors` has the decoder's by a text model's names.
    misplaced: tensors that the index names but no shard holds, to the shard that it names.
    """

    source: str
    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    header_digests: dict[str, str]
    shard_bytes: dict[str, int]
    stamps: dict[str, list[int]]
    _files: "_OpenFiles" = field(repr=False, compare=False)
    wrapper: Wrapper | None = None
    misplaced: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the model: digests of its config and headers, sizes of its shards."""
        whole = self.config if self.wrapper is None else self.wrapper.config
        config = json.dumps(whole, sort_keys=True).encode()
        return {
            "config": hashlib.sha256(config).hexdigest(),
            "headers": self.header_digests,
            "shard_bytes": self.shard_bytes,
        }

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(prod(entry.shape) for entry in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def read_into(self, entry: TensorEntry, buffer: memoryview, start: int = 0) -> None:
        """Fill `buffer` with the tensor's bytes from byte `start` on."""
        self._files.read(entry.file, entry.offset + start, [buffer])

    def read_all(self, requests: Sequence[tuple[TensorEntry, memoryview]], share: tuple[int, int] = (0, 1)) -> None:
        """Fill every buffer with its whole tensor; neighbours in a file are read together, by several threads.

        share: (i, n) reads every n-th block of bytes from the i-th on, about one n-th of all.
        """
        buffers = {entry.name: buffer for entry, buffer in requests}

        def read(block: Block) -> None:
            self.read_block(block, [buffers[entry.name][start:stop] for entry, start, stop in block.parts])

        own, readers = share
        total = sum(entry.nbytes for entry, _ in requests)
        blocks = self.coalesce([entry for entry, _ in requests], max(1, min(_READ_BYTES, -(-total // readers))))
        with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="pread") as threads:
            list(threads.map(read, blocks[own::readers]))

    def note_checksums(self, requests: Sequence[tuple[TensorEntry, memoryview]]) -> None:
        """Take whole tensors that are in these buffers into their crc32c."""
        for entry, buffer in requests:
            self.note_checksum(entry, 0, buffer)

    def coalesce(self, entries: Sequence[TensorEntry], max_bytes: int) -> list[Block]:
        """Blocks of at most so many bytes that cover these tensors, in the order of files and offsets."""
        blocks: list[tuple[str, int, list[tuple[TensorEntry, int, int]]]] = []
        end, room = -1, 0
        for entry in sorted(entries, key=lambda e: (e.file, e.offset)):
            start = 0
            while start < entry.nbytes:
                at = entry.offset + start
                if not blocks or blocks[-1][0] != entry.file or at != end or room == 0:
                    blocks.append((entry.file, at, []))
                    room = max_bytes
                stop = min(entry.nbytes, start + room)
                blocks[-1][2].append((entry, start, stop))
                room -= stop - start
                start, end = stop, entry.offset + stop
        return [Block(file, offset, tuple(parts)) for file, offset, parts in blocks]

    def read_block(self, block: Block, buffers: Sequence[memoryview]) -> None:
        """Fill buffers, which have the size of the block together, with its bytes."""
        self._files.read(block.file, block.offset, buffers)

    def note_checksum(self, entry: TensorEntry, start: int, data: memoryview) -> None:
        """Take bytes of a tensor that were read, from byte `start` on, into its crc32c; in order, from byte 0 on."""
        before = 0 if start == 0 else self._files.checksums[entry.name]
        self._files.checksums[entry.name] = google_crc32c.extend(before, np.frombuffer(data, np.uint8))

    def checksum(self, entries: Sequence[TensorEntry]) -> str:
        """One checksum for tensors that have been read whole."""
        lines = sorted(f"{entry.name} {self._files.checksums[entry.name]:08x}" for entry in entries if entry.nbytes)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def read_checksum(self, entries: Sequence[TensorEntry]) -> str:
        """Read tensors for their checksum alone."""
        buffer = memoryview(bytearray(min(_READ_BYTES, max((entry.nbytes for entry in entries), default=0))))
        for block in self.coalesce(entries, len(buffer)) if len(buffer) else ():
            self.read_block(block, [buffer[: block.nbytes]])
            at = 0
            for entry, start, stop in block.parts:
                self.note_checksum(entry, start, buffer[at : at + stop - start])
                at += stop - start
        return self.checksum(entries)

    def require_unchanged(self) -> None:
        """Raise CorruptCheckpoint if a shard is no longer the file that was opened."""
        for file, stamp in self.stamps.items():
            if _stamp(self.directory / file) != stamp:
                raise CorruptCheckpoint(
                    f"{self.directory / file} was changed or removed while in use; restore it and run the same "
                    "command again, or delete the run directory"
                )

    def drop_from_page_cache(self) -> None:
        """From now on let go of what was read: for a model larger than the memory that it may take."""
        self._files.drops = True

    def read_ranges(self, entry: TensorEntry, ranges: Sequence[tuple[int, int]], buffer: memoryview) -> None:
        """Fill `buffer` with byte ranges `(start, stop)` of the tensor, one after another."""
        at = 0
        for start, stop in ranges:
            self._files.read(entry.file, entry.offset + start, [buffer[at : at + stop - start]])
            at += stop - start

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read so far."""
        return self._files.bytes_read

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()


class _OpenFiles:
    """Descriptors of the shards, opened at first use, shared by threads."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self.bytes_read = 0
        self.checksums: dict[str, int] = {}  # crc32c of tensors, by name
        self.drops = False

    def read(self, file: str, offset: int, buffers: Sequence[memoryview]) -> None:
        with self._lock:
            if file not in self._descriptors:
                with _failures_of(self._directory / file):
                    self._descriptors[file] = os.open(self._directory / file, os.O_RDONLY)
            descriptor = self._descriptors[file]
            self.bytes_read += sum(len(buffer) for buffer in buffers)
        start, left = offset, [buffer for buffer in buffers if len(buffer)]
        while left:
            with _failures_of(self._directory / file):
                count = os.preadv(descriptor, left[:_MAX_BUFFERS], offset)
            if count == 0:
                raise CorruptCheckpoint(
                    f"{self._directory / file} ended at byte {offset}, inside its tensors; "
                    "it was changed or truncated while in use, so restore it and run again"
                )
            offset += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]
        if self.drops:
            os.posix_fadvise(descriptor, start, offset - start, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()


def describe(
    source: str, directory: Path, config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], dtype: str
) -> Checkpoint:
    """The checkpoint that these tensors would make, all of one dtype, of which there is nothing to read."""
    code = next((code for code, name in FORWARD_DTYPES.items() if name == dtype.removeprefix("torch.")), None)
    if code is None:
        raise UnsupportedModel(
            f"{source}/config.json has dtype {dtype}; pruning needs {', '.join(FORWARD_DTYPES.values())}"
        )
    tensors, at = {}, 0
    for name, shape in shapes.items():
        tensors[name] = TensorEntry(name, SINGLE_NAME, code, shape, at, prod(shape) * DTYPE_BYTES[code])
        at += tensors[name].nbytes
    return Checkpoint(source, directory, config, tensors, {}, {}, {}, _OpenFiles(directory))


def read_config(model: str) -> tuple[Path, dict[str, Any]]:
    """Directory and contents of the config.json of a directory, a file or a Hub id; no weights are downloaded.

    Raises InvalidModel if there is none.
    """
    path = Path(model)
    if not path.is_file() or path.suffix != ".json":
        path = _resolve(model, weights=False) / CONFIG_NAME
        names = [file.name for file in path.parent.iterdir()]
        require_model(model, names, lambda: _read_json(path.parent / "adapter_config.json", "download it again"))
    config = dense_type(_read_json(path, "it is what a dry run needs"))
    _warn_of_own_code(model, config)
    return path.parent, config


def has_shards(directory: Path) -> bool:
    """Whether a directory holds safetensors under the names that transformers gives them."""
    return has_weights([path.name for path in directory.iterdir()])


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Read and check config.json, the index and all shard headers of a directory or a Hub id.

    Tensors that a family's dense checkpoints name otherwise than its pruned class go by the latter's names. A head
    beside `tie_word_embeddings` is settled as transformers does (see tying.py); the config then says what is true.
    Raises InvalidModel if there is no such model or no safetensors in it, CorruptCheckpoint for a shard that is
    missing, truncated or whose header contradicts itself.
    """
    directory = _resolve(str(model), weights=True)
    require_plain_folder(directory)
    config, weights = _config_and_weights(str(model), directory, [path.name for path in directory.iterdir()])
    config.pop("transformers_weights", None)  # of these files, not of what is made from them
    if weights.note:
        logger.warning("%s", weights.note)
    _warn_of_own_code(str(model), config)
    tensors: dict[str, TensorEntry] = {}
    header_digests, shard_bytes = {}, {}
    for file in weights.files:
        entries, header_digests[file], shard_bytes[file] = read_header(directory / file)
        tensors |= {entry.name: entry for entry in entries}
    wrapper = _wrapper(config, tensors)
    require_causal(config, str(model))
    config = config if wrapper is None else _text_config(config)
    rename = _renaming(config, wrapper)
    named = {rename(name): entry for name, entry in tensors.items()}
    tensors = {name: replace(entry, name=name) for name, entry in named.items() if not _IGNORED.match(name)}
    misplaced = {rename(name): file for name, file in weights.weight_map.items() if rename(name) not in named}
    stamps = {file: _stamp(directory / file) for file in shard_bytes}
    files = _OpenFiles(directory)
    found = Checkpoint(
        str(model), directory, config, tensors, header_digests, shard_bytes, stamps, files, wrapper, misplaced
    )
    return settle_head(found)


def _renaming(config: Mapping[str, Any], wrapper: Wrapper | None) -> Callable[[str], str]:
    """From a tensor's name in the files to that in the pruned class of its family, if it is of one."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        return str
    inner = wrapper.inner if wrapper is not None else family.with_prefix
    return lambda name: family.canonical(inner(name))


def _config_and_weights(where: str, directory: Path, names: Sequence[str]) -> tuple[dict[str, Any], WeightFiles]:
    """Contents of config.json and the files that hold the weights. names: of all files, also those not fetched yet."""
    require_model(where, names, lambda: _read_json(directory / "adapter_config.json", "download it again"))
    need = "a model directory needs config.json beside its safetensors shards"
    config = dense_type(_read_json(directory / CONFIG_NAME, need))
    return config, weight_files_of(where, names, config, lambda name: _read_json(directory / name, "download it again"))


def _warn_of_own_code(model: str, config: Mapping[str, Any]) -> None:
    """Say that a class which comes with a supported model is not the one that is used."""
    auto_map, family = config.get("auto_map"), FAMILIES.get(str(config.get("model_type")))
    classes = [value for key, value in auto_map.items() if key != "AutoTokenizer"] if isinstance(auto_map, dict) else []
    if family is not None and classes and "per_layer_config" not in config:
        logger.warning(
            "%s has model code of its own (auto_map: %r), which is not run; transformers' %s is used instead",
            model,
            classes[-1],
            family.causal_class,
        )


def _stamp(path: Path) -> list[int]:
    """Size and time of change; empty if the file is gone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return []
    return [status.st_size, status.st_mtime_ns]


@contextmanager
def _failures_of(path: Path) -> Iterator[None]:
    """Name the shard in what the operating system says; one that is gone is the user's to restore."""
    try:
        yield
    except FileNotFoundError as error:
        raise CorruptCheckpoint(
            f"{path} was removed while in use; restore it and run the same command again"
        ) from error
    except OSError as error:
        raise StorageFailure.of(error, path) from error


def _wrapper(config: dict[str, Any], tensors: Mapping[str, TensorEntry]) -> Wrapper | None:
    """What is known of a multimodal model; None for a language model by itself."""
    text = config.get("text_config")
    if not isinstance(text, dict) or text.get("model_type") not in FAMILIES or config.get("model_type") in FAMILIES:
        return None
    forms = ("language_model.model.", "language_model.layers.", "model.language_model.")
    form = next((form for form in forms if any(name.startswith(form) for name in tensors)), forms[-1])
    return Wrapper(config, form.removesuffix("layers."))


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the text decoder, with what the wrapper says for both."""
    shared = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config")
    return {**config["text_config"], **{key: config[key] for key in shared if key in config}}


def read_header(path: Path) -> tuple[list[TensorEntry], str, int]:
    """Entries of a safetensors file by offset, sha256 of its header, and the file's size in bytes.

    Raises CorruptCheckpoint unless the tensors fill the file exactly, without holes or overlaps.
    Source: the format section of the safetensors README.
    """
    if not path.is_file():
        raise CorruptCheckpoint(f"shard {path} is missing; download the checkpoint again")
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(64)
        require_no_pointer(path, start)
        file.seek(8)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CorruptCheckpoint(
                f"{path} has {size} bytes, but claims a header of {length}; it is truncated or no safetensors file"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
        if not isinstance(header, dict):
            raise ValueError("not an object")
        entries = [_entry(path, name, item, 8 + length) for name, item in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpoint(f"the header of {path} cannot be read ({error}); download the shard again") from error
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    end = 8 + length
    for entry in entries:
        if entry.offset != end:
            raise CorruptCheckpoint(
                f"tensor {entry.name} in {path} starts at byte {entry.offset}, expected {end}: the header's offsets lie"
            )
        end += entry.nbytes
    if end != size:
        raise CorruptCheckpoint(f"{path} has {size} bytes, but its header describes {end}; download the shard again")
    return entries, hashlib.sha256(raw).hexdigest(), size


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two tensors of one name readers would take different ones."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _entry(path: Path, name: str, item: dict[str, Any], data_start: int) -> TensorEntry:
    dtype, shape, (start, stop) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {name} has dtype {dtype!r}, expected one of {', '.join(DTYPE_BYTES)}")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"tensor {name} has sizes or offsets that are no natural numbers")
    if stop - start != prod(shape) * DTYPE_BYTES[dtype]:
        raise ValueError(f"tensor {name} {dtype} {list(shape)} cannot take {stop - start} bytes")
    return TensorEntry(name, path.name, dtype, shape, data_start + start, stop - start)


def _read_json(path: Path, need: str) -> dict[str, Any]:
    if not path.is_file():
        raise InvalidModel(f"{path} does not exist; {need}")
    raw = read_plain(path)
    require_no_pointer(path, raw)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidModel(f"{path} is not JSON ({error}); {need}") from error
    if not isinstance(value, dict):
        raise InvalidModel(f"{path} holds no JSON object; {need}")
    return value


def _resolve(model: str, weights: bool) -> Path:
    """The directory of a model; a Hub id is downloaded (or found in the Hub cache) first.

    weights: whether they are wanted beside config.json.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.suffix == ".gguf" and path.exists():
        require_model(str(path.parent), [path.name], dict)
    if path.exists():
        raise InvalidModel(f"{model} is a file; name the directory that holds config.json and the safetensors shards")
    if model.partition("@")[0].count("/") > 1 or model.startswith(("/", ".", "~")):
        raise InvalidModel(f"no such model: {model} is not a directory")

    def choose(directory: Path, names: Sequence[str]) -> tuple[str, ...]:
        return _config_and_weights(model, directory, names)[1].files

    return hub.fetched(model, choose if weights else None)


def row_ranges(indices: np.ndarray, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Byte ranges `(start, stop)` of ascending rows, neighbours joined."""
    if len(indices) == 0:
        return
    breaks = np.flatnonzero(np.diff(indices) != 1)
    firsts = indices[np.concatenate(([0], breaks + 1))]
    lasts = indices[np.concatenate((breaks, [len(indices) - 1]))]
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        yield first * row_bytes, (last + 1) * row_bytes
