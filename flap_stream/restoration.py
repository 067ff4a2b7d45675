"""Pass 2 before anything is cut: what output projections keep is refitted on the inputs that the pruned prefix gives.

The calibration windows run through the model once more, this time through its pruned layers. Attention and MLP of a
layer follow one another: the inputs of the output projection are taken as the dense weights give them, its kept columns
are refitted (`refit.py`), and their outputs become the hidden states.

With the target `aligned`, what reads hidden states is brought nearer to the dense ones before anything else, and at the
end the head.

Of several ranks each runs its share of the windows, and rank 0 refits from the sums of all.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from flap_stream.allocation import LayerKeep
from flap_stream.architecture import ROWS, Family, LayerShape, Part
from flap_stream.checkpoint import FORWARD_DTYPES, TensorEntry, read_header
from flap_stream.errors import CorruptRun, NonFinite, UnsupportedModel
from flap_stream.hidden_states import HiddenStates
from flap_stream.layers import BatchSizes, StreamedModel
from flap_stream.planner import Placement, Refit
from flap_stream.progress import Progress
from flap_stream.refit import (
    DAMPING,
    KeptMoments,
    MomentSums,
    product_windows,
    product_with_mean,
    refit_to_own,
    refit_to_target,
    row_blocks,
)
from flap_stream.shards import OutputTensor, safetensors_header
from flap_stream.snapshots import Snapshots, resume
from flap_stream.store import RunDirectory
from flap_stream.surgery import removed_indices

_STEPS = 10  # runs over all windows that a layer takes here at most, as BatchSizes counts them


def require_refittable(family: Family, shapes: Sequence[LayerShape], target: str, where: str) -> None:
    """Raise UnsupportedModel for what no refit is defined for."""
    if any(shape.experts for shape in shapes):
        raise UnsupportedModel(f"{where} has experts, whose projections are not refitted; use --restore bias")
    if target != "own" and family.norms_outputs:
        raise UnsupportedModel(
            f"{where} norms what attention and MLP give before it is added, so that the hidden states are no target of "
            "least squares; use --refit-target own"
        )


def refit_sizes(model: StreamedModel, target: str) -> Refit:
    """The most that pass 2 can have to refit, for the planner: every layer could keep almost all."""
    parts = [(shape, part) for shape in model.shapes for part in model.family.parts(shape)]
    projections = [(model.hidden_size, part.kind.output.size(part.units, shape)) for shape, part in parts]
    if target != "aligned":
        return Refit(tuple(projections), has_dense=target == "dense")
    readers = [
        sum(projection.size(part.units, shape) for projection in part.kind.projections if projection.axis == ROWS)
        for shape, part in parts
    ]
    squares = [(model.hidden_size, model.hidden_size)] * (len(parts) + refits_head(model, target))
    return Refit((*projections, *squares), has_dense=True, aligned=model.hidden_size * max(readers))


def refits_head(model: StreamedModel, target: str) -> bool:
    """Whether the head is refitted; one that is the embedding stays."""
    return target == "aligned" and not model.skeleton.tied


def refit_stored_bytes(model: StreamedModel, target: str) -> int:
    """Most bytes that the refitted tensors take in the run directory."""
    weights = (
        entries.get(f"{projection.name}.weight")
        for entries, shape in zip(model.layer_entries, model.shapes, strict=True)
        for part in model.family.parts(shape)
        for projection in part.kind.projections
        if target == "aligned" or projection.axis != ROWS
    )
    stored = sum(weight.nbytes + weight.shape[0] * weight.item_bytes for weight in weights if weight is not None)
    return stored + (model.head_entry.nbytes if refits_head(model, target) else 0)


def refit_record(target: str) -> dict[str, Any]:
    """What decides a refit besides the plan and how layers are run."""
    return {"target": target, "damping": DAMPING}


def refit_layers(
    model: StreamedModel,
    run: RunDirectory,
    keeps: Sequence[LayerKeep],
    target: str,
    placement: Placement,
    progress: Progress,
    snapshot_interval: int | None = None,
) -> None:
    """Bring the refitted projections of all layers into the run directory, going on where an earlier call stopped.

    All ranks of the model do this together; `run` is open for writing on the first.

    Raises NonFinite, naming the layer, if inputs hold NaN or infinity.
    """
    ranks = model.ranks
    conditions = {"dtype": str(model.dtype), "device": model.device.type, "batch_size": placement.batch_size}
    if ranks.is_first:
        run.begin_refit({**conditions, **refit_record(target)})
    first, count = ranks.from_first(run.complete_refits), len(model.layers)
    if first < count + refits_head(model, target):
        with progress.stage("refit", count) as stage, torch.inference_mode(), ExitStack() as stack:
            tokens = run.read_tokens()
            samples, length = tokens.shape
            own = ranks.share(samples, product_windows(placement.batch_size, length))
            stores = [run.pruned_snapshots] + ([run.dense_snapshots] if target != "own" else [])
            saved = [
                (store, stack.enter_context(model.hidden_states(placement.hidden_place, len(own), length, run.path)))
                for store in stores
            ]
            start = resume(model, saved, tokens[own.start : own.stop], placement.batch_size, first)
            stage.skip(start)
            sizes = BatchSizes(placement.batch_size, run.batch_reductions(), own)
            layers = _Pass2(model, run, [hidden for _, hidden in saved], sizes, placement, samples, target == "aligned")
            snapshots = Snapshots(saved, snapshot_interval, ranks)
            for i, weights in model.stream(start, placement.prefetch):
                if i < first:
                    layers.run(i, weights, keeps[i], load_file(run.refit_path(i)))
                else:
                    refitted = layers.run(i, weights, keeps[i], None)
                    model.checkpoint.require_unchanged()
                    if ranks.is_first:
                        run.write_refit(i, _file_chunks(f"{model.family.layers}.{i}.", refitted))
                if i + 1 < count:
                    snapshots.layer_done(i + 1)
                stage.advance(tokens=tokens.size, bytes_moved=model.layer_bytes(i))
            if refits_head(model, target):
                head = layers.refit_head()
                model.checkpoint.require_unchanged()
                if ranks.is_first:
                    run.write_refit(count, _file_chunks("", {model.family.head: head}))
    if ranks.is_first:
        run.pruned_snapshots.drop()
        run.dense_snapshots.drop()


def refitted_tensors(run: RunDirectory, count: int) -> dict[str, TensorEntry]:
    """Where the refitted tensors are, by the names that the pruned checkpoint has for them.

    count: of files: a layer's each, and one of the head if that is refitted.
    Raises CorruptRun if any is missing or altered.
    """
    complete = run.complete_refits()
    if complete < count:
        raise CorruptRun(f"{run.refit_path(complete)} is missing or altered; run the same command again to refit")
    tensors = {}
    for layer in range(count):
        path = run.refit_path(layer)
        for entry in read_header(path)[0]:
            tensors[entry.name] = replace(entry, file=str(path.absolute()))
    return tensors


def _file_chunks(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """Bytes of a safetensors file."""
    codes = {getattr(torch, name): code for code, name in FORWARD_DTYPES.items()}
    planned = [
        OutputTensor(prefix + name, codes[tensor.dtype], tuple(tensor.shape), tensor.nbytes, None)
        for name, tensor in tensors.items()
    ]
    yield safetensors_header(planned)
    for tensor in tensors.values():
        yield memoryview(tensor.contiguous().cpu().view(torch.uint8).view(-1).numpy())


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


class _Pass2:
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
            others = {other.kind.module: Supplies(other.kind.name) for other in parts if other is not part}
            half = _Half(self, index, weights, part, others)
            refitted |= half.run(part.own(keep.of(part.kind.name)), shape, stored)
        return refitted

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

    on: _Pass2
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
            put = partial(_put_read, silent, targets)
            self._forward(on.dense, stand_ins, keep_output=False, after_batch=put)
            targets.advance()
            add = partial(_add_read, silent, _Feed(targets, on.sizes.first), sums)
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

        self._forward(self.on.hidden, {self.part.kind.module: supplies}, before_batch=give)

    def _forward(self, hidden: HiddenStates, stand_ins: Mapping[str, nn.Module], **how: Any) -> None:
        weights = self.weights if hidden is self.on.dense else {**self.weights, **self.aligned}
        self.on.forward(self.index, weights, hidden, stand_ins={**self.others, **stand_ins}, **how)


def _put_read(module: Supplies, targets: HiddenStates, start: int, _output: torch.Tensor) -> None:
    targets.put(start, module.read)


def _add_read(module: Supplies, targets: "_Feed", sums: MomentSums, start: int, _output: torch.Tensor) -> None:
    both = [module.read, targets.take(start, len(module.read))]
    sums.add(torch.cat(both, dim=-1).flatten(0, 1))


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
