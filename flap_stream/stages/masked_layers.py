"""A pruned decoder layer emulated by the dense one: removed channels are masked with zeros, biases compensate for them.

A layer is then read once for any number of plans. Outputs equal those of the written checkpoint up to rounding.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.scoring import baseline_input
from flap_stream.arithmetic.surgery import baseline_shift
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.model.dtypes import stored_dtype
from flap_stream.model.units import Part
from flap_stream.storage.run_directory import RunDirectory

_BLOCK_BYTES = 1 << 23  # of float64 weights multiplied at once; not measured

# From a layer's index, its dense tensors on the device and what is kept to tensors that replace its own, by name.
Mending = Callable[[int, Mapping[str, torch.Tensor], LayerKeep], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Decision:
    """What is kept in every layer, and how to compensate for what is removed."""

    keeps: list[LayerKeep]
    mend: Mending


@contextmanager
def masked(
    model: StreamedModel, index: int, weights: Mapping[str, torch.Tensor], decision: Decision | None
) -> Iterator[Mapping[str, torch.Tensor]]:
    """The tensors to run a layer with; in the block, removed inputs of its output projections are set to zero.

    Nor does its router choose removed experts.
    decision: None runs the dense layer.
    """
    if decision is None:
        yield weights
        return
    handles, keep = [], decision.keeps[index]
    for part, removed in _removed(model, index, keep):
        if len(removed) and f"{part.kind.output.name}.weight" in weights:
            channels = torch.from_numpy(removed).to(model.device)
            module = model.layers[index].get_submodule(part.kind.output.name)
            handles.append(module.register_forward_pre_hook(_zeroing(channels)))
    try:
        with model.rerouted(index, keep.neurons):
            yield {**weights, **decision.mend(index, weights, keep)}
    finally:
        for handle in handles:
            handle.remove()


def mending(restore: str, model: StreamedModel, run: RunDirectory, form: str) -> Mending:
    """How a restoration, `none` or `bias`, mends a layer. form: of the statistics, `exact` or `released`.

    A restoration that refits weights would belong here too: it would also return `<output projection>.weight`, of the
    dense size, since removed inputs are zero.
    """
    if restore == "none":
        return lambda index, weights, keep: {}
    assert restore == "bias"

    def mend(index: int, weights: Mapping[str, torch.Tensor], keep: LayerKeep) -> dict[str, torch.Tensor]:
        statistics, found = run.statistics.read(index), {}
        for part, removed in _removed(model, index, keep):
            name = part.kind.output.name
            if f"{name}.weight" in weights:
                mean = baseline_input(statistics.of(part.kind.name), form)[part.channels(model.shapes[index])]
                found[f"{name}.bias"] = _shifted_bias(model, index, weights, name, removed, mean)
        return found

    return mend


def _removed(model: StreamedModel, index: int, keep: LayerKeep) -> Iterator[tuple[Part, np.ndarray]]:
    """The parts of a layer, and the removed input channels of their output projections."""
    shape = model.shapes[index]
    for part, units in model.family.kept_parts(shape, keep):
        yield part, part.removed_channels(units, shape)


def _zeroing(channels: torch.Tensor) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
    def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        inputs[0].index_fill_(-1, channels, 0)  # in place: nothing else reads it

    return hook


def _shifted_bias(
    model: StreamedModel,
    index: int,
    weights: Mapping[str, torch.Tensor],
    name: str,
    removed: np.ndarray,
    mean: np.ndarray,
) -> torch.Tensor:
    """The bias that rewrite stores, rounded to its stored dtype; `[row]` in the dtype that the layers run in.

    mean: float64 `[channel]`.
    """
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    channels, means = (torch.from_numpy(array).to(model.device) for array in (removed, mean))
    rows = max(1, _BLOCK_BYTES // (8 * max(len(removed), 1)))
    total = torch.cat([baseline_shift(block, channels, means) for block in weight.split(rows)])
    if bias is not None:
        total += bias
    entry = model.layer_entries[index][f"{name}.weight" if bias is None else f"{name}.bias"]
    return total.to(stored_dtype(entry)).to(model.dtype)
