"""Text to token windows: the released sampling for calibration, consecutive windows for evaluation."""

import hashlib
import json
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flap_stream import files
from flap_stream.errors import InvalidText
from flap_stream.model_code import tokenizer_config

DATASETS = ("wikitext2", "c4", "ptb")
_TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
# Repository, configuration, column, and the splits for calibration and evaluation: lib/data.py of the released code.
_HUB_TEXTS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "text", "train", "test"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "sentence", "train", "validation"),
}
_C4 = ("allenai/c4", "en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz")

Tokenize = Callable[[str], Sequence[int]]


def tokens_digest(tokens: np.ndarray) -> str:
    """Sha256 of int64 tokens and their shape."""
    data = np.ascontiguousarray(tokens, dtype="<i8")
    return hashlib.sha256(repr(data.shape).encode() + data.tobytes()).hexdigest()


def load_tokenizer(directory: Path, trust_remote_code: bool) -> Tokenize:
    """A function from text to token ids, special tokens added as the model's tokenizer adds them.

    Raises InvalidText if there is no tokenizer that loads without the model's own code.
    """
    tokenizer = pretrained_tokenizer(directory, trust_remote_code)
    tokenizer.model_max_length = int(1e30)  # whole texts are tokenised at once; the windows are cut afterwards
    return lambda text: tokenizer(text)["input_ids"]


