import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from flap_stream.config import TextConfig
from flap_stream.errors import InsufficientMemory, InvalidText
from flap_stream.storage.run_manifest import tokens_digest
from flap_stream.text.tokenization import Tokenizer
from flap_stream.text.windows import TextWanted, calibration_tokens, evaluation_tokens

WORDS = " ".join(str(i) for i in range(200))


def numbers() -> Tokenizer:
    """A tokenizer whose ids are the numbers in the text."""
    return Tokenizer(lambda text: [int(word) for word in text.split()])


def windows(sources: Any, samples: int = 5, length: int = 8, seed: int = 0, **options: Any) -> np.ndarray:
    wanted = TextWanted([str(source) for source in sources], samples, length, TextConfig(**options))
    return calibration_tokens(wanted, seed, numbers, 1000).tokens


def evaluated(sources: Any, samples: int | None = None, length: int = 8, **options: Any) -> np.ndarray:
    wanted = TextWanted([str(source) for source in sources], samples, length, TextConfig(**options), evaluation=True)
    return evaluation_tokens(wanted, numbers, 1000).tokens


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(WORDS)
    return path


def test_windows_are_those_of_the_released_recipe(text: Path) -> None:
    ids = np.arange(200)
    random.seed(7)  # as lib/data.py does: the global generator, seeded, then one randint a window
    expected = []
    for _ in range(5):
        i = random.randint(0, 200 - 8 - 1)
        expected.append(ids[i : i + 8])
    np.testing.assert_array_equal(windows([text], seed=7), expected)


def test_drawing_windows_leaves_the_global_generator_alone(text: Path) -> None:
    random.seed(3)
    before = random.getstate()
    windows([text])
    assert random.getstate() == before


def test_documents_are_joined_by_one_space(tmp_path: Path) -> None:
    halves = [" ".join(str(i) for i in range(100)), " ".join(str(i) for i in range(100, 200))]
    (tmp_path / "text.txt").write_text(WORDS)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": half}) + "\n" for half in halves))
    pyarrow.parquet.write_table(pyarrow.table({"text": halves}), tmp_path / "rows.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, half in zip(("1.txt", "2.txt"), halves, strict=True):
        (folder / name).write_text(half)
    expected = windows([tmp_path / "text.txt"])
    for sources in (["rows.jsonl"], ["rows.parquet"], ["folder"], ["folder/1.txt", "folder/2.txt"]):
        np.testing.assert_array_equal(windows([tmp_path / source for source in sources]), expected)


def test_ready_tokens_are_used_in_order(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(60, dtype=np.int32).reshape(10, 6))
    tokens = windows([tmp_path / "tokens.npy"], samples=4)
    assert tokens.dtype == np.int64
    np.testing.assert_array_equal(tokens, np.arange(24).reshape(4, 6))


def test_evaluation_windows_are_consecutive_and_full(text: Path) -> None:
    np.testing.assert_array_equal(evaluated([text], length=32), np.arange(192).reshape(6, 32))
    assert len(evaluated([text], 2, 32)) == 2


def test_text_that_is_exactly_one_token_too_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(" ".join("1" * 8))
    with pytest.raises(InvalidText, match="has 8 tokens, but one window of 8 needs 9"):
        windows([tmp_path / "short.txt"])
    (tmp_path / "short.txt").write_text(" ".join("1" * 9))
    assert windows([tmp_path / "short.txt"]).shape == (5, 8)


def test_the_digest_knows_contents_and_shape() -> None:
    tokens = np.arange(12)
    digests = {tokens_digest(tokens.reshape(3, 4)), tokens_digest(tokens.reshape(4, 3)), tokens_digest(tokens[::-1])}
    assert len(digests) == 3
    assert tokens_digest(tokens.reshape(3, 4)) == tokens_digest(tokens.astype(np.int32).reshape(3, 4))


@pytest.mark.parametrize("name", ["wikitext2", "ptb", "c4"])
def test_hub_texts_say_what_to_do_when_they_cannot_be_had(name: str) -> None:
    with pytest.raises(InvalidText, match="local text file"):
        windows([name])


def test_windows_that_have_no_room_are_refused_before_the_text_is_read(text: Path) -> None:
    wanted = TextWanted([str(text)], 10**7, 128, TextConfig())
    with pytest.raises(InsufficientMemory, match=r"10,000,000 windows .* fewer --samples, or more --host-memory"):
        calibration_tokens(wanted, 0, numbers, 1000, room=1 << 30)
