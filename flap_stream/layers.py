"""The engine: a stream of decoder layers, each read from disk, run over all windows by transformers' own code, dropped.

The model is built without weights. What its layers are called with (masks, rotary embeddings) is recorded by running
the real model's `forward` with its layers replaced by recorders, so no family's forward is written again here.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flap_stream.architecture import Family, LayerShape, family_of, layer_shape, require_sizes
from flap_stream.checkpoint import FORWARD_DTYPES, Checkpoint, TensorEntry
from flap_stream.config import EngineConfig
from flap_stream.errors import CorruptCheckpoint, InvalidModel, InvalidOption, NonFinite, UnsupportedModel
from flap_stream.hidden_states import HiddenStates

_ALIGNMENT = 64
_LOGIT_BYTES = 1 << 26
# Tokens that one batch holds when nobody chooses: enough to keep the matrix products efficient, little workspace.
_AUTO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}

LayerCall = tuple[tuple[Any, ...], dict[str, Any]]


def choose_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` means here.

    Raises InvalidOption if it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidOption(f"--device {name}: this machine shows {torch.cuda.device_count()} CUDA devices to torch")
    return device


def build_skeleton(config: Mapping[str, Any], family: Family, where: str) -> PreTrainedModel:
    """The causal language model of a config.json, its parameters on the meta device, its buffers real.

    A pruned checkpoint gets the classes of `modeling/`, which give every layer its own size.
    """
    stock = {key: value for key, value in config.items() if key not in ("auto_map", "architectures", "dtype")}
    try:
        hf_config = CONFIG_MAPPING[config["model_type"]].from_dict(stock)
        with init_empty_weights(include_buffers=False):
            if "per_layer_config" in config:
                from flap_stream.modeling import modeling_flap_stream

                pruned = getattr(modeling_flap_stream, f"Pruned{family.class_prefix}ForCausalLM")
                skeleton = pruned._from_config(hf_config, attn_implementation="sdpa")
            else:
                skeleton = AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa")
    except Exception as error:  # whatever transformers makes of a wrong config.json
        reason = " ".join(str(error).split())
        raise InvalidModel(f"transformers cannot build a model from {where}/config.json: {reason}") from error
    return skeleton.eval().requires_grad_(False)


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps what it is called with, gives its input back."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type
        self.hidden_states: torch.Tensor | None = None
        self.call: LayerCall = ((), {})

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.hidden_states, self.call = hidden_states, (args, kwargs)
        return hidden_states


class _Returns(nn.Module):
    """Stands in for the base model when only the head is wanted."""

    def __init__(self, last_hidden_state: torch.Tensor) -> None:
        super().__init__()
        self._output = BaseModelOutputWithPast(last_hidden_state=last_hidden_state)

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return self._output


class StreamedModel:
    """A causal language model of which one decoder layer at a time has weights.

    shapes: sizes of every decoder layer, from its tensors.
    Raises UnsupportedModel, InvalidModel or CorruptCheckpoint if any tensor that a forward needs is missing or of
    another shape or dtype than the architecture's; no tensor has been read by then.
    """

    def __init__(self, checkpoint: Checkpoint, options: EngineConfig) -> None:
        self.checkpoint = checkpoint
        self.family = family_of(checkpoint.config, checkpoint.source)
        self.device = choose_device(options.device)
        self._require_plausible_config()
        self._skeleton = build_skeleton(checkpoint.config, self.family, checkpoint.source)
        for module in self._skeleton.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        self._base_name = self.family.layers.rpartition(".")[0]
        self._base = self._skeleton.get_submodule(self._base_name)
        self.layers = list(self._skeleton.get_submodule(self.family.layers).children())
        self._layer_entries = [self._entries_of(f"{self.family.layers}.{i}.", m) for i, m in enumerate(self.layers)]
        self._norm_entries = self._entries_of(f"{self.family.norm}.", self._skeleton.get_submodule(self.family.norm))
        self._head_entry = self._find_head()
        self.dtype = self._choose_dtype(options.dtype)
        self.shapes = [self._shape_of(entries) for entries in self._layer_entries]
        self.vocab_size, self.hidden_size = self._embedding_entry.shape
        self._calls: dict[int, list[LayerCall]] = {}

    def batch_size(self, requested: int | None, samples: int, tokens: int) -> int:
        """Windows that run through a layer at once; the caller's wish, or what suits the device."""
        return min(samples, requested or max(1, _AUTO_BATCH_TOKENS[self.device.type] // tokens))

    def layer_parameters(self, index: int) -> int:
        """Elements of all tensors of one decoder layer."""
        return sum(int(np.prod(entry.shape)) for entry in self._layer_entries[index].values())

    def layer_bytes(self, index: int) -> int:
        """Bytes of one decoder layer in the checkpoint."""
        return sum(entry.nbytes for entry in self._layer_entries[index].values())

    def embed(self, tokens: np.ndarray, batch_size: int) -> HiddenStates:
        """Hidden states that enter the first decoder layer.

        tokens: int64 `[sample, token]`. Records what the layers are called with on the way.
        """
        samples, length = tokens.shape
        hidden = HiddenStates(samples, length, self.hidden_size, self.dtype)
        weights = self._read_to_device({"weight": self._embedding_entry})
        name = self.family.embedding.removeprefix(f"{self._base_name}.")
        for start, stop in batches(samples, batch_size):
            ids = torch.from_numpy(tokens[start:stop]).to(self.device)
            first = self._record({"input_ids": ids}, {name: weights["weight"]})
            hidden.put(start, first)
        return hidden

    def record_calls(self, samples: int, tokens: int, batch_size: int) -> None:
        """Learn what the layers are called with, without the embedding's weights; for a run that goes on midway."""
        for count in {stop - start for start, stop in batches(samples, batch_size)}:
            embeds = torch.zeros(count, tokens, self.hidden_size, dtype=self.dtype, device=self.device)
            self._record({"inputs_embeds": embeds}, {})

    def stream(self, start: int = 0) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Decoder layers from `start` on, each with its weights on the device.

        The next layer is read while the current one is in use. Weights are views of reused buffers: they are valid
        until the next step.
        Raises NonFinite, naming layer and tensor, if weights hold NaN or infinity.
        """
        count = len(self.layers)
        if start >= count:
            return
        size = max(_slab_bytes(entries.values()) for entries in self._layer_entries[start:])
        slabs = [torch.empty(size, dtype=torch.uint8) for _ in range(min(2, count - start))]
        with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
            pending = reader.submit(self._read_into, self._layer_entries[start], slabs[0])
            for i in range(start, count):
                host = pending.result()
                if i + 1 < count:
                    slab = slabs[(i + 1 - start) % 2]
                    pending = reader.submit(self._read_into, self._layer_entries[i + 1], slab)
                weights = {name: tensor.to(self.device, self.dtype) for name, tensor in host.items()}
                self._require_finite(f"{self.family.layers}.{i}.", weights)
                yield i, weights

    def run_layer(self, index: int, weights: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """One decoder layer's forward over one batch, `[sample, token, hidden]`, by transformers' own code."""
        args, kwargs = self._calls[len(hidden)][index]
        output = functional_call(self.layers[index], dict(weights), (hidden, *args), kwargs)
        return output[0] if isinstance(output, tuple) else output

    def forward_layer(
        self,
        index: int,
        weights: Mapping[str, torch.Tensor],
        hidden: HiddenStates,
        batch_size: int,
        *,
        keep_output: bool = True,
        after_batch: Callable[[], None] | None = None,
    ) -> None:
        """Run one layer over all windows, overwriting the hidden states unless told not to.

        Raises NonFinite if its output holds NaN or infinity.
        """
        for start, stop in batches(len(hidden.values), batch_size):
            output = self.run_layer(index, weights, hidden.get(start, stop, self.device))
            if not _all_finite([output])[0]:
                raise NonFinite(
                    f"hidden states after layer {index} ({self.family.layers}.{index}) hold NaN or infinity, though "
                    f"its weights are finite; try --dtype float32 (it ran in {self.dtype})"
                )
            if keep_output:
                hidden.put(start, output)
            if after_batch is not None:
                after_batch()

    def head(self) -> Callable[[torch.Tensor], Iterator[tuple[int, torch.Tensor]]]:
        """The final norm and head, loaded: a function from hidden states to logits, in chunks.

        It takes `[token, hidden]` on the device and yields (first token, float32 logits `[token, vocabulary]`), the
        chunks so small that a large vocabulary does not matter.
        """
        norm_weights = self._read_to_device(self._norm_entries)
        head_weight = self._read_to_device({"weight": self._head_entry})["weight"]
        head_name = self.family.head
        chunk = max(1, _LOGIT_BYTES // (4 * self.vocab_size))

        def logits_of(hidden: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
            norm = self._skeleton.get_submodule(self.family.norm)
            for start in range(0, len(hidden), chunk):
                normed = functional_call(norm, norm_weights, (hidden[start : start + chunk],))
                with _replaced(self._skeleton, self._base_name, _Returns(normed[None])):
                    output = functional_call(self._skeleton, {head_name: head_weight}, kwargs={"use_cache": False})
                yield start, output.logits[0].float()

        return logits_of

    def _record(self, inputs: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> torch.Tensor:
        recorders = [_Recorder(layer) for layer in self.layers]
        layers_name = self.family.layers.rpartition(".")[2]
        norm_name = self.family.norm.rpartition(".")[2]
        with (
            _replaced(self._base, layers_name, nn.ModuleList(recorders)),
            _replaced(self._base, norm_name, nn.Identity()),
        ):
            functional_call(self._base, weights, kwargs={**inputs, "use_cache": False})
        first = recorders[0].hidden_states
        assert first is not None, "the model's forward did not call its first layer"
        self._calls[len(first)] = [recorder.call for recorder in recorders]
        return first

    def _read_into(self, entries: Mapping[str, TensorEntry], slab: torch.Tensor) -> dict[str, torch.Tensor]:
        raw, at, tensors = memoryview(slab.numpy()), 0, {}
        for name, entry in entries.items():
            self.checkpoint.read_into(entry, raw[at : at + entry.nbytes])
            dtype = getattr(torch, FORWARD_DTYPES[entry.dtype])
            tensors[name] = slab[at : at + entry.nbytes].view(dtype).view(entry.shape)
            at += -(-entry.nbytes // _ALIGNMENT) * _ALIGNMENT
        return tensors

    def _read_to_device(self, entries: Mapping[str, TensorEntry]) -> dict[str, torch.Tensor]:
        slab = torch.empty(_slab_bytes(entries.values()), dtype=torch.uint8)
        tensors = self._read_into(entries, slab)
        weights = {name: tensor.to(self.device, self.dtype) for name, tensor in tensors.items()}
        self._require_finite("", {entries[name].name: tensor for name, tensor in weights.items()})
        return weights

    def _require_finite(self, prefix: str, weights: Mapping[str, torch.Tensor]) -> None:
        for name, is_finite in zip(weights, _all_finite(weights.values()), strict=True):
            if not is_finite:
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
        self._embedding_entry = self._entry(self.family.embedding, expected)

    def _entries_of(self, prefix: str, module: nn.Module) -> dict[str, TensorEntry]:
        expected = module.state_dict()
        return {name: self._entry(prefix + name, tuple(tensor.shape)) for name, tensor in expected.items()}

    def _entry(self, name: str, shape: tuple[int, ...]) -> TensorEntry:
        entry = self.checkpoint.tensors.get(name)
        where = self.checkpoint.source
        if entry is None:
            raise CorruptCheckpoint(f"tensor {name} is missing from {where}; the checkpoint is incomplete")
        if entry.shape != shape:
            raise CorruptCheckpoint(
                f"tensor {name} of {where} has shape {list(entry.shape)}, but its config.json asks for {list(shape)}"
            )
        if entry.dtype not in FORWARD_DTYPES:
            raise UnsupportedModel(
                f"tensor {name} of {where} has dtype {entry.dtype}; pruning needs {', '.join(FORWARD_DTYPES)}"
            )
        return entry

    def _find_head(self) -> TensorEntry:
        if self._skeleton.config.tie_word_embeddings:
            return self._embedding_entry
        return self._entry(self.family.head, tuple(self._skeleton.get_parameter(self.family.head).shape))

    def _choose_dtype(self, name: str) -> torch.dtype:
        if name == "auto":
            name = FORWARD_DTYPES[next(iter(self._layer_entries[0].values())).dtype]
        return getattr(torch, name)

    def _shape_of(self, entries: Mapping[str, TensorEntry]) -> LayerShape:
        shapes = {name: entry.shape for name, entry in entries.items()}
        return layer_shape(self.family, self.checkpoint.config, shapes)


def batches(samples: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Ranges `(start, stop)` of windows, each of `batch_size` but for the last."""
    for start in range(0, samples, batch_size):
        yield start, min(start + batch_size, samples)


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
    finite = torch.isfinite(torch.stack(ends)).view(-1, 2)  # [tensor, (min, max)]
    return finite.all(dim=1).tolist()


def _slab_bytes(entries: Any) -> int:
    return sum(-(-entry.nbytes // _ALIGNMENT) * _ALIGNMENT for entry in entries)


@contextmanager
def _replaced(parent: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """Another submodule under a name, for a while."""
    original = getattr(parent, name)
    setattr(parent, name, module)
    try:
        yield
    finally:
        setattr(parent, name, original)
