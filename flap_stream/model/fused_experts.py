"""Checkpoints that hold all experts of a layer in one tensor, seen as if every expert had tensors of its own.

Each expert's tensors are runs of bytes of the whole, so that nothing is read twice and nothing is copied: with experts
and their output rows first, `[expert, 2 * neuron, hidden]` and `[expert, hidden, neuron]`, each of its projections is
one; with input rows first, `[expert, hidden, 2 * neuron]` and `[expert, neuron, hidden]`, its fused projection is one,
and is transposed when it is read.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod

from flap_stream.model.architecture import Family
from flap_stream.model.safetensors_format import Encoding, TensorEntry


def separated(
    tensors: Mapping[str, TensorEntry], family: Family, is_wanted: Callable[[str], bool]
) -> dict[str, TensorEntry]:
    """The tensors of a checkpoint by name, wanted fused experts replaced by parts with the pruned class's names."""
    assert family.experts is not None
    pattern = re.compile(rf"^(.*\.{re.escape(family.experts_path)})\.(gate_up_proj|down_proj)(_bias|)$")
    readers = [projection.name.rpartition(".")[2] for projection in family.experts.readers]
    found: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        fused = pattern.match(name)
        is_bias = fused is not None and bool(fused[3])
        if fused is None or len(entry.shape) != (2 if is_bias else 3) or not is_wanted(name):
            found[name] = entry
            continue
        projections = readers if fused[2] == "gate_up_proj" else ["down"]
        is_transposed = family.transposed_experts and not is_bias and entry.encoding is None
        kind = "bias" if is_bias else "weight"
        for part in _parts(entry, f"{fused[1]}.each", projections, kind):
            found[part.name] = _transposed(part) if is_transposed else part
    return found


def _parts(entry: TensorEntry, prefix: str, projections: list[str], kind: str) -> Iterator[TensorEntry]:
    experts = entry.shape[0]
    names = [f"{prefix}.{expert}.{projection}.{kind}" for expert in range(experts) for projection in projections]
    for i, name in enumerate(names):
        yield _run(entry, name, len(projections), i, len(names))


def _run(entry: TensorEntry, name: str, projections: int, index: int, count: int) -> TensorEntry:
    """One of `count` runs of bytes, of as many rows each, that a tensor consists of, and everything it is made of.

    A scale that all projections of an expert share is the same for each.
    """
    if prod(entry.shape) == 1:
        return entry  # one scale for all
    if entry.shape[1] % projections:
        index, count, projections = index // projections, count // projections, 1
    nbytes, shape = entry.nbytes // count, (entry.shape[1] // projections, *entry.shape[2:])
    encoding = entry.encoding
    if encoding is not None:
        parts = [_run(part, f"{name}.{n}", projections, index, count) for n, part in enumerate(encoding.parts)]
        encoding = replace(encoding, parts=tuple(parts))
    return replace(
        entry, name=name, shape=shape, offset=entry.offset + index * nbytes, nbytes=nbytes, encoding=encoding
    )


def _transposed(entry: TensorEntry) -> TensorEntry:
    return replace(entry, shape=entry.shape[::-1], encoding=Encoding("values", (entry,), is_transposed=True))
