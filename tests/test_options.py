"""What a user may write for an option, in Python and on the command line, and what becomes of the rest."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import DEMO, random_tokens, save, save_tokens, tiny_config, tiny_model

import flap_stream
from flap_stream.cli import main
from flap_stream.config import (
    BenchInferenceConfig,
    CollectConfig,
    EngineConfig,
    EvaluateConfig,
    ExportGgufConfig,
    PlanConfig,
    PruneConfig,
    RewriteConfig,
    SweepConfig,
)
from flap_stream.config.values import parse_size
from flap_stream.errors import InvalidOption


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 4 heads and 256 positions, ready tokens, and windows longer than its positions."""
    place = tmp_path_factory.mktemp("options")
    save(tiny_model(tiny_config()), place / "model")
    save_tokens(place / "tokens.npy", random_tokens(6, 16))
    save_tokens(place / "long.npy", random_tokens(2, 300))
    flap_stream.collect(place / "model", place / "run", CollectConfig(calibration=(str(place / "tokens.npy"),)))
    return place


# --- types ---


@pytest.mark.parametrize(
    ("kind", "name", "given", "meant"),
    [
        (CollectConfig, "calibration", "text.txt", ("text.txt",)),
        (CollectConfig, "calibration", Path("text.txt"), ("text.txt",)),
        (CollectConfig, "calibration", [Path("a.txt"), "b.txt"], ("a.txt", "b.txt")),
        (EvaluateConfig, "text", "text.txt", ("text.txt",)),
        (SweepConfig, "evaluate", "text.txt", ("text.txt",)),
        (SweepConfig, "ratios", 0.3, (0.3,)),
        (SweepConfig, "ratios", "0.1:0.3:0.1", (0.1, 0.2, 0.3)),
        (SweepConfig, "ratios", ["10%", 0.5], (0.1, 0.5)),
        (SweepConfig, "ratios", [0.5, 0.2, 0.2], (0.2, 0.5)),
        (SweepConfig, "resolution", "5%", 0.05),
        (BenchInferenceConfig, "batch_sizes", 4, (4,)),
        (BenchInferenceConfig, "prompt_lengths", "16,32", (16, 32)),
        (PlanConfig, "ratio", "0.3", 0.3),
        (PlanConfig, "ratio", "30%", 0.3),
        (PlanConfig, "ratio", np.float32(0.5), 0.5),
        (PlanConfig, "min_heads", np.int64(2), 2),
        (EngineConfig, "host_memory", "8GiB", 8 << 30),
        (EngineConfig, "host_memory", "8 GB", 8 * 10**9),
        (EngineConfig, "device_memory", 8e9, 8 * 10**9),
        (RewriteConfig, "max_shard_bytes", "5GB", 5 * 10**9),
        (EngineConfig, "dtype", "bf16", "bfloat16"),
        (EngineConfig, "dtype", torch.float16, "float16"),
        (EngineConfig, "device", torch.device("cuda:1"), "cuda:1"),
        (CollectConfig, "samples", "1e3", 1000),
        (CollectConfig, "samples", 1e3, 1000),
        (ExportGgufConfig, "type", "fp16", "f16"),
        (ExportGgufConfig, "type", "Q8_0", "q8_0"),
    ],
)
def test_what_is_meant_is_understood(kind: type, name: str, given: Any, meant: Any) -> None:
    found = getattr(kind(**{name: given}), name)
    assert found == meant and type(found) is type(meant)


