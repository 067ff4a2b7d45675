"""Least-squares fit of a sublayer's output projection (o_proj, down_proj) to the inputs that are kept."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from flap_stream.arithmetic.least_squares import (
    DAMPING,
    FOLLOW_SHARE,
    FOLLOW_TOKENS,
    KeptMoments,
    MomentSums,
    product_with_mean,
    solve_for_dense_output,
    solve_for_target,
)
from flap_stream.arithmetic.scoring import ChannelStatistics
from flap_stream.arithmetic.surgery import removed_indices
from flap_stream.engine.hidden_states import Feed, HiddenStates
from flap_stream.engine.memory import give_back_heap
from flap_stream.errors import NonFinite
from flap_stream.restore.pruned_sublayer import PrunedSublayer, size_exponents
from flap_stream.restore.stand_ins import Captures, Supplies

# Least and largest exponent of a token's scale. Their squares times a billion tokens are summed exactly in float64.
_SCALES = (-9, 2)
# Of the mean over all experts' inputs: the least sum of squares that one is expected to have. More tokens may reach an
# expert than in the dense model, which perhaps routed few or none to it.
_LEAST_EXPECTED = 2.0**-8


def residual_scale(config: Any) -> float:
    """What the outputs of attention and MLP are multiplied by when they are added to the hidden states."""
    if hasattr(config, "scale_depth"):
        return float(config.scale_depth / sqrt(config.num_hidden_layers))
    return float(getattr(config, "residual_multiplier", 1.0))


@dataclass(frozen=True)
class OutputProjection:
    """The output projection of a pruned sublayer, with its dense weight `[hidden, channel]` on the device.

    order: int64 `[channel]`, the kept inputs, then the removed ones. kept: how many are kept. exponent: the mean one of
    the dense model's hidden states after the sublayer, where they are the target.
    """

    sublayer: PrunedSublayer
    weight: torch.Tensor
    order: torch.Tensor
    kept: int
    exponent: int = 0

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
        """Run the layer for the inputs: the kept ones are written to the cache.

        To the sums all are added or, where hidden states are the target, the kept ones and what they should give.
        """
        refit = self.sublayer.refit
        captures, dense = Captures(refit.model.hidden_size), None
        if refit.dense is not None and sums is not None:
            dense, ordered = refit.targets(), self.weight[:, self.order]
        for start, entering in self.sublayer.forward({self.name: captures}, keep_output=False):
            inputs = captures.inputs
            kept = inputs[..., : self.kept]
            if cache is not None:
                cache.put(start, kept)
            if dense is not None and sums is not None:
                wanted = dense.take(start, len(inputs))
                output = functional.linear(inputs, ordered, self.sublayer.weights.get(f"{self.name}.bias"))
                target, scales = self._target(output, entering, wanted)
                sums.add(kept.flatten(0, 1), target.flatten(0, 1), scales=scales.flatten())
            elif sums is not None:
                sums.add(inputs.flatten(0, 1))
            del entering  # lest it live while the next batch runs

    def _target(
        self, output: torch.Tensor, entering: torch.Tensor, wanted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the projection should give, float32 `[sample, token, hidden]`, and the roots of the tokens' weights.

        Its dense output and, as far as so many tokens can tell, what still separates that from the dense model's hidden
        states. Every token counts as a share of its square there: some have squares a million times the others'.
        output: the dense output. entering: the pruned model's hidden states before it. wanted: the dense model's after.
        """
        refit = self.sublayer.refit
        missing = wanted.to(torch.float32, copy=True).sub_(entering)
        missing.div_(residual_scale(refit.model.skeleton.hf_config)).sub_(output)
        share = FOLLOW_SHARE * refit.tokens / (refit.tokens + FOLLOW_TOKENS * self.kept)
        scale = (self.exponent - size_exponents(wanted)).clamp_(*_SCALES)
        return missing.mul_(share).add_(output), torch.ldexp(torch.ones(scale.shape, device=scale.device), scale)

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
        refit, ordered = self.sublayer.refit, self._in_order(squares)
        if refit.dense is not None:
            target = squares @ statistics.weight_squared_norm
            ordered = torch.cat([ordered[: self.kept], torch.full((len(self.weight),), float(target)).double()])
        return refit.sums(self.kept, ordered, of_expert)

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
        if refit.dense is not None:
            refitted, bias = solve_for_target(ordered[:, :kept], moments, damping), moments.mean[kept:]
        else:
            refitted = solve_for_dense_output(ordered, moments, damping)
            bias = product_with_mean(ordered, moments.mean) + (0 if old is None else old.double())
        refitted = refitted.to(dtype).contiguous()  # as it is stored
        bias = bias - product_with_mean(refitted, moments.mean[:kept])
        tensors = {f"{name}.weight": refitted.cpu(), f"{name}.bias": bias.to(dtype).cpu()}
        if not kept:
            del tensors[f"{name}.weight"]
        return tensors
