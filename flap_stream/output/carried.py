"""Copying a model's small files (tokenizer, licence) into what is made from it: those that are its own and small."""

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from flap_stream.model.model_files import TEMPLATES_NAME, is_carried
from flap_stream.output.model_card import unusable_metadata
from flap_stream.progress import printable
from flap_stream.storage import files, places

logger = logging.getLogger(__name__)

MOST_BYTES = 8 << 20  # of a file that is not a vocabulary; not measured
_LARGE_NAMES = ("merges", "sentencepiece", "spiece", "tekken", "tokenizer", "vocab")
_LARGE_SUFFIXES = (".model", ".tiktoken")
_CHUNK_BYTES = 1 << 20  # not measured


def hindrance(path: Path, directory: Path) -> str | None:
    """Why a file in a model's directory cannot be copied, for the user; None if it can.

    Links are followed within the directory and into the Hub cache's blobs only: others could put anything that the user
    can read into a published result.
    """
    if not path.name.isprintable():  # which also holds for names that are not UTF-8
        return "its name is not printable text"
    if not places.has_room(path.name):
        return "its name is too long"
    if not os.access(path, os.R_OK):
        return "it is not readable"
    own, target = directory.resolve(), path.resolve()
    blobs = own.parent.parent / "blobs" if own.parent.name == "snapshots" else own
    if not target.is_relative_to(own) and not target.is_relative_to(blobs):
        return f"it links to {target}, outside the model's directory; put a copy there if it belongs to the model"
    is_vocabulary = path.name.startswith(_LARGE_NAMES) or path.suffix in _LARGE_SUFFIXES
    size, most = target.stat().st_size, files.MAX_BYTES if is_vocabulary else MOST_BYTES
    return f"it has {size:,} bytes; the limit for such a file is {most:,}" if size > most else None


def chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file that may be copied, in chunks."""
    descriptor = os.open(path.resolve(), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def carried_files(directory: Path) -> Iterator[tuple[str, Iterable[bytes]]]:
    """Names and contents of the files that are copied into everything made from a model: tokenizer, licence."""
    for path, reason in _meant_to_be_carried(directory):
        if reason is None:
            yield path.relative_to(directory).as_posix(), chunks(path)


def tell_left_out(directory: Path) -> None:
    """Warn, before any long work, of files that should be copied but cannot be, and of unusable card metadata."""
    for path, reason in _meant_to_be_carried(directory):
        if reason is not None:
            logger.warning("%s is left out of the result: %s", printable(str(path)), reason)
    for part in unusable_metadata(directory):
        logger.warning("%s of %s is left out of the model card", part, directory / "README.md")


def _meant_to_be_carried(directory: Path) -> Iterator[tuple[Path, str | None]]:
    """Files that should be copied, each with the reason why it cannot be, or None."""
    for path in sorted((*directory.iterdir(), *directory.glob(f"{TEMPLATES_NAME}/*"))):
        if path.is_file() and is_carried(path.relative_to(directory).as_posix()):
            yield path, hindrance(path, directory)
