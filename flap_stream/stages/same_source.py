"""Whether the dense model's files are still what the statistics in a run directory were taken from."""

import logging
from pathlib import Path

import numpy as np

from flap_stream.errors import RunMismatch
from flap_stream.model.architecture import family_of
from flap_stream.model.checkpoint import Checkpoint, row_ranges
from flap_stream.model.skeleton import Skeleton
from flap_stream.storage.run_directory import RunDirectory

logger = logging.getLogger(__name__)

_ROWS = 1024


def require_same_weights(source: Checkpoint, run: RunDirectory) -> None:
    """Raise RunMismatch if tensors that were used for complete layers have other bytes now.

    As long as sizes and times of the files are those that were recorded, nothing is read; files that were copied,
    downloaded again or touched are read once and held against the checksums of what pass 1 read.
    """
    recorded = run.recorded_source()
    if recorded is not None and recorded["stamps"] == source.stamps:
        return
    embedding = _embedding_checksum(source, run)
    if recorded is not None:
        logger.warning(
            "the files of %s are not those of before; reading them to see whether they differ", source.source
        )
        if embedding != recorded["embedding"]:
            raise _mismatch(source, run, "its embedding")
        skeleton, family = Skeleton(source.config, source.source), family_of(source.config, source.source)
        for i, checksum in enumerate(run.statistics.weights_checksums()):
            names = [f"{family.layers}.{i}.{name}" for name in skeleton.layer_tensors(i)]
            if source.read_checksum([source.tensors[name] for name in names]) != checksum:
                raise _mismatch(source, run, f"layer {i}")
    run.record_source(source.stamps, embedding)


def _mismatch(source: Checkpoint, run: RunDirectory, what: str) -> RunMismatch:
    then = run.manifest["source"]
    where = "" if Path(source.source).resolve() == Path(then).resolve() else f" ({then} then)"
    return RunMismatch(
        f"{what} of {source.source} has other weights than {run.path} was collected from{where}; "
        "restore the model, or delete the run directory and collect again"
    )


def _embedding_checksum(source: Checkpoint, run: RunDirectory) -> str:
    """Checksum of the rows that the calibration tokens take."""
    if not run.tokens.exists():
        return ""
    entry = source.tensors[family_of(source.config, source.source).embedding]
    row_bytes, ids = entry.nbytes // entry.shape[0], np.unique(run.tokens.read())
    block = memoryview(bytearray(min(_ROWS, len(ids)) * row_bytes))
    for at in range(0, len(ids), _ROWS):
        ranges = list(row_ranges(ids[at : at + _ROWS], row_bytes))
        data = block[: len(ids[at : at + _ROWS]) * row_bytes]
        source.read_ranges(entry, ranges, data)
        source.note_checksum(entry, at, data)
    return source.checksum([entry])
