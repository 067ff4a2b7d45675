"""Pass 1: every decoder layer's statistics, taken while the dense model streams by."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flap_stream.allocation import keep_in_layer
from flap_stream.config import CollectConfig, PlanConfig, part_of
from flap_stream.errors import CorruptCheckpoint
from flap_stream.hidden_states import HiddenStates
from flap_stream.layers import BatchSizes, StreamedModel
from flap_stream.moments import Moments, column_norms, joined_channels, window_moments
from flap_stream.planner import Placement
from flap_stream.progress import Progress, peak_device_bytes, peak_host_bytes
from flap_stream.ranks import Ranks
from flap_stream.scoring import ChannelStatistics, LayerStatistics, concatenated, wanda_scores
from flap_stream.snapshots import Snapshots, resume
from flap_stream.store import LayerCost, RunDirectory
from flap_stream.surgery import removed_indices

_CHANNEL_BLOCK = 16
# Means and m2s of a batch's windows, float32 [sample, channel], and the tokens of each.
_Windows = tuple[torch.Tensor, torch.Tensor, int]


def collect_statistics(
    model: StreamedModel, run: RunDirectory, options: CollectConfig, placement: Placement, progress: Progress
) -> None:
    """Bring the statistics of all layers into the run directory, going on where an earlier run stopped.

    Layers whose statistics are stored are not measured again; they are only run, from the newest snapshot on, to
    give the next layer its input. All ranks of the model do this together, each on its share of the windows; `run`
    is open for writing on the first.
    """
    ranks = model.ranks
    first = run.complete_layers()
    count = len(model.layers)
    if first == count:
        with progress.stage("collect", count) as stage:
            stage.skip(count)
        if ranks.is_first:
            run.snapshots.drop()  # a kill may have come between the last layer and this
        return
    with progress.stage("collect", count, device=model.device) as stage, torch.inference_mode(), ExitStack() as stack:
        if options.method == "magnitude-sp":
            stage.skip(first)
            costs = _Costs(0, model.device)
            for i, weights in model.stream(first, placement.prefetch):
                if ranks.is_first:
                    _store(model, run, i, _layer_statistics(model, i, weights, {}), costs)
                stage.advance(bytes_moved=model.layer_bytes(i))
            return
        tokens = run.read_tokens()
        own = ranks.share(len(tokens), placement.batch_size)
        hidden = stack.enter_context(model.hidden_states(placement.hidden_place, len(own), tokens.shape[1], run.path))
        kept = [(run.snapshots, hidden)]
        start = resume(model, kept, tokens[own.start : own.stop], placement.batch_size, first)
        stage.skip(start, recorded=first)
        sizes, costs = BatchSizes(placement.batch_size, run.batch_reductions(), own), _Costs(tokens.size, model.device)
        layers = _Pass1(model, run, hidden, sizes, options, costs)
        snapshots = Snapshots(kept, options.snapshot_interval, ranks)
        for i, weights in model.stream(start, placement.prefetch):
            if i < first:
                layers.repeat(i, weights)
                costs.of_layer()  # it has been recorded
            else:
                layers.measure(i, weights)
            if i + 1 < count:
                snapshots.layer_done(i + 1)
            stage.advance(tokens=tokens.size, bytes_moved=model.layer_bytes(i))
        if ranks.is_first:
            run.snapshots.drop()


class _Costs:
    """Tells what each layer took. tokens: that run through every one, on `device`."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self._tokens, self._device, self._since = tokens, device, time.monotonic()

    def of_layer(self) -> LayerCost:
        """What was taken since the last call."""
        before, self._since = self._since, time.monotonic()
        return LayerCost(self._since - before, self._tokens, peak_host_bytes(), peak_device_bytes(self._device))


def _store(model: StreamedModel, run: RunDirectory, index: int, statistics: LayerStatistics, costs: _Costs) -> None:
    """Record a layer, unless the model's files were changed while it was taken."""
    model.checkpoint.require_unchanged()
    checksum = model.checkpoint.checksum(list(model.layer_entries[index].values()))
    run.write_statistics(index, statistics, checksum, costs.of_layer())


