"""Gradients of what the logits decide, at the last layer's output; the logits are computed in chunks."""

from collections.abc import Callable

import torch

from flap_stream.engine.placement.job import chunk_tokens
from flap_stream.engine.streamed_model import StreamedModel

_Slopes = Callable[[slice, torch.Tensor], torch.Tensor]
_BLOCK = 256  # words of the vocabulary


class HeadGradient:
    """The final norm and the head, loaded once, for hidden states `[token, hidden]` in the dtype of the forward.

    Gradients are float32 `[token, hidden]`.
    """

    def __init__(self, model: StreamedModel) -> None:
        self._skeleton, self._norm, self._head = model.skeleton, model.final_norm(), model.head_weights()
        self._chunk = chunk_tokens(model.vocab_size)

    def of_drawn_tokens(self, hidden: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """The gradient of the summed negative log-likelihoods of tokens that the model draws, see `drawn`.

        draws: of the tokens that follow all but the last, float64 `[token - 1]`.
        """

        def slopes(rows: slice, logits: torch.Tensor) -> torch.Tensor:
            found = torch.softmax(logits, dim=-1)
            tokens = drawn(found, draws[rows])
            found[torch.arange(len(tokens), device=found.device), tokens] -= 1
            return found

        return self._propagated(hidden, len(draws), slopes)

    def of_divergence(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The gradient of `divergence`."""

        def slopes(rows: slice, logits: torch.Tensor) -> torch.Tensor:
            return torch.softmax(logits, dim=-1).sub_(torch.softmax(self._logits(target[rows]), dim=-1))

        return self._propagated(hidden, len(hidden), slopes)

    def divergence(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The summed Kullback-Leibler divergence of the next token's distribution from the target's, float64."""
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for part, wanted in zip(hidden.split(self._chunk), target.split(self._chunk), strict=True):
            found, expected = (torch.log_softmax(self._logits(values), dim=-1) for values in (part, wanted))
            total += (expected.exp() * expected.sub(found)).sum(dim=-1).sum(dtype=torch.float64)
        return total

    @torch.no_grad()
    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._skeleton.logits(self._head, self._norm(hidden)).float()

    def _propagated(self, hidden: torch.Tensor, count: int, slopes: _Slopes) -> torch.Tensor:
        """The gradient at the hidden states. slopes: that at the logits of some of the first `count` tokens."""
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            normed = self._norm(leaf)
        gradient = torch.zeros_like(normed, dtype=torch.float32)
        for start in range(0, count, self._chunk):
            rows = slice(start, min(start + self._chunk, count))
            part = normed[rows].detach().requires_grad_()
            with torch.enable_grad():
                logits = self._skeleton.logits(self._head, part)
            gradient[rows] = _propagated(slopes(rows, logits.detach().float()), logits, part)
        return _propagated(gradient, normed, leaf)


def drawn(probabilities: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """A token from each distribution, int64 `[row]`: the first whose cumulated probability exceeds the draw.

    probabilities: float32 `[row, token]`. draws: uniform in [0, 1), float64 `[row]`. Cumulative sums are products with
    a triangle of ones, in float64: the same in every run on a device, which those of torch need not be.
    """
    width, device = probabilities.shape[1], probabilities.device
    whole = probabilities[:, : width - width % _BLOCK].unflatten(1, (-1, _BLOCK)).sum(dim=2, dtype=torch.float64)
    rest = probabilities[:, width - width % _BLOCK :].sum(dim=1, keepdim=True, dtype=torch.float64)
    ends = _cumulated(torch.cat([whole, rest], dim=1))
    wanted = draws[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, wanted, right=True).clamp_max_(whole.shape[1])
    columns = block * _BLOCK + torch.arange(_BLOCK, device=device)
    own = probabilities.gather(1, columns.clamp_max(width - 1)).double().mul_(columns < width)
    before = torch.cat([torch.zeros_like(wanted), ends], dim=1).gather(1, block)
    token = torch.searchsorted(_cumulated(own), wanted - before, right=True).clamp_max_(_BLOCK - 1)
    return (block * _BLOCK + token)[:, 0].clamp_max_(width - 1)


def _cumulated(values: torch.Tensor) -> torch.Tensor:
    """Cumulative sums of each row."""
    return values @ torch.ones(values.shape[1], values.shape[1], dtype=values.dtype, device=values.device).triu()


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
