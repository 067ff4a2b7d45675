"""The pruned checkpoint as a whole: built beside its place, and there only when it is complete."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.arithmetic.sizes import pruned_sizes
from flap_stream.config import PlanConfig
from flap_stream.engine.ranks import ALONE, Ranks
from flap_stream.errors import CorruptCheckpoint, InsufficientSpace, NotPlain, OutputConflict
from flap_stream.model.architecture import PRUNED_TYPE, Family, family_of
from flap_stream.model.checkpoint import INDEX_NAME, Checkpoint, read_header
from flap_stream.model.model_code import MODELING_NAME, modeling_file
from flap_stream.model.model_files import TEMPLATES_NAME, is_carried
from flap_stream.output import carried
from flap_stream.output.model_card import base_name, model_card, unusable_metadata
from flap_stream.output.shards import Restoration, ShardPlan, plan_digest, plan_shards, write_shard
from flap_stream.progress import Progress
from flap_stream.storage import files, places
from flap_stream.storage.differences import output_differences
from flap_stream.storage.journal import Journal
from flap_stream.storage.run_directory import RunDirectory
from flap_stream.storage.schema import finite, matches, natural, one_of, parse_json

logger = logging.getLogger(__name__)

RECORD_NAME = "pruning.json"
RECORD_FORMAT, RECORD_VERSION = "flap-stream-pruning", 1
DIGESTS_NAME = "SHA256SUMS"

_RECORD = {
    "format": one_of(RECORD_FORMAT),
    "base": {"name": str},
    "options": {"method": str, "structure": str, "metric": str, "statistics": str, "ratio": finite},
    "restore": str,
    "realised_ratio": {"decoder": finite, "model": finite},
    "parameters": {"before": natural, "after": natural},
    "layers": [{"kv_groups": natural, "neurons": natural, "kept_kv_groups": [natural], "kept_neurons": [natural]}],
    "calibration?": dict,
}
_MARGIN_BYTES = 16 << 20


def read_record(out: Path) -> dict[str, Any] | None:
    """Contents of pruning.json of a complete output; None if nothing (or an empty directory) is there.

    Raises OutputConflict if something else is there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        record = parse_json(files.read_plain(out / RECORD_NAME))
        if matches(record, _RECORD):
            return record
    except (OSError, ValueError, NotPlain):
        pass
    raise OutputConflict(f"{out} exists and was not made by flap-stream; name another OUT or move it away")


