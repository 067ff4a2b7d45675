"""Decoder layers as pass 2 refits them: attention and MLP one after another, in the pruned and in the dense model.

The inputs of the output projection are taken as the dense weights give them, its kept columns are refitted (`refit.py`)
and their outputs become the hidden states. With the target `aligned`, what reads hidden states is refitted before that,
and at the end the head; with `joint`, gate and up once more (`mlp_step.py`). Nothing is cut: modules stand in for the
layer's own (`stand_ins.py`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.arithmetic.least_squares import (
    KeptMoments,
    MomentSums,
    product_with_mean,
    refit_to_own,
    refit_to_target,
)
from flap_stream.arithmetic.surgery import removed_indices
from flap_stream.engine.hidden_states import Feed, HiddenStates
from flap_stream.engine.layer_pass import Batch
from flap_stream.errors import NonFinite
from flap_stream.model.dtypes import stored_dtype
from flap_stream.model.units import Part
from flap_stream.restore.mlp_step import STEP_RUNS, MlpStep
from flap_stream.restore.second_pass import SecondPass, aligned_rows
from flap_stream.restore.stand_ins import Captures, Supplies


def refit_layer(
    on: SecondPass,
    index: int,
    weights: Mapping[str, torch.Tensor],
    keep: LayerKeep,
    stored: Mapping[str, torch.Tensor] | None,
    hands_on: bool = True,
) -> dict[str, torch.Tensor]:
    """Run one layer as pruned; its refitted tensors come out, by relative name, as they are stored.

    stored: those of an earlier call, which are then used as they are. hands_on: whether anything reads the hidden
    states that leave the layer; else they are not made.
    """
    shape = on.model.shapes[index]
    refitted: dict[str, torch.Tensor] = {}
    parts = on.model.family.parts(shape)
    for part in parts:
        others: dict[str, nn.Module] = {}
        for other in parts:
            if other is not part:
                others |= {other.kind.module: Supplies(other.kind.name), **on.without_norm(other)}
        half = _Half(on, index, weights, part, others, hands_on or part is not parts[-1])
        refitted |= half.run(part.own(keep.of(part.kind.name)), shape, stored)
    return refitted


def refit_head(on: SecondPass) -> torch.Tensor:
    """The head for what the final norm gives in the pruned model, in the dtype of the checkpoint."""
    norm, sums, dense = on.model.final_norm(), on.alignment_sums(), on.targets()
    for start, values in on.hidden.stream(on.sizes.first):
        both = [norm(values), norm(dense.take(start, len(values)))]
        sums.add(torch.cat(both, dim=-1).flatten(0, 1))
    matrix = on.alignment(sums, "the head")
    return aligned_rows(on.model.head_weight(), matrix, stored_dtype(on.model.head_entry))


@dataclass(frozen=True)
class _Half:
    """Attention or MLP of one layer, the other silent.

    others: what silences it. hands_on: whether the hidden states behind it are made. arranged: what reads the hidden
    states in the pruned model, in place of the dense tensors. Rows of the units that stay come first, and so do their
    channels where the output projection reads them, without anything to gather token by token.
    """

    on: SecondPass
    index: int
    weights: Mapping[str, torch.Tensor]
    part: Part
    others: Mapping[str, nn.Module]
    hands_on: bool
    arranged: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def run(
        self, units: np.ndarray, shape: LayerShape, stored: Mapping[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        """Refit, unless `stored` holds what came of it, and hand the hidden states on. units: those that stay."""
        if stored is not None:
            prefix = f"{self.on.model.family.layers}.{self.index}."
            stored = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
        rows = {
            f"{projection.name}.weight": torch.from_numpy(projection.kept_indices(units, self.part.units, shape))
            for projection in self.part.kind.readers
        }
        readers = dict[str, torch.Tensor]()
        if self.on.aligns and len(units):
            readers = self._align(rows, stored)
        if self.on.dense is not None:
            self._run_all(self.on.dense, {})
        if self.on.is_joint and self.part.kind.name == "mlp" and len(units):
            readers = self._arrange(units, shape, readers)._take_step(rows, readers, units, shape, stored)
        return readers | self._arrange(units, shape, readers)._run(units, shape, stored)

    def _arrange(self, units: np.ndarray, shape: LayerShape, readers: Mapping[str, torch.Tensor]) -> "_Half":
        """With the units that stay before the others. readers: weights of theirs that were refitted, if any."""
        device, dtype, count = self.on.model.device, self.on.model.dtype, self.part.units
        order, first = np.concatenate([units, removed_indices(units, count)]), np.arange(len(units))
        if not readers and np.array_equal(order, np.arange(count)):
            return self
        arranged = {}
        for projection in self.part.kind.readers:
            rows, stays = (
                torch.from_numpy(projection.kept_indices(some, count, shape)).to(device) for some in (order, first)
            )
            for name in (f"{projection.name}.weight", f"{projection.name}.bias"):
                if name in self.weights:
                    arranged[name] = self.weights[name][rows]
                if name in readers:
                    arranged[name].index_copy_(0, stays, readers[name].to(device, dtype))
        return replace(self, arranged=arranged)

    def _align(
        self, rows: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        """What reads the hidden states here, refitted to what it reads in the dense model; the rows that stay."""
        on, model = self.on, self.on.model
        if stored is not None:
            on.skip_runs(2)
            return {name: stored[name] for name in rows}
        assert on.dense is not None
        silent, sums = Supplies(self.part.kind.name), on.alignment_sums()
        samples, tokens, _ = on.hidden.shape
        with model.hidden_states(on.placement.hidden_place, samples, tokens, on.store.path) as targets:
            stand_ins = {self.part.kind.module: silent}

            for start, _ in self._forward(on.dense, stand_ins, keep_output=False):
                targets.put(start, silent.read)
            targets.advance()
            wanted = Feed(targets, on.sizes.first)
            for start, output in self._forward(on.hidden, stand_ins, keep_output=False):
                both = [silent.read, wanted.take(start, len(output))]
                sums.add(torch.cat(both, dim=-1).flatten(0, 1))
        matrix = on.alignment(sums, f"{self.part.kind.module} in layer {self.index}")
        return {
            name: aligned_rows(self.weights[name][kept.to(model.device)], matrix, self._stored_dtype(name))
            for name, kept in rows.items()
        }

    def _run(
        self, units: np.ndarray, shape: LayerShape, stored: Mapping[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        """Refit the output projection, and hand the hidden states on."""
        model, name = self.on.model, self.part.kind.output.name
        weight, bias = (self.weights.get(f"{name}.{part}") for part in ("weight", "bias"))
        if weight is None:  # an earlier pruning left the bias alone
            self._run_all(self.on.hidden, {})
            return {} if bias is None else {f"{name}.bias": bias.to(self._stored_dtype(f"{name}.bias"))}
        order, kept = self._order(units, shape, weight)
        if kept == len(order) and self.on.dense is None:
            self._run_all(self.on.hidden, {})
            weight = weight.to(self._stored_dtype(f"{name}.weight"))
            bias = torch.zeros_like(weight[:, 0]) if bias is None else bias.to(self._stored_dtype(f"{name}.bias"))
            return {f"{name}.weight": weight, f"{name}.bias": bias}
        if stored is None and not self.hands_on:
            return self._fit(weight, order, kept, None)
        samples, tokens, _ = self.on.hidden.shape
        place = self.on.placement.hidden_place if kept else "host"
        with model.hidden_states(place, samples, tokens, self.on.store.path, width=kept) as cache:
            if stored is None:
                refitted = self._fit(weight, order, kept, cache)
            else:
                self._capture(kept, cache, None)
                refitted = {key: tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}
            cache.advance()
            self._supply(refitted, cache)
        return refitted

    def _order(self, units: np.ndarray, shape: LayerShape, weight: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The output projection's inputs, int64 `[channel]`: those that stay, then those that go; how many stay."""
        kept = self.part.kind.output.kept_indices(units, self.part.units, shape)
        order = np.concatenate([kept, self.part.removed_channels(units, shape)])
        return torch.from_numpy(order).to(self.on.model.device), len(kept)

    def _fit(
        self, weight: torch.Tensor, order: torch.Tensor, kept: int, cache: HiddenStates | None
    ) -> dict[str, torch.Tensor]:
        """Weight and bias of the output projection for the inputs that it gets; these go into the cache, too."""
        sums = self._sums(order, kept)
        self._capture(kept, cache, sums)
        summed = self.on.collected(sums)
        return self.on.model.ranks.from_first(lambda: self._refit(weight, order, summed.finish()))

    def _sums(self, order: torch.Tensor, kept: int) -> MomentSums:
        """Of inputs in this order, and of the target; pass 1 knows how large they are in the dense model."""
        on = self.on
        statistics = on.store.statistics.read(self.index).of(self.part.kind.name)
        squares = torch.from_numpy(statistics.m2 + statistics.count * np.square(statistics.mean))
        ordered = squares[order.cpu()]
        if on.dense is not None:
            target = squares @ torch.from_numpy(statistics.weight_squared_norm)
            ordered = torch.cat([ordered[:kept], target.expand(on.model.hidden_size)])
        return on.sums(kept, ordered)

    def _capture(self, kept: int, cache: HiddenStates | None, sums: MomentSums | None) -> None:
        """Fill the cache with the kept inputs of the output projection and sum their moments, where they are wanted."""
        on, captures = self.on, Captures(self.on.model.hidden_size)
        targets = None if on.dense is None else on.targets()

        for start, output in self._forward(on.hidden, {self.part.kind.output.name: captures}, keep_output=False):
            inputs = captures.inputs
            if cache is not None:
                cache.put(start, inputs[..., :kept])
            if sums is not None:
                if targets is not None:
                    inputs = torch.cat([inputs[..., :kept], self._wanted(targets, start, output)], dim=-1)
                sums.add(inputs.flatten(0, 1))

    def _wanted(self, targets: Feed, start: int, output: torch.Tensor) -> torch.Tensor:
        """What this half should add to the hidden states. output: of the layer, both halves silent: what entered it."""
        multiplier = getattr(self.on.model.skeleton.hf_config, "residual_multiplier", 1.0)
        return (targets.take(start, len(output)) - output) / multiplier

    def _take_step(
        self,
        rows: Mapping[str, torch.Tensor],
        readers: dict[str, torch.Tensor],
        units: np.ndarray,
        shape: LayerShape,
        stored: Mapping[str, torch.Tensor] | None,
    ) -> dict[str, torch.Tensor]:
        """What reads the hidden states, after a Gauss-Newton step from `readers`: the rows that stay."""
        on, kind = self.on, self.part.kind
        layer, begun = on.batches.step
        if stored is not None:
            readers = {name: stored[name] for name in rows}
        else:
            weight = self.weights[f"{kind.output.name}.weight"]
            order, kept = self._order(units, shape, weight)
            fitted = self._fit(weight, order, kept, None)
            output = (fitted[f"{kind.output.name}.{part}"] for part in ("weight", "bias"))
            own = {name.removesuffix("weight") + "bias": stays.to(on.model.device) for name, stays in rows.items()}
            biases = {name: self.weights[name][stays] for name, stays in own.items() if name in self.weights}

            def run(mlp: nn.Module, windows: range | None = None) -> Iterator[Batch]:
                return self._forward(on.hidden, {kind.module: mlp}, keep_output=False, windows=windows)

            step = MlpStep(on, self.index, kind, run, self._wanted, biases, *output)
            readers = step.take(readers)
        on.batches.step = (layer, begun + STEP_RUNS)
        return readers

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
        return stored_dtype(self.on.model.layer_entries[self.index][name])

    def _supply(self, refitted: Mapping[str, torch.Tensor], cache: HiddenStates) -> None:
        """Hand on what the refitted projection makes of the cached inputs."""
        dtype = self.on.model.dtype
        tensors = {key.rpartition(".")[2]: tensor.to(self.on.model.device, dtype) for key, tensor in refitted.items()}
        inputs = Feed(cache, self.on.sizes.first)
        supplies = Supplies(self.part.kind.name, tensors.get("weight"), tensors["bias"], inputs.take)
        self._run_all(self.on.hidden, {self.part.kind.module: supplies, **self.on.without_norm(self.part)})

    def _run_all(self, hidden: HiddenStates, stand_ins: Mapping[str, nn.Module]) -> None:
        for _ in self._forward(hidden, stand_ins):
            pass

    def _forward(
        self,
        hidden: HiddenStates,
        stand_ins: Mapping[str, nn.Module],
        *,
        keep_output: bool = True,
        windows: range | None = None,
    ) -> Iterator[Batch]:
        weights = self.weights if hidden is self.on.dense else {**self.weights, **self.arranged}
        modules = {**self.others, **stand_ins}
        return self.on.batches.run(
            self.index, weights, hidden, windows=windows, keep_output=keep_output, stand_ins=modules
        )
