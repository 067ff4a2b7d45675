"""The texts that options name: files, folders of files, and data sets on the Hub, as one stream of pieces."""

import json
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from flap_stream.errors import InvalidText
from flap_stream.text.documents import Piece, Reading, file_pieces
from flap_stream.text.text_files import KINDS, PACKINGS, kind_of, open_bytes

DATASETS = ("wikitext2", "c4", "ptb")

_NOT_TEXT = ("readme", "license", "licence", "notice", "citation", "dataset_info", "state.json")
_C4_EVALUATION_DOCUMENTS = 1100  # as in the released code


class _HubFile(NamedTuple):
    """A file of a data set on the Hub, and its text column."""

    repository: str
    name: str
    column: str
    revision: str | None = None


# Splits for calibration and for evaluation: lib/data.py of the released code.
_WIKITEXT = "Salesforce/wikitext", "wikitext-2-raw-v1/{}-00000-of-00001.parquet", "text"
_PTB = "ptb-text-only/ptb_text_only", "penn_treebank/{}/0000.parquet", "sentence"
_HUB_FILES = {
    "wikitext2": [_HubFile(_WIKITEXT[0], _WIKITEXT[1].format(split), _WIKITEXT[2]) for split in ("train", "test")],
    "ptb": [
        _HubFile(_PTB[0], _PTB[1].format(split), _PTB[2], "refs/convert/parquet") for split in ("train", "validation")
    ],
    "c4": [
        _HubFile("allenai/c4", f"en/c4-{split}.json.gz", "text")
        for split in ("train.00000-of-01024", "validation.00000-of-00008")
    ],
}


def check_sources(sources: Sequence[str], evaluation: bool) -> None:
    """Raise InvalidText for sources that are unusable, as far as can be told without reading them."""
    for source in sources:
        if source == "c4" and not evaluation and len(sources) > 1:
            raise InvalidText("c4 is sampled document by document; it must be the only --calibration text")
        if source not in DATASETS:
            text_files(Path(source))


def fetch(sources: Sequence[str], evaluation: bool) -> None:
    """Download the named Hub data sets to its cache; they are small compared with a model."""
    for source in sources:
        if source in DATASETS:
            _fetched(source, evaluation)


def joined(sources: Sequence[str], evaluation: bool, reading: Reading) -> Iterator[str]:
    """Yield the documents of all sources in pieces, with the separators of the released code between documents."""
    separator, is_first = "\n\n" if evaluation else " ", True
    for source in sources:
        for begins, piece in _pieces(source, evaluation, reading):
            if begins and not is_first:
                yield separator
            is_first = False
            yield piece


def text_files(path: Path) -> list[Path]:
    """The text files that a path names: itself, or those in a folder.

    Raises InvalidText if there is none, or it is not a plain file.
    """
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if _is_text_of(path, file))
        if not found:
            raise InvalidText(
                f"directory {path} holds no {', '.join(KINDS)} file (not counting hidden files and READMEs)"
            )
        return found
    if not path.exists():
        raise InvalidText(f"no such text: {path} is neither a file, a directory, nor one of {', '.join(DATASETS)}")
    if kind_of(path) is None:
        raise InvalidText(
            f"{path} is not a {', '.join(KINDS)} file (plain or {', '.join(PACKINGS)}), .npy file or directory; "
            "convert it to one"
        )
    if not path.is_file():
        raise InvalidText(f"{path} is not a plain file; save the text to one first")
    return [path]


def _is_text_of(folder: Path, file: Path) -> bool:
    inner = file.relative_to(folder).parts
    is_hidden = any(part.startswith(".") for part in inner)
    is_about = file.name.lower().startswith(_NOT_TEXT)
    return kind_of(file) is not None and not is_hidden and not is_about and file.is_file()


def _pieces(source: str, evaluation: bool, reading: Reading) -> Iterator[Piece]:
    if source not in DATASETS:
        for path in text_files(Path(source)):
            yield from file_pieces(path, reading)
        return
    path, column = _fetched(source, evaluation)
    rows = file_pieces(path, Reading(column))
    yield from islice(rows, _C4_EVALUATION_DOCUMENTS) if source == "c4" else rows


def _fetched(source: str, evaluation: bool) -> tuple[Path, str]:
    """The local file of a Hub data set, downloaded if necessary, and its text column."""
    from huggingface_hub import hf_hub_download

    file = _HUB_FILES[source][evaluation]
    try:
        found = hf_hub_download(file.repository, file.name, repo_type="dataset", revision=file.revision)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidText(
            f"{source} could not be downloaded from the Hub ({reason}); give a local text file instead"
        ) from error
    return Path(found), file.column


class C4Documents(Sequence[str]):
    """Random access to the documents of the C4 file that the released code samples.

    They are unpacked to a nameless file in the Hub's cache directory, about 0.8 GB.
    """

    def __init__(self) -> None:
        from huggingface_hub.constants import HF_HUB_CACHE

        path, _ = _fetched("c4", evaluation=False)
        self._file = tempfile.TemporaryFile(dir=HF_HUB_CACHE)  # noqa: SIM115
        self._starts = array("q", [0])
        with open_bytes(path) as packed:
            for line in packed:
                self._file.write(line)
                self._starts.append(self._starts[-1] + len(line))

    def __enter__(self) -> "C4Documents":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: Any) -> str:
        self._file.seek(self._starts[index])
        return json.loads(self._file.readline())["text"]