@pytest.mark.parametrize(
    ("kind", "name", "given"),
    [
        (CollectConfig, "calibration", None),
        (CollectConfig, "calibration", ""),
        (CollectConfig, "calibration", 5),
        (CollectConfig, "calibration", {"text": "a.txt"}),
        (EvaluateConfig, "text", b"a.txt"),
        (CollectConfig, "samples", 1.5),
        (CollectConfig, "samples", True),
        (CollectConfig, "seed", "one"),
        (PlanConfig, "ratio", "much"),
        (PlanConfig, "ratio", "1e1000000"),
        (CollectConfig, "snapshot_interval", 0),
        (CollectConfig, "round_neurons_to", 0),
        (CollectConfig, "min_heads", -1),
        (CollectConfig, "tensor_parallel", 0),
        (PlanConfig, "ratio", None),
        (PlanConfig, "metric", 3),
        (EngineConfig, "host_memory", "8X"),
        (EngineConfig, "host_memory", 0),
        (EngineConfig, "trust_remote_code", "False"),
        (PruneConfig, "keep_run", "no"),
        (SweepConfig, "ratios", [[0.1]]),
        (RewriteConfig, "max_shard_bytes", ["5GB"]),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(kind: type, name: str, given: Any) -> None:
    with pytest.raises(InvalidOption, match="^--" + name.replace("_", "-").replace("shard-bytes", "shard-size")):
        kind(**{name: given})


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("8G", 8 << 30), ("8g", 8 << 30), ("512m", 512 << 20), ("8 GB", 8 * 10**9), ("1e3", 1000), ("1.5GiB", 3 << 29)],
)
def test_sizes_are_read_as_people_write_them(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


# --- the functions ---


def test_options_may_be_keywords(place: Path, tmp_path: Path) -> None:
    text = str(place / "tokens.npy")
    result = flap_stream.prune(place / "model", tmp_path / "out", ratio=0.3, calibration=text, keep_run=True)
    whole = PruneConfig(ratio=0.3, calibration=(text,))
    assert result.record == flap_stream.prune(place / "model", tmp_path / "same", whole).record
    assert flap_stream.plan(place / "run", ratio=0.3).options == PlanConfig(ratio=0.3)
    assert flap_stream.rewrite(place / "run", tmp_path / "staged").record == result.record
    assert flap_stream.collect(place / "model", tmp_path / "run", calibration=text).samples == 6
    assert [point.ratio for point in flap_stream.sweep(place / "run", ratios="10%,20%").points] == [0.1, 0.2]
    assert flap_stream.evaluate(tmp_path / "out", text=text, samples=3).windows == 3
    exported = flap_stream.export_stock(tmp_path / "out", tmp_path / "stock", pad=True)
    assert exported.directory == tmp_path / "stock"
    assert flap_stream.write_report(tmp_path / "out", tmp_path / "page.html").html == tmp_path / "page.html"


def test_options_are_given_in_one_way_and_by_their_names(place: Path) -> None:
    with pytest.raises(TypeError, match=r"prune\(\) has no option 'ration'; did you mean ratio\?"):
        flap_stream.prune(place / "model", place / "out", ration=0.3)
    with pytest.raises(InvalidOption, match="one of them"):
        flap_stream.plan(place / "run", PlanConfig(), ratio=0.3)
    with pytest.raises(InvalidOption, match=r"as a PruneConfig or by name, such as ratio=0\.2; it got 0\.2"):
        flap_stream.prune(place / "model", place / "out", 0.2)  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match="progress is 'yes'"):
        flap_stream.evaluate(place / "model", text=place / "tokens.npy", progress="yes")  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match="--html FILE or --png DIR"):
        flap_stream.write_report(place / "run")


