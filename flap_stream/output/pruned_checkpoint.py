"""The pruned checkpoint as a whole: built in a staging directory and renamed into place once it is complete."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flap_stream.engine.ranks import ALONE, Ranks
from flap_stream.errors import OutputConflict
from flap_stream.model.model_code import MODELING_NAME, modeling_file
from flap_stream.model.model_files import INDEX_NAME
from flap_stream.output.carried import carried_files
from flap_stream.output.destination import begun_jobs, require_own_place, require_space
from flap_stream.output.digests import DIGESTS_NAME, digests_file
from flap_stream.output.fp8_config import fp8_config, tell_unconverted
from flap_stream.output.model_card import model_card
from flap_stream.output.pruned_config import pruned_config
from flap_stream.output.pruned_model import PrunedModel
from flap_stream.output.pruning_record import RECORD_NAME, pruning_record, read_record, without_name
from flap_stream.output.recipe import RECIPE_NAME
from flap_stream.output.shard_plan import ShardPlan, plan_digest, plan_shards
from flap_stream.output.shard_writer import write_shard
from flap_stream.progress import Progress
from flap_stream.storage import files, places
from flap_stream.storage.differences import output_differences
from flap_stream.storage.run_directory import RunDirectory


@dataclass(frozen=True)
class _Job:
    """One pruned checkpoint to be written.

    run: where finished shards are noted, open for writing on the first rank. record: the contents of pruning.json.
    """

    pruned: PrunedModel
    run: RunDirectory
    out: Path
    plan: ShardPlan
    record: dict[str, Any]

    @property
    def staging(self) -> Path:
        """The directory in which the checkpoint is built."""
        return files.partial_path(self.out)

    @cached_property
    def digest(self) -> str:
        """Sha256 of everything that decides the bytes: tells whether a staging directory is this job's."""
        parts = (plan_digest(self.plan), json.dumps(without_name(self.record), sort_keys=True))
        return hashlib.sha256("\0".join((*parts, *self.pruned.restoration.digests)).encode()).hexdigest()


def write_checkpoint(
    pruned: PrunedModel,
    run: RunDirectory,
    out: Path,
    max_shard_bytes: int,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, Any], int]:
    """Write the pruned checkpoint, keeping shards that an interrupted call finished.

    ranks: each writes a part of the shards; the first writes everything else, and has `run` open for writing.
    Returns the contents of pruning.json and the number of bytes that this rank has written.
    Raises OutputConflict or InsufficientSpace before anything is written.
    """
    job = _Job(pruned, run, out, plan_shards(pruned, max_shard_bytes), pruning_record(pruned))
    tell_unconverted(pruned, job.plan, warns=ranks.is_first)
    found = ranks.from_first(lambda: read_record(out))
    if found is not None:
        if without_name(found) == without_name(job.record):
            return found, 0
        differences = output_differences(found, job.record) or "otherwise"
        raise OutputConflict(f"{out} was pruned {differences}; name another OUT or move it away")
    finished = ranks.from_first(lambda: _begin(job))
    written = _write_shards(job, finished, progress, ranks)
    if ranks.is_first:
        written += _finish(job, finished)
    ranks.barrier()
    return job.record, written


def _begin(job: _Job) -> dict[str, str]:
    """Make or reuse the staging directory; returns the shards that are whole there, name to sha256."""
    require_own_place(job.pruned.source, job.out, job.run.path)
    _open_staging(job)
    finished = {e["name"]: e["digest"] for e in job.run.journal.of_kind("shard") if e["job"] == job.digest}
    sizes = {shard.name: shard.nbytes for shard in job.plan.shards}
    finished = {n: digest for n, digest in finished.items() if _is_whole(job.staging / n, sizes.get(n), digest)}
    require_space(job.out, sum(shard.nbytes for shard in job.plan.shards if shard.name not in finished))
    return finished


def _open_staging(job: _Job) -> None:
    """Make the staging directory, or reuse the one that an interrupted call of this very job left."""
    run, staging = job.run, job.staging
    previous = begun_jobs(run.path, staging)
    mark = previous[-1].get("mark") if previous else None
    if not previous or previous[-1]["job"] != job.digest:
        files.remove(staging)  # of an older plan
        mark = places.new_mark()
        place, restore = str(staging.absolute()), job.pruned.restore
        run.journal.append("rewrite", job.out.name, place=place, job=job.digest, restore=restore, mark=mark)
    files.make_own_directory(staging)
    if isinstance(mark, str) and not (staging / places.MARK).exists():
        files.write_committed(staging / places.MARK, mark.encode())


def _is_whole(path: Path, nbytes: int | None, digest: str) -> bool:
    return path.is_file() and path.stat().st_size == nbytes and files.file_digest(path) == digest


def _write_shards(job: _Job, finished: dict[str, str], progress: Progress, ranks: Ranks) -> int:
    """Write this rank's part of the missing shards; returns the number of its bytes.

    finished: name to sha256 of whole shards, to which those written by any rank are added.
    """
    written = 0
    with progress.stage("rewrite", len(job.plan.shards), unit="shard") as stage:
        stage.skip(len(finished))
        left = [shard for shard in job.plan.shards if shard.name not in finished]
        for first in range(0, len(left), ranks.world):
            shards, own = left[first : first + ranks.world], ""
            for shard in shards[ranks.rank : ranks.rank + 1]:
                own = write_shard(job.pruned.source, shard, job.staging)
                job.pruned.source.require_unchanged()
                written += shard.nbytes
            for shard, digest in zip(shards, ranks.gathered(own), strict=False):
                if ranks.is_first:
                    job.run.journal.append("shard", shard.name, job=job.digest, digest=digest)
                finished[shard.name] = digest
                stage.advance(bytes_moved=shard.nbytes)
    return written


def _finish(job: _Job, digests: dict[str, str]) -> int:
    """Write all files without tensors and rename the checkpoint into place; returns the bytes written.

    digests: sha256 of the shards, by name.
    """
    written, digests = 0, dict(digests)
    for name, contents in _small_files(job):
        files.make_directory((job.staging / name).parent)
        digests[name] = files.write_committed(job.staging / name, contents)
        written += (job.staging / name).stat().st_size
    files.write_committed(job.staging / DIGESTS_NAME, digests_file(digests))
    files.remove(job.staging / places.MARK)
    files.commit_rename(job.staging, job.out)
    return written


def _small_files(job: _Job) -> list[tuple[str, bytes | Iterable[bytes]]]:
    """Names and contents of all files without tensors, the index and the config last."""
    source, record = job.pruned.source, job.record
    code = [name for name in job.pruned.code if name != MODELING_NAME]
    contents: list[tuple[str, bytes | Iterable[bytes]]] = []
    contents += [(name, files.read_plain(source.directory / name)) for name in code]
    contents += carried_files(source.directory)
    contents.append((MODELING_NAME, modeling_file()))
    contents.append((RECIPE_NAME, job.pruned.recipe))
    contents.append((RECORD_NAME, json.dumps(record, separators=(",", ":")).encode() + b"\n"))
    card = model_card(source.source, source.directory, record, multimodal=source.wrapper is not None)
    contents.append(("README.md", card.encode()))
    index = job.plan.index()
    if index is not None:
        contents.append((INDEX_NAME, index))
    config = {**pruned_config(job.pruned), **fp8_config(job.pruned, job.plan)}
    contents.append(("config.json", json.dumps(config, indent=2).encode() + b"\n"))
    return contents
