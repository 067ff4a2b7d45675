"""What is asked of texts reaches every verb, is recorded, and is checked before anything long."""

import gzip
import json
import random
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants
from models import DEMO, put_bos_before_texts

import flap_stream
import flap_stream.storage.run_directory
from flap_stream.cli import main
from flap_stream.config import CollectConfig, EvaluateConfig, PruneConfig, SweepConfig, TextConfig
from flap_stream.errors import InvalidOption, InvalidText, NotPlain
from flap_stream.text.tokenization import Tokenizer
from flap_stream.text.windows import TextWanted, calibration_tokens, evaluation_tokens

TEXT = str(DEMO / "evaluation.txt")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a tokenizer that puts `<s>`, which is 0, before a text."""
    place = tmp_path_factory.mktemp("bos") / "model"
    shutil.copytree(DEMO / "model", place)
    put_bos_before_texts(place)
    return place


def collected(model: Path, run: Path, **options: Any) -> tuple[dict[str, Any], np.ndarray]:
    flap_stream.collect(model, run, CollectConfig(calibration=(TEXT,), samples=8, sequence_length=16, **options))
    with flap_stream.storage.run_directory.RunDirectory(run) as directory:
        return json.loads((run / "run.json").read_text()), directory.tokens.read()


def test_run_json_says_how_windows_begin(model: Path, tmp_path: Path) -> None:
    for bos, prefix in (("auto", [0]), ("always", [0]), ("never", [])):
        manifest, tokens = collected(model, tmp_path / bos, bos=bos)
        assert manifest["calibration"]["bos"] == bos and manifest["window_prefix"] == prefix
        assert (tokens[:, 0] == 0).all() == bool(prefix)
    manifest, tokens = collected(DEMO / "model", tmp_path / "none")
    assert manifest["window_prefix"] == [] and (tokens[:, 0] != 0).any()


def test_released_statistics_imply_released_windows() -> None:
    assert PruneConfig(statistics="released").bos == "never" and PruneConfig().bos == "auto"
    assert SweepConfig(statistics="released").bos == "never"
    with pytest.raises(InvalidOption, match=r"--statistics released .* --bos always"):
        PruneConfig(statistics="released", bos="always")
    with pytest.raises(InvalidOption, match="--bos 'sometimes' is unknown; choose one of auto, always, never"):
        EvaluateConfig(bos="sometimes")


def test_every_verb_takes_bos(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> dict[str, Any]:
        assert main([*map(str, arguments), "--json", "--quiet"]) == 0
        return json.loads(capsys.readouterr().out)

    sizes = ("--samples", 8, "--sequence-length", 16)
    run("prune", model, tmp_path / "out", "--calibration", TEXT, *sizes, "--keep-run", "--bos", "never")
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert record["calibration"]["bos"] == "never"
    found = {
        bos: run("evaluate", model, "--text", TEXT, *sizes, "--bos", bos)["perplexity"] for bos in ("auto", "never")
    }
    assert found["auto"] != found["never"]
    for bos, expected in found.items():
        swept = run("sweep", tmp_path / "out.run", "--ratios", "0.3", "--evaluate", TEXT, *sizes, "--bos", bos)
        assert swept["dense_perplexity"] == pytest.approx(expected, rel=1e-4)


def test_options_about_text_are_refused_with_ready_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "tokens.npy", np.zeros((4, 8), dtype=np.int64))
    for option in (("--bos", "always"), ("--text-column", "x"), ("--chat-template", "always")):
        command = ["collect", str(DEMO / "model"), str(tmp_path / "run"), "--calibration", str(tmp_path / "tokens.npy")]
        assert main([*command, *option]) == 2
        assert f"{option[0]} {option[1]} applies to text, but" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nowhere.txt", "no such text: nowhere.txt"),
        ("a.doc", "a.doc is not a .txt"),
        ("folder", "directory folder holds no .txt"),
        ("tokens.npy a.doc", "a .npy file of token ids cannot be combined"),
        ("c4 c4", "c4 is sampled document by document"),
    ],
)
@pytest.mark.parametrize("verb", ["prune", "prune --dry-run", "collect", "evaluate"])
def test_texts_are_checked_before_torch_and_the_model(tmp_path: Path, verb: str, text: str, words: str) -> None:
    """The model of this name would be asked for on the Hub."""
    if verb == "evaluate" and text.startswith("c4"):
        pytest.skip("of its evaluation split all is taken, so it need not stand alone")
    (tmp_path / "a.doc").write_text("x")
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "tokens.npy", np.zeros((4, 8), dtype=np.int64))
    first, *more = verb.split()
    places = ["organisation/model", *([] if first == "evaluate" else ["out"])]
    command = [first, *places, *more, "--text" if first == "evaluate" else "--calibration", *text.split(), "--quiet"]
    program = (
        f"import sys; from flap_stream.cli import main; code = main({command!r}); print('torch' in sys.modules, code)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert words in result.stderr and result.stdout == "False 2\n"


def test_a_dry_run_looks_at_the_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(DEMO / "model", tmp_path / "model")
    command = ["prune", str(tmp_path / "model"), str(tmp_path / "out"), "--calibration", TEXT, "--dry-run"]
    assert main(command) == 0
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    capsys.readouterr()
    assert main(command) == 2
    assert "tokenizer.json is truncated or damaged" in capsys.readouterr().err


def cached_file(cache: Path, repository: str, name: str, revision: str = "main") -> Path:
    """Where a file of a data set is in a Hub cache."""
    place, commit = cache / f"datasets--{repository.replace('/', '--')}", "0" * 40
    (place / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text(commit)
    path = place / "snapshots" / commit / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache, without a connection, and a machine without the datasets library."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    return tmp_path / "cache"


def words() -> Tokenizer:
    return Tokenizer(lambda text: [int(word) for word in text.split()])


def test_the_default_text_needs_no_more_than_is_installed(hub: Path) -> None:
    assert EvaluateConfig().text == CollectConfig().calibration == ("wikitext2",)
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert any(name.startswith("pyarrow") for name in project["dependencies"])
    for name, first in (("train", 0), ("test", 500)):
        path = cached_file(hub, "Salesforce/wikitext", f"wikitext-2-raw-v1/{name}-00000-of-00001.parquet")
        rows = ["", *(str(first + i) for i in range(100))]
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path)
    drawn = calibration_tokens(TextWanted(["wikitext2"], 5, 8, TextConfig()), 0, words, 1000).tokens
    assert drawn.shape == (5, 8) and drawn.max() < 100
    consecutive = evaluation_tokens(TextWanted(["wikitext2"], None, 50, TextConfig(), True), words, 1000).tokens
    assert consecutive.ravel().tolist() == list(range(500, 600))


def test_c4_is_sampled_as_the_released_code_does(hub: Path) -> None:
    draw = random.Random(1)
    documents = [" ".join(str(draw.randrange(900)) for _ in range(draw.randrange(3, 40))) for _ in range(300)]
    for name in ("train.00000-of-01024", "validation.00000-of-00008"):
        path = cached_file(hub, "allenai/c4", f"en/c4-{name}.json.gz")
        path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in documents).encode()))
    expected: list[list[str]] = []
    random.seed(3)
    while len(expected) < 20:  # get_c4 in lib/data.py
        found = documents[random.randint(0, len(documents) - 1)].split()
        if len(found) > 16:
            i = random.randint(0, len(found) - 16 - 1)
            expected.append(found[i : i + 16])
    tokens = calibration_tokens(TextWanted(["c4"], 20, 16, TextConfig()), 3, words, 1000).tokens
    assert tokens.tolist() == [[int(word) for word in window] for window in expected]
    consecutive = evaluation_tokens(TextWanted(["c4"], None, 10, TextConfig(), True), words, 1000).tokens
    assert consecutive.ravel()[:40].tolist() == [int(word) for word in " ".join(documents).split()][:40]
    assert len(consecutive) == 256  # of more than 600
    read: list[str] = []

    def keep(text: str) -> list[int]:
        read.append(text)
        return [1] * 9

    whole = Tokenizer(keep)
    evaluation_tokens(TextWanted(["c4"], 1, 4, TextConfig(), True), lambda: whole, 1000)
    assert read[0].startswith(" ".join(documents)[:2000])
    with pytest.raises(InvalidText, match="none of 300 documents of c4 has more than 99 tokens"):
        calibration_tokens(TextWanted(["c4"], 20, 99, TextConfig()), 3, words, 1000)
    path = cached_file(hub, "allenai/c4", "en/c4-train.00000-of-01024.json.gz")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InvalidText, match="cannot be read"):
        calibration_tokens(TextWanted(["c4"], 20, 16, TextConfig()), 3, words, 1000)


def test_a_file_of_c4_with_holes_is_refused(hub: Path) -> None:
    with open(cached_file(hub, "allenai/c4", "en/c4-train.00000-of-01024.json.gz"), "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(NotPlain, match="has holes"):
        calibration_tokens(TextWanted(["c4"], 20, 16, TextConfig()), 3, words, 1000)


OWN = """
from .helping import SAMPLE
from transformers import PreTrainedTokenizerFast


