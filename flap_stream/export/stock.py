"""A pruned checkpoint that loads without remote code: layers of one size, in one of transformers' own classes.

The first of the candidates in stock_class.py that has room for every tensor of the checkpoint is used. Any other
tensors that it has must be biases, which are set to zero.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.config import EngineConfig, ExportStockConfig
from flap_stream.config.rules import options_of
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import InvalidInput, InvalidModel, OutputConflict, UnsupportedModel
from flap_stream.export.stock_class import StockSizes, choose_class, common_sizes, cut_tensors
from flap_stream.model.architecture import is_pruned
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.model.model_files import INDEX_NAME
from flap_stream.model.opening import open_checkpoint
from flap_stream.model.skeleton import Skeleton
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

_MARK = ".flap-stream-export"  # in a directory whose export has not finished


@dataclass(frozen=True)
class ExportStockResult:
    """A checkpoint that loads without remote code, and what padding its layers to one size costs.

    kv_groups, neurons: of a layer; experts, expert_neurons: of a mixture of experts, and of each of them.
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
    experts: int = 0
    expert_neurons: int = 0


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
        if model.family.experts is not None and not model.family.renames:
            raise UnsupportedModel(
                f"{out} has experts, which {model.family.causal_class} of transformers reads from one tensor for all; "
                "that is not written, so load it with trust_remote_code=True"
            )
        sizes = common_sizes(source, model.family, shapes, options.pad)
        skeleton, sizes = choose_class(source, shapes, sizes, options.pad)
        plan = group_shards(_padded(source, skeleton, shapes, sizes), options.max_shard_bytes)
        card = model_card(record["base"]["name"], source.directory, record, stock_class=skeleton.family.causal_class)
        _write(source, skeleton, plan, directory, card, progress)
    token_bytes = 2 * shapes[0].head_dim * next(iter(source.tensors.values())).item_bytes
    return ExportStockResult(
        directory=directory,
        model_class=skeleton.family.causal_class,
        kv_groups=sizes.kv_groups,
        neurons=sizes.neurons,
        parameters_before=source.parameters,
        parameters_after=plan.parameters,
        kv_cache_bytes_before=token_bytes * sum(shape.kv_groups for shape in shapes),
        kv_cache_bytes_after=token_bytes * sizes.kv_groups * len(shapes),
        experts=sizes.experts,
        expert_neurons=sizes.expert_neurons,
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


def _padded(
    source: Checkpoint, skeleton: Skeleton, shapes: Sequence[LayerShape], sizes: StockSizes
) -> Iterator[OutputTensor]:
    """Every tensor of the stock class: from the checkpoint, padded with zeros if smaller, all zeros if absent."""
    family, first = skeleton.family, next(iter(source.tensors.values()))
    cut = cut_tensors(family, shapes)
    parts = [list(zip(family.parts(shape), family.parts(sizes.of(shape)), strict=True)) for shape in shapes]
    for name, shape in skeleton.tensors().items():
        entry, written = source.tensors.get(name), name if family.experts is None else family.dense_name(name)
        if entry is None:
            yield OutputTensor(written, first.dtype, shape, prod(shape) * first.item_bytes, None)
        elif entry.shape == shape:
            yield OutputTensor(written, entry.dtype, shape, entry.nbytes, entry)
        else:
            projection, i, number = cut[name]
            own, wanted = parts[i][number]
            keep = projection.padded_indices(own.units, wanted.units, shapes[i])
            nbytes = prod(shape) * entry.item_bytes
            yield OutputTensor(written, entry.dtype, shape, nbytes, entry, projection.axis, keep)


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
