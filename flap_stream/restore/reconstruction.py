"""Reconstruction: all that a pruned layer keeps is fitted, so that its output comes nearest to the dense model's.

Layer by layer, from what the pruned and reconstructed layers before it output towards the hidden states of the dense
model, by Adam through transformers' own layer. The model's loss is not used, and no gradient passes through more than
one layer. Windows that the fit does not see decide when it stops and whether it is kept.
"""

import logging
from collections.abc import Iterator, Mapping

import torch

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.layer_shape import Sublayer
from flap_stream.engine.device import is_out_of_memory
from flap_stream.engine.wide_attention import wide_attention
from flap_stream.errors import InsufficientMemory
from flap_stream.restore.cut_layer import CutLayer
from flap_stream.restore.refit_pass import RefitPass
from flap_stream.restore.requirements import EPOCHS, HELD_OUT, LEARNING_RATE, STEP_TOKENS

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
    """Run one layer as pruned; returns all its tensors but routers, fitted. Arguments as of `sublayer.refit_layer`."""
    assert refit.dense is not None, "the dense model's hidden states are the target"
    layer = CutLayer(refit.model, index, weights, keep)
    refit.batches.run_all(index, weights, refit.dense)
    found = _Fit(refit, layer).run() if stored is None else dict(stored)
    if is_read:
        refit.batches.run_all(index, layer.whole(found), refit.hidden)
    return found


class _Fit:
    """The fit of one layer, whose input is `refit.hidden` and whose target is `refit.dense`."""

    def __init__(self, refit: RefitPass, layer: CutLayer) -> None:
        self._refit, self._layer, self._model = refit, layer, refit.model
        self._masks = layer.masks()
        samples, tokens, _ = refit.hidden.shape
        held_out = max(1, samples // HELD_OUT)
        self._fitted, self._held_out = range(samples - held_out), range(samples - held_out, samples)
        self._step = max(1, STEP_TOKENS // tokens)  # windows
        self._at_once = min(self._step, refit.sizes.first)

    def run(self) -> dict[str, torch.Tensor]:
        """What is kept of the layer's tensors after the fit."""
        statistics = self._refit.run.statistics.read(self._layer.index)
        start = self._layer.with_bias({kind: statistics.of(kind).mean for kind in Sublayer})
        kept = self._layer.cut(start)
        before = best = self._error(kept)
        if before > 0 and self._fitted:
            parameters = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
            del start  # its memory is wanted
            for _ in self._epochs(parameters, before):
                found = self._layer.cut({name: tensor.detach() for name, tensor in parameters.items()})
                if (error := self._error(found)) < best:
                    best, kept = error, found
        logger.info("layer %d: held-out error %.4g of the target, %.4g before the fit", self._layer.index, best, before)
        return kept

    def _epochs(self, parameters: Mapping[str, torch.Tensor], scale: float) -> Iterator[None]:
        """Fit the parameters in place; yields after each pass over the windows that are fitted."""
        steps = EPOCHS * -(-len(self._fitted) // self._step)
        groups = [
            {"params": [tensor], "lr": LEARNING_RATE * _size(parameters, name)} for name, tensor in parameters.items()
        ]
        adam = torch.optim.Adam(groups, betas=_BETAS, fused=True)

        def rate(step: int) -> float:
            return min(1.0, (step + 1) / max(1.0, _WARM_UP * steps)) * (1 - step / steps)

        schedule = torch.optim.lr_scheduler.LambdaLR(adam, rate)
        for _ in range(EPOCHS):
            waiting = 0
            for start, error in self._errors(parameters, self._fitted, fits=True):
                error.backward(torch.full_like(error, 1 / scale))
                waiting += self._at_once
                if waiting >= self._step or start + self._at_once >= self._fitted.stop:
                    adam.step()
                    schedule.step()
                    adam.zero_grad()
                    waiting = 0
            yield

    def _error(self, stored: Mapping[str, torch.Tensor]) -> float:
        """The mean error of the held-out windows."""
        whole = self._layer.whole(stored)
        total = sum(float(error) for _, error in self._errors(whole, self._held_out, fits=False))
        return total / (len(self._held_out) * self._refit.hidden.shape[1])

    def _errors(
        self, tensors: Mapping[str, torch.Tensor], windows: range, fits: bool
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """First window of each batch, and its error summed over tokens: squared, as a share of the target's square."""
        model, targets = self._model, self._refit.targets(windows, self._at_once)
        for start, inputs in self._refit.hidden.stream(self._at_once, windows):
            wanted = targets.take(start, len(inputs)).float()
            try:
                with torch.set_grad_enabled(fits), wide_attention(model.dtype, model.device.type):
                    output = model.run_batch(self._layer.index, self._weights(tensors) if fits else tensors, inputs, {})
                    squares = (output.float() - wanted).square().mean(dim=-1)
                    error = (squares / wanted.square().mean(dim=-1).clamp_min(_TINY)).sum()
            except RuntimeError as failure:
                if not is_out_of_memory(failure):
                    raise
                raise InsufficientMemory(
                    f"layer {self._layer.index} cannot be fitted on {len(inputs)} windows of {inputs.shape[1]} tokens: "
                    "the device is out of memory; free some, or give a smaller --batch-size"
                ) from failure
            yield start, error

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
