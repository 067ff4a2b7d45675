"""Which of a model's small files may go with what is made of it: those that are its own, and of credible size."""

import os
from collections.abc import Iterator
from pathlib import Path

from flap_stream.storage import files, places

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
    size, most = target.stat().st_size, files.MAX_BYTES if is_vocabulary else MOST_BYTES
    return f"it has {size:,} bytes, and at most {most:,} of such a file are carried" if size > most else None


def chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file that may be carried, a part at a time."""
    descriptor = os.open(path.resolve(), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk
