"""Both models are really run, in processes of their own, and what cannot be run is refused in a sentence."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from models import random_tokens, save, save_tokens, tiny_config, tiny_model
from test_cli import run as command

import flap_stream
from flap_stream.cli import main
from flap_stream.config import BenchInferenceConfig, PruneConfig
from flap_stream.errors import FlapStreamError
from flap_stream.progress import Progress
from flap_stream.stages.bench_inference import Measurement, Setting, side_by_side, summary


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bench")
    save(tiny_model(tiny_config()), place / "model")
    tokens = save_tokens(place / "tokens.npy", random_tokens(6, 16))
    flap_stream.prune(place / "model", place / "out", PruneConfig(ratio=0.5, calibration=(tokens,)))
    shutil.copytree(place / "out", place / "foreign")
    (place / "foreign" / "modeling_flap_stream.py").write_text("raise SystemExit('ran')")
    return place


@pytest.mark.slow
def test_both_models_are_measured_at_every_setting(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    code, out, err = command(
        capsys,
        *("bench-inference", "model", "out", "--batch-sizes", "1,2", "--prompt-lengths", "8,12", "--generate", "3"),
        *("--rounds", "2", "--json", "--device", "cpu"),
    )
    assert code == 0, err
    body = json.loads(out)
    assert body["dtype"] == "float32" and body["device"] == "cpu"
    record = json.loads((place / "out" / "pruning.json").read_text())
    assert body["weight_bytes"] == {
        "dense": 4 * record["parameters"]["before"],
        "pruned": 4 * record["parameters"]["after"],
    }
    found = [tuple(row["setting"].values()) for row in body["rows"]]
    assert found == [(1, 8, 3), (1, 12, 3), (2, 8, 3), (2, 12, 3)]
    kept = sum(len(layer["kept_kv_groups"]) for layer in record["layers"])
    for row in body["rows"]:
        batch, prompt, steps = row["setting"].values()
        for name, groups in (("dense", 3 * 2), ("pruned", kept)):
            assert row[name]["kv_cache_bytes"] == batch * (prompt + steps) * groups * 2 * 16 * 4
            assert row[name]["prompt_tokens_per_second"] > 0 and row[name]["generation_tokens_per_second"] > 0
            assert row[name]["peak_host_bytes"] > body["weight_bytes"][name]
        assert row["prompt_speedup"] > 0 and row["generation_speedup"] > 0


@pytest.mark.slow
def test_a_model_with_states_in_place_of_keys_is_measured(tmp_path: Path) -> None:
    model = save(tiny_model(tiny_config("lfm2")), tmp_path / "model")
    tokens = save_tokens(tmp_path / "tokens.npy", random_tokens(6, 16))
    flap_stream.prune(model, tmp_path / "out", ratio=0.3, calibration=tokens)
    how: dict[str, Any] = {"batch_sizes": 1, "prompt_lengths": 8, "generate": 2, "rounds": 1, "device": "cpu"}
    (row,) = flap_stream.bench_inference(model, tmp_path / "out", **how).rows
    assert row.dense.kv_cache_bytes > 0


def test_rates_are_of_all_tokens_by_the_median() -> None:
    runs = [Measurement(s, 2 * s, peak, 0, 5) for s, peak in ((1.0, 7), (2.0, 9), (4.0, 8))]
    found = summary(Setting(batch_size=3, prompt_length=10, generate=4), runs)
    assert (found.prompt_tokens_per_second, found.generation_tokens_per_second) == (15.0, 3.0)
    assert (found.peak_host_bytes, found.kv_cache_bytes) == (9, 5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("nowhere out", "no such model"),
        ("model nowhere", "no such model"),
        ("model foreign", "--trust-remote-code"),
        ("model out --prompt-lengths 250 --generate 7", "at most 256"),
        ("model out --batch-sizes 0", "--batch-sizes is 0"),
        ("model out --generate 0", "--generate is 0"),
        ("model out --rounds 0", "--rounds is 0"),
        ("model out --device tpu", "--device 'tpu' is unknown"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_sentence(
    place: Path, arguments: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert main(["bench-inference", "--prompt-lengths", "8", *arguments.split(), "--quiet"]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.slow
def test_a_process_that_fails_is_told_of(place: Path) -> None:
    options = BenchInferenceConfig(rounds=1, trust_remote_code=True)
    with pytest.raises(FlapStreamError, match=r"foreign failed \(ran\)"):
        side_by_side({"pruned": str(place / "foreign")}, [Setting(1, 4, 1)], options, Progress())
