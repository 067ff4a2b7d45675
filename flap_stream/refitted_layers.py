"""Decoder layers as pass 2 refits them: attention and MLP one after another, in the pruned and in the dense model.

The inputs of the output projection are taken as the dense weights give them, its kept columns are refitted (`refit.py`)
and their outputs become the hidden states. With the target `aligned`, what reads hidden states is refitted before that,
and at the end the head. Nothing is cut: modules stand in for the layer's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from flap_stream.allocation import LayerKeep
from flap_stream.architecture import ROWS, LayerShape, Part
from flap_stream.checkpoint import FORWARD_DTYPES, TensorEntry
from flap_stream.errors import NonFinite
from flap_stream.hidden_states import HiddenStates
from flap_stream.layers import BatchSizes, StreamedModel
from flap_stream.planner import Placement
from flap_stream.refit import (
    KeptMoments,
    MomentSums,
    product_windows,
    product_with_mean,
    refit_to_own,
    refit_to_target,
    row_blocks,
)
from flap_stream.store import RunDirectory
from flap_stream.surgery import removed_indices

_STEPS = 10  # runs over all windows that a layer takes here at most, as BatchSizes counts them


class Captures(nn.Module):
    """Stands in for an output projection: keeps its inputs, gives zeros."""

    inputs: torch.Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self._hidden_size = hidden_size

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[sample, token, channel]` to zeros `[sample, token, hidden]`."""
        self.inputs = inputs
        return inputs.new_zeros(1).expand(*inputs.shape[:-1], self._hidden_size)


