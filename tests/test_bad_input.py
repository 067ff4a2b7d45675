"""Every bad input gets one sentence and exit code 2 before any long work, and nothing that existed is touched."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import random_tokens
from refusals import (
    PRUNE,
    cut_shard,
    drop_shards,
    edit_config,
    edit_header,
    edit_index,
    edit_tensor,
    first,
    leave_a_pickle,
    refuse,
    with_value,
    write_npy,
)

import flap_stream
from flap_stream.cli import main
from flap_stream.model.model_files import INDEX_NAME

Q = "model.layers.1.self_attn.q_proj.weight"
DOWN = "model.layers.2.mlp.down_proj.weight"
BAD_MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config": (lambda m: (m / "config.json").unlink(), ("config.json does not exist",)),
    "config is not JSON": (lambda m: (m / "config.json").write_text("{"), ("config.json is not JSON",)),
    "config is a list": (lambda m: (m / "config.json").write_text("[]"), ("is not a JSON object",)),
    "no safetensors": (drop_shards, ("holds no safetensors", "save_pretrained")),
    "pickles": (leave_a_pickle, ("no safetensors", "convert it", "save_pretrained")),
    "quantised": (edit_config(quantization_config={"quant_method": "gptq"}), ("quantised", "gptq")),
    "int8 tensor": (edit_tensor(Q, lambda t: t.to(torch.int8)), (Q, "I8")),
    "other family": (edit_config(model_type="gpt2"), ("'gpt2'", "supported families")),
    "family is a list": (edit_config(model_type=["llama"]), ("supported families",)),
    "too many layers": (edit_config(num_hidden_layers=10**9), ("num_hidden_layers", "3 layers")),
    "negative layers": (edit_config(num_hidden_layers=-1), ("num_hidden_layers -1",)),
    "hidden size is text": (edit_config(hidden_size="64"), ("hidden_size '64'",)),
    "absurd hidden size": (edit_config(hidden_size=10**12), ("embed_tokens", "1000000000000")),
    "absurd MLP": (edit_config(intermediate_size=10**15), ("config.json",)),
    "no heads": (edit_config(num_attention_heads=0), ("num_attention_heads 0",)),
    "odd KV heads": (edit_config(num_key_value_heads=3), ("4 heads for 3 KV heads",)),
    "rope is text": (edit_config(rope_parameters="x"), ("transformers cannot build", "rope_parameters")),
    "shard missing": (lambda m: sorted(m.glob("*.safetensors"))[2].unlink(), ("shard", "is missing")),
    "shard truncated": (cut_shard, ("bytes, but its header describes",)),
    "header length": (
        lambda m: sorted(m.glob("*.safetensors"))[0].write_bytes(b"\xff" * 8 + b"{}"),
        ("claims a header of 18446744073709551615",),
    ),
    "header is empty": (lambda m: sorted(m.glob("*.safetensors"))[0].write_bytes(b""), ("claims a header",)),
    "header is not JSON": (edit_header(lambda h: b"{]      "), ("cannot be read",)),
    "header is not UTF-8": (edit_header(lambda h: b'{"\xff\xfe": 1}'), ("cannot be read",)),
    "offsets overlap": (edit_header(lambda h: first(h).update(data_offsets=[8, 8 + 2 * 97])), ("cannot take",)),
    "offsets beyond": (
        edit_header(lambda h: first(h).update(data_offsets=[n + 10**9 for n in first(h)["data_offsets"]])),
        ("the header offsets are inconsistent",),
    ),
    "dtype lies": (edit_header(lambda h: first(h).update(dtype="F16")), ("F16", "cannot take")),
    "dtype unknown": (edit_header(lambda h: first(h).update(dtype="F12")), ("'F12'", "expected one of")),
    "shape lies": (edit_header(lambda h: first(h).update(shape=[1, 2])), ("[1, 2]", "cannot take")),
    "negative shape": (edit_header(lambda h: first(h).update(shape=[-97, -64])), ("not natural numbers",)),
    "entry is a number": (edit_header(lambda h: h.update(x=5)), ("cannot be read",)),
    "index names a tensor that is not there": (
        lambda m: (edit_tensor(Q, lambda t: None)(m), edit_index(**{Q: "model-00001-of-00009.safetensors"})(m)),
        (Q, "is missing", "its index places it in model-00001-of-00009.safetensors"),
    ),
    "index leaves the folder": (
        edit_index(x="../secret.safetensors"),
        ("../secret.safetensors", "which is not a file in"),
    ),
    "index without a map": (lambda m: (m / INDEX_NAME).write_text("{}"), ("no weight_map",)),
    "tensor missing": (edit_tensor(Q, lambda t: None), (Q, "is missing")),
    "tensor of another shape": (edit_tensor(Q, lambda t: t[:32]), (Q, "[32, 64]", "[64, 64]")),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_models_that_cannot_be_pruned_are_refused(case: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, words = BAD_MODELS[case]
    damage(place / "model")
    refuse(capsys, PRUNE, *words)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nowhere/at/all", ("no such model: nowhere/at/all",)),
        ("./nowhere", ("is not a directory",)),
        ("someone/no-such-model", ("no such model", "Hub id")),
        ("tokens.npy", ("is a file",)),
    ],
)
def test_models_that_are_not_there_are_refused(
    model: str, words: Sequence[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(capsys, f"prune {model} out --calibration tokens.npy", *words)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (Q, (Q, "NaN or infinity")),
        (DOWN, (DOWN, "NaN or infinity")),
        ("model.embed_tokens.weight", ("model.embed_tokens.weight", "NaN or infinity")),
        ("model.layers.0.input_layernorm.weight", ("model.layers.0.input_layernorm.weight",)),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_stop_with_their_name(
    tensor: str, words: Sequence[str], value: Any, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(weights: torch.Tensor) -> torch.Tensor:
        if "embed" in tensor:
            weights[3] = value  # a token that occurs
            return weights
        return with_value(value)(weights)

    edit_tensor(tensor, change)(place / "model")
    refuse(capsys, PRUNE, *words, touches=("out.run",))
    assert not Path("out").exists()


@pytest.mark.parametrize("tensor", ["lm_head.weight", "model.norm.weight"])
def test_a_head_that_is_not_finite_stops_the_evaluation(
    tensor: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_tensor(tensor, with_value(float("nan")))(place / "model")
    refuse(capsys, "evaluate model --text tokens.npy", tensor, "NaN or infinity")


def test_hidden_states_that_overflow_stop_with_their_layer(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("gate_proj", "up_proj"):
        edit_tensor(f"model.layers.1.mlp.{name}.weight", lambda t: t * 3e3)(place / "model")
    words = ("hidden states after layer 1", "model.layers.1", "--dtype float32")
    refuse(capsys, f"{PRUNE} --dtype float16", *words, touches=("out.run",))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--ratio 0", ("--ratio is 0.0", "between 0 and 1")),
        ("--ratio 1", ("--ratio is 1.0",)),
        ("--ratio -0.2", ("--ratio is -0.2",)),
        ("--ratio nan", ("--ratio 'nan' is not a percentage",)),
        ("--ratio 0.99", ("--min-heads 1", "at most 0.7")),
        ("--ratio 0.5 --structure ul-um --min-neurons 90", ("--min-neurons", "lower the ratio")),
        ("--ratio 0.2 --structure al-mm", ("needs --remove-heads",)),
        ("--remove-heads 3", ("only valid with al-mm and ul-mm",)),
        ("--ratio 0.1 --structure al-mm --remove-heads 10", ("alone removes more",)),
        ("--method wanda-sp --structure al-am", ("al-am is not valid with --method wanda-sp",)),
        ("--method magnitude-sp --restore bias", ("defined without a bias",)),
        ("--samples 0", ("--samples is 0",)),
        ("--sequence-length 1", ("--sequence-length is 1",)),
        ("--batch-size 0", ("--batch-size is 0",)),
        ("--min-heads -1", ("--min-heads is -1",)),
        ("--max-shard-size 5XB", ("'5XB' is not a size",)),
        ("--device tpu", ("--device 'tpu'",)),
        pytest.param(
            "--device cuda",
            ("--device cuda", "0 CUDA devices"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA"),
        ),
    ],
)
def test_options_that_mean_nothing_are_refused(
    options: str, words: Sequence[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(capsys, f"{PRUNE} {options}", *words)


BAD_TEXTS: dict[str, tuple[Callable[[], object], str, tuple[str, ...]]] = {
    "missing": (lambda: None, "nowhere.txt", ("no such text: nowhere.txt",)),
    "of another kind": (lambda: Path("a.doc").write_text("x"), "a.doc", ("a.doc is not a ", ".txt")),
    "an empty directory": (lambda: Path("texts").mkdir(), "texts", ("texts holds no",)),
    "not UTF-8": (lambda: Path("a.txt").write_bytes(b"\xff\xfe\xfa"), "a.txt", ("a.txt cannot be read as UTF-8",)),
    "lines without text": (lambda: Path("a.jsonl").write_text('{"x": 1}'), "a.jsonl", ("a.jsonl line 1", '"text"')),
    "lines that are not JSON": (lambda: Path("a.jsonl").write_text("\n{\n"), "a.jsonl", ("a.jsonl line 2",)),
    "parquet that is not": (lambda: Path("a.parquet").write_text("x"), "a.parquet", ("a.parquet cannot be read",)),
    "one dimension": (lambda: write_npy("a.npy", np.arange(50)), "a.npy", ("int64 [50]", "[sample, token]")),
    "not whole numbers": (lambda: write_npy("a.npy", np.ones((3, 4))), "a.npy", ("float64 [3, 4]",)),
    "objects": (lambda: write_npy("a.npy", np.array([[None]])), "a.npy", ("a.npy cannot be read",)),
    "no windows": (lambda: write_npy("a.npy", np.ones((0, 4), int)), "a.npy", ("[0, 4]",)),
    "token too high": (lambda: write_npy("a.npy", np.full((3, 4), 97)), "a.npy", ("token 97", "0 to 96")),
    "token negative": (lambda: write_npy("a.npy", np.full((3, 4), -1)), "a.npy", ("token -1", "0 to 96")),
    "tokens beside text": (lambda: None, "tokens.npy model", ("cannot be combined with other texts",)),
}


@pytest.mark.parametrize("verb", ["prune", "evaluate"])
@pytest.mark.parametrize("case", BAD_TEXTS)
def test_texts_that_cannot_serve_are_refused(
    case: str, verb: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, text, words = BAD_TEXTS[case]
    tokenizer = Path(__file__).parents[1] / "flap_stream" / "demo" / "model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, place / "model" / name)
    make()
    command = f"prune model out --calibration {text}" if verb == "prune" else f"evaluate model --text {text}"
    refuse(capsys, command, *words)


def test_text_shorter_than_a_window_and_a_foreign_tokenizer_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.txt").write_text("In the beginning")
    refuse(capsys, "prune model out --calibration a.txt", "model has no tokenizer", ".npy")
    tokenizer = Path(__file__).parents[1] / "flap_stream" / "demo" / "model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, place / "model" / name)
    refuse(capsys, "prune model out --calibration a.txt", "a.txt has", "one window of 128 needs 129")
    refuse(capsys, "evaluate model --text a.txt", "a.txt has", "one window needs 128")
    Path("a.txt").write_text("In the beginning God created the heaven and the earth. " * 20)
    refuse(capsys, "prune model out --calibration a.txt", "the model's vocabulary is 0 to 96")


def test_an_output_that_is_not_ours_is_left_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/diary.txt").write_text("mine")
    refuse(capsys, PRUNE, "out exists and was not made by flap-stream")
    shutil.rmtree("out")
    Path("out").write_text("mine")
    refuse(capsys, PRUNE, "out exists and was not made by flap-stream")
    Path("out").unlink()
    Path("out.partial").mkdir()
    Path("out.partial/diary.txt").write_text("mine")
    refuse(capsys, PRUNE, "out.partial exists and was not made by the run")


@pytest.mark.parametrize("out", ["model/out", "model/a/b"])
def test_an_output_inside_the_model_is_refused(out: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refuse(capsys, f"prune model {out} --calibration tokens.npy", "lies in the model's own directory")


def test_another_checkpoint_at_the_output_is_left_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PRUNE.split(), "--quiet"]) == 0
    capsys.readouterr()
    changes = (
        "--ratio was 0.2, now 0.3",
        "--samples was 1024, now 5",
        "--metric was wifv, now ifv",
        "--restore was bias, now none",
    )
    for words in changes:
        option, now = words.split()[0], words.split()[-1]
        refuse(capsys, f"{PRUNE} {option} {now}", f"out was pruned with other options: {words}")
    edit_config(rms_norm_eps=0.1)(place / "model")
    refuse(capsys, PRUNE, "out was pruned from another model named model")


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (
            lambda: write_npy("tokens.npy", random_tokens(6, 16, seed=9)),
            "",
            ("tokens.npy produced different tokens then",),
        ),
        (lambda: None, "--samples 4", ("--samples was 1024, now 4",)),
        (lambda: None, "--dtype bfloat16", ("other options", "--dtype was float32, now bfloat16")),
        (lambda: None, "--batch-size 2", ("other options", "--batch-size was 6, now 2")),
        (lambda: None, "--method magnitude-sp", ("--method was flap, now magnitude-sp",)),
        (lambda: edit_config(rms_norm_eps=0.1)(Path("model")), "", ("before it was changed", "its config.json")),
        (
            lambda: edit_tensor("lm_head.weight", lambda t: t.bfloat16())(Path("model")),
            "",
            ("before it was changed", "its model-0000"),
        ),
    ],
)
def test_a_run_made_for_something_else_says_what_differs(
    change: Any, options: str, words: Sequence[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["collect", "model", "run", "--calibration", "tokens.npy", "--quiet"]) == 0
    capsys.readouterr()
    change()
    refuse(capsys, f"{PRUNE} --run run {options}", "run was made ", *words)


def test_a_directory_that_is_no_run_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refuse(capsys, f"{PRUNE} --run model", "model exists and is not a run directory")
    refuse(capsys, "plan model", "is not a run directory", "flap-stream collect")
    refuse(capsys, "rewrite nowhere out", "is not a run directory")
    refuse(capsys, "inspect nowhere", "neither a run directory")


def test_a_plan_that_the_collection_does_not_serve_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect", "model", "run", "--calibration", "tokens.npy", "--quiet"]) == 0
    refuse(capsys, "rewrite run out", "holds no plan yet", "flap-stream plan")
    refuse(capsys, "plan run --method wanda-sp", "collected for flap", "collect again with --method wanda-sp")
    assert (
        main(
            [
                "collect",
                "model",
                "wanda",
                "--calibration",
                "tokens.npy",
                "--method",
                "wanda-sp",
                "--ratio",
                "0.5",
                "--quiet",
            ]
        )
        == 0
    )
    words = ("collected with wanda-sp for --ratio 0.5", "does not serve 0.3")
    refuse(capsys, "plan wanda --method wanda-sp --ratio 0.3", *words)
    refuse(capsys, "plan wanda --ratio 0.5", "collected for wanda-sp")


def test_an_incomplete_collection_is_not_planned(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_tensor(DOWN, with_value(float("nan")))(place / "model")
    assert main(["collect", "model", "run", "--calibration", "tokens.npy", "--quiet"]) == 2
    capsys.readouterr()
    refuse(capsys, "plan run", "0002 is not complete", "collect again to finish", code=1)


def test_code_that_comes_with_a_model_is_not_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "from pathlib import Path\nPath('ran').touch()\n"
    for name in ("modeling_own", "tokenization_own"):
        (place / "model" / f"{name}.py").write_text(code)
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    edit_config(auto_map=auto_map)(place / "model")
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}, "tokenizer_class": "Own"}
    (place / "model" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    Path("a.txt").write_text("In the beginning " * 50)
    refuse(capsys, "prune model out --calibration a.txt", "trust-remote-code")
    assert main([*PRUNE.split(), "--quiet"]) == 0
    assert main(["evaluate", "out", "--text", "tokens.npy", "--quiet"]) == 0
    assert not Path("ran").exists() and "modeling_own" not in Path("out/config.json").read_text()


@pytest.mark.parametrize("name", ["out", "out.partial"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_link_in_the_place_of_the_output_is_refused_before_any_work(
    name: str, exists: Any, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if exists:
        Path("elsewhere").mkdir()
    Path(name).symlink_to("elsewhere")
    refuse(capsys, PRUNE, f"{name} is a symbolic link to elsewhere")


def test_a_run_directory_that_is_a_link_to_nowhere_is_refused_before_any_work(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out.run").symlink_to("elsewhere")
    refuse(capsys, PRUNE, "out.run is a link to elsewhere, which does not exist")


def test_an_output_that_does_not_fit_is_refused_before_any_work(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = place / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("no permission to mount a small file system")
    try:
        words = ("the output and the run directory need", "free", "another disk")
        refuse(capsys, "prune model small/out --calibration tokens.npy", *words)
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.slow
def test_the_real_command_prints_one_line_and_no_traceback(place: Path) -> None:
    command = [sys.executable, "-m", "flap_stream", "prune", "./nowhere", "out"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "flap-stream: no such model: ./nowhere is not a directory\n"


@pytest.mark.parametrize("options", [["--method", "shortgpt", "--ratio", "0.001"], ["--ratio", "0.999"]])
def test_a_dry_run_refuses_what_the_job_would(
    options: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for how in ([], ["--dry-run"]):
        assert main(["prune", "model", "out", "--calibration", "tokens.npy", *options, *how]) == 2
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]


def test_what_wanda_sp_cannot_decide_is_refused_before_a_layer_runs(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["--method", "wanda-sp", "--ratio", "0.9", "--min-heads", "4"]
    assert main(["collect", "model", "run", "--calibration", "tokens.npy", *how]) == 2
    assert "lower the ratio" in capsys.readouterr().err and not (place / "run").exists()


def test_an_output_of_other_options_is_refused_before_a_refit(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flap_stream.collect("model", "run", calibration="tokens.npy")
    flap_stream.plan("run", ratio=0.3)
    flap_stream.rewrite("run", "out")
    flap_stream.plan("run", ratio=0.5)
    monkeypatch.setattr("flap_stream.stages.rewrite.refit_layers", None)
    assert main(["rewrite", "run", "out", "--restore", "reconstruct"]) == 2
    assert "out was pruned with other options: --ratio was 0.3, now 0.5" in capsys.readouterr().err
    assert main(["rewrite", "run", "fresh", "--restore", "reconstruct", "--output-dtype", "fp8"]) == 2
    assert "fp8" in capsys.readouterr().err