def digests_file(digests: dict[str, str]) -> bytes:
    """Contents of SHA256SUMS, in the form that `sha256sum --check` reads. digests: file name to sha256."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()


def damaged_files(out: Path) -> list[str]:
    """Names of the files of a complete output that are not what was written, with what is wrong.

    Raises CorruptCheckpoint if SHA256SUMS, which says what was written, is missing or damaged.
    """
    path = out / DIGESTS_NAME
    lines = files.read_plain(path).decode(errors="replace").splitlines() if path.is_file() else []
    digests = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if "config.json" not in digests or not all(map(_is_written_name, digests)):
        state = "is damaged" if path.is_file() else "is missing"
        raise CorruptCheckpoint(f"{path} {state}; without it nothing can be checked, so prune again into another OUT")
    wrong = []
    for name, digest in digests.items():
        is_there = (out / name).is_file()
        if not is_there or not _is_credible(out / name) or files.file_digest(out / name) != digest:
            wrong.append(f"{name} is {'altered' if is_there else 'missing'}")
    return wrong


def _is_credible(path: Path) -> bool:
    """Whether a file of an output is no giant: of shards, the header says how large they are."""
    if path.suffix != ".safetensors":
        return path.stat().st_size <= files.MAX_BYTES
    try:
        return bool(read_header(path))
    except CorruptCheckpoint:
        return False


def _is_written_name(name: str) -> bool:
    """Whether SHA256SUMS can have a name: of a file of the output, or of its directory of chat templates."""
    own = name.removeprefix(f"{TEMPLATES_NAME}/")
    return Path(own).name == own and len(own) <= 255


def require_own_place(source: Checkpoint, out: Path, run: Path) -> None:
    """Raise OutputConflict if `out` cannot take the output, or another run has begun to write it."""
    places.require_apart(out, run)
    if out.resolve().is_relative_to(source.directory.resolve()):
        raise OutputConflict(f"{out} lies in the model's own directory {source.directory}; name an OUT elsewhere")
    staging = files.partial_path(out)
    for path in (out, staging):
        if path.is_symlink():
            raise OutputConflict(
                f"{path} is a symbolic link to {path.readlink()}; a finished output is renamed into its place, which "
                "cannot be a link, so name the place itself"
            )
    places.require_place(out)
    if staging.exists() and not _is_empty(staging) and not _begun(run, staging):
        raise OutputConflict(f"{staging} exists and was not made by the run in {run}; move it away or name another OUT")


def _begun(run: Path, staging: Path) -> list[dict[str, Any]]:
    """Journal entries of the jobs that a run directory began in a staging directory, oldest first."""
    return places.entries_of(Journal(run / "journal").of_kind("rewrite"), staging)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def require_space(out: Path, needed_bytes: int, run: Path | None = None, run_bytes: int = 0) -> None:
    """Raise InsufficientSpace if the disk of `out` has no room for so many bytes.

    run_bytes: what the run directory `run` needs, which may be on the same disk.
    """
    places = [(out, needed_bytes, "output needs", "an OUT")]
    if run is not None:
        same = _disk_of(run) == _disk_of(out)
        places = [(out, needed_bytes + run_bytes, "output and the run directory need", "an OUT")] if same else places
        places += [] if same else [(run, run_bytes, "run directory needs", "--run DIR")]
    for place, nbytes, what, name in places:
        free = files.free_bytes(place.absolute())
        if free < nbytes + _MARGIN_BYTES:
            raise InsufficientSpace(
                f"the {what} {nbytes + _MARGIN_BYTES:,} bytes, but the disk of {place.absolute().parent} has "
                f"{free:,} free; make room or name {name} on another disk"
            )


def _disk_of(path: Path) -> int:
    return files.existing_directory(path.absolute()).stat().st_dev


def options_record(options: PlanConfig) -> dict[str, Any]:
    """The options of a plan as pruning.json holds them."""
    return json.loads(json.dumps(asdict(options)))


def fingerprint_digest(fingerprint: dict[str, Any]) -> str:
    """One sha256 for all that identifies a model."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def write_checkpoint(
    source: Checkpoint,
    run: RunDirectory,
    out: Path,
    options: PlanConfig,
    keeps: Sequence[LayerKeep],
    restoration: Restoration,
    restore: str,
    max_shard_bytes: int,
    progress: Progress,
    ranks: Ranks = ALONE,
    code: Sequence[str] = (),
) -> tuple[dict[str, Any], int]:
    """Write the pruned checkpoint, going on with shards that an interrupted call finished.

    code: names of the tokenizer's own files of code, where they are trusted, to be carried.
    ranks: those that write a part of the shards each; all else is written by the first, for which `run` is open for
    writing.
    The contents of pruning.json and the bytes that this rank has written come out.
    Raises OutputConflict or InsufficientSpace before anything is written.
    """
    shapes, family = run.layer_shapes, family_of(source.config, source.source)
    plan = plan_shards(source, family, shapes, keeps, restoration, max_shard_bytes)
    record = _record(source, run, options, keeps, restore, restoration.how)
    found = ranks.from_first(lambda: read_record(out))
    if found is not None and _nameless(found) == _nameless(record):
        return found, 0
    if found is not None:
        differences = output_differences(found, record) or "otherwise"
        raise OutputConflict(f"{out} was pruned {differences}; name another OUT or move it away")
    staging = files.partial_path(out)
    job, finished = ranks.from_first(lambda: _begun_job(source, run, out, plan, record, restoration.digests))
    written = 0
    with progress.stage("rewrite", len(plan.shards), unit="shard") as stage:
        stage.skip(len(finished))
        left = [shard for shard in plan.shards if shard.name not in finished]
        for first in range(0, len(left), ranks.world):
            shards, own = left[first : first + ranks.world], ""
            for shard in shards[ranks.rank : ranks.rank + 1]:
                own = write_shard(source, shard, staging)
                source.require_unchanged()
                written += shard.nbytes
            for shard, digest in zip(shards, ranks.gathered(own), strict=False):
                if ranks.is_first:
                    run.journal.append("shard", shard.name, job=job, digest=digest)
                finished[shard.name] = digest
                stage.advance(bytes_moved=shard.nbytes)
    if not ranks.is_first:
        ranks.barrier()
        return record, written
    small: list[tuple[str, bytes | Iterable[bytes]]] = [
        (name, files.read_plain(source.directory / name)) for name in code if name != MODELING_NAME
    ]
    for name, contents in small + _small_files(source, plan, record, shapes, keeps, restore, family):
        files.make_directory((staging / name).parent)
        finished[name] = files.write_committed(staging / name, contents)
        written += (staging / name).stat().st_size
    files.write_committed(staging / DIGESTS_NAME, digests_file(finished))
    files.remove(staging / places.MARK)
    files.commit_rename(staging, out)
    ranks.barrier()
    return record, written


