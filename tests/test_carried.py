"""What a model's folder holds besides its weights is copied, or left out with a warning before any work."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from warm_commands import run_warm

import flap_stream
from flap_stream.cli import main
from flap_stream.config import PruneConfig
from flap_stream.output.digests import damaged_files
from flap_stream.stages import collect as collect_stage


def prune(model: str | Path, out: str | Path) -> Path:
    flap_stream.prune(model, out, PruneConfig(ratio=0.4, calibration=("tokens.npy",)))
    assert damaged_files(Path(out)) == []
    return Path(out)


FRONT_MATTER = {
    "a tab": b"license: mit\n\tlanguage: en",
    "an open bracket": b"license: [mit",
    "a tag": b"license: !!python/object/apply:os.system {a: b}",
    "not a dictionary": b"- license",
    "a scalar": b"license",
    "two colons": b"license: a: b",
    "not UTF-8": b"license: \xff\xfe",
    "nested deeply": b"license: " + b"[" * 5000,
    "a date that is none": b"license: 2024-99-99\nx: 1: 2",
    "an anchor in itself": b"license: &a [*a]",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FRONT_MATTER)
def test_front_matter_that_cannot_be_read_is_left_out_with_a_warning(
    kind: str, place: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "model" / "README.md").write_bytes(b"---\n" + FRONT_MATTER[kind] + b"\n---\n# A model\n")
    told: list[bool] = []
    collect = collect_stage.collect_statistics

    def recorded(*arguments: Any) -> Any:
        told.append("model card" in caplog.text)
        return collect(*arguments)

    monkeypatch.setattr("flap_stream.stages.collect.collect_statistics", recorded)
    card = ModelCard.load(prune("model", "out") / "README.md")
    assert told == [True]  # before the first layer
    assert card.data.get("license") is None and card.data.library_name == "transformers"


@pytest.mark.parametrize(
    ("metadata", "kept"),
    [
        ("license: mit\nlanguage:\n- no\n- en", {"license": "mit", "language": ["no", "en"]}),
        ("license: other\nlicense_name: a  'b' \"c\" #d", {"license_name": "a  'b' \"c\""}),
        ("license: {a: b}\nlanguage: en", {"language": "en", "license": None}),
        ('license: "a\\nb"\nlanguage: en', {"language": "en", "license": None}),
        ("license: 2024-01-01", {"license": "2024-01-01"}),
        (f"license: {'x' * 5000}", {"license": None}),
        ("1: 2\nlicense: mit", {"license": "mit"}),
    ],
)
def test_metadata_is_carried_where_it_is_plain_text(metadata: str, kept: dict[str, object], place: Path) -> None:
    (place / "model" / "README.md").write_text(f"---\n{metadata}\n---\n# A model\n")
    data = ModelCard.load(prune("model", "out") / "README.md").data
    assert {key: data.get(key) for key in kept} == kept


NAMES = [b"tok\xff.json", b"a\nb.json", b"x" * 246 + b".json", b"LICENSE\xfe", b"a\x1b[2J.txt", "é.json".encode()]


def test_files_whose_names_cannot_be_carried_are_left_out_with_a_warning(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in NAMES:
        Path(os.fsdecode(os.fsencode(place / "model") + b"/" + name)).write_text("{}")
    with caplog.at_level(logging.WARNING, "flap_stream"):
        out = prune("model", "out")
    assert caplog.text.count("is left out of the result") == len(NAMES) - 1
    assert (out / "é.json").read_text() == "{}" and len(list(out.glob("*.json"))) >= 3
    checked = subprocess.run(["sha256sum", "--quiet", "--strict", "--check", "SHA256SUMS"], cwd=out, check=False)
    assert checked.returncode == 0


@pytest.mark.parametrize("name", [b"my\nmodel", b"model\xff", b"`m` #1", b"m" * 255, "mödel".encode()])
def test_a_model_of_any_name_is_pruned_quoted_and_exported(name: bytes, place: Path) -> None:
    model = os.fsdecode(name)
    Path("model").rename(model)
    out = prune(model, "out")
    heading = next(line for line in (out / "README.md").read_text().splitlines() if line.startswith("# "))
    assert heading.endswith("pruned by 40% with flap")
    assert main(["export-stock", "out", "stock", "--pad", "--quiet"]) == 0
    assert main(["export-gguf", model, "dense.gguf", "--quiet"]) == 0
    assert json.loads((out / "pruning.json").read_text())["base"]["name"].isprintable()


@pytest.mark.slow
def test_an_output_of_any_name_is_printed(place: Path) -> None:
    options = ["--calibration", "tokens.npy", "--quiet"]
    done = run_warm([sys.executable, "-m", "flap_stream", "prune", "model", os.fsdecode(b"out\xff"), *options])
    assert done.returncode == 0, done.stderr
    assert "\\udcff" in done.stdout and Path(os.fsdecode(b"out\xff")).exists()


@pytest.mark.parametrize("contents", [None, "{", "[]", '{"format": "flap-stream-pruning"}'])
def test_a_record_that_the_card_cannot_quote_is_told_of_before_an_export(
    contents: Any, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = prune("model", "out") / "pruning.json"
    record.unlink() if contents is None else record.write_text(contents)
    assert main(["export-stock", "out", "stock", "--pad", "--quiet"]) == 2
    assert "pruning.json is missing or damaged" in capsys.readouterr().err
    assert not Path("stock.partial").exists()
