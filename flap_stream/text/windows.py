"""Text to token windows: the released sampling for calibration, consecutive windows for evaluation."""

import logging
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flap_stream.config import CollectConfig, TextConfig
from flap_stream.errors import InsufficientMemory, InvalidOption, InvalidText
from flap_stream.model.hub import is_path
from flap_stream.storage import files
from flap_stream.text.hub_datasets import fetch
from flap_stream.text.mixture import parts_of, spread
from flap_stream.text.rows import Reading
from flap_stream.text.sources import C4Documents, check_sources, joined
from flap_stream.text.tokenization import Tokenizer, window_prefix

__all__ = [
    "TextWanted",
    "Windows",
    "calibration_text",
    "calibration_tokens",
    "check_text",
    "evaluation_text",
    "evaluation_tokens",
]

logger = logging.getLogger(__name__)

_C4_EVALUATION_WINDOWS = 256  # as in the released code
_KEPT_TOKENS = 1 << 24  # 64 MiB; a longer calibration text is tokenised twice

Load = Callable[[], Tokenizer]


@dataclass(frozen=True)
class TextWanted:
    """A text to cut into windows of `length` tokens.

    sources: names from `DATASETS`, files and directories, or a single .npy file of token ids, whose own shape counts
    and of which the first `samples` rows are used; for calibration each may end in its share, `name:0.7`. samples:
    number of windows; None is all. evaluation: whether it is for evaluation rather than calibration.
    """

    sources: Sequence[str]
    samples: int | None
    length: int
    options: TextConfig
    evaluation: bool = False

    @property
    def names(self) -> str:
        """The sources, for messages."""
        return ", ".join(self.sources)

    @property
    def parts(self) -> "list[TextWanted] | None":
        """A text for each source, if they have shares of the windows. Raises InvalidText as `mixture.parts_of` does."""
        found = None if self.evaluation or self.samples is None else parts_of(self.sources, self.samples)
        return None if found is None else [replace(self, sources=(n,), samples=count) for n, count in found]


@dataclass(frozen=True)
class Windows:
    """Tokens int64 `[sample, token]`, and the prefix that each window begins with in addition to its text."""

    tokens: np.ndarray
    prefix: tuple[int, ...] = ()


def calibration_text(options: CollectConfig) -> TextWanted:
    """The text that statistics are collected on."""
    return TextWanted(options.calibration, options.samples, options.sequence_length, options)


def evaluation_text(sources: Sequence[str], samples: int | None, length: int, options: TextConfig) -> TextWanted:
    """The text that a perplexity is measured on."""
    return TextWanted(sources, samples, length, options, evaluation=True)


def check_text(wanted: TextWanted, model: str | Path | None = None) -> None:
    """Check a text as far as possible without a tokenizer and without reading it; needs neither torch nor a model.

    model: if it comes from the Hub, the Hub's texts, which are small compared with it, are downloaded first.
    Raises InvalidText or InvalidOption for a text that cannot be used.
    """
    if (parts := wanted.parts) is not None:
        for part in parts:
            check_text(part, model)
        return
    if _ready_tokens(wanted.sources) is not None:
        for name, value, default in (
            ("bos", wanted.options.bos, ("auto", "never")),
            ("text-column", wanted.options.text_column, (None,)),
            ("chat-template", wanted.options.chat_template, ("auto",)),
        ):
            if value not in default:
                raise InvalidOption(f"--{name} {value} applies to text, but {wanted.names} holds token ids")
        return
    check_sources(wanted.sources, wanted.evaluation)
    if model is not None and not Path(model).exists() and not is_path(str(model)):
        fetch(wanted.sources, wanted.evaluation)


def calibration_tokens(wanted: TextWanted, seed: int, load: Load, vocab_size: int, room: int | None = None) -> Windows:
    """Calibration windows; those of texts with shares are drawn from each text by the same seed, and spread evenly.

    load: returns the tokenizer; not called for token ids. room: bytes that reading and tokenising may take.
    Raises InvalidText for text that is missing, unreadable, too short, or outside the vocabulary.
    Source: lib/data.py of the released code (Python's `random` seeded once, `randint` with both ends included).
    """
    if (parts := wanted.parts) is not None:
        return _mixed([calibration_tokens(part, seed, load, vocab_size, room) for part in parts], parts)
    ready = _ready_tokens(wanted.sources)
    if ready is not None:
        return Windows(_checked(ready[: wanted.samples], vocab_size, wanted))
    assert wanted.samples is not None
    _require_room_for(wanted.samples, wanted, room)
    tokenizer, draw = load(), random.Random(seed)
    prefix = _window_prefix(tokenizer, wanted)
    if list(wanted.sources) == ["c4"]:
        tokens = _c4_windows(wanted.samples, wanted.length, draw, tokenizer, prefix)
    else:
        tokens = _drawn_windows(wanted, draw, tokenizer, prefix, room)
    return Windows(_checked(tokens, vocab_size, wanted), prefix)


