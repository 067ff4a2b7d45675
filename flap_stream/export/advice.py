"""`advise`: in which form a card can serve a model, after how much pruning, and what that job takes.

All from config.json and tensor headers; no tensor is loaded.
"""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

from flap_stream.config import AdviseConfig, PruneConfig
from flap_stream.config.rules import options_of
from flap_stream.engine.device import choose_device
from flap_stream.engine.device import free_bytes as free_device_bytes
from flap_stream.engine.memory import free_host_bytes
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import InsufficientMemory, InvalidOption, UnsupportedModel
from flap_stream.export.gguf_architecture import WRITTEN_AS_LLAMA
from flap_stream.model.hub import base_name
from flap_stream.model.safetensors_format import TensorEntry
from flap_stream.restore.requirements import require_refittable
from flap_stream.stages.forecast import Forecast, Machines, forecast, opened_or_described

USED = 0.9  # share of the card for weights and KV cache: what vLLM takes unless told otherwise
_MOST = 0.5  # ratio beyond which what is left is hardly worth having
_STEP = 0.005  # ratios are rounded up to a multiple of it
_BLOCK = 32  # values that share a scale in q8_0 and q4_0
_CACHE_ITEM_BYTES = 2  # of a key or value beside quantised weights


@dataclass(frozen=True)
class Form:
    """A form in which the model can be served.

    name: a dtype, or a type of GGUF. programs: that run it. weight_bytes, kv_bytes: of the dense model.
    ratio: roughly the share of the prunable weights to remove so that it fits, if as large a part of the KV groups is
    removed as of the neurons; 0 if it fits as it is, None if none does.
    pruned_bytes: of weights and KV cache at that ratio, biases of the restoration included.
    """

    name: str
    programs: str
    weight_bytes: int
    kv_bytes: int
    ratio: float | None
    pruned_bytes: int | None

    @property
    def is_gguf(self) -> bool:
        """Whether `export-gguf` writes it."""
        return self.name in {one.name for one in _QUANTISED}


@dataclass(frozen=True)
class Advice:
    """What to do with a model for a card.

    capacity: bytes of the card, or of free memory. limit: of them, for weights and KV cache.
    chosen: name of the best form that fits, None if none does. commands: to run, in order.
    forecast: what pruning takes; None if nothing is to be pruned, or the card is too small for pruning itself.
    """

    model: str
    model_type: str
    parameters: int
    layers: int
    capacity: int
    limit: int
    forms: list[Form]
    chosen: str | None
    commands: list[str]
    forecast: Forecast | None


@dataclass(frozen=True)
class _Format:
    """How values are stored.

    block_bytes: of 32 values of a matrix; 0 for the checkpoint's own dtype. is_packed: as a quantised checkpoint has
    them, which no pruned one has.
    """

    name: str
    programs: str
    block_bytes: int = 0
    is_packed: bool = False

    def nbytes(self, entry: TensorEntry) -> int:
        """Size of a tensor."""
        count = prod(entry.shape)
        if not self.block_bytes:
            return entry.stored_bytes if self.is_packed else entry.nbytes
        if len(entry.shape) < 2:
            return 4 * count
        return 2 * count if entry.shape[-1] % _BLOCK else count // _BLOCK * self.block_bytes


_QUANTISED = (_Format("q8_0", "llama.cpp", 34), _Format("q4_0", "llama.cpp", 18))


def advise(model: str | Path, options: AdviseConfig | None = None, **keywords: Any) -> Advice:
    """Say in which form a card can serve a model, and how to get there.

    model: a directory (config.json is enough), a config.json or a Hub id. keywords: the fields of `AdviseConfig`.
    Raises InvalidInput for a model that cannot be pruned.
    """
    options = options_of(AdviseConfig, "advise", options, keywords)
    device = choose_device("auto")
    capacity = options.gpu or (free_host_bytes() if device.type == "cpu" else free_device_bytes(device))
    limit = int(USED * capacity)
    with opened_or_described(str(model))[0] as source:
        streamed = StreamedModel(source, PruneConfig(device="cpu"))
        tokens = options.context * options.batch
        forms = [_form(streamed, one, tokens, limit) for one in _formats(streamed)]
        chosen = _chosen(forms, options.form)
        job = None if chosen is None or not chosen.ratio else _job(streamed, chosen, options, limit)
        parameters, layers = source.parameters, len(streamed.layers)
        model_type = source.config["model_type"]
    return Advice(
        model=str(model),
        model_type=model_type,
        parameters=parameters,
        layers=layers,
        capacity=capacity,
        limit=limit,
        forms=forms,
        chosen=None if chosen is None else chosen.name,
        commands=[] if chosen is None else list(_commands(str(model), chosen, job)),
        forecast=None if job is None else _forecast(model, job, options.gpu),
    )


def _formats(model: StreamedModel) -> list[_Format]:
    own = _Format(str(model.dtype).removeprefix("torch."), "transformers, vLLM")
    is_packed = any(entry.encoding is not None for entry in model.checkpoint.tensors.values())
    packed = [_Format("quantised", "transformers, vLLM", is_packed=True)] if is_packed else []
    return [*packed, own, *(_QUANTISED if model.checkpoint.config["model_type"] in WRITTEN_AS_LLAMA else ())]


