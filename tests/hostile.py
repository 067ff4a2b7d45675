"""Files that someone made to do harm: strategies for each kind of file that this package parses, and who reads it.

`READERS` is what the tests draw a few hundred examples for and `tools/fuzz_parsers.py` many thousand.
"""

import hashlib
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from models import save, tiny_config, tiny_model

from flap_stream.config import CollectConfig, TextConfig
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.model.model_files import INDEX_NAME, SINGLE_NAME
from flap_stream.model.opening import open_checkpoint
from flap_stream.model.safetensors_format import DTYPE_BYTES, read_header
from flap_stream.output.digests import DIGESTS_NAME, damaged_files
from flap_stream.output.pruning_record import RECORD_NAME, read_record
from flap_stream.storage import run_manifest
from flap_stream.storage.journal import ENTRY_SCHEMAS, Journal
from flap_stream.storage.run_directory import RunDirectory
from flap_stream.text.tokenization import Tokenizer
from flap_stream.text.windows import TextWanted, calibration_tokens

PLACE = Path(tempfile.mkdtemp(prefix="flap-stream-hostile-"))

numbers = st.one_of(
    st.integers(-2, 70),
    st.integers(),
    st.sampled_from([1 << 40, 1 << 62, 1 << 64, 10**30, -1, 0, True, 1.5, float("nan"), float("inf")]),
)
names = st.one_of(
    st.text(max_size=8), st.sampled_from(["", ".", "..", "../a", "/etc/passwd", "a\0b", "x" * 5000, "é\ud800"])
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, names),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=4)),
    max_leaves=8,
)


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


@st.composite
def edited(draw: st.DrawFn, seed: bytes) -> bytes:
    """A whole file with a few bytes changed, cut out, put in or repeated."""
    body = bytearray(seed)
    for _ in range(draw(st.integers(1, 4))):
        at, size = draw(st.integers(0, len(body))), draw(st.sampled_from([1, 2, 8, 40]))
        kind = draw(st.integers(0, 4))
        if kind == 0 and at < len(body):
            body[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1:
            del body[at : at + size]
        elif kind == 2:
            body[at:at] = draw(st.binary(max_size=size))
        elif kind == 3:
            body[at:at] = body[at : at + size]
        else:
            body[at:at] = draw(st.sampled_from([b"9" * size, b"[" * 2000, b"{", b'"', b"-", b"e99", b"\xff", b"null"]))
    return bytes(body)


@st.composite
def replaced(draw: st.DrawFn, seed: Any) -> Any:
    """A JSON value with a few of its parts replaced or taken out, at any depth."""
    value = json.loads(json.dumps(seed))
    for _ in range(draw(st.integers(1, 3))):
        parent: Any = value
        while True:
            keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(parent[key], (dict, list)) and parent[key] and draw(st.booleans()):
                parent = parent[key]
                continue
            if draw(st.integers(0, 4)) == 0:
                del parent[key]
            else:
                parent[key] = draw(values)
            break
    return value


entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from([*DTYPE_BYTES, "F12", ""]), values),
        "shape": st.one_of(st.lists(numbers, max_size=4), values),
        "data_offsets": st.one_of(st.lists(numbers, max_size=3), values),
    },
)


@st.composite
def safetensors(draw: st.DrawFn) -> bytes:
    """A file with any header: tensors that lie about their sizes or places, a length that is not the header's."""
    header: dict[str, Any] = draw(st.dictionaries(names, st.one_of(entries, values), max_size=4))
    at = 0
    for name in draw(st.lists(names, max_size=3)):  # among tensors that are right
        size = draw(st.integers(0, 6))
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    raw = draw(st.one_of(st.just(dumped(header)), edited(dumped(header))))
    length = draw(st.one_of(st.just(len(raw)), st.integers(0, 2**64 - 1)))
    return struct.pack("<Q", length) + raw + bytes(draw(st.one_of(st.just(at), st.integers(0, 40))))


def write(name: str, body: bytes) -> Path:
    path = PLACE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
    return path


def read_shard(body: bytes) -> None:
    tensors, _, size = read_header(write("header.safetensors", body))
    assert sum(entry.nbytes for entry in tensors) <= size  # what is accepted is there


MODEL = save(tiny_model(tiny_config(layers=1)), PLACE / "model", shard_size="20KB")
CONFIG, INDEX = ((MODEL / name).read_bytes() for name in ("config.json", INDEX_NAME))
SHARD = next(iter(sorted(MODEL.glob("*.safetensors")))).read_bytes()


def read_model(config: bytes = CONFIG, index: bytes = INDEX) -> None:
    write("model/config.json", config)
    write(f"model/{INDEX_NAME}", index)
    with open_checkpoint(MODEL) as checkpoint:
        StreamedModel(checkpoint, CollectConfig())


def journal_line(entry: Any) -> bytes:
    """A line whose digest is right."""
    body = dumped(entry)
    return hashlib.sha256(body).hexdigest()[:16].encode() + b" " + body + b"\n"


