"""Whether the dense model is still the one that the statistics in a run directory were collected from."""

import logging
from pathlib import Path

import numpy as np

from flap_stream.engine.ranks import ALONE, Ranks
from flap_stream.errors import CorruptRun, RunMismatch
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.model.families import family_of
from flap_stream.model.safetensors_format import row_ranges
from flap_stream.model.skeleton import Skeleton
from flap_stream.storage.differences import model_differences
from flap_stream.storage.run_directory import RunDirectory
from flap_stream.storage.run_manifest import has_shapes

logger = logging.getLogger(__name__)

_ROWS = 1024  # of the embedding, read at once; not measured


def absolute(source: str) -> str:
    """A model's directory as an absolute path; a Hub id as it is."""
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def require_model_of(run: RunDirectory, source: Checkpoint, ranks: Ranks = ALONE) -> None:
    """Raise RunMismatch unless the statistics were collected from this very model."""
    if source.fingerprint != run.manifest["model"]:
        now = {"model": source.fingerprint, "source": absolute(source.source), "parameters": source.parameters}
        raise RunMismatch(
            f"{run.path} was collected {model_differences(run.manifest, now)}; give that model, or collect again"
        )
    skeleton, vocabulary = Skeleton(source.config, source.source), run.manifest["sizes"]["vocabulary"]
    shapes = [skeleton.layer_shape(i) for i in range(len(skeleton.layers))]
    if not has_shapes(run.manifest, shapes) or vocabulary != source.tensors[skeleton.family.embedding].shape[0]:
        raise CorruptRun(
            f"{run.path / 'run.json'} has sizes that differ from those of {source.source}; delete it and collect again"
        )
    if ranks.is_first:
        require_same_weights(source, run)


def require_same_weights(source: Checkpoint, run: RunDirectory) -> None:
    """Raise RunMismatch if tensors whose statistics are stored have changed since.

    Nothing is read while the files' sizes and times match those recorded; files that were copied, downloaded again or
    touched are read once and compared with the checksums of what collection read.
    """
    recorded = run.recorded_source()
    if recorded is not None and recorded["stamps"] == source.stamps:
        return
    embedding = _embedding_checksum(source, run)
    if recorded is not None:
        logger.warning(
            "sizes or times of the files of %s have changed; reading them to see whether their contents have, too",
            source.source,
        )
        if embedding != recorded["embedding"]:
            raise _mismatch(source, run, "its embedding")
        skeleton, family = Skeleton(source.config, source.source), family_of(source.config, source.source)
        for i, checksum in enumerate(run.statistics.weights_checksums()):
            names = [f"{family.layer_prefix(i)}{name}" for name in skeleton.layer_tensors(i)]
            if source.read_checksum([source.tensors[name] for name in names]) != checksum:
                raise _mismatch(source, run, f"layer {i}")
    run.record_source(source.stamps, embedding)


def _mismatch(source: Checkpoint, run: RunDirectory, what: str) -> RunMismatch:
    then = run.manifest["source"]
    where = "" if Path(source.source).resolve() == Path(then).resolve() else f" ({then} then)"
    return RunMismatch(
        f"{what} of {source.source} does not have the weights that {run.path} was collected from{where}; "
        "restore the model, or delete the run directory and collect again"
    )


def _embedding_checksum(source: Checkpoint, run: RunDirectory) -> str:
    """Checksum of the rows of the calibration tokens; empty if there are none."""
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
