"""Where the output is written: checks that it can be put there and that the disk has room."""

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.arithmetic.target_prices import fp8_bytes
from flap_stream.errors import InsufficientSpace, OutputConflict
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.storage import files, places
from flap_stream.storage.journal import Journal

_MARGIN_BYTES = 16 << 20  # for all files without tensors; not measured


def require_own_place(source: Checkpoint, out: Path, run: Path) -> None:
    """Raise OutputConflict if the output cannot be put at `out`, or another run has begun to write it there."""
    places.require_apart(out, run)
    if out.resolve().is_relative_to(source.directory.resolve()):
        raise OutputConflict(f"{out} lies in the model's own directory {source.directory}; name an OUT elsewhere")
    staging = files.partial_path(out)
    for path in (out, staging):
        if path.is_symlink():
            raise OutputConflict(
                f"{path} is a symbolic link to {path.readlink()}; a finished output is renamed into place, which "
                "cannot be done to a link, so name its target"
            )
    places.require_place(out)
    if staging.exists() and not _is_empty(staging) and not begun_jobs(run, staging):
        raise OutputConflict(f"{staging} exists and was not made by the run in {run}; move it away or name another OUT")


def begun_jobs(run: Path, staging: Path) -> list[dict[str, Any]]:
    """Journal entries of the jobs that a run directory began in a staging directory, oldest first."""
    return places.entries_of(Journal(run / "journal").of_kind("rewrite"), staging)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def require_space(out: Path, needed_bytes: int, run: Path | None = None, run_bytes: int = 0) -> None:
    """Raise InsufficientSpace if the disk of `out` has no room for `needed_bytes`.

    run_bytes: what the run directory `run`, which may be on the same disk, needs.
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


def estimated_bytes(
    source: Checkpoint, shapes: Sequence[LayerShape], ratio: float, linears: frozenset[str] | None = None
) -> int:
    """Estimated size of the output, before a plan exists. linears: see `PrunedModel`."""
    nbytes, removed = float(source.nbytes), ratio * sum(shape.prunable for shape in shapes)
    if linears is None:
        return int(nbytes - removed * source.nbytes / source.parameters)
    packed = (entry for name, entry in source.tensors.items() if name in linears)
    return int(nbytes - sum(entry.nbytes - fp8_bytes(prod(entry.shape)) for entry in packed)) - fp8_bytes(int(removed))