def _begun_job(
    source: Checkpoint,
    run: RunDirectory,
    out: Path,
    plan: ShardPlan,
    record: dict[str, Any],
    digests: Sequence[str],
) -> tuple[str, dict[str, str]]:
    """The job with its staging directory, and the shards that are whole there: name to sha256."""
    require_own_place(source, out, run.path)
    staging = files.partial_path(out)
    job = _open_job(run, out, staging, plan, record, digests)
    finished = {e["name"]: e["digest"] for e in run.journal.of_kind("shard") if e["job"] == job}
    sizes = {shard.name: shard.nbytes for shard in plan.shards}
    finished = {n: digest for n, digest in finished.items() if _is_whole(staging / n, sizes.get(n), digest)}
    require_space(out, sum(shard.nbytes for shard in plan.shards if shard.name not in finished))
    return job, finished


def _open_job(
    run: RunDirectory, out: Path, staging: Path, plan: ShardPlan, record: dict[str, Any], digests: Sequence[str]
) -> str:
    """Make the staging directory, or take up the one that an interrupted call of this very job left."""
    previous = _begun(run.path, staging)
    parts = (plan_digest(plan), json.dumps(_nameless(record), sort_keys=True), *digests)
    job = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    mark = previous[-1].get("mark") if previous else None
    if not previous or previous[-1]["job"] != job:
        files.remove(staging)  # of an older plan
        mark = places.new_mark()
        place = str(staging.absolute())
        run.journal.append("rewrite", out.name, place=place, job=job, restore=record["restore"], mark=mark)
    files.make_own_directory(staging)
    if isinstance(mark, str) and not (staging / places.MARK).exists():
        files.write_committed(staging / places.MARK, mark.encode())
    return job


