"""The statistics of one decoder layer as it runs: of its weights, and of what its output projections read."""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from flap_stream.arithmetic.allocation import keep_in_layer
from flap_stream.arithmetic.moments import Moments, column_norms, joined_channels, window_moments
from flap_stream.arithmetic.scoring import ChannelStatistics, LayerStatistics, concatenated, wanda_scores
from flap_stream.config import CollectConfig, PlanConfig, part_of
from flap_stream.engine.device import HostCopy
from flap_stream.engine.layer_pass import LayerPass
from flap_stream.engine.placement import BATCHES_BEHIND
from flap_stream.engine.ranks import Ranks
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import CorruptCheckpoint
from flap_stream.stages.block_similarity import BlockSimilarity, block_similarity
from flap_stream.stages.expert_norms import ExpertNorms, expert_norms
from flap_stream.storage.run_directory import RunDirectory

# Channels that are merged together start at a multiple of this, since numpy may sum very few in another order.
_CHANNEL_BLOCK = 16
# Channels that are merged at once: with 128 windows they stay in cache, which takes a third less time than 22,016.
_MERGED_CHANNELS = 2048
_THREADS = 4  # that merge beside an accelerator; one keeps up with a disk of 2 GB/s
# Means and m2s of a batch's windows, float32 [sample, channel], and the number of tokens in each window.
_Windows = tuple[torch.Tensor, torch.Tensor, int]
_Copies = tuple[HostCopy, HostCopy, int]