def _mixed(found: Sequence[Windows], parts: Sequence[TextWanted]) -> Windows:
    """The windows of all parts, spread evenly."""
    for part, windows in zip(parts, found, strict=True):
        count, length = windows.tokens.shape
        if count != part.samples:
            raise InvalidText(f"{part.names} has {count} windows, but its share is {part.samples}; use fewer --samples")
        if length != part.length:
            raise InvalidText(
                f"{part.names} holds windows of {length} tokens, but the other texts' have {part.length}; "
                f"use --sequence-length {length}"
            )
    together = np.concatenate([windows.tokens for windows in found])
    prefix = max((windows.prefix for windows in found), key=len)
    return Windows(together[spread([len(windows.tokens) for windows in found])], prefix)


def evaluation_tokens(wanted: TextWanted, load: Load, vocab_size: int, room: int | None = None) -> Windows:
    """Consecutive full windows of a text; the remainder at the end is dropped.

    A prefix takes its place in each window from the text. No more text is read than `samples` windows need; of c4, as
    in the released code, that is 256 windows if it is None.
    Raises InvalidText as `calibration_tokens` does.
    """
    ready = _ready_tokens(wanted.sources)
    if ready is not None:
        return Windows(_checked(ready[: wanted.samples], vocab_size, wanted))
    if wanted.samples is None and list(wanted.sources) == ["c4"]:
        wanted = replace(wanted, samples=_C4_EVALUATION_WINDOWS)
    tokenizer = load()
    prefix = _window_prefix(tokenizer, wanted)
    width = wanted.length - len(prefix)
    most = None if wanted.samples is None else wanted.samples * width
    kept: list[np.ndarray] = []
    total = 0
    for ids in _token_stream(wanted, tokenizer, room):
        own = ids[_length_of(prefix, ids) :] if not total else ids  # each window has its prefix anyway
        kept.append(own.astype(np.int32))
        total += len(own)
        _require_room_for(total // width, wanted, room)
        if most is not None and total >= most:
            break
    count = total // width if wanted.samples is None else min(total // width, wanted.samples)
    if count == 0:
        raise InvalidText(
            f"{wanted.names} has {total} tokens, but one window needs {width}; "
            "give more text or a smaller --sequence-length"
        )
    tokens = np.empty((count, wanted.length), dtype=np.int64)
    tokens[:, : len(prefix)] = prefix
    tokens[:, len(prefix) :] = np.concatenate(kept)[: count * width].reshape(count, width)
    return Windows(_checked(tokens, vocab_size, wanted), prefix)


def _token_stream(wanted: TextWanted, tokenizer: Tokenizer, room: int | None) -> Iterator[np.ndarray]:
    """Yield the ids of the whole text, int64, piece by piece."""
    options = wanted.options
    is_chat = False

    def render(messages: list[Any]) -> str:
        nonlocal is_chat
        is_chat = True
        if tokenizer.render is None:
            raise InvalidText("this tokenizer has no chat template for conversations")
        return tokenizer.render(messages)

    reading = Reading(options.text_column, options.chat_template, render)
    pieces = joined(wanted.sources, wanted.evaluation, reading)
    first = next(pieces, "")  # afterwards it is known whether the text is a conversation

    def text() -> Iterator[str]:
        yield first
        yield from pieces

    yield from tokenizer.ids(text(), room, is_chat)


def _window_prefix(tokenizer: Tokenizer, wanted: TextWanted) -> tuple[int, ...]:
    prefix = window_prefix(tokenizer, wanted.options.bos)
    if len(prefix) >= wanted.length:
        raise InvalidOption(
            f"--sequence-length is {wanted.length}, but each window begins with {len(prefix)} special tokens; use "
            "a larger one, or --bos never"
        )
    return prefix


def _drawn_windows(
    wanted: TextWanted, draw: random.Random, tokenizer: Tokenizer, prefix: tuple[int, ...], room: int | None
) -> np.ndarray:
    """Windows from random places. These depend on the number of tokens, so a long text is tokenised twice."""
    assert wanted.samples is not None
    kept: list[np.ndarray] | None = []
    total = 0
    for ids in _token_stream(wanted, tokenizer, room):
        total += len(ids)
        if total > _KEPT_TOKENS:
            if kept is not None:
                logger.info("%s is long; tokenising it twice to bound memory", wanted.names)
            kept = None
        elif kept is not None:
            kept.append(ids.astype(np.int32))
    last = total - wanted.length - 1
    if last < 0:
        raise InvalidText(
            f"{wanted.names} has {total} tokens, but one window of {wanted.length} needs {wanted.length + 1}; "
            "give more text or a smaller --sequence-length"
        )
    starts = np.array([draw.randint(0, last) for _ in range(wanted.samples)])
    windows = np.zeros((wanted.samples, wanted.length), dtype=np.int64)
    at = 0
    for ids in _token_stream(wanted, tokenizer, room) if kept is None else kept:
        for row in np.flatnonzero((starts < at + len(ids)) & (starts + wanted.length > at)):
            first, stop = max(starts[row], at), min(starts[row] + wanted.length, at + len(ids))
            windows[row, first - starts[row] : stop - starts[row]] = ids[first - at : stop - at]
        at += len(ids)
    if at != total:
        raise InvalidText(f"{wanted.names} changed while it was being read; run the same command again")
    return np.stack([_begun_with(prefix, ids) for ids in windows])


def _begun_with(prefix: tuple[int, ...], ids: np.ndarray) -> np.ndarray:
    """The same number of ids, beginning with the prefix, which is added unless the ids begin with it already."""
    return ids if not prefix else np.concatenate([prefix, ids[_length_of(prefix, ids) :]])[: len(ids)]


def _length_of(prefix: tuple[int, ...], ids: np.ndarray) -> int:
    """Number of leading ids that are the prefix: its length, or 0."""
    return len(prefix) if tuple(ids[: len(prefix)]) == prefix else 0


def _c4_windows(
    samples: int, length: int, draw: random.Random, tokenizer: Tokenizer, prefix: tuple[int, ...]
) -> np.ndarray:
    """One window from each of `samples` random documents that are long enough (get_c4 in lib/data.py)."""
    windows: list[np.ndarray] = []
    tried = 0
    with C4Documents() as documents:
        while len(windows) < samples:
            tried += 1
            if tried > len(documents) and not windows:
                raise InvalidText(
                    f"none of {len(documents):,} documents of c4 has more than {length} tokens; use a smaller "
                    "--sequence-length"
                )
            document = documents[draw.randint(0, len(documents) - 1)]
            ids = np.concatenate(list(tokenizer.ids([document])))
            if len(ids) > length:
                start = draw.randint(0, len(ids) - length - 1)
                windows.append(_begun_with(prefix, ids[start : start + length]))
    return np.stack(windows)


def _require_room_for(count: int, wanted: TextWanted, room: int | None) -> None:
    """Raise InsufficientMemory if there is no room for the tokens of that many windows."""
    needed = 12 * count * wanted.length  # 4 bytes as they are gathered, 8 as they go through the model
    if room is not None and needed > max(room, 1 << 20):
        raise InsufficientMemory(
            f"the tokens of {count:,} windows of {wanted.names} take {needed:,} bytes, but only {room:,} may still "
            "be used; use fewer --samples, or more --host-memory"
        )


def _checked(tokens: np.ndarray, vocab_size: int, wanted: TextWanted) -> np.ndarray:
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= vocab_size:
        worst = lowest if lowest < 0 else highest
        raise InvalidText(
            f"{wanted.names} has token {worst}, but the model's vocabulary is 0 to {vocab_size - 1}; "
            "tokenise the text with this model's own tokenizer"
        )
    return np.array(tokens, dtype=np.int64)  # a copy, not the file


def _ready_tokens(sources: Sequence[str]) -> np.ndarray | None:
    """The tokens of a .npy file, memory-mapped; None if the sources are text."""
    if not any(source.endswith(".npy") for source in sources):
        return None
    if len(sources) != 1:
        raise InvalidText(
            f"{', '.join(sources)}: a .npy file of token ids cannot be combined with other texts; name only that file"
        )
    path = Path(sources[0])
    if path.exists() and not path.is_file():
        raise InvalidText(f"{path} is not a plain file; save the tokens to one with numpy.save")
    try:
        with warnings.catch_warnings(action="ignore"):
            files.require_plain(path)
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a false size allocates nothing
    except Exception as error:  # numpy evaluates the header as Python, which may raise nearly anything
        raise InvalidText(f"{path} cannot be read as a .npy file: {error}") from error
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or tokens.shape[1] < 2 or len(tokens) == 0:
        raise InvalidText(f"{path} holds {tokens.dtype} {list(tokens.shape)}; expected integers [sample, token]")
    return tokens
