"""Reconstruction: all that a pruned layer keeps is fitted, so that its output comes nearest to the dense model's.

Layer by layer, from what the pruned and reconstructed layers before it output towards the hidden states of the dense
model, by Adam through transformers' own layer; the last layer towards the dense model's distribution of the next token,
through the final norm and the head. No gradient passes through more than one layer. Windows that the fit does not see
decide when it stops and whether it is kept.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from typing import Protocol

import torch

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.layer_shape import Sublayer
from flap_stream.engine.device import is_out_of_memory
from flap_stream.engine.head_gradient import HeadGradient
from flap_stream.engine.wide_attention import wide_attention
from flap_stream.errors import InsufficientMemory
from flap_stream.restore.cut_layer import CutLayer
from flap_stream.restore.refit_pass import RefitPass
from flap_stream.restore.requirements import HELD_OUT, LEARNING_RATE, STEP_TOKENS, epochs

logger = logging.getLogger(__name__)

_WARM_UP = 0.05  # of all steps
_BETAS = (0.9, 0.99)
_TINY = 1e-30


def reconstruct_layer(
    refit: RefitPass,
    index: int,
    weights: Mapping[str, torch.Tensor],
    keep: LayerKeep,
    stored: Mapping[str, torch.Tensor] | None = None,
    is_read: bool = True,
) -> dict[str, torch.Tensor]:
    """Run one layer as pruned; returns all its tensors but routers, fitted. Arguments as of `sublayer.refit_layer`.

    Only rank 0 has windows to fit it to; the others take part in what all ranks do together, and return nothing.
    """
    assert refit.dense is not None, "the dense model's hidden states are the target"
    layer = CutLayer(refit.model, index, weights, keep)
    refit.batches.run_all(index, weights, refit.dense)
    with layer.rerouted():
        found = _Fit(refit, layer).run() if stored is None else dict(stored)
        if is_read:
            refit.batches.run_all(index, layer.whole(found), refit.hidden)
    return found


class _Objective(Protocol):
    """How far a layer's outputs are from the targets, both `[window, token, hidden]`; summed over tokens."""

    def error(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The sum, a scalar."""

    def gradient(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The gradient of the sum, float32 `[window, token, hidden]`."""


class _Squares:
    """The squared error of each token's hidden state, as a share of the target's square."""

    def error(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See `_Objective`."""
        squares, wanted = (values.float().square().mean(dim=-1) for values in (output.float() - target, target))
        return (squares / wanted.clamp_min(_TINY)).sum()

    def gradient(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See `_Objective`."""
        wanted = target.float().square().sum(dim=-1, keepdim=True)
        return (output.float() - target).mul_(2 / wanted.clamp_min(_TINY))


class _Divergence:
    """The Kullback-Leibler divergence of each token's logits."""

    def __init__(self, head: HeadGradient) -> None:
        self._head = head

    def error(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See `_Objective`."""
        return self._head.divergence(output.flatten(0, 1), target.flatten(0, 1))

    def gradient(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See `_Objective`."""
        return self._head.of_divergence(output.flatten(0, 1), target.flatten(0, 1)).view_as(output)


class _Fit:
    """The fit of one layer, whose input is `refit.hidden` and whose target is `refit.dense`."""

    def __init__(self, refit: RefitPass, layer: CutLayer) -> None:
        self._refit, self._layer, self._model = refit, layer, refit.model
        self._masks = layer.masks()
        self._is_last = layer.index + 1 == len(self._model.layers)
        self._objective: _Objective = _Divergence(HeadGradient(self._model)) if self._is_last else _Squares()
        samples, tokens, _ = refit.hidden.shape
        self._passes = epochs(samples * tokens)
        held_out = max(1, samples // HELD_OUT)
        self._fitted, self._held_out = range(samples - held_out), range(samples - held_out, samples)
        self._step = max(1, STEP_TOKENS // tokens)  # windows
        self._at_once = max(n for n in range(1, refit.sizes.first + 1) if self._step % n == 0)

    def run(self) -> dict[str, torch.Tensor]:
        """What is kept of the layer's tensors after the fit; nothing without windows."""
        if not self._refit.hidden.samples:
            return {}
        statistics = self._refit.run.statistics.read(self._layer.index)
        start = self._layer.with_bias({kind: statistics.of(kind).mean for kind in Sublayer})
        kept = self._layer.cut(start)
        with self._named_failures():
            before = best = self._error(kept)
            if before > 0 and self._fitted:
                parameters = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
                del start  # its memory is wanted
                for _ in self._epochs(parameters, before):
                    found = self._layer.cut({name: tensor.detach() for name, tensor in parameters.items()})
                    if not isfinite(error := self._error(found)):
                        break  # it has overflowed, and would go on from there
                    if error < best:
                        best, kept = error, found
                    del found  # lest it live beside the next
        if not isfinite(best):
            raise self._model.non_finite_outputs(self._layer.index)
        what = "divergence of the logits" if self._is_last else "error of the hidden states"
        logger.info("layer %d: held-out %s %.4g, %.4g before the fit", self._layer.index, what, best, before)
        return kept

    def _epochs(self, parameters: Mapping[str, torch.Tensor], scale: float) -> Iterator[None]:
        """Fit the parameters in place; yields after each pass over the windows that are fitted."""
        steps = self._passes * -(-len(self._fitted) // self._step)
        groups = [
            {"params": [tensor], "lr": LEARNING_RATE * _size(parameters, name)} for name, tensor in parameters.items()
        ]
        adam = torch.optim.Adam(groups, betas=_BETAS, fused=True)

        def rate(step: int) -> float:
            return min(1.0, (step + 1) / max(1.0, _WARM_UP * steps)) * (1 - step / steps)

        schedule = torch.optim.lr_scheduler.LambdaLR(adam, rate)
        for _ in range(self._passes):
            waiting = 0
            for start, output, target in self._run(parameters, self._fitted, fits=True):
                gradient = self._objective.gradient(output.detach(), target)
                output.backward(gradient.div_(scale).to(output.dtype))
                waiting += self._at_once
                if waiting == self._step or start + self._at_once >= self._fitted.stop:
                    adam.step()
                    schedule.step()
                    adam.zero_grad()
                    waiting = 0
            yield

    def _error(self, stored: Mapping[str, torch.Tensor]) -> float:
        """The mean error of the held-out windows."""
        outputs = self._run(self._layer.whole(stored), self._held_out, fits=False)
        total = sum(float(self._objective.error(output, target)) for _, output, target in outputs)
        return total / (len(self._held_out) * self._refit.hidden.shape[1])

    def _run(
        self, tensors: Mapping[str, torch.Tensor], windows: range, fits: bool
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """First window of each batch, the layer's output, with its graph if it fits, and the target."""
        model, targets = self._model, self._refit.targets(windows, self._at_once)
        for start, inputs in self._refit.hidden.stream(self._at_once, windows):
            with torch.set_grad_enabled(fits), wide_attention(model.dtype, model.device.type):
                weights = self._weights(tensors) if fits else tensors
                output = model.run_unchecked(self._layer.index, weights, inputs, {})
            yield start, output, targets.take(start, len(inputs))

    @contextmanager
    def _named_failures(self) -> Iterator[None]:
        """Raise InsufficientMemory if the device runs out of it in this block."""
        try:
            yield
        except RuntimeError as failure:
            if not is_out_of_memory(failure):
                raise
            raise InsufficientMemory(
                f"layer {self._layer.index} cannot be fitted on {self._at_once} windows of "
                f"{self._refit.hidden.shape[1]} tokens: the device is out of memory; free some, or give a smaller "
                "--batch-size"
            ) from failure

    def _weights(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All tensors of the layer as it runs, those that are fitted from their float32 parameters."""
        dtype = self._model.dtype
        found = dict(self._layer.weights)
        for name, tensor in parameters.items():
            mask = self._masks.get(name)
            found[name] = (tensor if mask is None else tensor * mask).to(dtype)
        return found


def _size(parameters: Mapping[str, torch.Tensor], name: str) -> float:
    """Root mean square of a tensor; of a linear's bias, that of its weight."""
    weight = parameters.get(f"{name.rpartition('.')[0]}.weight", parameters[name])
    return float(torch.linalg.vector_norm(weight.detach()) / weight.numel() ** 0.5)
