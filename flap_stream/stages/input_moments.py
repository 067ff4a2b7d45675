"""Moments of what a layer's output projections read while it runs, merged over windows and ranks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from flap_stream.arithmetic.moments import Moments, joined_channels, window_moments
from flap_stream.engine.device import HostCopy
from flap_stream.engine.ranks import Ranks
from flap_stream.engine.streamed_model import StreamedModel

# Channels of a rank are a multiple of this, since numpy may sum very few in another order; not measured.
_CHANNEL_BLOCK = 16
# Means and m2s of a batch's windows, float32 [sample, channel], and the number of tokens in each window.
_Windows = tuple[torch.Tensor, torch.Tensor, int]


class MomentMerger:
    """Merges the window moments of a layer's output projections, for every channel in the order of windows.

    Ranks run their windows in parallel, so merging is divided by channels: each rank receives the moments of some
    channels over all windows, and adds them batch by batch as one process would. No operation mixes channels, so every
    sum has the same terms in the same order whatever the number of ranks.
    """

    def __init__(self, ranks: Ranks, channels: Mapping[str, int]) -> None:
        self._ranks, self._channels = ranks, channels
        self._moments = {name: Moments.empty(len(self._own(name, ranks.rank))) for name in channels}
        self._pending: dict[str, _Windows] = {}
        self._coming: dict[str, tuple[HostCopy, HostCopy, int]] = {}  # of one batch, on their way from the device
        self._batches: list[dict[str, _Windows]] = []

    def _own(self, name: str, rank: int) -> range:
        """The channels of a projection that a rank merges, in blocks: numpy might sum very few in another order."""
        count, world = self._channels[name], self._ranks.world
        first, last = (count * part // world // _CHANNEL_BLOCK * _CHANNEL_BLOCK for part in (rank, rank + 1))
        return range(first, count if rank + 1 == world else last)

    def hook(self, name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        """A forward pre-hook that takes the moments of a projection's inputs."""

        def see(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            windows = inputs[0] if inputs[0].ndim == 3 else inputs[0][None]  # an expert's tokens are one window
            means, m2s = window_moments(windows)
            self._pending[name] = (means, m2s, windows.shape[1])

        return see

    def begin_batch(self) -> None:
        """Discard what a batch that failed has left: another is about to run."""
        self._pending = {}

    def take_batch(self) -> None:
        """Add the moments of the batch that has just run.

        On an accelerator they arrive while the next batch runs, and are merged meanwhile.
        """
        before, self._coming = (
            self._coming,
            {name: (HostCopy(means), HostCopy(m2s), tokens) for name, (means, m2s, tokens) in self._pending.items()},
        )
        self._arrived(before)
        on_cpu = all(means.device.type == "cpu" for means, _, _ in self._pending.values())
        self._pending = {}
        if on_cpu:
            self._arrived(self._coming)
            self._coming = {}
        if self._ranks.world == 1:
            self._merge()

    def _arrived(self, coming: Mapping[str, tuple[HostCopy, HostCopy, int]]) -> None:
        """Add what has arrived to the batches to merge."""
        if coming:
            self._batches.append({name: (means.result(), m2s.result(), n) for name, (means, m2s, n) in coming.items()})

    def finish(self) -> dict[str, Moments]:
        """Moments over all windows, by projection."""
        self._arrived(self._coming)
        self._merge()
        parts = self._ranks.gathered(self._moments)
        return {name: joined_channels([part[name] for part in parts]) for name in self._channels}

    def _merge(self) -> None:
        for batches in self._ranks.exchanged([self._columns(rank) for rank in range(self._ranks.world)]):
            for batch in batches:
                for name, (means, m2s, tokens) in batch.items():
                    self._moments[name].add_windows(means, m2s, tokens)
        self._batches = []

    def _columns(self, rank: int) -> list[dict[str, tuple[np.ndarray, np.ndarray, int]]]:
        """The channels that a rank merges, for the windows that ran here."""
        return [
            {
                name: (means.numpy()[:, own.start : own.stop], m2s.numpy()[:, own.start : own.stop], tokens)
                for name, (means, m2s, tokens) in batch.items()
                if len(own := self._own(name, rank)) or rank == 0
            }
            for batch in self._batches
        ]


@contextmanager
def input_moments(model: StreamedModel, index: int, weights: Mapping[str, torch.Tensor]) -> Iterator[MomentMerger]:
    """A merger of the moments of what the layer's output projections read while it runs in the block."""
    names = [part.kind.output.name for part in model.family.parts(model.shapes[index])]
    present = {name: weights[f"{name}.weight"].shape[1] for name in names if f"{name}.weight" in weights}
    merger = MomentMerger(model.ranks, {name: present.get(name, 0) for name in names})
    layer = model.layers[index]
    handles = [layer.get_submodule(name).register_forward_pre_hook(merger.hook(name)) for name in present]
    handles.append(layer.register_forward_pre_hook(lambda _module, _inputs: merger.begin_batch()))
    try:
        yield merger
    finally:
        for handle in handles:
            handle.remove()
