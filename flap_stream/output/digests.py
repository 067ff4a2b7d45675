"""SHA256SUMS: the digests of a finished checkpoint, and its verification."""

from pathlib import Path

from flap_stream.errors import CorruptCheckpoint
from flap_stream.model.model_files import TEMPLATES_NAME
from flap_stream.model.safetensors_format import read_header
from flap_stream.storage import files
from flap_stream.storage.schema import hexadecimal

DIGESTS_NAME = "SHA256SUMS"


def digests_file(digests: dict[str, str]) -> bytes:
    """Contents of SHA256SUMS, in the form that `sha256sum --check` reads. digests: file name to sha256."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()


def read_digests(out: Path) -> dict[str, str]:
    """What SHA256SUMS of a complete output lists: file name to sha256.

    Raises CorruptCheckpoint if it is missing or damaged.
    """
    path = out / DIGESTS_NAME
    lines = files.read_plain(path).decode(errors="replace").splitlines() if path.is_file() else []
    digests = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    is_whole = all(len(digest) == 64 and hexadecimal(digest) for digest in digests.values())
    if "config.json" not in digests or not is_whole or not all(map(_is_written_name, digests)):
        state = "is damaged" if path.is_file() else "is missing"
        raise CorruptCheckpoint(f"{path} {state}; without it nothing can be checked, so prune again into another OUT")
    return digests


def damaged_files(out: Path) -> list[str]:
    """Files of a complete output that differ from what was written, each with what is wrong.

    Raises CorruptCheckpoint if SHA256SUMS is missing or damaged.
    """
    wrong = []
    for name, digest in read_digests(out).items():
        is_there = (out / name).is_file()
        if not is_there or not _is_credible(out / name) or files.file_digest(out / name) != digest:
            wrong.append(f"{name} is {'altered' if is_there else 'missing'}")
    return wrong


def _is_credible(path: Path) -> bool:
    """Whether a file's size is plausible, so that it can be read; a shard's header says how large it is."""
    if path.suffix != ".safetensors":
        return path.stat().st_size <= files.MAX_BYTES
    try:
        return bool(read_header(path))
    except CorruptCheckpoint:
        return False


def _is_written_name(name: str) -> bool:
    """Whether a name can be in SHA256SUMS: a file of the output, or of its directory of chat templates."""
    own = name.removeprefix(f"{TEMPLATES_NAME}/")
    return Path(own).name == own and own not in ("", "..") and len(own) <= 255