def _nameless(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what the model's directory was called, which may be found through another path."""
    return {**record, "base": {**record["base"], "name": ""}}


def _is_whole(path: Path, nbytes: int | None, digest: str) -> bool:
    return path.is_file() and path.stat().st_size == nbytes and files.file_digest(path) == digest


def _record(
    source: Checkpoint,
    run: RunDirectory,
    options: PlanConfig,
    keeps: Sequence[LayerKeep],
    restore: str,
    refit: dict[str, Any] | None,
) -> dict[str, Any]:
    shapes = run.layer_shapes
    sizes = pruned_sizes(shapes, keeps, source.parameters, restore)
    return {
        "format": RECORD_FORMAT,
        "version": RECORD_VERSION,
        "base": {"name": base_name(source.source), "fingerprint": fingerprint_digest(source.fingerprint)},
        "options": options_record(options),
        "restore": restore,
        **({} if refit is None else {"refit": refit}),
        "calibration": run.manifest["calibration"],
        **sizes.record(),
        "layers": [
            {
                "kv_groups": shape.kv_groups,
                "neurons": shape.neurons,
                "kept_kv_groups": keep.kv_groups.tolist(),
                "kept_neurons": keep.neurons.tolist(),
                **({"experts": list(shape.experts)} if shape.experts else {}),
            }
            for keep, shape in zip(keeps, shapes, strict=True)
        ],
    }


def carried_files(directory: Path) -> Iterator[tuple[str, Iterable[bytes]]]:
    """Names and contents of what goes with a model into anything that is made from it: tokenizer, licence."""
    for path, hindrance in _meant_to_be_carried(directory):
        if hindrance is None:
            yield path.relative_to(directory).as_posix(), carried.chunks(path)


def tell_left_out(directory: Path) -> None:
    """Warn, before any long work, of what goes with a model but cannot be carried or quoted."""
    for path, hindrance in _meant_to_be_carried(directory):
        if hindrance is not None:
            logger.warning("%s is left out of the result: %s", path, hindrance)
    for part in unusable_metadata(directory):
        logger.warning("%s of %s is left out of the model card", part, directory / "README.md")


def _meant_to_be_carried(directory: Path) -> Iterator[tuple[Path, str | None]]:
    """Files that go with a model, and what keeps each from it."""
    for path in sorted((*directory.iterdir(), *directory.glob(f"{TEMPLATES_NAME}/*"))):
        if path.is_file() and is_carried(path.relative_to(directory).as_posix()):
            yield path, carried.hindrance(path, directory)


def _small_files(
    source: Checkpoint,
    plan: ShardPlan,
    record: dict[str, Any],
    shapes: Sequence[LayerShape],
    keeps: Sequence[LayerKeep],
    restore: str,
    family: Family,
) -> list[tuple[str, bytes | Iterable[bytes]]]:
    """Names and contents of all files without tensors, the index and the config last."""
    contents: list[tuple[str, bytes | Iterable[bytes]]] = list(carried_files(source.directory))
    contents.append((MODELING_NAME, modeling_file()))
    contents.append((RECORD_NAME, json.dumps(record, separators=(",", ":")).encode() + b"\n"))
    card = model_card(source.source, source.directory, record, multimodal=source.wrapper is not None)
    contents.append(("README.md", card.encode()))
    index = plan.index()
    if index is not None:
        contents.append((INDEX_NAME, index))
    config = _pruned_config(source, shapes, keeps, restore, family)
    contents.append(("config.json", json.dumps(config, indent=2).encode() + b"\n"))
    return contents


def _pruned_config(
    source: Checkpoint,
    shapes: Sequence[LayerShape],
    keeps: Sequence[LayerKeep],
    restore: str,
    family: Family,
) -> dict[str, Any]:
    """The dense config.json with every layer's own sizes, and the classes that know what to do with them.

    The global sizes stay the dense ones, which pass validation everywhere. The model_type is one of our own, so that
    loading without remote code asks for it.
    """
    if source.wrapper is not None:
        whole = source.wrapper.config
        sizes = _pruned_sizes(whole["text_config"], shapes, keeps, restore, family)
        return {**whole, **_classes(whole, wrapper_classes(whole)), "text_config": sizes}
    sizes = _pruned_sizes(source.config, shapes, keeps, restore, family)
    return {**sizes, **_classes(source.config, family.pruned_classes)}


def wrapper_classes(config: dict[str, Any]) -> dict[str, str]:
    """Auto class to the class in `modeling/` of a multimodal model.

    The model without its head has none: transformers would not find the tensors of another class's.
    """
    name = str(config["architectures"][0]).removeprefix("Pruned")
    return {"AutoModelForImageTextToText": f"Pruned{name}"}


def _classes(config: dict[str, Any], classes: dict[str, str]) -> dict[str, Any]:
    """What a config.json says of the classes that load it. classes: auto class to the model class in `modeling/`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    *_, architecture = classes.values()
    classes = {"AutoConfig": f"Pruned{CONFIG_MAPPING[config['model_type']].__name__}", **classes}
    module = MODELING_NAME.removesuffix(".py")
    return {
        "model_type": PRUNED_TYPE + config["model_type"],
        "architectures": [architecture],
        "auto_map": {auto: f"{module}.{name}" for auto, name in classes.items()},
    }


def _pruned_sizes(
    config: dict[str, Any],
    shapes: Sequence[LayerShape],
    keeps: Sequence[LayerKeep],
    restore: str,
    family: Family,
) -> dict[str, Any]:
    """A language model's config with every layer's own sizes."""
    return {
        **config,
        "head_dim": shapes[0].head_dim,
        "per_layer_config": {
            str(i): {
                "num_attention_heads": len(keep.kv_groups) * shape.heads_per_group,
                "num_key_value_heads": len(keep.kv_groups),
                **({} if shape.experts else {"intermediate_size": len(keep.neurons)}),
            }
            for i, (keep, shape) in enumerate(zip(keeps, shapes, strict=True))
        },
        **(
            {"pruned_expert_sizes": [_expert_sizes(family, *pair) for pair in zip(shapes, keeps, strict=True)]}
            if family.experts
            else {}
        ),
        "allow_global_per_layer_attribute_access": True,
        "pruned_output_bias": restore != "none" or config.get("pruned_output_bias", False),
    }


def _expert_sizes(family: Family, shape: LayerShape, keep: LayerKeep) -> list[int]:
    """Neurons that stay in each expert of a layer."""
    return [len(part.own(keep.neurons)) for part in family.parts(shape) if shape.experts and part.kind.name == "mlp"]


def estimated_bytes(source: Checkpoint, shapes: Sequence[LayerShape], ratio: float) -> int:
    """About how large the output will be, before anything is decided."""
    return int(source.nbytes - ratio * sum(shape.prunable for shape in shapes) * source.nbytes / source.parameters)