@dataclass(frozen=True)
class Collection:
    """The windows on their way through the layers, and what is measured in each. landing: see `MomentMerger`."""

    batches: LayerPass
    run: RunDirectory
    options: CollectConfig
    landing: torch.Tensor

    @property
    def hands_on_pruned(self) -> bool:
        """Whether a layer's pruned output feeds the next, which takes a second run of the layer."""
        return self.options.method == "wanda-sp"

    def measure(self, index: int, weights: Mapping[str, torch.Tensor]) -> LayerStatistics:
        """Run a layer; return the statistics of what its output projections read, over the windows of all ranks."""
        model = self.batches.model
        with input_moments(model, index, weights, self.landing) as merger, self._beside(index) as beside:
            for _start, output in self.batches.run(index, weights, keep_output=not self.hands_on_pruned):
                del output  # lest it live while the next batch runs
                merger.take_batch()
                if beside is not None:
                    beside.take_batch()
        moments = merger.finish()
        _require_same_on_all_machines(model, index)
        found = layer_statistics(model, index, weights, moments)
        if isinstance(beside, ExpertNorms):
            return replace(found, experts=beside.finish())
        return found if beside is None else replace(found, block=beside.finish())

    def _beside(self, index: int) -> AbstractContextManager[ExpertNorms | BlockSimilarity | None]:
        """What the method needs to know of a layer that runs in the block, besides what output projections read."""
        if self.options.method == "reap":
            return expert_norms(self.batches.model, index)
        if self.options.method == "shortgpt":
            return block_similarity(self.batches.model, index, len(self.batches.tokens))
        return nullcontext()

    def repeat(self, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Run a measured layer to feed the next one; for wanda-sp pruned, its removed channels set to zero."""
        if self.hands_on_pruned:
            self.batches.step = (index, 1)
            self._zero_removed(index, weights)
        self.batches.run_all(index, weights)

    def _zero_removed(self, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        model, decision = self.batches.model, part_of(self.options, PlanConfig)
        shape = model.shapes[index]
        channels = shape.heads_per_group * shape.head_dim
        keep = model.ranks.from_first(
            lambda: keep_in_layer(wanda_scores(self.run.statistics.read(index), channels), shape, decision)
        )
        for part, units in model.family.kept_parts(shape, keep):
            removed = part.removed_channels(units, shape)
            if len(removed):
                weights[f"{part.kind.output.name}.weight"][:, torch.from_numpy(removed).to(model.device)] = 0


def _require_same_on_all_machines(model: StreamedModel, index: int) -> None:
    """Raise CorruptCheckpoint if machines read different bytes of a layer."""
    ranks, entries = model.ranks, list(model.layer_entries[index].values())
    checksum = model.checkpoint.checksum(entries) if ranks.leads_node else None
    if len({found for found in ranks.gathered(checksum) if found is not None}) > 1:
        raise CorruptCheckpoint(
            f"layer {index} of {model.checkpoint.source} differs between machines; "
            "give all machines the same files and run the same command again"
        )


def layer_statistics(
    model: StreamedModel, index: int, weights: Mapping[str, torch.Tensor], moments: Mapping[str, Moments]
) -> LayerStatistics:
    """Moments and norms of the weights combined, experts one after another; without moments, counts are 0."""
    found: dict[str, list[ChannelStatistics]] = {"attention": [], "mlp": []}
    for part in model.family.parts(model.shapes[index]):
        name = part.kind.output.name
        found[part.kind.name].append(_channel_statistics(weights.get(f"{name}.weight"), moments.get(name)))
    attention, mlp = (concatenated(parts or [_channel_statistics(None, None)]) for parts in found.values())
    return LayerStatistics(attention, mlp)


def _channel_statistics(weight: torch.Tensor | None, moments: Moments | None) -> ChannelStatistics:
    """Of one output projection. weight: None if the layer does not have it."""
    channels = 0 if weight is None else weight.shape[1]
    squared, absolute = (np.zeros(0), np.zeros(0)) if weight is None else column_norms(weight)
    own = vars(Moments.empty(channels) if moments is None else moments)
    norms: dict[str, Any] = {"weight_squared_norm": squared, "weight_abs_mean": absolute}
    count = np.full(channels, own["count"], dtype=np.int64)
    return ChannelStatistics(**{**own, **norms, "count": count})


class MomentMerger:
    """Merges the window moments of a layer's output projections, for every channel in the order of windows.

    Ranks run their windows in parallel, so merging is divided by channels: each rank receives the moments of some
    channels over all windows, and adds them batch by batch as one process would. No operation mixes channels, so every
    sum has the same terms in the same order whatever the number of ranks, or of threads: beside an accelerator, groups
    of channels are merged by several while the next batches run.
    """

    def __init__(
        self, ranks: Ranks, channels: Mapping[str, int], device: torch.device, landing: torch.Tensor | None = None
    ) -> None:
        """landing: of `placement.landing_bytes`, page-locked; None takes memory from torch, which keeps it."""
        self._ranks, self._channels = ranks, channels
        self._pending: dict[str, _Windows] = {}
        self._batches: list[dict[str, _Copies]] = []  # with several ranks, until they are exchanged
        threads = 0 if device.type == "cpu" else min(_THREADS, os.cpu_count() or 1)
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="merge") for _ in range(threads)]
        threads_in_turn = itertools.cycle(self._threads or [None])
        # By projection, groups of the own channels; a group's batches go to one thread, and so stay in order.
        self._groups = {
            name: [
                (Moments.empty(len(columns)), columns, next(threads_in_turn))
                for columns in _divided(len(self._own(name, ranks.rank)))
            ]
            for name in channels
        }
        self._behind: deque[list[Future[None]]] = deque()
        self._landing = None if landing is None or not len(landing) else landing.view(1 + BATCHES_BEHIND, -1)
        self._turns = itertools.count()

    def _own(self, name: str, rank: int) -> range:
        """The channels of a projection that a rank merges."""
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

        On an accelerator they arrive, and are merged, while the next batches run.
        """
        while len(self._behind) >= BATCHES_BEHIND:
            self._wait()
        turn, at, batch = next(self._turns), 0, dict[str, _Copies]()
        for name, (means, m2s, tokens) in self._pending.items():
            into = [None, None] if self._landing is None else _places(self._landing, turn, at, means)
            batch[name] = (HostCopy(means, into[0]), HostCopy(m2s, into[1]), tokens)
            at += 2 * means.nbytes
        self._pending = {}
        if self._ranks.world > 1:
            self._batches.append(batch)
        else:
            self._add(batch)

    def _add(self, batch: Mapping[str, _Copies]) -> None:
        """Add one batch, of all windows or their own channels."""
        adding = list[Future[None]]()
        for name, copies in batch.items():  # of experts only those that got tokens
            for moments, columns, thread in self._groups[name]:
                if thread is None:
                    _add_windows(moments, columns, copies)
                else:
                    adding.append(thread.submit(_add_windows, moments, columns, copies))
        if adding:
            self._behind.append(adding)

    def _wait(self) -> None:
        for added in self._behind.popleft():
            added.result()

    def finish(self) -> dict[str, Moments]:
        """Moments over all windows, by projection."""
        if self._ranks.world > 1:
            self._exchange()
        while self._behind:
            self._wait()
        own = {name: joined_channels([moments for moments, _, _ in groups]) for name, groups in self._groups.items()}
        parts = self._ranks.gathered(own)
        return {name: joined_channels([part[name] for part in parts]) for name in self._channels}

    def _exchange(self) -> None:
        """Give every rank its channels of all windows, and add them."""
        for batches in self._ranks.exchanged([self._columns(rank) for rank in range(self._ranks.world)]):
            for batch in batches:
                for name, (means, m2s, tokens) in batch.items():
                    for moments, columns, _ in self._groups[name]:
                        own = slice(columns.start, columns.stop)
                        moments.add_windows(means[:, own], m2s[:, own], tokens)
        self._batches = []

    def _columns(self, rank: int) -> list[dict[str, tuple[np.ndarray, np.ndarray, int]]]:
        """The channels that a rank merges, for the windows that ran here."""
        return [
            {
                name: (_columns_of(means, own), _columns_of(m2s, own), tokens)
                for name, (means, m2s, tokens) in batch.items()
                if len(own := self._own(name, rank)) or rank == 0
            }
            for batch in self._batches
        ]

    def close(self) -> None:
        """End the threads, once they have added what they were given."""
        for thread in self._threads:
            thread.shutdown()


def _divided(channels: int) -> list[range]:
    """Groups of channels that are merged at once, of about the same size."""
    count = -(-channels // _MERGED_CHANNELS) or 1
    starts = [channels * i // count // _CHANNEL_BLOCK * _CHANNEL_BLOCK for i in range(count)]
    return [range(*ends) for ends in zip(starts, [*starts[1:], channels], strict=True)]


def _places(landing: torch.Tensor, turn: int, at: int, like: torch.Tensor) -> list[torch.Tensor | None]:
    """Where means and m2s of a projection go: from byte `at` of a batch's part of the memory on."""
    slot, size = landing[turn % len(landing)], like.nbytes
    return [slot[first : first + size].view(like.dtype).view(like.shape) for first in (at, at + size)]


def _columns_of(values: HostCopy, columns: range) -> np.ndarray:
    return values.result().numpy()[:, columns.start : columns.stop]


def _add_windows(moments: Moments, columns: range, copies: _Copies) -> None:
    means, m2s, tokens = copies
    moments.add_windows(_columns_of(means, columns), _columns_of(m2s, columns), tokens)


@contextmanager
def input_moments(
    model: StreamedModel, index: int, weights: Mapping[str, torch.Tensor], landing: torch.Tensor | None = None
) -> Iterator[MomentMerger]:
    """A merger of the moments of what the layer's output projections read while it runs in the block.

    landing: see `MomentMerger`.
    """
    names = [part.kind.output.name for part in model.family.parts(model.shapes[index])]
    present = {name: weights[f"{name}.weight"].shape[1] for name in names if f"{name}.weight" in weights}
    merger = MomentMerger(model.ranks, {name: present.get(name, 0) for name in names}, model.device, landing)
    layer = model.layers[index]
    handles = [layer.get_submodule(name).register_forward_pre_hook(merger.hook(name)) for name in present]
    handles.append(layer.register_forward_pre_hook(lambda _module, _inputs: merger.begin_batch()))
    try:
        yield merger
    finally:
        for handle in handles:
            handle.remove()
        merger.close()