def test_progress_is_shown_on_request(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flap_stream.evaluate(place / "model", text=place / "tokens.npy")
    assert capsys.readouterr().err == ""
    flap_stream.evaluate(place / "model", text=place / "tokens.npy", progress=True)
    assert "evaluate: 3/3" in capsys.readouterr().err


NOTEBOOK_CELL = """
import flap_stream
flap_stream.evaluate({model!r}, text={text!r}, progress=True)
"""


def test_the_kernel_of_a_notebook_shows_a_bar(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    flap_stream.evaluate(place / "model", text=place / "tokens.npy", progress=True)
    shown = capsys.readouterr().err
    assert "evaluate" in shown and "3/3" in shown and "\r" in shown
    assert "s left" not in shown


@pytest.mark.slow
def test_a_real_notebook_shows_a_bar(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ipykernel")
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    shown: list[str] = []

    def note(message: dict[str, Any]) -> None:
        content = message["content"]
        shown.append(content.get("text", "") + str(content.get("data", {})) + "".join(content.get("traceback", [])))

    try:
        cell = NOTEBOOK_CELL.format(model=str(place / "model"), text=str(place / "tokens.npy"))
        client.execute_interactive(cell, timeout=120, output_hook=note)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    out = "".join(shown)
    assert "evaluate" in out and "3/3" in out and "\r" in out, out
    assert "s left" not in out


def test_results_and_options_print_short(place: Path, tmp_path: Path) -> None:
    text = (str(DEMO / "calibration.txt"),)
    result = flap_stream.prune(DEMO / "model", tmp_path / "out", ratio=0.2, calibration=text, samples=8, keep_run=True)
    assert "removed=" in repr(result) and len(repr(result)) < 300
    planned = flap_stream.plan(tmp_path / "out.run", ratio=0.2)
    assert "decoder_ratio" in repr(planned) and len(repr(planned)) < 500
    assert len(repr(planned.layers[0])) < 60
    assert len(repr(flap_stream.sweep(tmp_path / "out.run", ratios=(0.2, 0.3)))) < 600
    assert repr(EvaluateConfig(samples=3)) == "EvaluateConfig(samples=3)"


def test_the_package_is_typed_and_names_its_functions_without_importing_torch() -> None:
    assert (Path(flap_stream.__file__).parent / "py.typed").is_file()
    names = {"prune", "write_report", "export_gguf", "export_stock", "bench_inference", "Progress"}
    assert names <= set(dir(flap_stream)) and names <= set(flap_stream.__all__)
    code = "import sys, flap_stream; dir(flap_stream); flap_stream.PruneConfig(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_was_removed_names_what_to_use(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["rewrite", "run", "out", "--restore", "least-squares", "--refit-target"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "joint"])
    assert ended.value.code == 2
    assert "'joint' was removed: least-squares always fits the layer's own dense output" in capsys.readouterr().err
    assert main([*arguments, "own"]) == 2  # since there is no run
    assert "run" in capsys.readouterr().err
    with pytest.raises(InvalidOption, match="--refit-target was removed"):
        flap_stream.rewrite(place / "run", place / "out", restore="least-squares", refit_target="dense")


# --- options without an effect ---


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("prune model out --method magnitude-sp --metric ifv", "only valid with --method flap"),
        ("plan run --method magnitude-sp --statistics released", "only valid with --method flap"),
        ("plan run --method magnitude-sp --head-score l2", "only valid with --method flap"),
        ("sweep run --samples 8", "only valid with --evaluate TEXT"),
        ("sweep run --evaluate tokens.npy --resolution 0.01", "only valid with --max-perplexity-increase"),
        ("prune model out --calibration tokens.npy --ranks 2", "only valid with --dry-run"),
        ("prune model out --calibration tokens.npy --min-heads 99", "no layer has more than 4 query heads"),
        ("prune model out --calibration tokens.npy --min-heads 99 --dry-run", "no layer has more than 4 query heads"),
        ("plan run --min-neurons 97", "no layer has more than 96 neurons"),
    ],
)
def test_what_would_not_do_what_it_says_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, words: str
) -> None:
    monkeypatch.chdir(place)
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("evaluate model --text long.npy", "300 tokens are longer than the 256 positions"),
        ("collect model long --calibration long.npy", "300 tokens are longer than the 256 positions"),
        ("prune model weights --method magnitude-sp --seed 3", "--seed 3 has no effect"),
        ("prune model weights --method magnitude-sp --bos always", "--bos always has no effect"),
        ("collect model tokens --calibration tokens.npy --ratio 0.3", "--ratio 0.3 has no effect"),
        ("evaluate model --text tokens.npy --sequence-length 8", "a .npy already holds windows"),
        ("collect model tokens --calibration tokens.npy --samples 64", "only 6 windows"),
        ("rewrite planned rewritten --dtype fp32", "--dtype float32 has no effect"),
        ("sweep run --batch-size 2", "--batch-size 2 has no effect"),
    ],
)
def test_what_changes_nothing_is_said(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, command: str, words: str
) -> None:
    monkeypatch.chdir(place)
    if "planned" in command:
        flap_stream.collect("model", "planned", calibration="tokens.npy")
        flap_stream.plan("planned", ratio=0.3)
    with caplog.at_level(logging.WARNING):
        assert main(command.split()) == 0
    assert words in caplog.text


