"""The engine: decoder layers are read one after another, run over all windows by transformers' code, and dropped."""

import gc
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from flap_stream.config import EngineConfig
from flap_stream.engine import memory
from flap_stream.engine import placement as planner
from flap_stream.engine.hidden_states import HiddenStates, batches, make_hidden_states
from flap_stream.engine.placement import Job, Placement, Refit
from flap_stream.engine.ranks import ALONE, Ranks, own_device
from flap_stream.engine.weight_stream import load, stream_layers
from flap_stream.errors import CorruptCheckpoint, InvalidOption, NonFinite, UnsupportedModel
from flap_stream.model.architecture import family_of, require_sizes
from flap_stream.model.checkpoint import FORWARD_DTYPES, Checkpoint, TensorEntry, row_ranges
from flap_stream.model.skeleton import LayerCall, Skeleton
from flap_stream.storage.batch_reductions import BatchReduction

logger = logging.getLogger(__name__)

Logits = Callable[[torch.Tensor], Iterator[tuple[int, torch.Tensor]]]

_LOGIT_BYTES = 1 << 26


def choose_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` means here.

    Raises InvalidOption if it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidOption(f"--device {name}: this machine shows {torch.cuda.device_count()} CUDA devices to torch")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


class BatchSizes:
    """How many windows run at once: halved wherever the device runs out of memory, and at the same points when resumed.

    A step is one run of a layer over all windows: the layer and the number of the run there. A halving concerns the
    windows that follow in the same step up to where another rank's begin, and all windows of later steps.
    reductions: earlier halvings. windows: those that run here, of all; they are counted from 0 in what is asked and
    told, None if they are all.
    """

    def __init__(self, first: int, reductions: Iterable[BatchReduction] = (), windows: range | None = None) -> None:
        self.first = first
        self._reductions = list(reductions)
        self._windows = range(sys.maxsize) if windows is None else windows
        self._new: list[BatchReduction] = []

    def at(self, step: tuple[int, int], start: int) -> int:
        """Windows that run at once from window `start` of a step on."""
        window = self._windows.start + start
        sizes = (r.size for r in self._reductions if r.step < step or (r.step == step and r.start <= window < r.stop))
        return min(sizes, default=self.first)

    def halve(self, step: tuple[int, int], start: int, failed: int) -> None:
        """From here on, half as many as have just failed."""
        self._new.append(BatchReduction(step, self._windows.start + start, self._windows.stop, failed // 2))
        self._reductions.append(self._new[-1])

    def agree(self, ranks: Ranks) -> list[BatchReduction]:
        """The new halvings of all ranks, in force everywhere from the next step on."""
        own, self._new = self._new, []
        found = ranks.gathered(own)
        self._reductions += [one for rank, new in enumerate(found) if rank != ranks.rank for one in new]
        return [one for new in found for one in new]


class StreamedModel:
    """A causal language model of which one decoder layer at a time has weights.

    shapes: sizes of every decoder layer, from its tensors. layer_entries, norm_entries: tensors by relative name.
    ranks: the processes that run it over a part of the windows each.
    Raises UnsupportedModel, InvalidModel or CorruptCheckpoint if any tensor that a forward needs is missing or of
    another shape or dtype than the architecture's; no tensor has been read by then.
    """

    def __init__(self, checkpoint: Checkpoint, options: EngineConfig, ranks: Ranks = ALONE) -> None:
        self.checkpoint, self.ranks = checkpoint, ranks
        self.device = choose_device(own_device(options.device, ranks))
        self.family = family_of(checkpoint.config, checkpoint.source)
        is_mixture = self.family.experts is not None
        memory.keep_malloc_steady(memory.OWN_BLOCK_BYTES_OF_MIXTURES if is_mixture else memory.OWN_BLOCK_BYTES)
        memory.keep_few_kernels()
        self._require_plausible_config()
        self.skeleton = Skeleton(checkpoint.config, checkpoint.source)
        self.skeleton.move_buffers(self.device)
        self.layers = self.skeleton.layers
        self.layer_entries = [
            self._entries_of(f"{self.family.layers}.{i}.", self.skeleton.layer_tensors(i))
            for i in range(len(self.layers))
        ]
        self.norm_entries = self._entries_of(f"{self.family.norm}.", self.skeleton.norm_tensors())
        self.head_entry = (
            self.embedding_entry if self.skeleton.tied else self._entry(self.family.head, self.skeleton.head_shape())
        )
        self.dtype = self._choose_dtype(options.dtype)
        self.shapes = [self.skeleton.layer_shape(i) for i in range(len(self.layers))]
        self.vocab_size, self.hidden_size = self.embedding_entry.shape
        self._calls: dict[int, list[LayerCall]] = {}

    @property
    def expert_share(self) -> float:
        """Share of a layer's experts that a token goes to; 1 without experts."""
        config = self.skeleton.hf_config
        experts = max((len(shape.experts) for shape in self.shapes), default=0)
        return config.num_experts_per_tok / experts if experts else 1.0

    def layer_bytes(self, index: int) -> int:
        """Bytes of one decoder layer in the checkpoint."""
        return sum(entry.nbytes for entry in self.layer_entries[index].values())

    def hidden_states(
        self,
        place: str,
        samples: int,
        tokens: int,
        directory: Path | None = None,
        width: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> HiddenStates:
        """Hidden states of so many windows, in one of hidden_states.PLACES, without values yet.

        width, dtype: of others than those between the layers.
        """
        width = self.hidden_size if width is None else width
        return make_hidden_states(place, samples, tokens, width, dtype or self.dtype, self.device, directory)

    def place(
        self,
        options: EngineConfig,
        job: Job,
        *,
        then: Sequence[Job] = (),
        recorded: int | None = None,
    ) -> Placement:
        """How to run a job within the memory allowed, to which the allocator and page cache are held.

        then: jobs that follow at the same batch size, and must fit too.
        recorded: the batch size of a run that is taken up, in force unless the options name one.
        All ranks do as fits the one with the least memory.
        Raises InsufficientMemory if there is no way, InvalidOption for ranks on devices of different types.
        """
        types = self.ranks.gathered(self.device.type)
        if len(set(types)) > 1:
            raise InvalidOption(f"ranks run on {' and '.join(sorted(set(types)))}; start them all with one --device")
        found = memory.limits(self.device, options.host_memory, options.device_memory, self.ranks.local[1])
        limits = memory.Limits(*map(min, zip(*map(astuple, self.ranks.gathered(found)), strict=True)))
        memory.enforce(self.device, limits.device)
        placement = self.ranks.from_first(
            lambda: planner.place(job, limits, options.batch_size, options.prefetch, then, recorded)
        )
        if self.checkpoint.nbytes > limits.host - placement.host_bytes:
            self.checkpoint.drop_from_page_cache()
        return placement

    def room(self, options: EngineConfig) -> int:
        """Bytes of host memory that may be taken beside what is in use now."""
        return memory.room(self.device, options.host_memory, options.device_memory, self.ranks.local[1])

    def job(
        self, samples: int, tokens: int, *, head: bool = False, refit: Refit | None = None, backward: bool = False
    ) -> Job:
        """What running all layers over so many windows (and the head, or refitting them) means, for the planner."""
        return Job(
            skeleton=Skeleton(self.checkpoint.config, self.checkpoint.source),  # not ours: its runs leave traces
            layers=self.layer_entries,
            dtype=self.dtype,
            device=self.device.type,
            samples=max(samples, 1),
            tokens=max(tokens, 1),
            head=self.head_entry if head or (refit is not None and refit.has_head) else None,
            refit=refit,
            backward=backward,
            ranks=self.ranks.world,
            local_ranks=max(map(len, self.ranks.nodes)),
        )

    def refit_after(self, job: Job, refit: Refit) -> Job:
        """Refitting after a job over the same windows; what a batch of that takes is not looked for again."""
        return replace(job, refit=refit, head=self.head_entry if refit.has_head else None)

    def embed(self, tokens: np.ndarray, batch_size: int, hidden: HiddenStates, copies: int = 1) -> None:
        """Fill the hidden states with what enters the first decoder layer.

        tokens: int64 `[sample, token]`. Of the embedding, only the rows of these tokens are read, batch by batch.
        copies: how often all windows stand there, one after another.
        Records what the layers are called with on the way.
        """
        for start, stop in batches(range(len(tokens)), batch_size):
            unique, ids = np.unique(tokens[start:stop], return_inverse=True)
            rows = self._embedding_rows(unique)
            places = torch.from_numpy(ids.reshape(stop - start, -1)).to(self.device)
            first, self._calls[stop - start] = self.skeleton.record(self.skeleton.embed(rows, places))
            for copy in range(copies):
                hidden.put(copy * len(tokens) + start, first)
        hidden.advance()

    def _record_calls(self, windows: int, tokens: int) -> list[LayerCall]:
        """What the layers are called with for a batch of another size than was embedded."""
        embeds = torch.zeros(windows, tokens, self.hidden_size, dtype=self.dtype, device=self.device)
        return self.skeleton.record(embeds)[1]

    def stream(
        self, order: Sequence[int] | None = None, prefetch: int = 1
    ) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Decoder layers in an order (by default their own), each with its weights on the device.

        prefetch: layers that are read ahead while one is in use. Weights are views of reused buffers: they are valid
        until the next step.
        Raises NonFinite, naming layer and tensor, if weights hold NaN or infinity.
        """
        order = range(len(self.layers)) if order is None else order
        entries = [self.layer_entries[i] for i in order]
        layers = stream_layers(self.checkpoint, entries, self.device, self.dtype, prefetch, self.ranks)
        for i, weights in zip(order, layers, strict=True):
            self._require_finite(f"{self.family.layers}.{i}.", weights)
            yield i, weights
            memory.give_back_heap()  # else what activations leave there grows from layer to layer

    def run_batch(
        self, index: int, weights: Mapping[str, torch.Tensor], values: torch.Tensor, stand_ins: Mapping[str, nn.Module]
    ) -> torch.Tensor:
        """The output of one layer for one batch of hidden states, both `[sample, token, hidden]` on the device.

        stand_ins: as of `Skeleton.run_layer`.
        Raises NonFinite if it holds NaN or infinity.
        """
        if len(values) not in self._calls:
            self._calls[len(values)] = self._record_calls(len(values), values.shape[1])
        output = self.skeleton.run_layer(index, weights, values, self._calls[len(values)][index], stand_ins)
        if not _all_finite([output])[0]:
            raise NonFinite(
                f"hidden states after layer {index} ({self.family.layers}.{index}) hold NaN or infinity, though "
                f"its weights are finite; try --dtype float32 (it ran in {self.dtype})"
            )
        return output

    def head(self) -> Logits:
        """The final norm and head, loaded: a function from hidden states to logits, in chunks.

        It takes `[token, hidden]` on the device and yields (first token, float32 logits `[token, vocabulary]`), the
        chunks so small that a large vocabulary does not matter.
        """
        norm, head_weight = self.final_norm(), self.head_weight()
        chunk = max(1, _LOGIT_BYTES // (4 * self.vocab_size))

        def logits_of(hidden: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
            for start in range(0, len(hidden), chunk):
                yield start, self.skeleton.logits(head_weight, norm(hidden[start : start + chunk])).float()

        return logits_of

    def forget_calls(self) -> None:
        """Record anew what layers are called with: what was recorded in inference mode cannot be differentiated."""
        self._calls = {}

    def final_norm(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The final norm, loaded: from hidden states that left the last layer to what the head reads, on the device."""
        norm_weights = self._load(self.norm_entries)
        return lambda hidden: self.skeleton.norm(norm_weights, hidden)

    def head_weight(self) -> torch.Tensor:
        """The head, loaded, `[vocabulary, hidden]`."""
        return self._load({"weight": self.head_entry})["weight"]

    def _embedding_rows(self, ids: np.ndarray) -> torch.Tensor:
        """Rows of the embedding on the device, `[id, hidden]`. ids: ascending."""
        entry = self.embedding_entry
        row_bytes = entry.nbytes // self.vocab_size
        raw = torch.empty(len(ids) * row_bytes, dtype=torch.uint8)
        self.checkpoint.read_ranges(entry, list(row_ranges(ids, row_bytes)), memoryview(raw.numpy()))
        rows = raw.view(getattr(torch, FORWARD_DTYPES[entry.dtype])).view(len(ids), self.hidden_size)
        rows = rows.to(self.device, self.dtype)
        self._require_none("", [] if all(_all_finite([rows])) else [entry.name])
        return rows

    def _load(self, entries: Mapping[str, TensorEntry]) -> dict[str, torch.Tensor]:
        weights = load(self.checkpoint, entries, self.device, self.dtype, self.ranks)
        self._require_finite("", {entries[name].name: tensor for name, tensor in weights.items()})
        return weights

    def _require_finite(self, prefix: str, weights: Mapping[str, torch.Tensor]) -> None:
        """Look at the tensors that a node's ranks have in common, each at a part; all know before they go on."""
        own, count = self.ranks.local
        part = dict(list(weights.items())[own::count])
        bad = [name for name, is_finite in zip(part, _all_finite(part.values()), strict=True) if not is_finite]
        self._require_none(prefix, [name for names in self.ranks.gathered(bad) for name in names])

    def _require_none(self, prefix: str, non_finite: Sequence[str]) -> None:
        for name in non_finite:
            raise NonFinite(
                f"tensor {prefix}{name} of {self.checkpoint.source} holds NaN or infinity; "
                "the checkpoint is damaged, so download it again"
            )

    def _require_plausible_config(self) -> None:
        """Hold config.json against the tensors before anything is built from it."""
        config, where = self.checkpoint.config, self.checkpoint.source
        require_sizes(config, where)
        layers = config["num_hidden_layers"]
        prefix = f"{self.family.layers}."
        found = {name.removeprefix(prefix).split(".")[0] for name in self.checkpoint.tensors if name.startswith(prefix)}
        if len(found) != layers:
            raise CorruptCheckpoint(
                f"{where}/config.json has num_hidden_layers {layers}, but there are tensors of {len(found)} layers; "
                "the checkpoint is incomplete or its config.json is another model's"
            )
        expected = (config["vocab_size"], config["hidden_size"])
        self.embedding_entry = self._entry(self.family.embedding, expected)

    def _entries_of(self, prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorEntry]:
        return {name: self._entry(prefix + name, shape) for name, shape in shapes.items()}

    def _entry(self, name: str, shape: tuple[int, ...]) -> TensorEntry:
        entry = self.checkpoint.tensors.get(name)
        where = self.checkpoint.source
        if entry is None:
            file = self.checkpoint.misplaced.get(name)
            placed = "" if file is None else f" (its index places it in {file}, which does not hold it)"
            what = "it is a model without its head" if name == self.family.head else "the checkpoint is incomplete"
            raise CorruptCheckpoint(f"tensor {name} is missing from {where}{placed}; {what}")
        if entry.shape != shape:
            raise CorruptCheckpoint(
                f"tensor {name} of {where} has shape {list(entry.shape)}, but its config.json asks for {list(shape)}"
            )
        if entry.dtype not in FORWARD_DTYPES:
            raise UnsupportedModel(
                f"tensor {name} of {where} has dtype {entry.dtype}; pruning needs {', '.join(FORWARD_DTYPES)}"
            )
        return entry

    def _choose_dtype(self, name: str) -> torch.dtype:
        if name == "auto":
            name = FORWARD_DTYPES[next(iter(self.layer_entries[0].values())).dtype]
        return getattr(torch, name)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """So many threads in torch's CPU kernels: products may round otherwise with another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def release(device: torch.device) -> None:
    """Give freed memory back, so that the next stage starts from little."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _all_finite(tensors: Iterable[torch.Tensor]) -> list[bool]:
    """Whether each tensor is free of NaN and infinity, in one pass and without a copy: both survive min and max."""
    ends = [end for tensor in tensors for end in tensor.aminmax()]
    if not ends:
        return []  # a norm without weights
    finite = torch.isfinite(torch.stack(ends)).view(-1, 2)  # [tensor, (min, max)]
    return finite.all(dim=1).tolist()