class Own(PreTrainedTokenizerFast):
    pass
"""


def test_the_code_of_a_tokenizer_is_carried_where_it_is_trusted(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO / "model", model)
    (model / "tokenization_own.py").write_text(OWN)
    (model / "helping.py").write_text("SAMPLE = 1\n")
    (model / "other.py").write_text("OTHER = 1\n")
    config = json.loads((model / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Own"}
    config["auto_map"] = {"AutoTokenizer": [None, "tokenization_own.Own"]}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    options: dict[str, Any] = {"calibration": (TEXT,), "samples": 8, "sequence_length": 16}
    flap_stream.prune(model, tmp_path / "trusted", PruneConfig(**options, trust_remote_code=True))
    code = {path.name for path in (tmp_path / "trusted").glob("*.py")}
    assert code == {"tokenization_own.py", "helping.py", "modeling_flap_stream.py"}
    measured = flap_stream.evaluate(
        tmp_path / "trusted", EvaluateConfig(text=(TEXT,), samples=2, trust_remote_code=True)
    )
    assert measured.windows == 2
    np.save(tmp_path / "tokens.npy", np.ones((4, 16), dtype=np.int64))
    flap_stream.prune(model, tmp_path / "untrusted", PruneConfig(calibration=(str(tmp_path / "tokens.npy"),)))
    assert {path.name for path in (tmp_path / "untrusted").glob("*.py")} == {"modeling_flap_stream.py"}
