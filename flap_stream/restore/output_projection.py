"""Least-squares fit of a sublayer's output projection (o_proj, down_proj) to the inputs that are kept."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from flap_stream.arithmetic.least_squares import (
    DAMPING,
    KeptMoments,
    MomentSums,
    product_with_mean,
    solve_for_dense_output,
)
from flap_stream.arithmetic.scoring import ChannelStatistics
from flap_stream.arithmetic.surgery import removed_indices
from flap_stream.engine.hidden_states import Feed, HiddenStates
from flap_stream.engine.memory import give_back_heap
from flap_stream.errors import NonFinite
from flap_stream.restore.pruned_sublayer import PrunedSublayer
from flap_stream.restore.stand_ins import Captures, Supplies

# Of the mean over all experts' inputs: the least sum of squares that one is expected to have. More tokens may reach an
# expert than in the dense model, which perhaps routed few or none to it.
_LEAST_EXPECTED = 2.0**-8


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
        """The projection fitted to the inputs that it gets: see `fitted`. cache: filled with the kept inputs."""
        part, refit = self.sublayer.part, self.sublayer.refit
        statistics = refit.run.statistics.read(self.sublayer.index).of(part.kind.name)
        sums = self.sums(statistics)
        self.capture(cache, sums)
        return self.fitted(sums, statistics)

    def fitted(self, sums: MomentSums, statistics: ChannelStatistics, damping: float = 0.0) -> dict[str, torch.Tensor]:
        """Weight and bias fitted to all inputs, by relative name, in host memory, the same on every rank.

        sums: over this rank's windows; used up. statistics: as of `sums`. damping: is at least this times the kept
        inputs for each token.
        Raises NonFinite if inputs or their squares hold NaN or infinity.
        """
        refit = self.sublayer.refit
        summed = refit.collected(sums)
        return refit.model.ranks.from_first(lambda: self._solve(summed, statistics, damping))

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

    def sums(self, statistics: ChannelStatistics, of_expert: bool = False) -> MomentSums:
        """Empty sums for inputs in this order; the statistics say how large they are when dense.

        statistics: of all units of the kind in the layer. of_expert: see `RefitPass.sums`.
        """
        squares = statistics.m2 + statistics.count * np.square(statistics.mean)
        if of_expert:
            squares = np.maximum(squares, _LEAST_EXPECTED * squares.mean())
        return self.sublayer.refit.sums(self.kept, self._in_order(squares), of_expert)

    def _in_order(self, values: np.ndarray) -> torch.Tensor:
        """The values of its own inputs, the kept ones first, in host memory. values: of all units of the kind."""
        sublayer = self.sublayer
        own = sublayer.part.channels(sublayer.refit.model.shapes[sublayer.index])
        return torch.from_numpy(values[own])[self.order.cpu()]

    def _solve(self, sums: MomentSums, statistics: ChannelStatistics, damping: float) -> dict[str, torch.Tensor]:
        """Weight and bias, in the dtypes of the checkpoint; only the bias if no input is kept. sums: used up."""
        moments = sums.finish()
        if not moments.count:  # the weight stays, and the dense model's inputs say what the removed ones gave
            moments = replace(moments, mean=self._in_order(statistics.mean).to(moments.mean))
        give_back_heap()  # the sums, else they would stay there beside what follows
        tensors = self._solution(moments, max(DAMPING, damping * self.kept / max(moments.count, 1)))
        del moments
        give_back_heap()
        return tensors

    def _solution(self, moments: KeptMoments, damping: float) -> dict[str, torch.Tensor]:
        """The same, from the moments, which are used up."""
        refit, name, kept = self.sublayer.refit, self.name, self.kept
        if not torch.isfinite(moments.mean).all() or not torch.isfinite(moments.kept.diagonal()).all():
            raise NonFinite(
                f"the inputs of {name} in layer {self.sublayer.index}, or their squares, hold NaN or infinity; try "
                f"--dtype float32 (it ran in {refit.model.dtype})"
            )
        old, dtype = self.sublayer.weights.get(f"{name}.bias"), self.sublayer.stored_dtype(f"{name}.weight")
        ordered = self.weight[:, self.order]
        refitted = solve_for_dense_output(ordered, moments, damping).to(dtype).contiguous()  # as it is stored
        bias = product_with_mean(ordered, moments.mean) + (0 if old is None else old.double())
        bias = bias - product_with_mean(refitted, moments.mean[:kept])
        tensors = {f"{name}.weight": refitted.cpu(), f"{name}.bias": bias.to(dtype).cpu()}
        if not kept:
            del tensors[f"{name}.weight"]
        return tensors
