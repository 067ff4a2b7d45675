"""A pruned checkpoint that loads without remote code: layers of one size, in one of transformers' own classes.

The first of the candidates below that has room for every tensor of the checkpoint is used. Any other tensors that it
has must be biases, which are set to zero.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flap_stream.arithmetic.layer_shape import LayerShape, Sublayer
from flap_stream.config import EngineConfig, ExportStockConfig
from flap_stream.config.rules import options_of
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import InvalidInput, InvalidModel, OutputConflict, UnsupportedModel
from flap_stream.model.architecture import Family, is_pruned
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.model.families import FAMILIES
from flap_stream.model.model_code import decoded
from flap_stream.model.model_files import INDEX_NAME
from flap_stream.model.opening import open_checkpoint
from flap_stream.model.safetensors_format import TensorEntry
from flap_stream.model.skeleton import Skeleton
from flap_stream.model.units import ROWS
from flap_stream.output.carried import carried_files, tell_left_out
from flap_stream.output.destination import require_space
from flap_stream.output.digests import DIGESTS_NAME, digests_file
from flap_stream.output.model_card import model_card
from flap_stream.output.pruning_record import RECORD_NAME, read_record
from flap_stream.output.shard_plan import OutputTensor, ShardPlan, group_shards
from flap_stream.output.shard_writer import write_shard
from flap_stream.progress import Progress
from flap_stream.storage import files, places

logger = logging.getLogger(__name__)

# Families whose layers compute exactly what Llama's do, so that Llama's class, or SeedOss's with any number of heads,
# can hold them too.
_LOADABLE_AS_LLAMA = ("llama", "ministral", "mistral", "qwen2", "seed_oss")
_BIAS_FLAGS = ("attention_bias", "attention_out_bias", "mlp_bias")
_SHARED_KEYS = (
    "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "head_dim", "hidden_act", "hidden_size",
    "initializer_range", "max_position_embeddings", "num_hidden_layers", "pad_token_id", "rms_norm_eps",
    "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings", "use_cache", "vocab_size",
)  # fmt: skip
_PRUNED_KEYS = (
    "auto_map",
    "allow_global_per_layer_attribute_access",
    "pruned_output_bias",
    "attention_is_whole",
    "pruned_neurons",
)
_MARK = ".flap-stream-export"  # in a directory whose export has not finished


@dataclass(frozen=True)
class ExportStockResult:
    """A checkpoint that loads without remote code, and what padding its layers to one size costs.

    parameters_before: of the pruned checkpoint. kv_cache_bytes: keys and values of one token, before and after.
    """

    directory: Path
    model_class: str
    kv_groups: int
    neurons: int
    parameters_before: int
    parameters_after: int
    kv_cache_bytes_before: int
    kv_cache_bytes_after: int


def export_stock(
    out: str | Path,
    directory: str | Path,
    options: ExportStockConfig | None = None,
    progress: Progress | bool | None = None,
    **keywords: Any,
) -> ExportStockResult:
    """Write the pruned checkpoint `out` into `directory` as one that loads without remote code.

    keywords: the fields of `ExportStockConfig`, in place of `options`. progress: True shows it on stderr.
    Raises UnsupportedModel, naming the reason and what to do instead, if no class of transformers can hold it,
    OutputConflict if `directory` exists, InsufficientSpace if the disk has too little room.
    """
    options = options_of(ExportStockConfig, "export_stock", options, keywords)
    directory, progress = Path(directory), Progress.of(progress)
    _require_free(directory)
    with open_checkpoint(out) as source:
        if not is_pruned(source.config):
            raise InvalidInput(f"{out} was not pruned by flap-stream; it needs no export to load without remote code")
        if source.wrapper is not None:
            raise UnsupportedModel(f"{out} is a multimodal model; only language models by themselves are exported")
        record = _record(source)
        tell_left_out(source.directory)
        model = StreamedModel(source, EngineConfig(device="cpu"))
        shapes, source = model.shapes, _without_ignored(source, model.skeleton)
        if any(shape.experts for shape in shapes):
            raise UnsupportedModel(f"{out} has experts, which transformers' own classes store in another form")
        if _lists_widths(source.config, model.family):
            widest = shapes[0]
        else:
            widest = _common_shape(shapes, options.pad, str(out), model.family.prunes(Sublayer.ATTENTION))
        skeleton, widest = _choose_class(source, widest, options.pad)
        plan = group_shards(_padded(source, skeleton, shapes, widest), options.max_shard_bytes)
        card = model_card(record["base"]["name"], source.directory, record, stock_class=skeleton.family.causal_class)
        _write(source, skeleton, plan, directory, card, progress)
    token_bytes = 2 * widest.head_dim * next(iter(source.tensors.values())).item_bytes
    return ExportStockResult(
        directory=directory,
        model_class=skeleton.family.causal_class,
        kv_groups=widest.kv_groups,
        neurons=max(widest.neurons, *(shape.neurons for shape in shapes)),
        parameters_before=source.parameters,
        parameters_after=plan.parameters,
        kv_cache_bytes_before=token_bytes * sum(shape.kv_groups for shape in shapes),
        kv_cache_bytes_after=token_bytes * widest.kv_groups * len(shapes),
    )


def _without_ignored(source: Checkpoint, skeleton: Skeleton) -> Checkpoint:
    """The checkpoint without the tensors that its own class does not have, which transformers ignores as well."""
    held = skeleton.tensors()
    ignored = [name for name in source.tensors if name not in held]
    if ignored:
        logger.warning(
            "%d tensors that the class of %s does not have are left out, such as %r",
            len(ignored),
            source.source,
            ignored[0],
        )
    return replace(source, tensors={name: entry for name, entry in source.tensors.items() if name in held})


def _lists_widths(config: Mapping[str, Any], family: Family) -> bool:
    """Whether the stock class, too, gives every layer neurons of its own number."""
    return isinstance(config.get(family.width), list)


def _common_shape(shapes: Sequence[LayerShape], pad: bool, where: str, has_groups: bool) -> LayerShape:
    """The shape that all layers have, or will have when padded. Raises UnsupportedModel if there is none.

    has_groups: whether KV groups are counted; attention is left whole otherwise.
    """
    groups, neurons = max(shape.kv_groups for shape in shapes), max(shape.neurons for shape in shapes)
    widest = replace(shapes[0], kv_groups=groups, neurons=neurons)
    sizes = [(shape.kv_groups, shape.neurons) for shape in shapes]
    odd = next((i for i, size in enumerate(sizes) if size != (groups, neurons)), None)
    if odd is not None and not pad:
        raise UnsupportedModel(
            f"layer {odd} of {where} has {sizes[odd][0]} KV groups and {sizes[odd][1]} neurons, others up to {groups} "
            f"and {neurons}, but no class of transformers has layers of different sizes; add --pad to pad with "
            "zeros, or prune with --structure ul-um, which gives all layers one size"
        )
    if (has_groups and not groups) or not neurons:
        raise UnsupportedModel(f"no layer of {where} has any {'neurons' if groups else 'attention heads'} left")
    return widest


def _choose_class(source: Checkpoint, widest: LayerShape, pad: bool) -> tuple[Skeleton, LayerShape]:
    """The model in the first stock class that can hold every tensor, and the shape of its layers.

    Some classes require a number of heads that divides the hidden size: with `pad`, heads are added up to the dense
    model's number until one fits. Raises UnsupportedModel if none does.
    """
    dense_groups = source.config.get("num_key_value_heads") or source.config["num_attention_heads"]
    misfits: list[str] = []
    for groups in range(widest.kv_groups, dense_groups + 1 if pad else widest.kv_groups + 1):
        shape = replace(widest, kv_groups=groups)
        for config in _candidates(source.config, shape):
            try:
                skeleton = Skeleton(config, source.source)
            except InvalidModel:
                continue  # its class does not accept these sizes
            own = skeleton.layer_shape(0)
            if (own.kv_groups, own.neurons) != (shape.kv_groups, shape.neurons):
                continue  # some of its sizes follow from others
            held = skeleton.tensors()
            misfits = [name for name in source.tensors if name not in held]
            absent = [name for name in held if name not in source.tensors]
            emptied = _emptied_modules(source, skeleton.family)
            if not misfits and all(name.endswith(".bias") or name.startswith(emptied) for name in absent):
                return skeleton, shape
    family = source.config["model_type"]
    if misfits:
        raise UnsupportedModel(
            f"no class of transformers for {family} has tensor {misfits[0]} of {source.source}; prune with --restore "
            "none, which adds no biases"
        )
    if not FAMILIES[family].prunes(Sublayer.ATTENTION):
        raise UnsupportedModel(f"no class of transformers for {family} accepts {widest.neurons} neurons in every layer")
    raise UnsupportedModel(
        f"no class of transformers for {family} accepts {widest.kv_groups * widest.heads_per_group} heads with hidden "
        f"size {source.config['hidden_size']}; add --pad, which adds heads until the class accepts their number"
    )


def _emptied_modules(source: Checkpoint, family: Family) -> tuple[str, ...]:
    """Path prefixes of the modules that have no units left."""
    layers = range(source.config["num_hidden_layers"])
    return tuple(
        f"{family.layers}.{i}.{kind.module}."
        for i in layers
        for kind in family.kinds
        if f"{family.layers}.{i}.{kind.output.name}.weight" not in source.tensors
    )


def _candidates(config: Mapping[str, Any], widest: LayerShape) -> Iterator[dict[str, Any]]:
    """Stock configs in order of preference: the family's own, with all its biases, Llama's, SeedOss's."""
    heads = widest.kv_groups * widest.heads_per_group
    family = FAMILIES[config["model_type"]]
    sizes: dict[str, Any] = {family.width: widest.neurons}
    if _lists_widths(config, family):
        sizes = {family.width: config["pruned_neurons"]}
    if family.prunes(Sublayer.ATTENTION):
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": widest.kv_groups, "head_dim": widest.head_dim}
    uniform = {key: value for key, value in config.items() if key not in _PRUNED_KEYS}
    if not family.varies_sizes:  # else they are the dense model's
        uniform.pop("per_layer_config", None)
    own = uniform | sizes
    yield _named(own)
    known = CONFIG_MAPPING[config["model_type"]].from_dict(decoded(uniform))  # its validation may refuse the new sizes
    flags = {flag: True for flag in _BIAS_FLAGS if hasattr(known, flag)}
    if flags:
        yield _named(own | flags)
    if config["model_type"] in _LOADABLE_AS_LLAMA and not _has_window(known):
        given = {**known.to_dict(), **config}
        shared = {key: given[key] for key in _SHARED_KEYS if given.get(key) is not None} | sizes
        flags = dict.fromkeys(_BIAS_FLAGS, True)
        yield _named({**shared, **flags, "model_type": "llama"})
        yield _named({**shared, **flags, "model_type": "seed_oss", "residual_dropout": 0.0})


