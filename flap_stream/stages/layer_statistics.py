"""The statistics of every decoder layer, collected while the dense model streams by."""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from flap_stream.arithmetic.allocation import keep_in_layer
from flap_stream.arithmetic.moments import Moments, column_norms
from flap_stream.arithmetic.scoring import ChannelStatistics, LayerStatistics, concatenated, wanda_scores
from flap_stream.config import CollectConfig, PlanConfig, part_of
from flap_stream.engine.layer_pass import LayerPass
from flap_stream.engine.memory import page_locked
from flap_stream.engine.placement import landing_bytes
from flap_stream.engine.placement.prediction import Placement
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import CorruptCheckpoint
from flap_stream.progress import Progress, Stage, peak_device_bytes, peak_host_bytes
from flap_stream.stages.block_similarity import BlockSimilarity, block_similarity
from flap_stream.stages.expert_norms import ExpertNorms, expert_norms
from flap_stream.stages.input_moments import input_moments
from flap_stream.stages.loss import keep_inputs
from flap_stream.storage.loss import LossStore
from flap_stream.storage.run_directory import RunDirectory
from flap_stream.storage.statistics import LayerCost


def collect_statistics(
    model: StreamedModel,
    run: RunDirectory,
    options: CollectConfig,
    placement: Placement,
    progress: Progress,
    loss: LossStore | None = None,
) -> None:
    """Collect the statistics of all layers into the run directory, resuming where an earlier call stopped.

    Layers whose statistics are stored are not measured again; they are only run, from the newest snapshot on, to
    produce the next layer's input. All ranks of the model take part, each with its share of the windows; `run` is open
    for writing on rank 0. loss: where to keep the inputs of all layers for the backward sweep; None if there is none.
    """
    first, count = run.statistics.complete_layers(), len(model.layers)
    with progress.stage("collect", count, device=model.device) as stage, torch.inference_mode():
        if first == count:
            stage.skip(count)
            if model.ranks.is_first:
                run.snapshots.drop()  # a kill may have come between the last layer and this
        elif options.method == "magnitude-sp":
            stage.skip(first)
            _collect_norms(model, run, range(first, count), placement.prefetch, stage)
        else:
            _collect_moments(model, run, options, placement, stage, loss)


def _collect_norms(model: StreamedModel, run: RunDirectory, layers: range, prefetch: int, stage: Stage) -> None:
    """Collect statistics of the weights; no layer is run."""
    costs = _Costs(0, model.device)
    with model.stream(layers, prefetch) as streamed:
        for i, weights in streamed:
            if model.ranks.is_first:
                _store(model, run, i, _layer_statistics(model, i, weights, {}), costs)
            stage.advance(bytes_moved=model.layer_bytes(i))


def _collect_moments(
    model: StreamedModel,
    run: RunDirectory,
    options: CollectConfig,
    placement: Placement,
    stage: Stage,
    loss: LossStore | None,
) -> None:
    """Collect statistics of the weights and of what output projections read, while the windows run through."""
    ranks, first, tokens = model.ranks, run.statistics.complete_layers(), run.tokens.read()
    own = ranks.share(len(tokens), placement.batch_size)
    landing = 0 if model.device.type == "cpu" or ranks.world > 1 else landing_bytes(model.shapes, placement.batch_size)
    with (
        model.hidden_states(placement.hidden_place, len(own), tokens.shape[1], run.path) as hidden,
        page_locked(model.device, landing) as memory,
    ):
        batches = LayerPass(
            model,
            placement,
            tokens[own.start : own.stop],
            [hidden],
            stores=[run.snapshots],
            reductions=run.batch_reductions("collect"),
            windows=own,
        )
        collection, costs = _Collection(batches, run, options, memory), _Costs(tokens.size, model.device)
        for i, weights in batches.layers(stage, first, options.snapshot_interval):
            if loss is not None:
                keep_inputs(batches, loss, i)
            if i < first:
                collection.repeat(i, weights)
                costs.of_layer()  # it has been recorded
            else:
                statistics = collection.measure(i, weights)
                if ranks.is_first:
                    _store(model, run, i, statistics, costs)
                if collection.hands_on_pruned:
                    collection.repeat(i, weights)
        if loss is not None:
            keep_inputs(batches, loss, len(model.layers))
        if ranks.is_first:
            run.snapshots.drop()


class _Costs:
    """Measures what each layer takes. tokens: the tokens that run through it, on `device`."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self._tokens, self._device, self._since = tokens, device, time.monotonic()

    def of_layer(self) -> LayerCost:
        """Time since the last call, and the peaks of memory so far."""
        before, self._since = self._since, time.monotonic()
        return LayerCost(self._since - before, self._tokens, peak_host_bytes(), peak_device_bytes(self._device))


def _store(model: StreamedModel, run: RunDirectory, index: int, statistics: LayerStatistics, costs: _Costs) -> None:
    """Store a layer's statistics, unless the model's files changed in the meantime."""
    model.checkpoint.require_unchanged()
    checksum = model.checkpoint.checksum(list(model.layer_entries[index].values()))
    run.statistics.write(index, statistics, checksum, costs.of_layer())


@dataclass(frozen=True)
class _Collection:
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
        found = _layer_statistics(model, index, weights, moments)
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
        for part in model.family.parts(shape):
            removed = part.removed_channels(part.own(keep.of(part.kind.name)), shape)
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


def _layer_statistics(
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
