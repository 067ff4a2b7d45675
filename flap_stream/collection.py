"""Pass 1: every decoder layer's statistics, taken while the dense model streams by."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flap_stream.allocation import keep_in_layer
from flap_stream.config import CollectConfig, PlanConfig, part_of
from flap_stream.hidden_states import HiddenStates
from flap_stream.layers import BatchSizes, StreamedModel
from flap_stream.moments import Moments, column_norms, window_moments
from flap_stream.planner import Placement
from flap_stream.progress import Progress, peak_device_bytes, peak_host_bytes
from flap_stream.scoring import ChannelStatistics, LayerStatistics, concatenated, wanda_scores
from flap_stream.snapshots import Snapshots, resume
from flap_stream.store import LayerCost, RunDirectory
from flap_stream.surgery import removed_indices


def collect_statistics(
    model: StreamedModel, run: RunDirectory, options: CollectConfig, placement: Placement, progress: Progress
) -> None:
    """Bring the statistics of all layers into the run directory, going on where an earlier run stopped.

    Layers whose statistics are stored are not measured again; they are only run, from the newest snapshot on, to
    give the next layer its input.
    """
    first = run.complete_layers()
    count = len(model.layers)
    if first == count:
        run.snapshots.drop()  # a kill may have come between the last layer and this
        return
    with progress.stage("collect", count) as stage, torch.inference_mode(), ExitStack() as stack:
        if options.method == "magnitude-sp":
            stage.skip(first)
            costs = _Costs(tokens=0)
            for i, weights in model.stream(first, placement.prefetch):
                _store(model, run, i, _layer_statistics(model, i, weights, {}), costs)
                stage.advance(bytes_moved=model.layer_bytes(i))
            return
        tokens = run.read_tokens()
        hidden = stack.enter_context(
            model.hidden_states(placement.hidden_place, len(tokens), tokens.shape[1], run.path)
        )
        kept = [(run.snapshots, hidden)]
        start = resume(model, kept, tokens, placement.batch_size, first)
        stage.skip(start)
        sizes = BatchSizes(placement.batch_size, run.batch_reductions(), run.record_batch_reduction)
        layers = _Pass1(model, hidden, sizes, options)
        snapshots, costs = Snapshots(kept, options.snapshot_interval), _Costs(tokens.size)
        for i, weights in model.stream(start, placement.prefetch):
            if i < first:
                layers.repeat(i, weights, run.read_statistics(i))
                costs.of_layer()  # it has been recorded
            else:
                _store(model, run, i, layers.measure(i, weights), costs)
            if i + 1 < count:
                snapshots.layer_done(i + 1)
            stage.advance(tokens=tokens.size, bytes_moved=model.layer_bytes(i))
        run.snapshots.drop()


class _Costs:
    """Tells what each layer took. tokens: that run through every one."""

    def __init__(self, tokens: int) -> None:
        self._tokens, self._since = tokens, time.monotonic()

    def of_layer(self) -> LayerCost:
        """What was taken since the last call."""
        before, self._since = self._since, time.monotonic()
        return LayerCost(self._since - before, self._tokens, peak_host_bytes(), peak_device_bytes())


def _store(model: StreamedModel, run: RunDirectory, index: int, statistics: LayerStatistics, costs: _Costs) -> None:
    """Record a layer, unless the model's files were changed while it was taken."""
    model.checkpoint.require_unchanged()
    checksum = model.checkpoint.checksum(list(model.layer_entries[index].values()))
    run.write_statistics(index, statistics, checksum, costs.of_layer())


@dataclass(frozen=True)
class _Pass1:
    """The hidden states on their way through the layers."""

    model: StreamedModel
    hidden: HiddenStates
    sizes: BatchSizes
    options: CollectConfig

    @property
    def _hands_on_pruned(self) -> bool:
        return self.options.method == "wanda-sp"

    def measure(self, index: int, weights: Mapping[str, torch.Tensor]) -> LayerStatistics:
        """Run a layer, take the moments of what its output projections read, and hand its output on."""
        with _input_moments(self.model, index, weights) as (moments, merge_batch):
            self._forward(
                index, weights, step=2 * index, keep_output=not self._hands_on_pruned, after_batch=merge_batch
            )
        statistics = _layer_statistics(self.model, index, weights, moments)
        if self._hands_on_pruned:
            self.repeat(index, weights, statistics)
        return statistics

    def repeat(self, index: int, weights: Mapping[str, torch.Tensor], statistics: LayerStatistics) -> None:
        """Hand on the output of a layer that has been measured; of Wanda-sp, as pruned: what goes gives nothing."""
        if self._hands_on_pruned:
            shape, decision = self.model.shapes[index], part_of(self.options, PlanConfig)
            channels = shape.heads_per_group * shape.head_dim
            keep = keep_in_layer(wanda_scores(statistics, channels), shape, decision)
            for part in self.model.family.parts(shape):
                output = part.kind.output
                kept = output.kept_indices(part.own(keep.of(part.kind.name)), part.units, shape)
                removed = removed_indices(kept, output.size(part.units, shape))
                if len(removed):
                    weights[f"{output.name}.weight"][:, torch.from_numpy(removed).to(self.model.device)] = 0
        self._forward(index, weights, step=2 * index + self._hands_on_pruned)

    def _forward(self, index: int, weights: Mapping[str, torch.Tensor], **how: Any) -> None:
        self.model.forward_layer(index, weights, self.hidden, self.sizes, **how)


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


@contextmanager
def _input_moments(model: StreamedModel, index: int, weights: Mapping[str, torch.Tensor]) -> Any:
    """Moments of the inputs of the layer's output projections while it runs, and a function to call a batch."""
    moments: dict[str, Moments] = {}
    pending: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = {}
    handles = []

    def hook_for(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            windows = inputs[0] if inputs[0].ndim == 3 else inputs[0][None]  # an expert's tokens are one window
            pending[name] = (*window_moments(windows), windows.shape[1])

        return hook

    def merge_batch(_start: int, _output: torch.Tensor) -> None:
        for name, (means, m2s, tokens) in pending.items():
            moments[name].add_windows(means.cpu().numpy(), m2s.cpu().numpy(), tokens)
        pending.clear()

    for part in model.family.parts(model.shapes[index]):
        name = part.kind.output.name
        weight = weights.get(f"{name}.weight")
        moments[name] = Moments.empty(0 if weight is None else weight.shape[1])
        if weight is not None:
            handles.append(model.layers[index].get_submodule(name).register_forward_pre_hook(hook_for(name)))
    try:
        yield moments, merge_batch
    finally:
        for handle in handles:
            handle.remove()