def _named(config: dict[str, Any]) -> dict[str, Any]:
    return config | {"architectures": [FAMILIES[config["model_type"]].causal_class]}


def _has_window(known: PreTrainedConfig) -> bool:
    """Whether some layer attends only to the last tokens."""
    types = getattr(known, "layer_types", None)
    return any(t != "full_attention" for t in types) if types else getattr(known, "sliding_window", None) is not None


def _padded(
    source: Checkpoint, skeleton: Skeleton, shapes: Sequence[LayerShape], widest: LayerShape
) -> Iterator[OutputTensor]:
    """Every tensor of the stock class: from the checkpoint, padded with zeros if smaller, all zeros if absent."""
    family, first = skeleton.family, next(iter(source.tensors.values()))
    projections = {
        f"{family.layers}.{i}.{projection.name}.{part}": (projection, i, kind)
        for i in range(len(shapes))
        for kind in family.kinds
        for projection in kind.projections
        for part in (("weight", "bias") if projection.axis == ROWS else ("weight",))
    }
    for name, shape in skeleton.tensors().items():
        entry = source.tensors.get(name)
        if entry is None:
            yield OutputTensor(name, first.dtype, shape, prod(shape) * first.item_bytes, None)
        elif entry.shape == shape:
            yield OutputTensor(name, entry.dtype, shape, entry.nbytes, entry)
        else:
            projection, i, kind = projections[name]
            units, wanted = (shape.units(kind.name) for shape in (shapes[i], widest))
            keep = projection.padded_indices(units, wanted, shapes[i])
            yield _resized(entry, shape, projection.axis, keep)