def _form(model: StreamedModel, how: _Format, tokens: int, limit: int) -> Form:
    """The model in a format, with a KV cache of so many tokens, within `limit` bytes."""
    weights = sum(how.nbytes(entry) for entry in model.checkpoint.tensors.values())
    prunable = sum(map(how.nbytes, _prunable(model)))
    added = sum(shape.added_biases for shape in model.shapes) * (4 if how.block_bytes else model.dtype.itemsize)
    tokens *= _CACHE_ITEM_BYTES if how.block_bytes else model.dtype.itemsize
    groups = _group_cache_items(model)
    cache = tokens * (groups or _cache_items(model))
    if weights + cache <= limit:
        return Form(how.name, how.programs, weights, cache, 0.0, weights + cache)
    if how.is_packed:
        return Form(how.name, how.programs, weights, cache, None, None)
    whole = weights + cache + added
    removable = prunable + (tokens * groups if groups and not how.block_bytes else 0)
    ratio = ceil((whole - limit) / removable / _STEP) * _STEP
    if ratio >= 1:
        return Form(how.name, how.programs, weights, cache, None, None)
    return Form(how.name, how.programs, weights, cache, round(ratio, 4), int(whole - ratio * removable))


def _prunable(model: StreamedModel) -> Iterator[TensorEntry]:
    for layer, shape in zip(model.layer_entries, model.shapes, strict=True):
        for part in model.family.parts(shape):
            found = (layer.get(f"{projection.name}.weight") for projection in part.kind.projections)
            yield from (entry for entry in found if entry is not None)


def _group_cache_items(model: StreamedModel) -> int:
    """Keys and values of one token in all KV groups; 0 where attention stays whole."""
    return sum(2 * shape.kv_groups * shape.head_dim for shape in model.shapes)


def _cache_items(model: StreamedModel) -> int:
    """How many values one token adds to the caches of a model whose attention stays whole, by transformers' config.

    Latent attention counts as vLLM keeps it, compressed; layers with a state of a fixed size count nothing.
    """
    whole, count = model.skeleton.hf_config, len(model.layers)
    kinds = getattr(whole, "layer_types", None) or getattr(whole, "layers_block_type", None) or ["attention"] * count
    layers = [whole.per_layer_config[i] for i in range(count)] if model.family.varies_sizes else [whole] * count
    has_cache = ("attention" in kind and "linear" not in kind for kind in kinds)
    return sum(_layer_cache_items(config) for config, has in zip(layers, has_cache, strict=True) if has)


def _layer_cache_items(config: Any) -> int:
    if getattr(config, "kv_lora_rank", None):
        return config.kv_lora_rank + config.qk_rope_head_dim
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * (getattr(config, "num_key_value_heads", None) or heads) * head_dim


def _chosen(forms: list[Form], name: str | None) -> Form | None:
    """The form of that name, by default the first that loses least; None if what is left is not worth having.

    Raises InvalidOption for a form that the model does not have.
    """
    names = [form.name for form in forms]
    if name is not None and name not in names:
        raise InvalidOption(
            f"--form {name} is not one that this model can be served in here; choose one of {', '.join(names)}"
        )
    own = [form for form in forms if name in (None, form.name)]
    possible = [form for form in own if form.ratio is not None and form.ratio <= _MOST]
    return min(possible, key=lambda form: form.ratio or 0, default=None)


def _job(model: StreamedModel, form: Form, options: AdviseConfig, limit: int) -> PruneConfig:
    """The pruning that makes it fit."""
    restore = "least-squares"
    try:
        require_refittable(model, restore)
    except UnsupportedModel:
        restore = "bias"
    how: dict[str, Any] = {"ratio": form.ratio}
    if not form.is_gguf and _group_cache_items(model):
        how = {"target_memory": limit, "context": options.context, "batch": options.batch}
    if form.is_gguf:
        how["round_neurons_to"] = _BLOCK
    return PruneConfig(metric="fisher", restore=restore, **how)


def _forecast(model: str | Path, job: PruneConfig, card: int | None) -> Forecast | None:
    try:
        return forecast(model, "pruned", job, Machines(card=card))
    except InsufficientMemory:
        return None


def _commands(model: str, form: Form, job: PruneConfig | None) -> Iterator[str]:
    """What to run, one command after another."""
    result = model
    if job is not None:
        result = "pruned"
        aim = ["--ratio", f"{job.ratio:g}"]
        if job.target_memory is not None:
            aim = ["--target-memory", str(job.target_memory), "--context", str(job.context), "--batch", str(job.batch)]
        rounding = ["--round-neurons-to", str(_BLOCK)] if job.round_neurons_to == _BLOCK else []
        how = ["--metric", str(job.metric), "--restore", str(job.restore)]
        yield shlex.join(["flap-stream", "prune", model, result, *aim, *how, *rounding])
        yield f"flap-stream evaluate {result} --save {result}"
    if form.is_gguf:
        yield shlex.join(["flap-stream", "export-gguf", result, f"{base_name(result)}.gguf", "--type", form.name])
    if job is not None:
        base = ["--base-model", "NAMESPACE/NAME"] if Path(model).exists() else []
        yield shlex.join(["flap-stream", "push", result, f"NAMESPACE/{base_name(model)}-pruned", *base])
