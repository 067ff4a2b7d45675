"""The tokenizer of a checkpoint as llama.cpp reads it from a GGUF file."""

import json
import logging
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from flap_stream.errors import InvalidModel, UnsupportedModel
from flap_stream.storage import files

logger = logging.getLogger(__name__)

_BYTE_LEVEL = "ByteLevel"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED = _WORDS + r"\p{N}{1}| ?[^\s\p{L}\p{N}" + "\r\n" + r"]+|\s*[" + "\r\n" + r"]+|\s+(?!\S)|\s+"
# The steps that split text before merges, to llama.cpp's names for them: {whether whole words ignore merges: name}.
# Source: the patterns in llama.cpp's src/llama-vocab.cpp.
_PRE_TOKENIZERS: dict[tuple[str, ...], dict[bool, str]] = {
    (_BYTE_LEVEL,): {False: "gpt-2"},
    ("Digits", _BYTE_LEVEL): {False: "smollm"},
    (_WORDS + r"\p{N}{1,3}" + _REST,): {False: "dbrx", True: "llama-bpe"},
    (_WORDS + r"\p{N}" + _REST,): {False: "qwen2"},
    (_TEKKEN,): {False: "tekken", True: "tekken"},
    (_SEED,): {False: "seed-coder"},
}


def add_vocabulary(writer: GGUFWriter, directory: Path, vocab_size: int, pre: str | None) -> None:
    """Add the tokens, merges or scores, special tokens and chat template of a checkpoint directory.

    pre: llama.cpp's name for the pre-tokenizer; None derives it. Without a tokenizer the file accepts only token ids.
    Raises UnsupportedModel if llama.cpp has no such tokenizer.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        if (directory / "tokenizer.model").is_file():
            raise UnsupportedModel(
                f"{directory} has tokenizer.model but no tokenizer.json; create it with "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        logger.warning("%s has no tokenizer.json; the file will accept only token ids, not text", directory)
        writer.add_tokenizer_model("none")
        return
    try:
        tokenizer = json.loads(files.read_plain(path))
        model = tokenizer["model"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise InvalidModel(
            f"{path} is truncated or damaged ({error}); copy it again from the original model"
        ) from error
    if model.get("type", "BPE") != "BPE":
        raise UnsupportedModel(f"{path} is a {model['type']} tokenizer; export-gguf supports only BPE")
    is_bytes = not model.get("byte_fallback", False)
    tokens, types = _tokens(tokenizer, vocab_size, is_bytes)
    if is_bytes:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre or _pre_tokenizer(tokenizer, path))
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre(pre or "default")
        writer.add_token_scores(_scores(tokens, model["merges"]))
        writer.add_add_space_prefix(_adds_space(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    SpecialVocab(directory, load_merges=is_bytes, n_vocab=vocab_size).add_to_gguf(writer, quiet=True)


def _tokens(tokenizer: dict[str, Any], vocab_size: int, is_bytes: bool) -> tuple[list[str], list[TokenType]]:
    """Text and type of every id; ids unused by the tokenizer get placeholder names."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    unknown = tokenizer["model"].get("unk_token")
    for token, i in tokenizer["model"]["vocab"].items():
        if i < vocab_size:
            tokens[i], types[i] = token, TokenType.NORMAL
            if not is_bytes and len(token) == 6 and token.startswith("<0x"):
                types[i] = TokenType.BYTE
            elif token == unknown:
                types[i] = TokenType.UNKNOWN
    for added in tokenizer.get("added_tokens", []):
        i, token = added["id"], added["content"]
        if i < vocab_size and types[i] != TokenType.UNKNOWN:
            # llama.cpp matches the text of such tokens literally in the input.
            tokens[i] = token if added["special"] else token.replace("▁", " ")
            types[i] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    return tokens, types


def _pre_tokenizer(tokenizer: dict[str, Any], path: Path) -> str:
    found = tuple(_steps(tokenizer.get("pre_tokenizer")))
    names = _PRE_TOKENIZERS.get(found, {})
    name = names.get(bool(tokenizer["model"].get("ignore_merges", False)))
    if name is None:
        raise UnsupportedModel(
            f"{path} splits text with {' then '.join(found) or 'nothing'}, for which export-gguf knows no "
            "llama.cpp name; if llama.cpp has one, name it with --tokenizer-pre"
        )
    return name


def _steps(pre: dict[str, Any] | None) -> list[str]:
    """The steps in order: the pattern of a step, or its type if it has none."""
    if pre is None:
        return []
    if pre["type"] == "Sequence":
        return [step for part in pre["pretokenizers"] for step in _steps(part)]
    if pre["type"] == "Split":
        return [pre["pattern"].get("Regex", pre["pattern"].get("String", ""))]
    if pre["type"] == _BYTE_LEVEL:
        return [_BYTE_LEVEL] if pre.get("use_regex", True) else []
    return [pre["type"]]


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Scores that make llama.cpp merge in the order of the list: earlier merges score higher.

    Tokens that no merge produces score lowest.
    """
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _adds_space(tokenizer: dict[str, Any]) -> bool:
    """Whether a space is prepended to text."""
    parts = [tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")]
    while parts:
        part = parts.pop()
        if part is None:
            continue
        parts += part.get("normalizers", []) + part.get("pretokenizers", [])
        if part["type"] == "Prepend":
            return True
        if part["type"] == "Metaspace":
            return part.get("prepend_scheme", "always") != "never"
    return False
