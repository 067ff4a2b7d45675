"""Gradients of what the logits decide, at the last layer's output; the logits are computed in chunks."""

from collections.abc import Callable

import torch

from flap_stream.engine.placement.job import chunk_tokens
from flap_stream.engine.streamed_model import StreamedModel

_Slopes = Callable[[slice, torch.Tensor], torch.Tensor]


class HeadGradient:
    """The final norm and the head, loaded once, for hidden states `[token, hidden]` in the dtype of the forward.

    Gradients are float32 `[token, hidden]`.
    """

    def __init__(self, model: StreamedModel) -> None:
        self._skeleton, self._norm, self._head = model.skeleton, model.final_norm(), model.head_weights()
        self._chunk = chunk_tokens(model.vocab_size)

    def of_fisher_draw(self, hidden: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
        """The gradient of logits times `fisher_slopes`, of all tokens but the last. signs: of these tokens."""
        return self._through_norm_and_head(hidden, len(signs), lambda rows, logits: fisher_slopes(logits, signs[rows]))

    def of_divergence(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The gradient of `divergence`."""

        def slopes(rows: slice, logits: torch.Tensor) -> torch.Tensor:
            return torch.softmax(logits, dim=-1).sub_(torch.softmax(self._logits(target[rows]), dim=-1))

        return self._through_norm_and_head(hidden, len(hidden), slopes)

    def divergence(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The summed Kullback-Leibler divergence of the next token's distribution from the target's, float64."""
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for part, wanted in zip(hidden.split(self._chunk), target.split(self._chunk), strict=True):
            found, expected = (torch.log_softmax(self._logits(values), dim=-1) for values in (part, wanted))
            total += (expected.exp() * expected.sub(found)).sum(dim=-1).sum(dtype=torch.float64)
        return total

    @torch.no_grad()
    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._skeleton.outer.logits(self._head, self._norm(hidden)).float()

    def _through_norm_and_head(self, hidden: torch.Tensor, count: int, slopes: _Slopes) -> torch.Tensor:
        """The gradient at the hidden states. slopes: that at the logits of some of the first `count` tokens."""
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            normed = self._norm(leaf)
        gradient = torch.zeros_like(normed, dtype=torch.float32)
        for start in range(0, count, self._chunk):
            rows = slice(start, min(start + self._chunk, count))
            part = normed[rows].detach().requires_grad_()
            with torch.enable_grad():
                logits = self._skeleton.outer.logits(self._head, part)
            gradient[rows] = _propagated(slopes(rows, logits.detach().float()), logits, part)
        return _propagated(gradient, normed, leaf)


def fisher_slopes(logits: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """A draw whose covariance is the Fisher information of the tokens' distributions with respect to logits.

    With p a distribution and e the signs: sqrt(p) e - p sum(sqrt(p) e), whose mean over random signs is 0 and whose
    covariance diag(p) - p p^T. The gradient of the likelihood of a token drawn from p has the same, but varies more,
    and jumps where the logits change by a rounding. logits: float32 `[token, word]`, as is what is returned. signs:
    their bits, uint8 `[token, word / 8]`.
    """
    bits = signs[..., None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8, device=signs.device)).bitwise_and_(1)
    p = torch.softmax(logits, dim=-1)
    found = p.sqrt().mul_(bits.flatten(1)[:, : p.shape[1]].view(torch.int8).mul_(2).sub_(1))
    return found.addcmul_(p, found.sum(dim=-1, keepdim=True), value=-1)


def _propagated(gradient: torch.Tensor, output: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    """The gradient with respect to a leaf, from that with respect to an output; both float32.

    gradient: is overwritten. In between it is scaled by a power of two, so that half precision neither overflows nor
    vanishes.
    """
    ends = torch.stack(gradient.aminmax()).abs().amax()
    shift = torch.frexp(ends).exponent
    down, up = (torch.ldexp(torch.ones_like(ends), by) for by in (-shift, shift))  # ldexp of all would be slow
    (found,) = torch.autograd.grad(output, leaf, gradient.mul_(down).to(output.dtype))
    return found.float().mul_(up)
