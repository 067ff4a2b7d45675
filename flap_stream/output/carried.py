"""Which of a model's small files may go with what is made of it: those that are its own, and of credible size."""

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from flap_stream.model.model_files import TEMPLATES_NAME, is_carried
from flap_stream.output.model_card import unusable_metadata
from flap_stream.storage import files, places

logger = logging.getLogger(__name__)

MOST_BYTES = 8 << 20
_LARGE_NAMES = ("merges", "sentencepiece", "spiece", "tekken", "tokenizer", "vocab")
_LARGE_SUFFIXES = (".model", ".tiktoken")
_CHUNK_BYTES = 1 << 20


def hindrance(path: Path, directory: Path) -> str | None:
    """What keeps a file in a model's folder from being carried, as words for a person; None if nothing does.

    A link is carried if it stays in the folder, or is one of those that the Hub's cache consists of: others could bring
    anything that the user may read into a result that is published.
    """
    if not path.name.isprintable():  # nor are the bytes of a name that is not UTF-8
        return "its name is not printable text"
    if not places.has_room(path.name):
        return "its name is too long"
    if not os.access(path, os.R_OK):
        return "it may not be read"
    own, target = directory.resolve(), path.resolve()
    blobs = own.parent.parent / "blobs" if own.parent.name == "snapshots" else own
    if not target.is_relative_to(own) and not target.is_relative_to(blobs):
        return f"it links to {target}, outside of the model's folder; put a copy there if it belongs to the model"
    is_vocabulary = path.name.startswith(_LARGE_NAMES) or path.suffix in _LARGE_SUFFIXES
    size, most = target.stat().st_size, files.MOST_BYTES if is_vocabulary else MOST_BYTES
    return f"it has {size:,} bytes, and at most {most:,} of such a file are carried" if size > most else None


def chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file that may be carried, a part at a time."""
    descriptor = os.open(path.resolve(), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def carried_files(directory: Path) -> Iterator[tuple[str, Iterable[bytes]]]:
    """Names and contents of what goes with a model into anything that is made from it: tokenizer, licence."""
    for path, reason in _meant_to_be_carried(directory):
        if reason is None:
            yield path.relative_to(directory).as_posix(), chunks(path)


def tell_left_out(directory: Path) -> None:
    """Warn, before any long work, of what goes with a model but cannot be carried or quoted."""
    for path, reason in _meant_to_be_carried(directory):
        if reason is not None:
            logger.warning("%s is left out of the result: %s", path, reason)
    for part in unusable_metadata(directory):
        logger.warning("%s of %s is left out of the model card", part, directory / "README.md")


def _meant_to_be_carried(directory: Path) -> Iterator[tuple[Path, str | None]]:
    """Files that go with a model, and what keeps each from it."""
    for path in sorted((*directory.iterdir(), *directory.glob(f"{TEMPLATES_NAME}/*"))):
        if path.is_file() and is_carried(path.relative_to(directory).as_posix()):
            yield path, hindrance(path, directory)