def test_options_with_an_effect_are_passed_over_in_silence(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        flap_stream.collect(place / "model", place / "plain", calibration=place / "tokens.npy")
        flap_stream.collect(
            place / "model", place / "wanda", calibration=place / "tokens.npy", method="wanda-sp", ratio=0.3
        )
        flap_stream.evaluate(place / "model", text=place / "tokens.npy", batch_size=2, dtype="float32")
        flap_stream.plan(place / "run", ratio=0.3, metric="ifv", min_heads=2)
        flap_stream.rewrite(place / "run", place / "with code", trust_remote_code=True)
    assert caplog.text == ""


def test_no_verb_warns_of_options_that_were_not_given(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(place)
    with caplog.at_level(logging.WARNING):
        for command in (
            "collect model bare --calibration tokens.npy",
            "collect model scored --calibration tokens.npy --loss-windows 2",
            "plan bare",
            "rewrite bare written",
            "sweep bare",
            "sweep bare --evaluate tokens.npy",
            "evaluate written --text tokens.npy",
            "prune model whole --calibration tokens.npy",
            "prune model by-magnitude --method magnitude-sp",
            "prune model fed-on --method wanda-sp --calibration tokens.npy",
            "inspect whole",
            "export-stock whole stock --pad",
        ):
            assert main(command.split()) == 0, command
    assert caplog.text == ""


# --- the command line ---


def usage_error(capsys: pytest.CaptureFixture[str], command: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 2 and "usage:" not in error, error
    return error


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("prun model out", ("'prun' is unknown", "did you mean prune?", "flap-stream --help")),
        ("prune model out --ration 0.3", ("there is no option --ration", "did you mean --ratio?", "prune --help")),
        ("prune model --ration 0.3 out", ("--ration", "did you mean --ratio?")),
        ("prune model out --metric wivf", ("'wivf' is unknown", "did you mean wifv?")),
        ("prune model out --samples many", ("--samples", "'many' is not a whole number")),
        ("prune model", ("required: OUT",)),
        ("prune --calibration a.txt model", ("required: OUT",)),
        ("prune model out more", ("'more' is one argument too many",)),
        ("prune model out --ratio", ("--ratio: expected one argument",)),
        ("", ("required: VERB",)),
    ],
)
def test_a_usage_error_is_two_lines(capsys: pytest.CaptureFixture[str], command: str, words: tuple[str, ...]) -> None:
    error = usage_error(capsys, command)
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    "command",
    [
        "prune --calibration {text} {model} {out} --quiet",
        "prune --calibration {text} {model} {out}",
        "prune {model} --calibration {text} {out}",
        "prune --calibration {text} {model} --quiet {out}",
        "prune --quiet {model} {out} --calibration {text}",
        "prune --calibration {text} -- {model} {out}",
        "prune --calibration={text} {model} {out}",
    ],
)
def test_an_option_with_several_values_leaves_the_model(place: Path, tmp_path: Path, command: str) -> None:
    out = tmp_path / "out"
    assert main(command.format(text=place / "tokens.npy", model=place / "model", out=out).split()) == 0
    assert (out / "pruning.json").exists()


def test_several_texts_in_front_of_the_model_are_all_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [str(tmp_path / name) for name in ("first.txt", "second.txt")]
    for text, name in zip(texts, ("evaluation.txt", "calibration.txt"), strict=True):
        Path(text).write_text((DEMO / name).read_text()[:4000])
    model, windows = str(DEMO / "model"), []
    for given in (["--text", *texts, model], [model, "--text", *texts], [model, "--text", texts[0]]):
        assert main(["evaluate", *given, "--json"]) == 0
        windows.append(json.loads(capsys.readouterr().out)["windows"])
    assert windows[0] == windows[1] > windows[2]


def test_the_command_line_reads_what_people_write(place: Path, tmp_path: Path) -> None:
    text, model = place / "tokens.npy", place / "model"
    command = f"prune {model} {tmp_path / 'out'} --calibration {text} --ratio 30% --dtype fp32 --samples 1e3"
    assert main([*command.split(), "--host-memory", "4G", "--max-shard-size", "1e5"]) == 0
    record = (tmp_path / "out" / "pruning.json").read_text()
    assert '"ratio":0.3' in record and '"samples":1000' in record