JOURNAL = [
    {"kind": "tokens", "name": "tokens", "digest": "0"},
    {
        **{"kind": "statistics", "name": "0000", "digest": "0", "weights": ""},
        "cost": {"seconds": 0.5, "tokens": 8, "peak_host_bytes": 1, "peak_device_bytes": 0},
    },
    {"kind": "sweep", "name": "0", "digest": "0"},
    {"kind": "hidden-sweep", "name": "0", "job": "", "layer": 1, "digest": "0"},
    {"kind": "hidden", "name": "0001", "layer": 1, "digest": "0"},
    {"kind": "restoration", "name": "restoration", "job": "0"},
    {"kind": "refit", "name": "0000", "job": "0", "digest": "0"},
    {"kind": "hidden-pruned", "name": "0001", "job": "0", "layer": 1, "digest": "0"},
    {"kind": "rewrite", "name": "out", "place": "/out", "job": "0"},
]
OPTIONS = {"method": "flap", "dtype": "torch.float32", "device": "cpu", "batch_size": 1}
MANIFEST = {
    **{"format": run_manifest.FORMAT, "version": run_manifest.VERSION, "source": "model"},
    **{"calibration": {}, "versions": {}},
    **{"model": {"config": ""}, "tokens": {"sha256": "", "shape": [1, 2]}, "options": OPTIONS},
    "sizes": {"hidden": 2, "vocabulary": 50, "weight_bytes": 16, "expert_share": 1.0},
    **{"threads": 1, "parameters": 8, "layers": [dict.fromkeys(run_manifest.SHAPE, 1) | {"experts": []}]},
}


def sealed(manifest: Any) -> bytes:
    """A run.json whose digest is right, if it can hold one."""
    if isinstance(manifest, dict):
        manifest["sha256"] = run_manifest.manifest_digest(manifest)
    return dumped(manifest)


def read_run(manifest: bytes = sealed(MANIFEST), journal: bytes = b"") -> None:
    write("run/run.json", manifest)
    write("run/journal", journal)
    with RunDirectory(PLACE / "run") as run:
        (
            run.statistics.complete_layers(),
            run.layer_shapes,
            run.snapshots.newest(),
            run.refits.pruned_snapshots.newest(),
            run.refits.complete_layers(),
            run.batch_reductions("collect").read(),
            run.damaged(),
        )
        run.statistics.costs(), run.sweeps.curves()


def read_journal(body: bytes) -> None:
    journal = Journal(write("journal", body))
    for kind in ENTRY_SCHEMAS:
        journal.find(kind, "0000")


RECORD = {
    **{"format": "flap-stream-pruning", "version": 1, "base": {"name": "m", "fingerprint": ""}, "restore": "bias"},
    "options": {"method": "flap", "structure": "al-am", "metric": "wifv", "statistics": "exact", "ratio": 0.2},
    **{"realised_ratio": {"decoder": 0.2, "model": 0.1}, "parameters": {"before": 9, "after": 8}},
    "layers": [{"kv_groups": 2, "neurons": 3, "kept_kv_groups": [0], "kept_neurons": [1, 2]}],
}


def read_output(body: bytes) -> None:
    write(f"out/{RECORD_NAME}", body)
    record = read_record(PLACE / "out")
    assert record is not None
    f"{record['realised_ratio']['decoder']:.2%} {record['parameters']['before']:,} {record['options']['ratio']:.0%}"
    [len(layer["kept_neurons"]) for layer in record["layers"]]


def read_digests(body: bytes) -> None:
    write(f"sums/{DIGESTS_NAME}", body)
    damaged_files(PLACE / "sums")


def load_nothing() -> Tokenizer:
    raise AssertionError("ready tokens need no tokenizer")


def read_tokens(body: bytes) -> None:
    wanted = TextWanted([str(write("tokens.npy", body))], 4, 4, TextConfig())
    calibration_tokens(wanted, 0, load_nothing, 50)


def npy(shape: str, dtype: str, data: bytes) -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


NPY = npy("(2, 4)", "<i8", np.arange(8).astype("<i8").tobytes())
npys = st.one_of(
    edited(NPY),
    st.builds(
        lambda shape, dtype, data: npy(str(tuple(shape)), dtype, data),
        st.lists(numbers, max_size=3),
        st.sampled_from(["<i8", "<u2", "|O", "<f4", "|b1", ">i8", "<U9"]),
        st.binary(max_size=64),
    ),
)
config = json.loads(CONFIG)
configs = st.one_of(edited(CONFIG), replaced(config).map(dumped))
indexes = st.one_of(
    edited(INDEX),
    replaced(json.loads(INDEX)).map(dumped),
    st.dictionaries(names, names, max_size=4).map(lambda weights: dumped({"weight_map": weights})),
)
WHOLE_JOURNAL = b"".join(journal_line(entry) for entry in JOURNAL)
journals = st.one_of(
    edited(WHOLE_JOURNAL),
    replaced(JOURNAL).map(lambda lines: b"".join(map(journal_line, lines))),
    st.lists(values, max_size=4).map(lambda lines: b"".join(map(journal_line, lines))),
)
manifests = st.one_of(edited(sealed(MANIFEST)), replaced(MANIFEST).map(sealed))
SUMS = b"".join(b"0" * 64 + b"  " + name + b"\n" for name in (b"config.json", b"model.safetensors"))

# What reads it, what is drawn, and how much it weighs: building a model for a config takes a thousand times as long.
READERS: dict[str, tuple[Callable[[bytes], None], st.SearchStrategy[bytes], float]] = {
    "safetensors header": (read_shard, st.one_of(safetensors(), edited(SHARD)), 1.0),
    "index": (lambda body: read_model(index=body), indexes, 0.3),
    "config.json": (lambda body: read_model(config=body), configs, 0.1),
    "journal": (read_journal, journals, 1.0),
    "journal of a run": (lambda body: read_run(journal=body), journals, 0.5),
    "run.json": (lambda body: read_run(manifest=body), manifests, 0.5),
    "pruning.json": (read_output, st.one_of(edited(dumped(RECORD)), replaced(RECORD).map(dumped)), 0.5),
    "SHA256SUMS": (read_digests, edited(SUMS), 0.5),
    "tokens.npy": (read_tokens, npys, 0.5),
}
assert SINGLE_NAME not in {p.name for p in MODEL.iterdir()}  # so that the index is read
