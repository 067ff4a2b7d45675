"""Text to token ids: whole, or in pieces, with the same ids in bounded memory.

A tokenizer takes about 155 bytes per byte of text while it works, so a long text is tokenised in pieces. Where it can
be cut is not assumed but tested: a piece is tokenised with context on both sides, and a place is a seam only if the ids
on either side of it are the same in every context tried. If there is no such place, the piece grows.
"""

import importlib.util
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from flap_stream.errors import InvalidOption, InvalidText, first_line
from flap_stream.model.model_code import tokenizer_config

logger = logging.getLogger(__name__)

BYTES_PER_CHARACTER = 200  # most that a tokenizer takes while it works: 155 measured, and a margin

_PIECE_CHARS = 1 << 16  # not measured
_CONTEXT_CHARS = 1 << 10  # on each side of a seam; not measured
_SEAMS_TRIED = 12  # of each sort; not measured
_SAMPLES = ("a", "In the beginning")
_SENTENCE_MODELS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model")
_SENTENCE_PACKAGES = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
_TIKTOKEN_PACKAGES = {"tiktoken": "tiktoken"}

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Tokenizer:
    """Turns text into ids.

    encode: ids of a text without special tokens. prefix, suffix: special tokens added around a text.
    bos: the beginning-of-text token, if there is one. render: turns a conversation into text.
    in_pieces: whether ids depend only on nearby text, so that a text can be tokenised in pieces.
    """

    encode: Encode
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    bos: int | None = None
    render: Callable[[list[dict[str, Any]]], str] | None = None
    in_pieces: bool = True

    def ids(self, pieces: Iterable[str], room: int | None = None, is_chat: bool = False) -> Iterator[np.ndarray]:
        """Yield the ids of a text, int64, piece by piece; together they are those of the whole text.

        pieces: the text, cut anywhere. room: bytes that tokenising may take; None for no limit.
        is_chat: the text may spell out the prefix at its beginning, which is then not added again.
        Raises InvalidText if the text cannot be cut into pieces that are small enough.
        """
        most = None if room is None else max(_PIECE_CHARS + 2 * _CONTEXT_CHARS, room // BYTES_PER_CHARACTER)
        prefix = np.asarray(self.prefix, dtype=np.int64)
        found = _Cutter(self.encode, pieces, most).ids() if self.in_pieces else self._at_once(pieces, most)
        for number, ids in enumerate(found):
            written_out = is_chat and len(ids) >= len(prefix) and (ids[: len(prefix)] == prefix).all()
            yield ids if number or written_out else np.concatenate([prefix, ids])
        yield np.asarray(self.suffix, dtype=np.int64)

    def _at_once(self, pieces: Iterable[str], most: int | None) -> Iterator[np.ndarray]:
        found, size = [], 0
        for piece in pieces:
            size += len(piece)
            if most is not None and size > most:
                raise InvalidText(_too_large(most))
            found.append(piece)
        yield np.asarray(self.encode("".join(found)), dtype=np.int64)


def _too_large(most: int) -> str:
    return (
        f"the text cannot be tokenised in pieces of {most:,} characters, the most that fit in memory; give less text, "
        "more --host-memory, or token ids as a .npy file"
    )


class _Cutter:
    """Tokenises one text in pieces.

    `_text` is the part in memory: `_before` characters of context, whose ids are `_known`, then text without ids yet.
    """

    def __init__(self, encode: Encode, pieces: Iterable[str], most: int | None) -> None:
        self._encode, self._pieces, self._most = encode, iter(pieces), most
        self._text, self._before, self._known = "", 0, np.zeros(0, dtype=np.int64)
        self._context_of_next = 0  # characters of the text that the waiting piece has, too
        self._ended = False

    def ids(self) -> Iterator[np.ndarray]:
        """Yield the ids of each piece, once the next piece has confirmed the seam between them."""
        last: tuple[str, int, np.ndarray] | None = None  # the state before the waiting piece
        waiting: np.ndarray | None = None
        size = _PIECE_CHARS
        while True:
            self._read(size + _CONTEXT_CHARS)
            found = self._encoded(self._text)
            if not _starts_with(found, self._known):  # what follows changes earlier ids: go back
                if last is None:
                    raise InvalidText("the tokenizer gives other ids to parts of a text; give token ids as a .npy file")
                text, self._before, self._known = last
                self._text = text + self._text[self._context_of_next :]
                last, waiting, size = None, None, 2 * max(size, len(text))
                self._require_room(size)
                continue
            if waiting is not None:
                yield waiting
            waiting, last = None, None
            if self._ended:
                yield found[len(self._known) :]
                return
            cut = self._seam(found)
            if cut is None:
                size *= 2
                self._require_room(size)
                continue
            place, known, rest = cut
            waiting = found[len(self._known) : len(found) - rest]
            last = self._text[:place], self._before, self._known
            start = max(0, place - _CONTEXT_CHARS)
            self._context_of_next = place - start
            self._text, self._before, self._known, size = self._text[start:], place - start, known, _PIECE_CHARS

    def _read(self, size: int) -> None:
        """Read until there are `size` characters after the context, or the text ends."""
        parts, have = [self._text], len(self._text) - self._before
        while have < size and not self._ended:
            piece = next(self._pieces, None)
            self._ended = piece is None
            if piece:
                parts.append(piece)
                have += len(piece)
        self._text = "".join(parts)

    def _encoded(self, text: str) -> np.ndarray:
        return np.asarray(self._encode(text), dtype=np.int64)

    def _require_room(self, size: int) -> None:
        if self._most is not None and size > self._most:
            raise InvalidText(_too_large(self._most))

    def _seam(self, found: np.ndarray) -> tuple[int, np.ndarray, int] | None:
        """A place to cut: its position, the ids of the context before it, and the number of ids after it; None if none.

        found: ids of the whole text. The ids before and after the place must be the same when only the context before
        it, the context on both sides and the whole text are tokenised.
        """
        end = len(self._text) - _CONTEXT_CHARS
        for place in _places(self._text, max(self._before + 1, end - _PIECE_CHARS // 2), end):
            start = max(0, place - _CONTEXT_CHARS)
            left = self._encoded(self._text[start:place])
            both = self._encoded(self._text[start:])
            right = both[len(left) :]
            if not len(left) or not len(right) or not _starts_with(both, left) or not _ends_with(found, right):
                continue
            before = found[: len(found) - len(right)]
            if _ends_with(before, left if start == 0 else left[len(left) // 2 :]):
                return place, left, len(right)
        return None


def _places(text: str, first: int, end: int) -> Iterator[int]:
    """Yield places to try, likeliest and latest first: after a line, before a word, at a space, at a sign, anywhere."""
    sorts: tuple[Callable[[str, str], bool], ...] = (
        lambda a, b: a == "\n" and b.isalpha(),
        lambda a, b: b == " " and a.isalpha(),
        lambda a, b: a.isspace() != b.isspace(),
        lambda a, b: not a.isalnum() and b.isalnum(),
        lambda a, b: True,
    )
    for is_place in sorts:
        found = (i for i in range(end, first - 1, -1) if is_place(text[i - 1], text[i]))
        yield from islice(found, _SEAMS_TRIED)


def _starts_with(ids: np.ndarray, part: np.ndarray) -> bool:
    return len(ids) >= len(part) and bool((ids[: len(part)] == part).all())


def _ends_with(ids: np.ndarray, part: np.ndarray) -> bool:
    return len(ids) >= len(part) and bool((ids[len(ids) - len(part) :] == part).all())


def load_tokenizer(directory: Path, trust_remote_code: bool) -> Tokenizer:
    """The tokenizer in a model's directory.

    Raises InvalidText if there is none that loads, or only with custom code that is not trusted.
    """
    found = pretrained_tokenizer(directory, trust_remote_code)
    found.model_max_length = int(1e30)  # windows are cut afterwards
    return described(found, directory)


def described(found: Any, directory: Path) -> Tokenizer:
    """Wrap a tokenizer of transformers, finding out what it adds around a text."""

    def whole(text: str) -> list[int]:
        return found(text)["input_ids"]

    def bare(text: str) -> list[int]:
        return found(text, add_special_tokens=False)["input_ids"]

    render, bos = _renderer(found, directory), found.bos_token_id
    around = _around(whole(_SAMPLES[0]), bare(_SAMPLES[0]))
    if around is None or any(whole(text) != [*around[0], *bare(text), *around[1]] for text in _SAMPLES):
        return Tokenizer(whole, bos=bos, render=render, in_pieces=False)
    return Tokenizer(bare, *around, bos, render, in_pieces=not _reads_as_a_whole(found))


def window_prefix(tokenizer: Tokenizer, bos: str) -> tuple[int, ...]:
    """The ids that every window begins with: with `auto`, those that the tokenizer puts before a text, if any.

    Raises InvalidOption for `always` if the tokenizer has no such token.
    """
    prefix = tokenizer.prefix if bos != "never" else ()
    if bos == "always" and not prefix:
        if tokenizer.bos is None:
            raise InvalidOption("--bos always needs a beginning-of-text token, and this model's tokenizer has none")
        prefix = (tokenizer.bos,)
    return prefix


def _around(whole: list[int], inner: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """What `whole` has before and after `inner`; None if it does not contain it."""
    for start in range(len(whole) - len(inner) + 1):
        if whole[start : start + len(inner)] == inner:
            return tuple(whole[:start]), tuple(whole[start + len(inner) :])
    return None


def _reads_as_a_whole(tokenizer: Any) -> bool:
    """Whether ids may depend on the whole text: a unigram model rounds sums of scores along all of it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "Unigram":
        return False
    splits = backend.pre_tokenizer
    return splits is None or len(splits.pre_tokenize_str("a b c")) < 3


def _renderer(tokenizer: Any, directory: Path) -> Callable[[list[dict[str, Any]]], str]:
    def render(messages: list[dict[str, Any]]) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise InvalidText(f"the tokenizer of {directory} has no chat template for conversations")
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template is a sandboxed program, which may raise anything
            raise InvalidText(f"the chat template does not accept this conversation ({first_line(error)})") from error

    return render


def pretrained_tokenizer(directory: Path, trust_remote_code: bool) -> Any:
    """The tokenizer that transformers finds in a model's directory.

    Raises InvalidText if there is none that loads, or only with custom code that is not trusted.
    """
    from transformers import AutoTokenizer

    _require_packages(directory)
    if trust_remote_code:
        _fetch_code(directory)
    try:
        return AutoTokenizer.from_pretrained(
            directory, config=tokenizer_config(directory), trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the tokenizers library raises plain Exception, a damaged file almost anything
        if not trust_remote_code and code_files(directory):
            raise InvalidText(
                f"the tokenizer of {directory} is custom code; read it and allow it with --trust-remote-code, or "
                "give token ids as a .npy file"
            ) from error
        _require_known_form(directory / "tokenizer.json")
        raise InvalidText(
            f"the tokenizer of {directory} does not load ({first_line(error)}); give token ids as a .npy file instead"
        ) from error


def _require_known_form(path: Path) -> None:
    """Raise InvalidText if a tokenizer.json is missing, damaged or not supported by the library, saying which."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import __version__ as installed

    if not path.is_file():
        if not any(path.parent.glob("*token*")) and not any(path.parent.glob("*.model")):
            raise InvalidText(
                f"{path.parent} has no tokenizer; copy {path.name} and its companions there from the original model, "
                "or give token ids as a .npy file"
            )
        return
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidText(f"{path} is truncated or damaged ({error}); download it again") from error
    try:
        Backend.from_file(str(path))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise InvalidText(
            f"{path} is not supported by tokenizers {installed} ({first_line(error)}); a newer one may do so: pip "
            "install -U tokenizers transformers; or give token ids as a .npy file"
        ) from error


def _require_packages(directory: Path) -> None:
    """Raise InvalidText if a tokenizer needs packages that are not installed; without them transformers may guess."""
    found = [name for name in _SENTENCE_MODELS if (directory / name).is_file()]
    if not found or (directory / "tokenizer.json").is_file() or code_files(directory):
        return
    with open(directory / found[0], "rb") as file:
        is_sentencepiece = file.read(1) == b"\n"  # the first field of its message; tiktoken's is text
    packages = _SENTENCE_PACKAGES if is_sentencepiece else _TIKTOKEN_PACKAGES
    missing = [name for module, name in packages.items() if not _is_installed(module)]
    if missing:
        raise InvalidText(
            f"{directory} has its tokenizer only as {found[0]}, which needs {', '.join(missing)}: pip install "
            "'flap-stream[sentencepiece]'"
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def code_files(directory: Path) -> list[str]:
    """Names of the Python files that define a tokenizer, as tokenizer_config.json says, and of those they import."""
    try:
        config = json.loads((directory / "tokenizer_config.json").read_bytes())
        named = config.get("auto_map", {})
        classes = named.get("AutoTokenizer") if isinstance(named, dict) else named
    except (OSError, ValueError, RecursionError, AttributeError):
        return []
    classes = [classes] if isinstance(classes, str) else classes if isinstance(classes, list) else []
    modules = [name.rpartition(".")[0] for name in classes if isinstance(name, str)]
    found: set[str] = set()
    while modules:
        module = modules.pop()
        name = f"{module}.py"
        if module.isidentifier() and name not in found:
            found.add(name)
            path = directory / name
            text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
            modules += re.findall(r"^\s*(?:from|import)\s+\.(\w+)", text, re.MULTILINE)
    return sorted(found)


def _fetch_code(directory: Path) -> None:
    """Download the tokenizer's code to the Hub cache if the model is there; do nothing for other directories."""
    cached = directory.parent.parent.name
    if directory.parent.name != "snapshots" or not cached.startswith("models--"):
        return
    from huggingface_hub import hf_hub_download

    repository, tried = cached.removeprefix("models--").replace("--", "/"), set[str]()
    while missing := [n for n in code_files(directory) if n not in tried and not (directory / n).is_file()]:
        tried.update(missing)
        for name in missing:
            try:
                hf_hub_download(repository, name, revision=directory.name)
            except (OSError, ValueError, RuntimeError) as error:
                raise InvalidText(
                    f"{name} of the tokenizer of {repository} could not be downloaded ({first_line(error)})"
                ) from error
