"""The directory in which a pruned checkpoint is built, and which is renamed into place once it is complete."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flap_stream.errors import OutputConflict
from flap_stream.model.model_code import MODELING_NAME, modeling_file
from flap_stream.model.model_files import INDEX_NAME
from flap_stream.output.carried import carried_files
from flap_stream.output.destination import begun_jobs, require_own_place, require_space
from flap_stream.output.digests import DIGESTS_NAME, digests_file
from flap_stream.output.fp8_config import fp8_config
from flap_stream.output.model_card import model_card
from flap_stream.output.pruned_config import pruned_config
from flap_stream.output.pruned_model import PrunedModel
from flap_stream.output.pruning_record import RECORD_NAME, without_name
from flap_stream.output.recipe import RECIPE_NAME
from flap_stream.output.shard_plan import ShardPlan, plan_digest
from flap_stream.storage import files, places
from flap_stream.storage.differences import output_differences
from flap_stream.storage.run_directory import RunDirectory


@dataclass(frozen=True)
class Staging:
    """Where one pruned checkpoint is built.

    run: where finished shards are noted, open for writing on the first rank. record: the contents of pruning.json.
    """

    pruned: PrunedModel
    run: RunDirectory
    out: Path
    plan: ShardPlan
    record: dict[str, Any]

    @property
    def directory(self) -> Path:
        """The directory in which the checkpoint is built."""
        return files.partial_path(self.out)

    @cached_property
    def digest(self) -> str:
        """Identifies this job: sha256 of the shards' headers and sources, the record and the refitted files."""
        parts = (plan_digest(self.plan), json.dumps(without_name(self.record), sort_keys=True))
        return hashlib.sha256("\0".join((*parts, *self.pruned.restoration.digests)).encode()).hexdigest()

    def require_same(self, found: dict[str, Any]) -> None:
        """Raise OutputConflict unless what is complete at OUT is this checkpoint. found: the record of that."""
        if without_name(found) != without_name(self.record):
            differences = output_differences(found, self.record) or "otherwise"
            raise OutputConflict(f"{self.out} was pruned {differences}; name another OUT or move it away")

    def begin(self) -> dict[str, str]:
        """Make the directory, or reuse it; returns the shards that are whole there, name to sha256.

        Raises OutputConflict or InsufficientSpace before anything is written.
        """
        require_own_place(self.pruned.source, self.out, self.run.path)
        self._open()
        finished = {e["name"]: e["digest"] for e in self.run.journal.of_kind("shard") if e["job"] == self.digest}
        sizes = {shard.name: shard.nbytes for shard in self.plan.shards}
        finished = {n: digest for n, digest in finished.items() if _is_whole(self.directory / n, sizes.get(n), digest)}
        require_space(self.out, sum(shard.nbytes for shard in self.plan.shards if shard.name not in finished))
        return finished

    def _open(self) -> None:
        """Make the directory, or reuse the one that an interrupted call of this very job left."""
        run, directory = self.run, self.directory
        previous = begun_jobs(run.path, directory)
        mark = previous[-1].get("mark") if previous else None
        if not previous or previous[-1]["job"] != self.digest:
            files.remove(directory)  # of an older plan
            mark = places.new_mark()
            how = {"restore": self.pruned.restore, "fp8": self.pruned.linears is not None}
            run.journal.append(
                "rewrite", self.out.name, place=str(directory.absolute()), job=self.digest, mark=mark, **how
            )
        files.make_own_directory(directory)
        if isinstance(mark, str) and not (directory / places.MARK).exists():
            files.write_committed(directory / places.MARK, mark.encode())

    def note(self, shard: str, digest: str) -> None:
        """Note that a shard is whole. digest: its sha256."""
        self.run.journal.append("shard", shard, job=self.digest, digest=digest)

    def finish(self, digests: dict[str, str]) -> int:
        """Write all files without tensors and rename the directory into place; returns the bytes written.

        digests: sha256 of the shards, by name.
        """
        written, digests = 0, dict(digests)
        for name, contents in _small_files(self):
            files.make_directory((self.directory / name).parent)
            digests[name] = files.write_committed(self.directory / name, contents)
            written += (self.directory / name).stat().st_size
        files.write_committed(self.directory / DIGESTS_NAME, digests_file(digests))
        files.remove(self.directory / places.MARK)
        files.commit_rename(self.directory, self.out)
        return written


def _is_whole(path: Path, nbytes: int | None, digest: str) -> bool:
    return path.is_file() and path.stat().st_size == nbytes and files.file_digest(path) == digest


def _small_files(staging: Staging) -> list[tuple[str, bytes | Iterable[bytes]]]:
    """Names and contents of all files without tensors, the index and the config last."""
    source, record = staging.pruned.source, staging.record
    code = [name for name in staging.pruned.code if name != MODELING_NAME]
    contents: list[tuple[str, bytes | Iterable[bytes]]] = []
    contents += [(name, files.read_plain(source.directory / name)) for name in code]
    contents += carried_files(source.directory)
    contents.append((MODELING_NAME, modeling_file()))
    contents.append((RECIPE_NAME, staging.pruned.recipe))
    contents.append((RECORD_NAME, json.dumps(record, separators=(",", ":")).encode() + b"\n"))
    card = model_card(source.source, source.directory, record, multimodal=source.wrapper is not None)
    contents.append(("README.md", card.encode()))
    index = staging.plan.index()
    if index is not None:
        contents.append((INDEX_NAME, index))
    config = {**pruned_config(staging.pruned), **fp8_config(staging.pruned, staging.plan)}
    contents.append(("config.json", json.dumps(config, indent=2).encode() + b"\n"))
    return contents