def pretrained_tokenizer(directory: Path, trust_remote_code: bool) -> Any:
    """The tokenizer that transformers finds beside a model.

    Raises InvalidText if none loads without the model's own code.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            directory, config=tokenizer_config(directory), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise InvalidText(
                f"the tokenizer of {directory} is code of its own; read it and let it run with --trust-remote-code, or "
                "give ready tokens as a .npy file"
            ) from error
        reason = str(error).strip().splitlines()[0]
        raise InvalidText(
            f"the tokenizer of {directory} does not load ({reason}); give ready tokens as a .npy file instead"
        ) from error


def calibration_tokens(
    sources: Sequence[str], samples: int, length: int, seed: int, tokenize: Callable[[], Tokenize], vocab_size: int
) -> np.ndarray:
    """Calibration windows, int64 `[sample, token]`.

    sources: one of `DATASETS`, or files and directories, or one .npy of ready tokens, whose own shape counts and of
    which the first `samples` rows are used.
    tokenize: loads the tokenizer; not called for ready tokens.
    Raises InvalidText for text that is missing, unreadable, too short, or not of this vocabulary.
    Source: lib/data.py of the released code (Python's `random` seeded once, `randint` with both ends included).
    """
    ready = _ready_tokens(sources)
    if ready is not None:
        return _checked(ready[:samples], vocab_size, sources)
    draw = random.Random(seed)
    if list(sources) == ["c4"]:
        tokens = _c4_windows(samples, length, draw, tokenize())
    else:
        ids = np.asarray(tokenize()(" ".join(_documents(sources, evaluation=False))), dtype=np.int64)
        last = len(ids) - length - 1
        if last < 0:
            raise InvalidText(
                f"{_names(sources)} gives {len(ids)} tokens, but one window of {length} needs {length + 1}; "
                "give more text or a smaller --sequence-length"
            )
        starts = [draw.randint(0, last) for _ in range(samples)]
        tokens = np.stack([ids[start : start + length] for start in starts])
    return _checked(tokens, vocab_size, sources)


def evaluation_tokens(
    sources: Sequence[str], samples: int | None, length: int, tokenize: Callable[[], Tokenize], vocab_size: int
) -> np.ndarray:
    """Consecutive full windows of a text, int64 `[sample, token]`; what is left over at the end is dropped.

    Raises InvalidText as `calibration_tokens` does.
    """
    ready = _ready_tokens(sources)
    if ready is not None:
        return _checked(ready[:samples], vocab_size, sources)
    text = "\n\n".join(_documents(sources, evaluation=True))
    ids = np.asarray(tokenize()(text), dtype=np.int64)
    count = len(ids) // length
    if count == 0:
        raise InvalidText(
            f"{_names(sources)} gives {len(ids)} tokens, but one window needs {length}; "
            "give more text or a smaller --sequence-length"
        )
    return _checked(ids[: count * length].reshape(count, length)[:samples], vocab_size, sources)


def _names(sources: Sequence[str]) -> str:
    return ", ".join(sources)


def _checked(tokens: np.ndarray, vocab_size: int, sources: Sequence[str]) -> np.ndarray:
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= vocab_size:
        worst = lowest if lowest < 0 else highest
        raise InvalidText(
            f"{_names(sources)} has token {worst}, but the model's vocabulary is 0 to {vocab_size - 1}; "
            "tokenise the text with this model's own tokenizer"
        )
    return np.array(tokens, dtype=np.int64)  # a copy, not the file


def _ready_tokens(sources: Sequence[str]) -> np.ndarray | None:
    """The tokens of a .npy file, if that is what is named."""
    if not any(source.endswith(".npy") for source in sources):
        return None
    if len(sources) != 1:
        raise InvalidText(f"{_names(sources)}: a .npy of ready tokens stands alone; name it without other texts")
    path = Path(sources[0])
    try:
        with warnings.catch_warnings(action="ignore"):
            files.require_plain(path)
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a claim of 1 TB allocates nothing
    except Exception as error:  # numpy evaluates the header as Python, so nearly anything may come out
        raise InvalidText(f"{path} cannot be read as a .npy file: {error}") from error
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or tokens.shape[1] < 2 or len(tokens) == 0:
        raise InvalidText(f"{path} holds {tokens.dtype} {list(tokens.shape)}; expected integers [sample, token]")
    return tokens


def _documents(sources: Sequence[str], evaluation: bool) -> list[str]:
    documents: list[str] = []
    for source in sources:
        if source == "c4" and evaluation:
            documents.extend(_load_dataset(source, _C4[0], None, "validation", {"validation": _C4[2]})[:1100]["text"])
        elif source in _HUB_TEXTS:
            repository, name, column, train, test = _HUB_TEXTS[source]
            documents.extend(_load_dataset(source, repository, name, test if evaluation else train)[column])
        elif source == "c4":
            raise InvalidText("c4 is sampled document by document; name it alone as --calibration")
        else:
            for path in _text_files(Path(source)):
                documents.extend(_read_documents(path))
    return documents


def _text_files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in _TEXT_SUFFIXES)
        if not found:
            raise InvalidText(f"directory {path} holds no {', '.join(_TEXT_SUFFIXES)} file")
        return found
    if not path.exists():
        raise InvalidText(f"no such text: {path} is neither a file, a directory, nor one of {', '.join(DATASETS)}")
    if path.suffix not in _TEXT_SUFFIXES:
        raise InvalidText(f"{path} is none of {', '.join(_TEXT_SUFFIXES)}, .npy or a directory; convert it to one")
    return [path]


def _read_documents(path: Path) -> Iterator[str]:
    """Texts of a file: the whole of a .txt, the field `text` of every row of a .jsonl or .parquet."""
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    try:
        files.require_plain(path, may_have_holes=False)
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidText(f"{path} cannot be read as UTF-8 text: {error}") from error
    if path.suffix == ".txt":
        yield content
        return
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidText(f'{path} line {number} is no JSON object with a "text" field') from error
        if not isinstance(text, str):
            raise InvalidText(f'{path} line {number}: "text" is {type(text).__name__}, expected a string')
        yield text


def _read_parquet(path: Path) -> list[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InvalidText(f"{path} needs pyarrow: pip install 'flap-stream[datasets]'") from error
    try:
        files.require_plain(path)
        return pyarrow.parquet.read_table(path, columns=["text"]).column("text").to_pylist()
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise InvalidText(f'{path} cannot be read as parquet with a "text" column: {error}') from error


def _load_dataset(
    source: str, repository: str, name: str | None, split: str, data_files: dict[str, str] | None = None
) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InvalidText(f"{source} needs the datasets library: pip install 'flap-stream[datasets]'") from error
    try:
        return load_dataset(repository, name, split=split, data_files=data_files)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidText(f"{source} cannot be had from the Hub ({reason}); give a local text file instead") from error


def _c4_windows(samples: int, length: int, draw: random.Random, tokenize: Tokenize) -> np.ndarray:
    """One window from each of `samples` random documents that are long enough (get_c4 in lib/data.py)."""
    documents = _load_dataset("c4", _C4[0], None, "train", {"train": _C4[1]})
    windows: list[Sequence[int]] = []
    while len(windows) < samples:
        ids = tokenize(documents[draw.randint(0, len(documents) - 1)]["text"])
        if len(ids) > length:
            start = draw.randint(0, len(ids) - length - 1)
            windows.append(ids[start : start + length])
    return np.asarray(windows, dtype=np.int64)
