"""One pass over the decoder layers: resumed from a snapshot, streamed, saved periodically, its progress reported.

A stage is a `for` loop over `LayerPass.layers` and, inside, over the batches of `LayerPass.run`.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from flap_stream.engine.batch_sizes import BatchSizes
from flap_stream.engine.device import free_cached, is_out_of_memory
from flap_stream.engine.hidden_states import HiddenStates
from flap_stream.engine.placement.prediction import Placement
from flap_stream.engine.snapshots import Snapshots, resume
from flap_stream.engine.streamed_model import Layer, StreamedModel
from flap_stream.errors import InsufficientMemory
from flap_stream.progress import Stage
from flap_stream.storage.batch_reductions import BatchReductions
from flap_stream.storage.snapshots import SnapshotStore

logger = logging.getLogger(__name__)

# First window of a batch and the layer's output for it, `[sample, token, hidden]` in the model's dtype on the device.
Batch = tuple[int, torch.Tensor]
StandIns = Mapping[str, nn.Module]  # replacements for some of a layer's modules, by path


@dataclass
class LayerPass:
    """Runs hidden states through all layers, batch by batch.

    tokens: int64 `[sample, token]`, this rank's windows. hidden: those that advance together; the first is the default.
    stores: where each is saved, in the same order; empty if the pass cannot be resumed.
    reductions: where smaller batch sizes are recorded. windows: this rank's range of all windows; None if it has all.
    copies: how many times all windows are repeated in `hidden`, one after another.
    begins_beside_weights: whether `begin` runs while the first layers are read, beside their buffers.
    """

    begins_beside_weights: ClassVar[bool] = True

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

    @property
    def first_window(self) -> int:
        """The number, among all windows, of this rank's first."""
        return 0 if self.windows is None else self.windows.start

    def __post_init__(self) -> None:
        assert self.copies == 1 or self.windows is None, "a batch's first window tells whose it is"
        known = self.reductions.read() if self.reductions is not None else ()
        self.sizes = BatchSizes(self.placement.batch_size, known, self.windows)

    def layers(self, stage: Stage, stored: int | None = None, interval: int | None = None) -> Iterator[Layer]:
        """Yield layers in the order of the pass, each with its weights, from the newest usable snapshot on.

        stored: number of layers whose results are stored, beyond which no snapshot is used; None if layers have none.
        interval: layers between snapshots; None saves whenever that costs little time. A layer counts as done when the
        next one is requested.
        """
        model, order = self.model, self.order()
        saved = list(zip(self.stores, self.hidden, strict=True)) if self.stores else []
        start = resume(saved, len(order) if stored is None else stored, model.ranks) if saved else None
        # Of some models, what embeds is loaded by the ranks of a node together, as the layers are by another thread.
        begins_beside = self.begins_beside_weights and model.skeleton.state.is_plain
        if start is None and not begins_beside:
            self.begin()
        done = start or 0
        stage.skip(done, recorded=None if stored is None else min(stored, len(order)))
        snapshots = Snapshots(saved, interval, model.ranks) if saved else None
        tokens = sum(model.ranks.gathered(self.tokens.size)) * self.copies
        with model.stream(order[done:], self.placement.prefetch) as layers:
            if start is None and begins_beside:
                self.begin()
            for i, weights in layers:
                self.step = (done, 0)
                yield i, weights
                done += 1
                if snapshots is not None and done < len(order):
                    snapshots.layer_done(done)
                stage.advance(tokens=tokens, bytes_moved=model.layer_bytes(i))

    def order(self) -> range:
        """The layers in the order of the pass."""
        return range(len(self.model.layers))

    def begin(self) -> None:
        """Fill the hidden states with the inputs of the first layer of the pass."""
        for hidden in self.hidden:
            self.model.embed(self.tokens, self.placement.batch_size, hidden, self.copies)

    def run_batch(
        self, index: int, weights: Mapping[str, torch.Tensor], start: int, values: torch.Tensor, modules: StandIns
    ) -> torch.Tensor:
        """The output of a layer for one batch, whose first window is `start`."""
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
        """Run one layer over all windows, batch by batch; yields first window and output of each.

        keep_output: replace the hidden states by the outputs.
        windows: run over these only; their outputs replace the inputs once the caller advances the hidden states.
        stand_ins: see `Skeleton.run_layer`; a `StandIn` gets the first window of each batch as its `start`.
        Raises NonFinite if an output holds NaN or infinity, InsufficientMemory if not even one window can run.
        """
        hidden = self.hidden[0] if hidden is None else hidden
        for start, values in self._batches(index, weights, hidden, windows, stand_ins or {}):
            if keep_output:
                hidden.put(start, values)
            yield start, values
            del values  # lest it live while the next batch runs
        self.model.require_finite_outputs(index)
        if keep_output and windows is None:
            hidden.advance()
        for reduction in self.sizes.agree(self.model.ranks):
            if self.reductions is not None and self.model.ranks.is_first:
                self.reductions.add(reduction)
        self.step = (self.step[0], self.step[1] + 1)

    def run_all(
        self,
        index: int,
        weights: Mapping[str, torch.Tensor],
        hidden: HiddenStates | None = None,
        *,
        windows: range | None = None,
    ) -> None:
        """Run one layer only to replace the hidden states. windows: see `run`."""
        for _start, output in self.run(index, weights, hidden, windows=windows):
            del output  # lest it live while the next batch runs

    def pass_on(self, windows: range | None = None) -> None:
        """Let hidden states through unchanged, as if there were no layer. windows: see `run`."""
        hidden = self.hidden[0]
        for start, values in hidden.stream(self.sizes.first, windows):
            hidden.put(start, values.clone())  # the buffer is read into again while this is written
        if windows is None:
            hidden.advance()

    def _batches(
        self,
        index: int,
        weights: Mapping[str, torch.Tensor],
        hidden: HiddenStates,
        windows: range | None,
        stand_ins: StandIns,
    ) -> Iterator[Batch]:
        """Yield first window and output of batches as large as the device has memory for."""
        for first, stored in hidden.stored(self.sizes.first, windows):
            done = 0
            while done < len(stored):
                start = first + done
                part = stored[done : done + self.sizes.at(self.step, start)]
                output = self._run_if_it_fits(index, weights, start, part, stand_ins)
                if output is None:
                    self._halve(index, start, part)
                    continue
                yield start, output
                del output  # lest it live while the next batch runs
                done += len(part)

    def _run_if_it_fits(
        self, index: int, weights: Mapping[str, torch.Tensor], start: int, stored: torch.Tensor, modules: StandIns
    ) -> torch.Tensor | None:
        """The output, or None if the device ran out of memory, which nothing of the batch occupies any more."""
        own = [module for module in modules.values() if isinstance(module, StandIn)]
        for module in own:
            module.start = start
        try:
            values = stored.to(self.model.device, non_blocking=True)
            return self.run_batch(index, weights, start, values, modules)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Only now: the exception held what was allocated until there.
        for module in own:
            module.forget()
        free_cached(self.model.device)
        return None

    def _halve(self, index: int, start: int, part: torch.Tensor) -> None:
        if len(part) == 1:
            raise InsufficientMemory(
                f"layer {index} cannot run a single window of {part.shape[1]} tokens: the device is out of memory; "
                "free some, raise --device-memory or shorten --sequence-length"
            )
        self.sizes.halve(self.step, start, len(part))
        logger.warning("out of device memory in layer %d; continuing with %d windows at once", index, len(part) // 2)


class StandIn(nn.Module):
    """A replacement for one of a layer's modules.

    start: the first window of the batch that runs. seen: names of attributes that hold tensors of the last batch.
    """

    start: int = 0
    seen: tuple[str, ...] = ()

    def forget(self) -> None:
        """Drop the tensors of the last batch, which failed."""
        for name in self.seen:
            vars(self).pop(name, None)
