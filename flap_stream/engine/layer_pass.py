"""One pass over the decoder layers: resumed from a snapshot, streamed, saved now and then, its progress reported.

A stage is a `for` loop over `LayerPass.layers` and, inside, over the batches of `LayerPass.run`.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from flap_stream.engine.hidden_states import HiddenStates
from flap_stream.engine.placement import Placement
from flap_stream.engine.snapshots import Snapshots, resume
from flap_stream.engine.streamed_model import BatchSizes, StreamedModel, release
from flap_stream.errors import InsufficientMemory
from flap_stream.progress import Stage
from flap_stream.storage.batch_reductions import BatchReductions
from flap_stream.storage.snapshots import SnapshotStore

logger = logging.getLogger(__name__)

# First window of a batch and the layer's output for it, `[sample, token, hidden]` in the model's dtype on the device.
Batch = tuple[int, torch.Tensor]
StandIns = Mapping[str, nn.Module]  # in the place of some of a layer's modules, by path


@dataclass
class LayerPass:
    """Hidden states on their way through all layers, batch by batch.

    tokens: int64 `[sample, token]`, this rank's windows. hidden: what travels together; the first is run by default.
    stores: where each is saved, in the same order; none if the pass is not resumable.
    reductions: where smaller batches are recorded. windows: this rank's, of all; None if it has all.
    copies: how often all windows stand in `hidden`, one after another.
    """

    model: StreamedModel
    placement: Placement
    tokens: np.ndarray
    hidden: Sequence[HiddenStates]
    stores: Sequence[SnapshotStore] = ()
    reductions: BatchReductions | None = None
    windows: range | None = None
    copies: int = 1
    sizes: BatchSizes = field(init=False)
    step: tuple[int, int] = field(init=False, default=(0, 0))

    def __post_init__(self) -> None:
        known = self.reductions.read() if self.reductions is not None else ()
        self.sizes = BatchSizes(self.placement.batch_size, known, self.windows)

    def layers(
        self, stage: Stage, stored: int | None = None, interval: int | None = None
    ) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Layers in the order of the pass, each with its weights, from the newest usable snapshot on.

        stored: how many layers have their result stored, which no snapshot may lie behind; None if none has a result.
        interval: layers from one snapshot to the next; None saves as often as it costs little. A layer counts as done
        at the next step.
        """
        model, order = self.model, self.order()
        saved = list(zip(self.stores, self.hidden, strict=True)) if self.stores else []
        start = resume(saved, len(order) if stored is None else stored, model.ranks) if saved else None
        if start is None:
            self.begin()
        done = start or 0
        stage.skip(done, recorded=None if stored is None else min(stored, len(order)))
        snapshots = Snapshots(saved, interval, model.ranks) if saved else None
        tokens = sum(model.ranks.gathered(self.tokens.size)) * self.copies
        for i, weights in model.stream(order[done:], self.placement.prefetch):
            self.step = (done, 0)
            yield i, weights
            done += 1
            if snapshots is not None and done < len(order):
                snapshots.layer_done(done)
            stage.advance(tokens=tokens, bytes_moved=model.layer_bytes(i))

    def order(self) -> range:
        """The layers in the order in which the hidden states go through them."""
        return range(len(self.model.layers))

    def begin(self) -> None:
        """Fill the hidden states with what enters the first layer of the pass."""
        for hidden in self.hidden:
            self.model.embed(self.tokens, self.placement.batch_size, hidden, self.copies)

    def run_batch(
        self, index: int, weights: Mapping[str, torch.Tensor], start: int, values: torch.Tensor, modules: StandIns
    ) -> torch.Tensor:
        """What a layer makes of one batch, whose first window is `start`."""
        return self.model.run_batch(index, weights, values, modules)

    def run(
        self,
        index: int,
        weights: Mapping[str, torch.Tensor],
        hidden: HiddenStates | None = None,
        *,
        windows: range | None = None,
        keep_output: bool = True,
        stand_ins: StandIns | None = None,
    ) -> Iterator[Batch]:
        """Run one layer over all windows, batch by batch; its outputs become the hidden states unless told not to.

        windows: to run over these alone; their outputs count once the caller advances the hidden states.
        stand_ins: as of `Skeleton.run_layer`; one that is a `StandIn` is told the first window of each batch.
        Raises NonFinite if an output holds NaN or infinity, InsufficientMemory if not even one window can run.
        """
        hidden = self.hidden[0] if hidden is None else hidden
        for start, values in self._batches(index, weights, hidden, windows, stand_ins or {}):
            if keep_output:
                hidden.put(start, values)
            yield start, values
        if keep_output and windows is None:
            hidden.advance()
        for reduction in self.sizes.agree(self.model.ranks):
            if self.reductions is not None and self.model.ranks.is_first:
                self.reductions.add(reduction)
        self.step = (self.step[0], self.step[1] + 1)

    def run_all(self, index: int, weights: Mapping[str, torch.Tensor], hidden: HiddenStates | None = None) -> None:
        """`run` for its hidden states alone."""
        for _ in self.run(index, weights, hidden):
            pass

    def _batches(
        self,
        index: int,
        weights: Mapping[str, torch.Tensor],
        hidden: HiddenStates,
        windows: range | None,
        stand_ins: StandIns,
    ) -> Iterator[Batch]:
        """First window and output of batches that the device has memory for."""
        for first, values in hidden.stream(self.sizes.first, windows):
            done = 0
            while done < len(values):
                start = first + done
                part = values[done : done + self.sizes.at(self.step, start)]
                for module in stand_ins.values():
                    if isinstance(module, StandIn):
                        module.start = start
                output = self._run_if_it_fits(index, weights, start, part, stand_ins)
                if output is None:
                    self._halve(index, start, part)
                    continue
                yield start, output
                done += len(part)

    def _run_if_it_fits(
        self, index: int, weights: Mapping[str, torch.Tensor], start: int, values: torch.Tensor, modules: StandIns
    ) -> torch.Tensor | None:
        """The output, or None if the device ran out of memory."""
        try:
            return self.run_batch(index, weights, start, values, modules)
        except torch.OutOfMemoryError:
            pass  # what it had allocated is held by the exception until here
        release(self.model.device)
        return None

    def _halve(self, index: int, start: int, part: torch.Tensor) -> None:
        if len(part) == 1:
            raise InsufficientMemory(
                f"layer {index} cannot run a single window of {part.shape[1]} tokens: the device is out of memory, so "
                "free some, raise --device-memory or shorten --sequence-length"
            )
        self.sizes.halve(self.step, start, len(part))
        logger.warning("out of device memory in layer %d; %d windows at once now", index, len(part) // 2)


class StandIn(nn.Module):
    """A module in the place of one of a layer's. start: the first window of the batch that runs."""

    start: int = 0
