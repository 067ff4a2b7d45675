"""How much the experts of a mixture output, for REAP: norms weighted by the router, while a layer runs.

The score of an expert is the mean, over the tokens routed to it, of its weight times the norm of its output
(Lasby et al. 2025, arXiv 2510.13999, equation 9).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from flap_stream.arithmetic.scoring import ExpertStatistics
from flap_stream.engine.ranks import Ranks
from flap_stream.engine.streamed_model import StreamedModel


class ExpertNorms:
    """Sums over each window's tokens, of the batches that have run.

    Sums are taken window by window, so that neither batches nor ranks change them.
    """

    def __init__(self, ranks: Ranks, experts: int) -> None:
        self._ranks, self._experts = ranks, experts
        self._windows = self._tokens = 0
        self._arguments: tuple[torch.Tensor, ...] = ()
        self._pending: dict[int, torch.Tensor] = {}
        self._found: list[np.ndarray] = []

    def see_layer(self, _module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        """Note the size of a batch that begins, and drop what one that failed has left."""
        self._windows, self._tokens, _ = inputs[0].shape
        self._pending = {}

    def see_experts(self, _module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        """Note where the tokens go."""
        self._arguments = arguments

    def hook(self, number: int) -> Callable[[Any, tuple[torch.Tensor, ...], torch.Tensor], None]:
        """A forward hook that takes the norms of an expert's outputs."""

        def see(_module: Any, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            norms = torch.linalg.vector_norm(output, dim=-1, dtype=torch.float32).double()
            if len(self._arguments) > 1:
                _, index, weight = self._arguments
                token, choice = torch.where(index == number)
                norms = norms * weight[token, choice]
            else:  # the router has weighted the inputs
                rows = self._arguments[0].unflatten(0, (self._experts, -1))[number]
                token = rows.ne(0).any(dim=-1).nonzero()[:, 0]
            of_tokens = norms.new_zeros(2, self._windows * self._tokens)
            of_tokens[:, token] = torch.stack([norms, torch.ones_like(norms)])
            self._pending[number] = of_tokens.unflatten(1, (self._windows, -1)).sum(dim=2)

        return see

    def take_batch(self) -> None:
        """Keep the sums of the batch that has just run."""
        found = np.zeros((2, self._windows, self._experts))
        for number, sums in self._pending.items():
            found[:, :, number] = sums.cpu().numpy()
        self._found.append(found)

    def finish(self) -> ExpertStatistics:
        """The means over the windows of all ranks."""
        own = np.concatenate(self._found or [np.zeros((2, 0, self._experts))], axis=1)
        sums, counts = np.concatenate(self._ranks.gathered(own), axis=1).sum(axis=1)
        return ExpertStatistics(counts.astype(np.int64), sums / np.maximum(counts, 1))


@contextmanager
def expert_norms(model: StreamedModel, index: int) -> Iterator[ExpertNorms]:
    """The norms of what a layer's experts, if it has any, output while it runs in the block."""
    experts = len(model.shapes[index].experts)
    norms = ExpertNorms(model.ranks, experts)
    handles = [model.layers[index].register_forward_pre_hook(norms.see_layer)]
    if experts:
        each = model.skeleton.mixture(index).experts
        handles.append(each.register_forward_pre_hook(norms.see_experts))
        handles += [expert.register_forward_hook(norms.hook(number)) for number, expert in enumerate(each.each)]
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()
