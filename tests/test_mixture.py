"""Calibration texts with shares: every text gives its windows, evenly spread; what cannot be is said."""

from pathlib import Path

import numpy as np
import pytest
from models import DEMO, random_tokens, save_tokens

import flap_stream
from flap_stream import CollectConfig
from flap_stream.errors import InvalidText
from flap_stream.storage.run_directory import RunDirectory
from flap_stream.text.mixture import parts_of, spread


def tokens_of(place: Path, *calibration: str, samples: int) -> np.ndarray:
    options = CollectConfig(calibration=calibration, samples=samples, sequence_length=16)
    flap_stream.collect(DEMO / "model", place, options)
    with RunDirectory(place) as run:
        return run.tokens.read()


def test_texts_are_mixed_by_their_shares_and_every_beginning_has_them(tmp_path: Path) -> None:
    prose, code = tmp_path / "prose.txt", tmp_path / "code.txt"
    prose.write_text((DEMO / "calibration.txt").read_text()[:9000])
    code.write_text(Path(__file__).read_text())
    mixed = tokens_of(tmp_path / "mixed", f"{prose}:0.7", f"{code}:0.3", samples=20)
    alone = [tokens_of(tmp_path / f"{n}", str(text), samples=n) for text, n in ((prose, 14), (code, 6))]
    is_code = [any((row == other).all() for other in alone[1]) for row in mixed]
    assert np.array_equal(mixed[~np.array(is_code)], alone[0]) and np.array_equal(mixed[is_code], alone[1])
    assert sum(is_code[:10]) == 3
    with RunDirectory(tmp_path / "mixed") as run:
        assert run.manifest["calibration"]["sources"] == ["prose.txt:0.7", "code.txt:0.3"]


def test_rows_of_tokens_can_be_mixed_too(tmp_path: Path) -> None:
    rows = save_tokens(tmp_path / "rows.npy", random_tokens(9, 16))
    mixed = tokens_of(tmp_path / "run", f"{rows}:0.25", f"{DEMO / 'calibration.txt'}:0.75", samples=12)
    assert (
        len(mixed) == 12 and sum(any((row == other).all() for other in random_tokens(9, 16)[:3]) for row in mixed) == 3
    )


def test_windows_go_by_largest_remainder() -> None:
    assert parts_of(["a:0.5", "b:0.3", "c:0.2"], 7) == [("a", 4), ("b", 2), ("c", 1)]
    assert parts_of(["a", "b"], 7) is None
    assert parts_of(["a:70%", "b:30%"], 10) == [("a", 7), ("b", 3)]
    assert parts_of(["a:nan", "b"], 7) is None  # a file of that name, which is then not found
    assert spread([2, 1]).tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (("a:0.5", "b"), "b has no share, but other calibration texts do; write it as b:0.5"),
        (("a:0.5", "b:0.6"), r"0.5 \+ 0.6 = 1.1; they must be positive and add up to 1"),
        (("a:1.5", "b:-0.5"), "must be positive"),
        (("a:0.99", "b:0.01"), "b:0.01 gets none of 10 windows"),
    ],
)
def test_shares_that_are_none_are_refused(sources: tuple[str, ...], words: str) -> None:
    with pytest.raises(InvalidText, match=words):
        parts_of(sources, 10)


def test_a_file_named_like_a_share_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:0.5").write_text("text")
    assert parts_of(["a:0.5"], 10) is None


def test_too_few_rows_and_rows_of_another_length_are_refused(tmp_path: Path) -> None:
    text = str(DEMO / "calibration.txt")
    for shape, words in (
        ((3, 16), "has 3 windows, but its share is 5"),
        ((5, 20), "windows of 20 tokens, but the other"),
    ):
        rows = save_tokens(tmp_path / "rows.npy", random_tokens(*shape))
        with pytest.raises(InvalidText, match=words):
            tokens_of(tmp_path / "run", f"{rows}:0.5", f"{text}:0.5", samples=10)
    with pytest.raises(InvalidText, match="no such text"):
        tokens_of(tmp_path / "run", "missing.txt:0.5", f"{text}:0.5", samples=10)
