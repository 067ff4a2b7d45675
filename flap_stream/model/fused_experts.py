"""Checkpoints that hold all experts of a layer in one tensor, seen as if every expert had tensors of its own.

With experts and their output rows first, `[expert, 2 * neuron, hidden]` and `[expert, hidden, neuron]`, each expert's
gate, up and down projections are runs of bytes, so that nothing is read twice and nothing is copied.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod

from flap_stream.model.safetensors_format import TensorEntry

_FUSED = re.compile(r"^(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")


def separated(tensors: Mapping[str, TensorEntry], is_wanted: Callable[[str], bool]) -> dict[str, TensorEntry]:
    """The tensors of a checkpoint by name, wanted fused experts replaced by parts with the pruned class's names."""
    found: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        fused = _FUSED.match(name)
        if fused is None or len(entry.shape) != 3 or not is_wanted(name):
            found[name] = entry
        else:
            projections = ("gate", "up") if fused[2] == "gate_up_proj" else ("down",)
            found |= {part.name: part for part in _parts(entry, f"{fused[1]}.each", projections)}
    return found


def _parts(entry: TensorEntry, prefix: str, projections: tuple[str, ...]) -> Iterator[TensorEntry]:
    experts, rows, columns = entry.shape
    shape = (rows // len(projections), columns)
    nbytes, offset = prod(shape) * entry.item_bytes, entry.offset
    for expert in range(experts):
        for projection in projections:
            name = f"{prefix}.{expert}.{projection}.weight"
            yield replace(entry, name=name, shape=shape, offset=offset, nbytes=nbytes)
            offset += nbytes
