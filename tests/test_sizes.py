"""One number for one thing: what plan, sweep, prune, report and JSON say of sizes is what is in the files."""

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
from models import load, random_tokens, save, save_tokens, tiny_config, tiny_model
from safetensors import safe_open
from test_cli import run as command

import flap_stream
from flap_stream.config import CollectConfig, PlanConfig, PruneConfig, RewriteConfig, SweepConfig
from flap_stream.report.facts import read_facts

CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3"},  # norms of its own, which go with a layer's last head
    "phi3": {"family": "phi3"},
    "qwen3_moe": {"family": "qwen3_moe"},
}


def elements(directory: Path) -> int:
    total = 0
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


@pytest.mark.slow
@pytest.mark.parametrize("restore", ["bias", "none"])
@pytest.mark.parametrize("case", CASES)
def test_parameters_and_shares_are_the_same_everywhere(
    case: str, restore: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(tiny_model(tiny_config(**CASES[case])), tmp_path / "model")
    calibration, run, out = (
        (save_tokens(tmp_path / "text.npy", random_tokens(8, 24)),),
        tmp_path / "run",
        tmp_path / "out",
    )
    emptied = {"ratio": 0.5, "min_heads": 0, "structure": "al-mm", "remove_heads": 9}
    how: dict[str, Any] = emptied if case == "qwen3" else {"ratio": 0.3}
    result = flap_stream.prune(
        model, out, PruneConfig(**how, calibration=calibration, restore=restore, keep_run=True), run=run
    )
    assert any(layer["kept_kv_groups"] == [] for layer in result.record["layers"]) == (case == "qwen3")
    sizes = result.record["parameters"]
    assert sizes["after"] == elements(out) and sizes["before"] == elements(model)
    ratios = (result.record["realised_ratio"]["decoder"], 1 - sizes["after"] / sizes["before"])
    swept = {name: value for name, value in how.items() if name != "ratio"}
    sweep = flap_stream.sweep(run, SweepConfig(**swept, ratios=(how["ratio"],), restore=restore))
    assert [(point.parameters, point.decoder_ratio) for point in sweep.points] == [(sizes["after"], ratios[0])]
    facts = read_facts(run)
    assert (facts.sizes[0].before, facts.sizes[0].after) == (sizes["before"], sizes["after"])
    assert (facts.sizes[1].before, facts.sizes[1].after) == pytest.approx((4 * sizes["before"], 4 * sizes["after"]))
    of_out = read_facts(out)
    assert of_out.sizes[0].after == sizes["after"]
    found: list[Any] = [facts, of_out, *sweep.points]
    shares = [(each.decoder_ratio, each.model_ratio) for each in found]
    assert shares == [(ratios[0], pytest.approx(ratios[1]))] * 3 and len({share for _, share in shares}) == 1
    code, printed, _ = command(capsys, "inspect", out, "--json")
    assert code == 0 and json.loads(printed)["parameters"] == sizes
    if restore == "bias":  # the method's own, as plan counts
        plan = flap_stream.plan(run, PlanConfig(**how))
        assert (plan.parameters_after, plan.decoder_ratio, plan.model_ratio) == (sizes["after"], *shares[0])


def test_a_plan_says_what_prune_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tiny_model(tiny_config()), tmp_path / "model")
    calibration = save_tokens(tmp_path / "text.npy", random_tokens(8, 24))
    flap_stream.collect(model, tmp_path / "run", CollectConfig(calibration=(calibration,)))
    said = {}
    for how in ("--json", "--quiet"):
        code, printed, _ = command(capsys, "plan", tmp_path / "run", "--ratio", "0.3", how)
        assert code == 0
        said[how] = printed
    planned = json.loads(said["--json"])
    record = flap_stream.rewrite(tmp_path / "run", tmp_path / "out", RewriteConfig()).record
    for key in ("parameters", "realised_ratio", "width_multiple"):
        assert planned[key] == record[key]
    assert planned["parameters"]["added_biases"] == 2 * 3 * 64
    after = planned["parameters"]["after"]
    assert f"-> {after:,}, 384 of them biases" in said["--quiet"]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_is_written_by_default_has_widths_of_multiples_of_8(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(tiny_model(tiny_config(family)), tmp_path / "model")
    calibration = save_tokens(tmp_path / "text.npy", random_tokens(8, 24))
    common = ("--calibration", calibration, "--ratio", "0.3", "--quiet")
    for name, options, is_fast in (("default", (), True), ("published", ("--round-neurons-to", "1"), False)):
        out, run = tmp_path / name, tmp_path / f"{name}.run"
        assert command(capsys, "prune", model, out, *common, *options, "--run", run)[0] == 0
        widths = {
            size
            for key, parameter in load(out).named_parameters()
            if key.endswith(("proj.weight", "gate.weight", "up.weight", "down.weight")) and "mlp.gate." not in key
            for size in parameter.shape
        }
        assert all(width % 8 == 0 for width in widths) == is_fast
        record, card = json.loads((out / "pruning.json").read_text()), (out / "README.md").read_text()
        assert (record["width_multiple"] % 8 == 0) == is_fast
        said = "very width is a multiple of 8" if is_fast else "ot every width is a multiple of 8"
        printed = command(capsys, "plan", run, "--ratio", "0.3", *options)[1]
        assert said in card.replace("\n", " ") and said in printed
        assert abs(record["realised_ratio"]["decoder"] - 0.3) < 0.03


@pytest.mark.parametrize("restore", ["least-squares", "reconstruct"])
def test_a_refit_is_counted_as_a_bias_is(restore: str, tmp_path: Path) -> None:
    for name, biases in (("plain", False), ("biases", True)):
        config = tiny_config(attention_bias=biases, mlp_bias=biases, layers=2)
        model = save(tiny_model(config), tmp_path / name)
        calibration, out = (save_tokens(tmp_path / "text.npy", random_tokens(64, 24)),), tmp_path / f"{name}-pruned"
        options = PruneConfig(ratio=0.3, calibration=calibration, restore=restore)
        parameters = flap_stream.prune(model, out, options).record["parameters"]
        assert parameters["after"] == elements(out) and parameters["added_biases"] == (0 if biases else 2 * 2 * 64)
