"""Least-squares fit of a sublayer's output projection (o_proj, down_proj) to the inputs that are kept."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from flap_stream.arithmetic.least_squares import (
    KeptMoments,
    MomentSums,
    product_with_mean,
    solve_for_dense_output,
)
from flap_stream.arithmetic.surgery import removed_indices
from flap_stream.engine.hidden_states import Feed, HiddenStates
from flap_stream.engine.memory import give_back_heap
from flap_stream.errors import NonFinite
from flap_stream.restore.pruned_sublayer import PrunedSublayer
from flap_stream.restore.stand_ins import Captures, Supplies


@dataclass(frozen=True)
class OutputProjection:
    """The output projection of a pruned sublayer, with its dense weight `[hidden, channel]` on the device.

    order: int64 `[channel]`, the kept inputs, then the removed ones. kept: how many are kept.
    """

    sublayer: PrunedSublayer
    weight: torch.Tensor
    order: torch.Tensor
    kept: int

    @classmethod
    def of(cls, sublayer: PrunedSublayer) -> "OutputProjection | None":
        """The output projection of a sublayer; None if an earlier pruning removed its weight."""
        model, part = sublayer.refit.model, sublayer.part
        weight = sublayer.weights.get(f"{part.kind.output.name}.weight")
        if weight is None:
            return None
        kept = part.kind.output.kept_indices(sublayer.units, part.units, model.shapes[sublayer.index])
        order = np.concatenate([kept, removed_indices(kept, weight.shape[1])])
        return cls(sublayer, weight, torch.from_numpy(order).to(model.device), len(kept))

    @property
    def name(self) -> str:
        """Path inside the decoder layer."""
        return self.sublayer.part.kind.output.name

    @property
    def is_whole(self) -> bool:
        """Whether all its inputs are kept."""
        return self.kept == len(self.order)

    def fit(self, cache: HiddenStates | None = None) -> dict[str, torch.Tensor]:
        """Weight and bias fitted to the inputs that it gets, by relative name, in host memory, the same on every rank.

        cache: filled with the kept inputs. Raises NonFinite if inputs or their squares hold NaN or infinity.
        """
        refit, sums = self.sublayer.refit, self._sums()
        self.capture(cache, sums)
        summed = refit.collected(sums)
        del sums
        return refit.model.ranks.from_first(lambda: self._solve(summed))

    def capture(self, cache: HiddenStates | None, sums: MomentSums | None = None) -> None:
        """Run the layer for the inputs: the kept ones are written to the cache, and all are added to the sums."""
        captures = Captures(self.sublayer.refit.model.hidden_size)
        for start, _ in self.sublayer.forward({self.name: captures}, keep_output=False):
            inputs = captures.inputs
            if cache is not None:
                cache.put(start, inputs[..., : self.kept])
            if sums is not None:
                sums.add(inputs.flatten(0, 1))

    def hand_on(self, refitted: Mapping[str, torch.Tensor], cache: HiddenStates) -> None:
        """Advance the hidden states by the refitted projection's outputs for the cached inputs."""
        refit, part = self.sublayer.refit, self.sublayer.part
        model = refit.model
        tensors = {key.rpartition(".")[2]: tensor.to(model.device, model.dtype) for key, tensor in refitted.items()}
        inputs = Feed(cache, refit.sizes.first)
        supplies = Supplies(part.kind.name, tensors.get("weight"), tensors["bias"], inputs.take)
        self.sublayer.run_all({part.kind.module: supplies, **refit.without_norm(part)})

    def _sums(self) -> MomentSums:
        """Empty sums for inputs in this order; the statistics say how large they are when dense."""
        refit = self.sublayer.refit
        statistics = refit.run.statistics.read(self.sublayer.index).of(self.sublayer.part.kind.name)
        squares = torch.from_numpy(statistics.m2 + statistics.count * np.square(statistics.mean))
        return refit.sums(self.kept, squares[self.order.cpu()])

    def _solve(self, sums: MomentSums) -> dict[str, torch.Tensor]:
        """Weight and bias, in the dtypes of the checkpoint; only the bias if no input is kept. sums: used up."""
        moments = sums.finish()
        give_back_heap()  # the sums, else they would stay there beside what follows
        tensors = self._solution(moments)
        del moments
        give_back_heap()
        return tensors

    def _solution(self, moments: KeptMoments) -> dict[str, torch.Tensor]:
        """The same, from the moments, which are used up."""
        refit, name, kept = self.sublayer.refit, self.name, self.kept
        if not torch.isfinite(moments.mean).all() or not torch.isfinite(moments.kept.diagonal()).all():
            raise NonFinite(
                f"the inputs of {name} in layer {self.sublayer.index}, or their squares, hold NaN or infinity; try "
                f"--dtype float32 (it ran in {refit.model.dtype})"
            )
        old, dtype = self.sublayer.weights.get(f"{name}.bias"), self.sublayer.stored_dtype(f"{name}.weight")
        ordered = self.weight[:, self.order]
        refitted = solve_for_dense_output(ordered, moments).to(dtype)
        bias = product_with_mean(ordered, moments.mean) + (0 if old is None else old.double())
        bias = bias - product_with_mean(refitted, moments.mean[:kept])
        tensors = {f"{name}.weight": refitted.cpu(), f"{name}.bias": bias.to(dtype).cpu()}
        if not kept:
            del tensors[f"{name}.weight"]
        return tensors