@dataclass(frozen=True)
class _Pass1:
    """The hidden states on their way through the layers."""

    model: StreamedModel
    run: RunDirectory
    hidden: HiddenStates
    sizes: BatchSizes
    options: CollectConfig
    costs: _Costs

    @property
    def _hands_on_pruned(self) -> bool:
        return self.options.method == "wanda-sp"

    def measure(self, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Run a layer, store the moments of what its output projections read, and hand its output on."""
        ranks = self.model.ranks
        with _input_moments(self.model, index, weights) as merger:
            self._forward(
                index,
                weights,
                step=2 * index,
                keep_output=not self._hands_on_pruned,
                before_batch=merger.begin_batch,
                after_batch=merger.take_batch,
            )
        moments = merger.finish()
        entries = list(self.model.layer_entries[index].values())
        checksum = self.model.checkpoint.checksum(entries) if ranks.leads_node else None
        checksums = {found for found in ranks.gathered(checksum) if found is not None}
        if len(checksums) > 1:
            raise CorruptCheckpoint(
                f"layer {index} of {self.model.checkpoint.source} has other bytes on one machine than on another; "
                "give all machines the same files and run the same command again"
            )
        if ranks.is_first:
            _store(self.model, self.run, index, _layer_statistics(self.model, index, weights, moments), self.costs)
        if self._hands_on_pruned:
            self.repeat(index, weights)

    def repeat(self, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Hand on the output of a layer that has been measured; of Wanda-sp, as pruned: what goes gives nothing."""
        if self._hands_on_pruned:
            shape, decision = self.model.shapes[index], part_of(self.options, PlanConfig)
            channels = shape.heads_per_group * shape.head_dim
            keep = self.model.ranks.from_first(
                lambda: keep_in_layer(wanda_scores(self.run.read_statistics(index), channels), shape, decision)
            )
            for part in self.model.family.parts(shape):
                output = part.kind.output
                kept = output.kept_indices(part.own(keep.of(part.kind.name)), part.units, shape)
                removed = removed_indices(kept, output.size(part.units, shape))
                if len(removed):
                    weights[f"{output.name}.weight"][:, torch.from_numpy(removed).to(self.model.device)] = 0
        self._forward(index, weights, step=2 * index + self._hands_on_pruned)

    def _forward(self, index: int, weights: Mapping[str, torch.Tensor], **how: Any) -> None:
        self.model.forward_layer(index, weights, self.hidden, self.sizes, **how)
        for reduction in self.sizes.agree(self.model.ranks):
            if self.model.ranks.is_first:
                self.run.record_batch_reduction(*reduction)


def _layer_statistics(
    model: StreamedModel, index: int, weights: Mapping[str, torch.Tensor], moments: Mapping[str, Moments]
) -> LayerStatistics:
    """Moments and the norms of the weights together, experts one after another; without moments, counts are 0."""
    found: dict[str, list[ChannelStatistics]] = {"attention": [], "mlp": []}
    for part in model.family.parts(model.shapes[index]):
        weight = weights.get(f"{part.kind.output.name}.weight")
        channels = 0 if weight is None else weight.shape[1]
        squared, absolute = (np.zeros(0), np.zeros(0)) if weight is None else column_norms(weight)
        own = vars(moments.get(part.kind.output.name, Moments.empty(channels)))
        norms: dict[str, Any] = {"weight_squared_norm": squared, "weight_abs_mean": absolute}
        count = np.full(channels, own["count"], dtype=np.int64)
        found[part.kind.name].append(ChannelStatistics(**{**own, **norms, "count": count}))
    return LayerStatistics(**{kind: concatenated(parts) for kind, parts in found.items()})


class _Merger:
    """Merges the window moments of a layer's output projections: those of every channel in the order of windows.

    Ranks run their windows side by side, so the merging is divided by channels: each rank gets the moments of some of
    them, of all windows, and adds them batch by batch as one process would. No operation mixes channels; so every sum
    has the same terms in the same order, whatever the number of ranks.
    """

    def __init__(self, ranks: Ranks, channels: Mapping[str, int]) -> None:
        self._ranks, self._channels = ranks, channels
        self._moments = {name: Moments.empty(len(self._own(name, ranks.rank))) for name in channels}
        self._pending: dict[str, _Windows] = {}
        self._batches: list[dict[str, _Windows]] = []

    def _own(self, name: str, rank: int) -> range:
        """The channels of a projection that a rank merges; not very few, which numpy might sum in another order."""
        count, world = self._channels[name], self._ranks.world
        first, last = (count * part // world // _CHANNEL_BLOCK * _CHANNEL_BLOCK for part in (rank, rank + 1))
        return range(first, count if rank + 1 == world else last)

    def hook(self, name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        """What sees the inputs of a projection."""

        def see(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            windows = inputs[0] if inputs[0].ndim == 3 else inputs[0][None]  # an expert's tokens are one window
            means, m2s = window_moments(windows)
            self._pending[name] = (means, m2s, windows.shape[1])

        return see

    def begin_batch(self, _start: int, _windows: int) -> None:
        """A batch is about to run: what one that failed has left does not count."""
        self._pending = {}

    def take_batch(self, _start: int, _output: torch.Tensor) -> None:
        """A batch has run."""
        on_host = {name: (means.cpu(), m2s.cpu(), tokens) for name, (means, m2s, tokens) in self._pending.items()}
        self._batches.append(on_host)
        self._pending = {}
        if self._ranks.world == 1:
            self._merge()

    def finish(self) -> dict[str, Moments]:
        """Moments of all windows, by projection."""
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
        """The channels that a rank merges, of the windows that have run here."""
        return [
            {
                name: (means.numpy()[:, own.start : own.stop], m2s.numpy()[:, own.start : own.stop], tokens)
                for name, (means, m2s, tokens) in batch.items()
                if len(own := self._own(name, rank)) or rank == 0
            }
            for batch in self._batches
        ]


@contextmanager
def _input_moments(model: StreamedModel, index: int, weights: Mapping[str, torch.Tensor]) -> Iterator[_Merger]:
    """What takes the moments of the inputs of the layer's output projections while it runs."""
    names = [part.kind.output.name for part in model.family.parts(model.shapes[index])]
    present = {name: weights[f"{name}.weight"].shape[1] for name in names if f"{name}.weight" in weights}
    merger = _Merger(model.ranks, {name: present.get(name, 0) for name in names})
    handles = [model.layers[index].get_submodule(name).register_forward_pre_hook(merger.hook(name)) for name in present]
    try:
        yield merger
    finally:
        for handle in handles:
            handle.remove()