def _resized(entry: TensorEntry, shape: tuple[int, ...], axis: int, keep: Any) -> OutputTensor:
    return OutputTensor(entry.name, entry.dtype, shape, prod(shape) * entry.item_bytes, entry, axis, keep)


def _require_free(directory: Path) -> None:
    places.require_name(directory)
    if directory.exists():
        raise OutputConflict(f"{directory} exists already; name another DIR or move it away")
    places.require_place(directory)
    staging = files.partial_path(directory)
    if staging.exists() and not (staging / _MARK).exists():
        raise OutputConflict(f"{staging} exists and was not written by an export; move it away or name another DIR")


def _record(source: Checkpoint) -> dict[str, Any]:
    """The contents of pruning.json, which the model card quotes."""
    try:
        record = read_record(source.directory)
    except OutputConflict as error:
        raise InvalidModel(f"{source.directory / RECORD_NAME} is missing or damaged; prune again") from error
    assert record is not None, "a directory with a config.json is not empty"
    return record


def _write(
    source: Checkpoint, skeleton: Skeleton, plan: ShardPlan, directory: Path, card: str, progress: Progress
) -> None:
    staging = files.partial_path(directory)
    files.remove(staging)
    require_space(directory, plan.nbytes)
    files.make_own_directory(staging)
    files.write_committed(staging / _MARK, b"")
    digests = {}
    with progress.stage("export", len(plan.shards), unit="shard") as stage:
        for shard in plan.shards:
            digests[shard.name] = write_shard(source, shard, staging)
            stage.advance(bytes_moved=shard.nbytes)
    small: dict[str, bytes | Iterable[bytes]] = {**dict(carried_files(source.directory))}
    small["README.md"] = card.encode()
    index = plan.index()
    if index is not None:
        small[INDEX_NAME] = index
    small["config.json"] = json.dumps(dict(skeleton.config), indent=2).encode() + b"\n"
    for name, contents in small.items():
        files.make_directory((staging / name).parent)
        digests[name] = files.write_committed(staging / name, contents)
    files.write_committed(staging / DIGESTS_NAME, digests_file(digests))
    files.remove(staging / _MARK)
    files.commit_rename(staging, directory)
