"""A causal language model of which one decoder layer at a time is in memory, run by transformers' code."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from flap_stream.config import EngineConfig
from flap_stream.engine import memory, placement
from flap_stream.engine.device import begin, card, choose_device, limit_memory, own_device
from flap_stream.engine.finite import all_finite, refuse_non_finite, require_finite
from flap_stream.engine.hidden_states import HiddenStates, batches, make_hidden_states
from flap_stream.engine.placement import Job
from flap_stream.engine.placement.job import Refit
from flap_stream.engine.placement.prediction import Placement
from flap_stream.engine.ranks import ALONE, Ranks
from flap_stream.engine.weight_stream import load, stream_layers
from flap_stream.errors import InvalidOption, NonFinite
from flap_stream.model.checked_tensors import CheckedTensors
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.model.dtypes import stored_dtype
from flap_stream.model.families import family_of
from flap_stream.model.mixture import expert_share
from flap_stream.model.safetensors_format import TensorEntry, row_ranges
from flap_stream.model.skeleton import LOGIT_BYTES, LayerCall, Skeleton
from flap_stream.progress import format_bytes

logger = logging.getLogger(__name__)

Logits = Callable[[torch.Tensor], Iterator[tuple[int, torch.Tensor]]]

Layer = tuple[int, dict[str, torch.Tensor]]  # its index, and its weights on the device by relative name


class StreamedModel:
    """A causal language model that has weights for one decoder layer at a time.

    shapes, layer_entries, outer_entries, embedding_entry, input_entry, head_entries: see `CheckedTensors`.
    layers: the modules. expert_share: see `mixture.expert_share`.
    ranks: the processes of the job, each of which runs a part of the windows.
    Creating one changes the process: see `device.begin`, which `device.release` undoes, `memory.keep_malloc_steady` and
    `memory.keep_few_kernels`.
    Raises InvalidOption for a device that does not exist, and what `CheckedTensors` raises, before reading any tensor.
    """

    def __init__(self, checkpoint: Checkpoint, options: EngineConfig, ranks: Ranks = ALONE) -> None:
        self.checkpoint, self.ranks = checkpoint, ranks
        self.device = choose_device(own_device(options.device, ranks))
        self.family = family_of(checkpoint.config, checkpoint.source)
        is_mixture = self.family.experts is not None
        memory.keep_malloc_steady(memory.OWN_BLOCK_BYTES_OF_MIXTURES if is_mixture else memory.OWN_BLOCK_BYTES)
        memory.keep_few_kernels()
        tensors = CheckedTensors(checkpoint)
        begin(self.device)  # only now, when the model is accepted: whoever has created it ends this
        self.skeleton, self.shapes, self.layers = tensors.skeleton, tensors.shapes, tensors.skeleton.layers
        self.skeleton.move_buffers(self.device)
        self.layer_entries, self.outer_entries = tensors.layer_entries, tensors.outer_entries
        self.embedding_entry, self.input_entry = tensors.embedding_entry, tensors.input_entry
        self.head_entries = tensors.head_entries
        self.vocab_size, self.hidden_size = tensors.vocab_size, tensors.hidden_size
        self.expert_share = expert_share(self.skeleton.hf_config, max(len(shape.experts) for shape in self.shapes))
        stored = stored_dtype(next(iter(self.layer_entries[0].values())))
        self.dtype: torch.dtype = stored if options.dtype == "auto" else getattr(torch, options.dtype)
        self._calls: dict[tuple[int, int], list[LayerCall]] = {}  # by number of windows and of tokens in each
        self._ends: list[torch.Tensor] = []  # of outputs: smallest and largest value, until they are looked at

    def layer_bytes(self, index: int) -> int:
        """Bytes of one decoder layer in the checkpoint."""
        return sum(entry.stored_bytes for entry in self.layer_entries[index].values())

    def hidden_states(
        self,
        place: str,
        samples: int,
        tokens: int,
        directory: Path | None = None,
        width: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> HiddenStates:
        """Hidden states `[sample, token, width]` in one of hidden_states.PLACES, without values yet.

        directory: for files on disk. width, dtype: default to those between the layers.
        """
        shape = (samples, tokens, self.skeleton.state.width if width is None else width)
        return make_hidden_states(place, shape, dtype or self.dtype, self.device, directory)

    def place(
        self, options: EngineConfig, job: Job, *, then: Sequence[Job] = (), recorded: int | None = None
    ) -> Placement:
        """How to run a job within the memory allowed; the same for all ranks, to suit the one with the least memory.

        Limits torch's allocator until `device.release`, and drops the checkpoint from the page cache if it has no room.
        then: jobs that follow at the same batch size, and must fit too.
        recorded: the batch size of a run that is resumed, used unless the options name one.
        Raises InsufficientMemory if there is no way, InvalidOption for ranks on devices of different types.
        """
        limits = _common_limits(self.device, options, self.ranks)
        limit_memory(self.device, limits.device)
        chosen = self.ranks.from_first(
            lambda: placement.place(job, limits, options.batch_size, options.prefetch, then, recorded)
        )
        if self.checkpoint.stored_bytes > limits.host - chosen.host_bytes:
            self.checkpoint.drop_from_page_cache()
        return chosen

    def room(self, options: EngineConfig) -> int:
        """Bytes of host memory that may be used in addition to what is in use now."""
        return memory.room(self.device, options.host_memory, options.device_memory, self.ranks.local[1])

    def job(
        self, samples: int, tokens: int, *, head: bool = False, refit: Refit | None = None, backward: bool = False
    ) -> Job:
        """The job of running that many windows through all layers, for `place`.

        head: with logits at the end. refit: while refitting. backward: with gradients.
        """
        return Job(
            skeleton=self.skeleton,
            layers=self.layer_entries,
            dtype=self.dtype,
            device=self.device.type,
            samples=max(samples, 1),
            tokens=max(tokens, 1),
            head=self.head_entries["weight"] if head or (refit is not None and refit.fitted) else None,
            refit=refit,
            backward=backward,
            ranks=self.ranks.world,
            local_ranks=max(map(len, self.ranks.nodes)),
        )

    def refit_after(self, job: Job, refit: Refit) -> Job:
        """The job of refitting over the same windows as another."""
        return replace(job, refit=refit, head=self.head_entries["weight"] if refit.fitted else None)

    def embed(self, tokens: np.ndarray, batch_size: int, hidden: HiddenStates, copies: int = 1) -> None:
        """Fill the hidden states with the inputs of the first decoder layer.

        tokens: int64 `[sample, token]`. Only the embedding rows of these tokens are read, batch by batch.
        copies: how many times all windows are repeated, one after another.
        Also records the arguments that the layers are called with.
        """
        embedding = _Embedding(self, tokens[:batch_size].size)
        for start, stop in batches(range(len(tokens)), batch_size):
            first, self._calls[stop - start, tokens.shape[1]] = embedding.first(tokens[start:stop])
            for copy in range(copies):
                hidden.put(copy * len(tokens) + start, first)
        hidden.advance()

    @contextmanager
    def stream(self, order: Sequence[int] | None = None, prefetch: int = 1) -> Iterator[Iterator[Layer]]:
        """Read decoder layers in the block, from its beginning on, in an order (by default the forward's).

        Yields an iterator over them, each with its weights on the device: views of reused buffers, valid until the next
        layer. It raises NonFinite, naming layer and tensor, if weights hold NaN or infinity.
        prefetch: layers that are read ahead while one is in use.
        """
        order = range(len(self.layers)) if order is None else order
        entries = [self.layer_entries[i] for i in order]
        dtypes = self.skeleton.dtypes(self.dtype)
        with stream_layers(self.checkpoint, entries, self.device, dtypes, prefetch, self.ranks) as layers:
            yield _finite_layers(self, zip(order, layers, strict=True))

    def rerouted(self, index: int, neurons: np.ndarray) -> AbstractContextManager[None]:
        """In the block, a layer's router, if it has one, chooses among the experts that keep any of these neurons."""
        shape = self.shapes[index]
        is_whole = len(kept := shape.kept_experts(neurons)) == len(shape.experts)
        return nullcontext() if is_whole else self.skeleton.only_experts(index, kept)

    def run_batch(
        self, index: int, weights: Mapping[str, torch.Tensor], values: torch.Tensor, stand_ins: Mapping[str, nn.Module]
    ) -> torch.Tensor:
        """The output of one layer for one batch of hidden states, both `[sample, token, hidden]` on the device.

        stand_ins: see `Skeleton.run_layer`.
        Raises NonFinite if the output holds NaN or infinity; on an accelerator `require_finite_outputs` does, since the
        host would wait for it.
        """
        output = self.run_unchecked(index, weights, values, stand_ins)
        self._ends += output.detach().aminmax()
        if self.device.type == "cpu":
            self.require_finite_outputs(index)
        return output

    def run_unchecked(
        self, index: int, weights: Mapping[str, torch.Tensor], values: torch.Tensor, stand_ins: Mapping[str, nn.Module]
    ) -> torch.Tensor:
        """The same, for a caller that itself looks for NaN and infinity."""
        samples, tokens, _ = values.shape
        if (samples, tokens) not in self._calls:
            embeds = values.new_zeros(samples, tokens, self.hidden_size)
            self._calls[samples, tokens] = self.skeleton.outer.record(embeds)[1]
        return self.skeleton.run_layer(index, weights, values, self._calls[samples, tokens][index], stand_ins)

    def require_finite_outputs(self, index: int) -> None:
        """Raise NonFinite if an output of `run_batch` since the last call holds NaN or infinity."""
        ends, self._ends = self._ends, []
        if ends and not bool(torch.isfinite(torch.stack(ends)).all()):
            raise self.non_finite_outputs(index)

    def non_finite_outputs(self, index: int) -> NonFinite:
        """The error for a layer whose outputs hold NaN or infinity."""
        return NonFinite(
            f"hidden states after layer {index} ({self.family.layers}.{index}) hold NaN or infinity, though "
            f"its weights are finite; try --dtype float32 (it ran in {self.dtype})"
        )

    def head(self) -> Logits:
        """Load the final norm and the head; returns a function from hidden states to logits.

        It takes `[token, hidden]` on the device and yields (first token, float32 logits `[token, vocabulary]`) in
        chunks of at most 64 MiB, whatever the size of the vocabulary.
        """
        return _chunked_logits(self.skeleton, self.final_norm(), self.head_weights())

    def forget_calls(self) -> None:
        """Forget the recorded arguments of the layers: those from inference mode cannot be differentiated."""
        self._calls = {}

    def final_norm(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Load the final norm; returns a function from the last layer's output to the head's input, on the device."""
        outer = self.load(self.outer_entries)
        return lambda hidden: self.skeleton.outer.norm(outer, hidden)

    def head_weights(self) -> dict[str, torch.Tensor]:
        """Load the head's tensors, by relative name: the weight `[vocabulary, hidden]`, of some families a bias."""
        return self.load(self.head_entries)

    def load(self, entries: Mapping[str, TensorEntry]) -> dict[str, torch.Tensor]:
        """Tensors on the device, in the dtype of the forward. Raises NonFinite if one holds NaN or infinity."""
        weights = load(self.checkpoint, entries, self.device, self.dtype, self.ranks)
        require_finite({entries[name].name: w for name, w in weights.items()}, self.checkpoint.source, self.ranks)
        return weights


class _Embedding:
    """Embeds batches of at most `tokens` tokens, of which only the rows of words in use are read."""

    def __init__(self, model: StreamedModel, tokens: int) -> None:
        self._outer = model.skeleton.outer
        self._words = _Rows(model, model.embedding_entry, tokens)
        self._inputs = None if model.input_entry is None else _Rows(model, model.input_entry, tokens)
        self._weights = None if model.skeleton.state.is_plain else model.load(model.outer_entries)

    def first(self, tokens: np.ndarray) -> tuple[torch.Tensor, list[LayerCall]]:
        """See `OuterModel.record`. tokens: int64 `[sample, token]`."""
        inputs = None if self._inputs is None else self._outer.embed_inputs(*self._inputs.read(tokens))
        return self._outer.record(self._outer.embed(*self._words.read(tokens)), self._weights, inputs)


class _Rows:
    """Reads the rows of an embedding `[word, size]` that batches of at most `tokens` tokens ask for."""

    def __init__(self, model: StreamedModel, entry: TensorEntry, tokens: int) -> None:
        self._model, self._entry, self._row_bytes = model, entry, entry.nbytes // entry.shape[0]
        most = min(tokens, entry.shape[0]) * self._row_bytes
        self._buffer = memory.host_buffer((most,), torch.uint8)  # a new one for each batch costs as much as reading

    def read(self, tokens: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Some rows, on a CPU perhaps the buffer itself, and for each token which it is, int64, on the device.

        A word beyond the table has its first row, as in transformers.
        """
        model, entry = self._model, self._entry
        unique, places = np.unique(np.where(tokens < entry.shape[0], tokens, 0), return_inverse=True)
        raw = self._buffer[: len(unique) * self._row_bytes]
        model.checkpoint.read_ranges(entry, list(row_ranges(unique, self._row_bytes)), memoryview(raw.numpy()))
        rows = raw.view(stored_dtype(entry)).view(len(unique), -1).to(model.device, model.dtype)
        refuse_non_finite([] if all(all_finite([rows])) else [entry.name], model.checkpoint.source)
        return rows, torch.from_numpy(places.reshape(tokens.shape)).to(model.device)


def _finite_layers(model: StreamedModel, layers: Iterable[Layer]) -> Iterator[Layer]:
    for i, weights in layers:
        prefix = model.family.layer_prefix(i)
        require_finite({prefix + name: w for name, w in weights.items()}, model.checkpoint.source, model.ranks)
        yield i, weights
        memory.give_back_heap()  # otherwise what activations leave there grows from layer to layer


def _chunked_logits(
    skeleton: Skeleton, norm: Callable[[torch.Tensor], torch.Tensor], head_weights: Mapping[str, torch.Tensor]
) -> Logits:
    """See `StreamedModel.head`. head_weights: by relative name."""
    chunk = max(1, LOGIT_BYTES // (4 * len(head_weights["weight"])))

    def logits_of(hidden: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        for start in range(0, len(hidden), chunk):
            yield start, skeleton.outer.logits(head_weights, norm(hidden[start : start + chunk])).float()

    return logits_of


def _common_limits(device: torch.device, options: EngineConfig, ranks: Ranks) -> memory.Limits:
    """The limits of the rank with the least memory; warns if they are less than what was asked for.

    Raises InvalidOption for ranks on devices of different types, and for ranks that share an accelerator.
    """
    types = sorted(set(ranks.gathered(device.type)))
    if len(types) > 1:
        raise InvalidOption(f"ranks run on {' and '.join(types)}; start them all with the same --device")
    cards = [(ranks.node, *found) for found in [card(device)] if found is not None]
    taken = [one for own in ranks.gathered(cards) for one in own]
    if len(set(taken)) < len(taken):
        raise InvalidOption(
            f"{len(taken)} ranks share {len(set(taken))} devices; start one rank for each device, and show each rank "
            "all devices of its machine or only its own"
        )
    own = memory.limits(device, options.host_memory, options.device_memory, ranks.local[1])
    common = memory.Limits(*map(min, zip(*map(astuple, ranks.gathered(own)), strict=True)))
    if options.device_memory is not None and common.device < options.device_memory and ranks.is_first:
        logger.warning(
            "--device-memory is %s, but only %s of %s are free for tensors; that is the limit",
            format_bytes(options.device_memory),
            format_bytes(common.device),
            device,
        )
    return common
