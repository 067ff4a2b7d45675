"""Tokenising in pieces gives the ids of tokenising at once, for every kind of tokenizer, in bounded memory."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import DEMO
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from flap_stream.config import TextConfig
from flap_stream.errors import InvalidOption, InvalidText
from flap_stream.text import tokenization
from flap_stream.text.tokenization import Tokenizer, code_files, load_tokenizer
from flap_stream.text.windows import TextWanted, calibration_tokens, evaluation_tokens

SPECIAL = ["<unk>", "<s>", "</s>"]
LETTERS = [chr(i) for i in range(32, 127)] + list("\néßжя的了我🙂\u0301\u2028\u0085")


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return trained(backend, trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def digits_in_threes() -> Backend:
    backend = Backend(models.BPE(unk_token="<unk>"))
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    split = pre_tokenizers.Split(pattern, "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return trained(backend, trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def sentencepiece_bpe() -> Backend:
    """As of Llama 2 and Gemma: one word is the whole text, and a space goes before it."""
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for training alone
    backend = trained(backend, trainers.BpeTrainer, initial_alphabet=LETTERS)
    body = json.loads(backend.to_str())
    return Backend.from_str(json.dumps({**body, "pre_tokenizer": None}))


def unigram() -> Backend:
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return trained(backend, trainers.UnigramTrainer, unk_token="<unk>", initial_alphabet=LETTERS)


def unsplit_unigram() -> Backend:
    backend = unigram()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    return backend


def word_piece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return trained(backend, trainers.WordPieceTrainer)


KINDS = [byte_level, digits_in_threes, sentencepiece_bpe, unigram, unsplit_unigram, word_piece]


def trained(backend: Backend, kind: Callable[..., Any], **options: Any) -> Backend:
    trainer = kind(vocab_size=800, special_tokens=SPECIAL, show_progress=False, **options)
    backend.train_from_iterator((DEMO / "evaluation.txt").read_text()[:60_000].splitlines(keepends=True), trainer)
    return backend


def saved(backend: Backend, place: Path, bos: bool = True) -> Path:
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    backend.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(place)
    return place


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(saved(request.param(), tmp_path_factory.mktemp("tokenizer")), False)


def texts(draw: random.Random) -> Iterator[str]:
    """Of many kinds, each long enough for a dozen pieces; the last ones have hardly a place to cut."""
    prose = (DEMO / "evaluation.txt").read_text()
    at = draw.randrange(len(prose) - 5000)
    yield prose[at : at + 5000]
    parts = [
        "a ",
        "  ",
        "\n",
        "é",
        "e\u0301",
        "🙂",
        "<s>",
        "\u2028",
        "\u0085",
        "1234567",
        "the",
        "foo bar ",
        "\t",
        "ab" * 9,
        "、",
    ]
    yield "".join(draw.choice(parts) for _ in range(2000))
    yield "".join(draw.choice("的了我, 。") for _ in range(4000))
    yield "\n".join(" " * draw.randrange(12) + "x = " + str(draw.random()) for _ in range(200))
    yield "".join(draw.choice("0123456789abcdefghij") for _ in range(4000))
    yield "a" * draw.randrange(3000, 4000)
    yield "12" * draw.randrange(1500, 2000)
    yield "b" + " " * draw.randrange(3000, 4000) + "a"


@pytest.mark.parametrize("seed", range(3))
def test_pieces_give_the_ids_of_the_whole_text(
    tokenizer: Tokenizer, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "_PIECE_CHARS", 400)
    monkeypatch.setattr(tokenization, "_CONTEXT_CHARS", 100)
    draw = random.Random(seed)
    for number, text in enumerate(texts(draw)):
        cuts = sorted(draw.randrange(len(text)) for _ in range(20))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
        found = list(tokenizer.ids(pieces))
        expected = [*tokenizer.prefix, *tokenizer.encode(text), *tokenizer.suffix]
        assert np.concatenate(found).tolist() == expected, number
        if tokenizer.in_pieces and number < 4:
            assert len(found) > 5, number  # it was cut


def test_only_what_depends_on_the_whole_text_is_tokenised_at_once(tmp_path: Path) -> None:
    found = {kind.__name__: load_tokenizer(saved(kind(), tmp_path / kind.__name__), False) for kind in KINDS}
    assert [name for name, tokenizer in found.items() if not tokenizer.in_pieces] == ["unsplit_unigram"]
    assert {tokenizer.prefix for tokenizer in found.values()} == {(1,)}
    assert {tokenizer.suffix for tokenizer in found.values()} == {(2,)}


def test_a_text_that_has_no_place_to_cut_is_refused_when_there_is_no_memory_for_it() -> None:
    counting = Tokenizer(lambda text: [len(text) % 1000] * len(text))  # every id depends on all of the text
    pieces = ["word " * 200] * 2000
    with pytest.raises(InvalidText, match=r"cannot be tokenised in pieces .* more --host-memory"):
        list(counting.ids(pieces, room=200 * 500_000))
    assert sum(map(len, counting.ids(pieces))) == 2_000_000


def test_what_follows_may_change_what_came_before() -> None:
    """A seam that further text puts in doubt is given up: the piece before it is tokenised anew."""

    def encode(text: str) -> list[int]:
        words = text.split(" ")
        return [len(word) + 100 * (len(text) > 150_000 and i % 2) for i, word in enumerate(words)]

    text = " ".join(["abc", "de", "f"] * 40_000)
    found = np.concatenate(list(Tokenizer(encode).ids([text])))
    assert found.tolist() == encode(text)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """31 MB of text went through the tokenizer at once, with 155 bytes of memory for each of them."""
    text = (DEMO / "calibration.txt").read_text()
    (tmp_path / "long.txt").write_text(text * (4_000_000 // len(text)))
    program = (
        "import resource, sys\nfrom pathlib import Path\nfrom flap_stream.text.windows import *\n"
        "from flap_stream.text.tokenization import load_tokenizer\n"
        "from flap_stream.config import *\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        f"load = lambda: load_tokenizer(Path({str(DEMO / 'model')!r}), False)\n"
        "load()\nbefore = peak()\n"
        "calibration_tokens(calibration_text(CollectConfig(calibration=('long.txt',))), 0, load, 4096)\n"
        "evaluation_tokens(evaluation_text(('long.txt',), 2000, 128, TextConfig()), load, 4096)\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 150  # MiB


def test_a_text_that_is_gone_through_twice_gives_the_same_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text((DEMO / "evaluation.txt").read_text())
    wanted = TextWanted([str(tmp_path / "text.txt")], 40, 32, TextConfig())
    expected = calibration_tokens(wanted, 5, lambda: load_tokenizer(DEMO / "model", False), 4096)
    monkeypatch.setattr("flap_stream.text.windows._KEPT_TOKENS", 1000)
    monkeypatch.setattr(tokenization, "_PIECE_CHARS", 5000)
    found = calibration_tokens(wanted, 5, lambda: load_tokenizer(DEMO / "model", False), 4096)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(byte_level(), tmp_path_factory.mktemp("bos"))


@pytest.fixture(scope="module")
def without_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(byte_level(), tmp_path_factory.mktemp("none"), bos=False)


def both_windows(place: Path, bos: str, length: int = 16) -> tuple[np.ndarray, np.ndarray]:
    text, options = [str(DEMO / "evaluation.txt")], TextConfig(bos=bos)
    drawn = calibration_tokens(TextWanted(text, 50, length, options), 0, lambda: load_tokenizer(place, False), 800)
    wanted = TextWanted(text, 50, length, options, evaluation=True)
    return drawn.tokens, evaluation_tokens(wanted, lambda: load_tokenizer(place, False), 800).tokens


def test_every_window_begins_with_bos_where_the_tokenizer_adds_it(with_bos: Path) -> None:
    (drawn, consecutive), (bare_drawn, bare) = both_windows(with_bos, "auto"), both_windows(with_bos, "never")
    assert drawn.shape == consecutive.shape == (50, 16)
    assert (drawn[:, 0] == 1).all() and (consecutive[:, 0] == 1).all()
    assert not (drawn[:, 1:] == 1).any() and not (consecutive[:, 1:] == 1).any()
    np.testing.assert_array_equal(drawn[:, 1:], bare_drawn[:, :15])  # of the same places
    assert bare[0, 0] == 1 and not (bare.ravel()[1:] == 1).any()  # the text's own, as before
    np.testing.assert_array_equal(consecutive[:, 1:].ravel(), bare.ravel()[1:751])


def test_bos_can_be_had_where_the_tokenizer_adds_none(without_bos: Path) -> None:
    for found, expected in zip(both_windows(without_bos, "auto"), both_windows(without_bos, "never"), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert not (found == 1).any()
    for found in both_windows(without_bos, "always"):
        assert (found[:, 0] == 1).all()


def test_bos_that_a_tokenizer_does_not_have_is_refused() -> None:
    wanted = TextWanted([str(DEMO / "evaluation.txt")], 5, 8, TextConfig(bos="always"))
    with pytest.raises(InvalidOption, match="--bos always needs a beginning-of-text token"):
        calibration_tokens(wanted, 0, lambda: Tokenizer(lambda text: [1]), 10)


CONVERSATIONS = [
    [{"role": "user", "content": f"question {i} " + "word " * 30}, {"role": "assistant", "content": f"answer {i}"}]
    for i in range(12)
]
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


def with_template(place: Path, to: Path) -> Path:
    shutil.copytree(place, to)
    (to / "chat_template.jinja").write_text(TEMPLATE)
    return to


@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_conversations_go_through_the_chat_template(with_bos: Path, tmp_path: Path, form: str) -> None:
    place = with_template(with_bos, tmp_path / "chat")
    rows = CONVERSATIONS
    if form == "conversations":
        names = {"user": "human", "assistant": "gpt"}
        rows = [[{"from": names[t["role"]], "value": t["content"]} for t in turns] for turns in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({form: turns, "text": None}) + "\n" for turns in rows))
    rendered = "\n\n".join(
        "".join(f"<s>{turn['role']}: {turn['content']}</s>" for turn in turns) for turns in CONVERSATIONS
    )
    options = TextConfig(bos="never", chat_template="always")
    wanted = TextWanted([str(tmp_path / "rows.jsonl")], None, 8, options, evaluation=True)
    found = evaluation_tokens(wanted, lambda: load_tokenizer(place, False), 800).tokens.ravel()
    expected = load_tokenizer(place, False).encode(rendered)
    assert found.tolist() == list(expected)[: len(found)] and found[0] == 1 and found[1] != 1  # no second BOS


def test_conversations_are_refused_where_they_cannot_be_rendered(with_bos: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": CONVERSATIONS[0]}))

    def read(place: Path, **options: Any) -> None:
        wanted = TextWanted([str(tmp_path / "rows.jsonl")], None, 8, TextConfig(**options), evaluation=True)
        evaluation_tokens(wanted, lambda: load_tokenizer(place, False), 800)

    with pytest.raises(InvalidText, match=r'line 1: "messages": the tokenizer of .* has no chat template'):
        read(with_bos)
    broken = with_template(with_bos, tmp_path / "broken")
    (broken / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidText, match=r"does not accept this conversation .roles must alternate"):
        read(broken)
    with pytest.raises(InvalidText, match="--text-column"):
        read(with_bos, chat_template="never")


def damaged(place: Path, **changes: object) -> Path:
    place.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(DEMO / "model" / name, place / name)
    if changes:
        body = json.loads((place / "tokenizer.json").read_text())
        (place / "tokenizer.json").write_text(json.dumps({**body, **changes}))
    return place


def test_a_tokenizer_that_cannot_be_read_is_named_as_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = damaged(tmp_path / "new", pre_tokenizer={"type": "OfTheFuture"})
    with pytest.raises(
        InvalidText, match=r"tokenizer.json is not supported by tokenizers \d.*pip install -U tokenizers"
    ):
        load_tokenizer(new, False)
    short = damaged(tmp_path / "short")
    (short / "tokenizer.json").write_bytes((DEMO / "model" / "tokenizer.json").read_bytes()[:9000])
    with pytest.raises(InvalidText, match=r"tokenizer.json is truncated or damaged .* download it again"):
        load_tokenizer(short, False)
    sentences = damaged(tmp_path / "sentences")
    (sentences / "tokenizer.json").unlink()
    (sentences / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # as where it is not installed
    with pytest.raises(InvalidText, match=r"only as tokenizer.model, .* sentencepiece.*stream\[sentencepiece\]"):
        load_tokenizer(sentences, False)
    (sentences / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(InvalidText, match=r"only as tokenizer.model, which needs tiktoken: pip install"):
        load_tokenizer(sentences, False)


def test_the_code_of_a_tokenizer_is_found(tmp_path: Path) -> None:
    assert code_files(tmp_path) == []
    for named, expected in (
        ({"AutoTokenizer": ["tokenization_own.Own", None]}, ["tokenization_own.py"]),
        ({"AutoTokenizer": "tokenization_own.Own"}, ["tokenization_own.py"]),
        ({"AutoTokenizer": ["slow.Own", "fast.Own"]}, ["fast.py", "slow.py"]),
        ({"AutoTokenizer": ["other/repo--tokenization_own.Own", None]}, []),
        ({"AutoTokenizer": ["../../outside.Own", 3]}, []),
        ({"AutoConfig": "configuration_own.Own"}, []),
        (7, []),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": named}))
        assert code_files(tmp_path) == expected