class Supplies(nn.Module):
    """Stands in for attention or an MLP: gives what the refitted projection makes of inputs taken before.

    weight: `[hidden, kept]`, or None for zeros. bias: `[hidden]` or None. read: what the module was last given.
    """

    inputs: torch.Tensor
    read: torch.Tensor

    def __init__(self, kind: str, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self._is_attention, self._weight, self._bias = kind == "attention", weight, bias

    def forward(self, *args: torch.Tensor, **kwargs: Any) -> Any:
        """In the form that the module has."""
        self.read = hidden = args[0] if args else kwargs["hidden_states"]
        if self._weight is not None:
            output = functional.linear(self.inputs, self._weight, self._bias)
        else:
            output = torch.zeros_like(hidden) if self._bias is None else self._bias.expand_as(hidden)
        return (output, None) if self._is_attention else output


class Pass2:
    """The hidden states on their way through the pruned layers; beside them, as the target, the dense ones.

    samples: windows of all ranks. aligns: whether what reads hidden states is refitted too.
    """

    def __init__(
        self,
        model: StreamedModel,
        run: RunDirectory,
        hidden: Sequence[HiddenStates],
        sizes: BatchSizes,
        placement: Placement,
        samples: int,
        aligns: bool = False,
    ) -> None:
        self.model, self.store, self.sizes, self.placement, self.samples = model, run, sizes, placement, samples
        self.hidden, self.dense = hidden[0], hidden[1] if len(hidden) > 1 else None
        self.aligns = aligns
        self._step = 0

    @property
    def block_tokens(self) -> int:
        """Tokens that are multiplied apart from others'."""
        length = self.hidden.shape[1]
        return product_windows(self.sizes.first, length) * length

    def run(
        self,
        index: int,
        weights: Mapping[str, torch.Tensor],
        keep: LayerKeep,
        stored: Mapping[str, torch.Tensor] | None,
    ) -> dict[str, torch.Tensor]:
        """Run one layer as pruned; its refitted tensors come out, by relative name, as they are stored.

        stored: those of an earlier call, which are then used as they are.
        """
        shape = self.model.shapes[index]
        refitted: dict[str, torch.Tensor] = {}
        parts = self.model.family.parts(shape)
        self._step = 2 * len(self.model.layers) + _STEPS * index  # pass 1 has two a layer
        for part in parts:
            others: dict[str, nn.Module] = {}
            for other in parts:
                if other is not part:
                    others |= {other.kind.module: Supplies(other.kind.name), **self.without_norm(other)}
            half = _Half(self, index, weights, part, others)
            refitted |= half.run(part.own(keep.of(part.kind.name)), shape, stored)
        return refitted

    def without_norm(self, part: Part) -> dict[str, nn.Module]:
        """What saves the time of norming for a part that does not look at it."""
        path = self.model.family.norm_before(part.kind)
        return {} if path is None else {path: nn.Identity()}

    def forward(self, index: int, weights: Mapping[str, torch.Tensor], hidden: HiddenStates, **how: Any) -> None:
        """`StreamedModel.forward_layer` as the next step."""
        self.model.forward_layer(index, weights, hidden, self.sizes, step=self._step, **how)
        for reduction in self.sizes.agree(self.model.ranks):
            if self.model.ranks.is_first:
                self.store.record_batch_reduction(*reduction)
        self._step += 1

    def skip(self, steps: int) -> None:
        """Steps that an earlier call has made for good."""
        self._step += steps

    def collected(self, sums: MomentSums) -> MomentSums:
        """On rank 0 the sums over the windows of all ranks; nothing on the others."""
        for part in sums.parts():
            self.model.ranks.sum_on_first(part)
        return sums

    def alignment_sums(self) -> MomentSums:
        """Of what is read in the pruned model, and in the dense one; norms give values around 1."""
        samples, length, width = self.samples, *self.hidden.shape[1:]
        squares = torch.full((2 * width,), float(samples * length), dtype=torch.float64)
        return MomentSums(width, squares, samples * length, self.block_tokens, self.model.dtype, self.model.device)

    def alignment(self, sums: MomentSums, where: str) -> torch.Tensor:
        """The matrix, float32 `[hidden, hidden]`, that brings what is read nearest to what the dense model reads."""
        summed = self.collected(sums)

        def solve() -> torch.Tensor:
            moments = summed.finish(about_mean=False)
            if not torch.isfinite(moments.kept.diagonal()).all():
                raise NonFinite(f"what enters {where} holds NaN or infinity, or its squares do; try --dtype float32")
            identity = torch.eye(moments.kept.shape[0], device=moments.kept.device)
            return refit_to_target(identity, moments).cpu()

        return self.model.ranks.from_first(solve).to(self.model.device)

    def refit_head(self) -> torch.Tensor:
        """The head for what the final norm gives in the pruned model, in the dtype of the checkpoint."""
        assert self.dense is not None
        norm, sums, dense = self.model.final_norm(), self.alignment_sums(), _Feed(self.dense, self.sizes.first)
        for start, values in self.hidden.stream(self.sizes.first):
            both = [norm(values), norm(dense.take(start, len(values)))]
            sums.add(torch.cat(both, dim=-1).flatten(0, 1))
        matrix = self.alignment(sums, "the head")
        return _aligned(self.model.head_weight(), matrix, _dtype_of(self.model.head_entry))


def _dtype_of(entry: TensorEntry) -> torch.dtype:
    return getattr(torch, FORWARD_DTYPES[entry.dtype])


def _aligned(weight: torch.Tensor, matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight @ matrix, in host memory."""
    return torch.cat([(weight[rows].float() @ matrix).to(dtype).cpu() for rows in row_blocks(weight)])


@dataclass(frozen=True)
class _Half:
    """Attention or MLP of one layer, the other silent.

    others: what silences it. aligned: tensors that the pruned model has in place of the dense ones.
    """

    on: Pass2
    index: int
    weights: Mapping[str, torch.Tensor]
    part: Part
    others: Mapping[str, nn.Module]
    aligned: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def run(
        self, units: np.ndarray, shape: LayerShape, stored: Mapping[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        """Refit, unless `stored` holds what came of it, and hand the hidden states on. units: those that stay."""
        if stored is not None:
            prefix = f"{self.on.model.family.layers}.{self.index}."
            stored = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
        if not self.on.aligns or not len(units):
            return self._run(units, shape, stored)
        rows = {
            f"{projection.name}.weight": torch.from_numpy(projection.kept_indices(units, self.part.units, shape))
            for projection in self.part.kind.projections
            if projection.axis == ROWS
        }
        stays = self._align(rows, stored)
        device, dtype = self.on.model.device, self.on.model.dtype
        aligned = {
            name: self.weights[name].index_copy(0, rows[name].to(device), tensor.to(device, dtype))
            for name, tensor in stays.items()
        }
        return stays | replace(self, aligned=aligned)._run(units, shape, stored)

    def _align(
        self, rows: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        """What reads the hidden states here, refitted to what it reads in the dense model; the rows that stay."""
        on, model = self.on, self.on.model
        if stored is not None:
            on.skip(2)
            return {name: stored[name] for name in rows}
        assert on.dense is not None
        silent, sums = Supplies(self.part.kind.name), on.alignment_sums()
        samples, tokens, _ = on.hidden.shape
        with model.hidden_states(on.placement.hidden_place, samples, tokens, on.store.path) as targets:
            stand_ins = {self.part.kind.module: silent}

            def put(start: int, _output: torch.Tensor) -> None:
                targets.put(start, silent.read)

            self._forward(on.dense, stand_ins, keep_output=False, after_batch=put)
            targets.advance()
            wanted = _Feed(targets, on.sizes.first)

            def add(start: int, output: torch.Tensor) -> None:
                both = [silent.read, wanted.take(start, len(output))]
                sums.add(torch.cat(both, dim=-1).flatten(0, 1))

            self._forward(on.hidden, stand_ins, keep_output=False, after_batch=add)
        matrix = on.alignment(sums, f"{self.part.kind.module} in layer {self.index}")
        return {
            name: _aligned(self.weights[name][kept.to(model.device)], matrix, self._stored_dtype(name))
            for name, kept in rows.items()
        }

    def _run(
        self, units: np.ndarray, shape: LayerShape, stored: Mapping[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        """Refit the output projection, and hand the hidden states on."""
        model, name = self.on.model, self.part.kind.output.name
        if self.on.dense is not None:
            self._forward(self.on.dense, {})
        weight, bias = (self.weights.get(f"{name}.{part}") for part in ("weight", "bias"))
        if weight is None:  # an earlier pruning left the bias alone
            self._forward(self.on.hidden, {})
            return {} if bias is None else {f"{name}.bias": bias.to(self._stored_dtype(f"{name}.bias"))}
        kept = self.part.kind.output.kept_indices(units, self.part.units, shape)
        removed = removed_indices(kept, weight.shape[1])
        if not len(removed) and self.on.dense is None:
            self._forward(self.on.hidden, {})
            weight = weight.to(self._stored_dtype(f"{name}.weight"))
            bias = torch.zeros_like(weight[:, 0]) if bias is None else bias.to(self._stored_dtype(f"{name}.bias"))
            return {f"{name}.weight": weight, f"{name}.bias": bias}
        order = torch.from_numpy(np.concatenate([kept, removed])).to(model.device)
        samples, tokens, _ = self.on.hidden.shape
        place = self.on.placement.hidden_place if len(kept) else "host"
        with model.hidden_states(place, samples, tokens, self.on.store.path, width=len(kept)) as cache:
            sums = self._sums(order, len(kept)) if stored is None else None
            self._capture(order, len(kept), cache, sums)
            if sums is None:
                assert stored is not None
                refitted = {key: tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}
            else:
                summed = self.on.collected(sums)
                refitted = model.ranks.from_first(lambda: self._refit(weight, order, summed.finish()))
            self._supply(refitted, cache)
        return refitted

    def _sums(self, order: torch.Tensor, kept: int) -> MomentSums:
        """Of inputs in this order, and of the target; pass 1 knows how large they are in the dense model."""
        on = self.on
        length = on.hidden.shape[1]
        statistics = on.store.read_statistics(self.index).of(self.part.kind.name)
        squares = torch.from_numpy(statistics.m2 + statistics.count * np.square(statistics.mean))
        ordered = squares[order.cpu()]
        if on.dense is not None:
            target = squares @ torch.from_numpy(statistics.weight_squared_norm)
            ordered = torch.cat([ordered[:kept], target.expand(on.model.hidden_size)])
        return MomentSums(kept, ordered, on.samples * length, on.block_tokens, on.model.dtype, on.model.device)

    def _capture(self, order: torch.Tensor, kept: int, cache: HiddenStates, sums: MomentSums | None) -> None:
        """Fill the cache with the kept inputs of the output projection; their moments are summed if they are wanted.

        order: int64 `[channel]`, the kept ones first.
        """
        on, captures = self.on, Captures(self.on.model.hidden_size)
        wanted = order if sums is not None and on.dense is None else order[:kept]
        targets = None if on.dense is None else _Feed(on.dense, on.sizes.first)
        residual_multiplier = getattr(on.model.skeleton.hf_config, "residual_multiplier", 1.0)

        def take(start: int, output: torch.Tensor) -> None:
            inputs = captures.inputs.index_select(-1, wanted)
            cache.put(start, inputs[..., :kept])
            if sums is not None:
                if targets is not None:  # the output is what entered, since both halves are silent
                    wanted_output = (targets.take(start, len(output)) - output) / residual_multiplier
                    inputs = torch.cat([inputs, wanted_output], dim=-1)
                sums.add(inputs.flatten(0, 1))

        self._forward(on.hidden, {self.part.kind.output.name: captures}, keep_output=False, after_batch=take)
        cache.advance()

    def _refit(self, weight: torch.Tensor, order: torch.Tensor, moments: KeptMoments) -> dict[str, torch.Tensor]:
        """Weight and bias of the pruned output projection, in the dtypes of the checkpoint."""
        name, kept = self.part.kind.output.name, moments.kept.shape[0]
        old, stored_dtype = self.weights.get(f"{name}.bias"), self._stored_dtype(f"{name}.weight")
        if not torch.isfinite(moments.mean).all() or not torch.isfinite(moments.kept.diagonal()).all():
            raise NonFinite(
                f"the inputs of {name} in layer {self.index} hold NaN or infinity, or their squares do; try --dtype "
                f"float32 (it ran in {self.on.model.dtype})"
            )
        ordered = weight[:, order]
        if self.on.dense is not None:
            refitted = refit_to_target(ordered[:, :kept], moments).to(stored_dtype)
            bias = moments.mean[kept:]
        else:
            refitted = refit_to_own(ordered, moments).to(stored_dtype)
            bias = product_with_mean(ordered, moments.mean) + (0 if old is None else old.double())
        bias = bias - product_with_mean(refitted, moments.mean[:kept])
        tensors = {f"{name}.weight": refitted.cpu(), f"{name}.bias": bias.to(stored_dtype).cpu()}
        if not kept:  # the whole module goes but for its bias
            del tensors[f"{name}.weight"]
        return tensors

    def _stored_dtype(self, name: str) -> torch.dtype:
        return _dtype_of(self.on.model.layer_entries[self.index][name])

    def _supply(self, refitted: Mapping[str, torch.Tensor], cache: HiddenStates) -> None:
        """Hand on what the refitted projection makes of the cached inputs."""
        dtype = self.on.model.dtype
        tensors = {key.rpartition(".")[2]: tensor.to(self.on.model.device, dtype) for key, tensor in refitted.items()}
        supplies = Supplies(self.part.kind.name, tensors.get("weight"), tensors["bias"])
        inputs = _Feed(cache, self.on.sizes.first)

        def give(start: int, count: int) -> None:
            supplies.inputs = inputs.take(start, count)

        stand_ins = {self.part.kind.module: supplies, **self.on.without_norm(self.part)}
        self._forward(self.on.hidden, stand_ins, before_batch=give)

    def _forward(self, hidden: HiddenStates, stand_ins: Mapping[str, nn.Module], **how: Any) -> None:
        weights = self.weights if hidden is self.on.dense else {**self.weights, **self.aligned}
        self.on.forward(self.index, weights, hidden, stand_ins={**self.others, **stand_ins}, **how)


class _Feed:
    """Hidden states beside others that are run through a layer: the same windows, in order."""

    def __init__(self, hidden: HiddenStates, batch_size: int) -> None:
        self._batches = hidden.stream(batch_size)
        self._first, self._values = next(self._batches, (0, torch.empty(0)))  # a rank may have no windows

    def take(self, start: int, count: int) -> torch.Tensor:
        """Windows from `start` on, within one batch; no earlier ones are asked for again."""
        while start >= self._first + len(self._values):
            self._first, self._values = next(self._batches)
        return self._values[start - self._first : start - self._first + count]
