"""The data sets on the Hub that the released code uses."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flap_stream.errors import InvalidText, first_line

DATASETS = ("wikitext2", "c4", "ptb")


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


def fetch(sources: Sequence[str], evaluation: bool) -> None:
    """Download the named Hub data sets to its cache; they are small compared with a model."""
    for source in sources:
        if source in DATASETS:
            fetched(source, evaluation)


def fetched(source: str, evaluation: bool) -> tuple[Path, str]:
    """The local file of a Hub data set, downloaded if necessary, and its text column."""
    from huggingface_hub import hf_hub_download

    file = _HUB_FILES[source][evaluation]
    try:
        found = hf_hub_download(file.repository, file.name, repo_type="dataset", revision=file.revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidText(
            f"{source} could not be downloaded from the Hub ({first_line(error)}); give a local text file instead"
        ) from error
    return Path(found), file.column
