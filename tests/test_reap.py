"""REAP: experts are removed by the norms of what they output."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from masked import decoder_of, masked_model, mixture_of, separate
from models import load, random_tokens, tiny_config
from rank_jobs import RankJob
from test_whole_experts import TOKENS, made

import flap_stream
from flap_stream.config import CollectConfig, PruneConfig
from flap_stream.errors import InvalidOption, RunMismatch, UnsupportedModel
from flap_stream.storage.run_directory import RunDirectory


def reap_in_memory(model: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens routed to each expert, and the mean over them of weight times norm of its output, by layer."""
    separate(model, decoder_of(model))
    found = []
    for layer in decoder_of(model).layers:
        if not hasattr(mixture_of(layer), "experts"):
            continue
        sums, counts = (np.zeros(len(mixture_of(layer).experts.each)) for _ in range(2))
        found.append((counts, sums))

        def see(experts: Any, inputs: Any, _output: Any, counts: np.ndarray = counts, sums: np.ndarray = sums) -> None:
            hidden, index, weights = inputs
            for token, chosen, weight in zip(hidden, index, weights, strict=True):
                for number, share in zip(chosen.tolist(), weight.tolist(), strict=True):
                    sums[number] += share * float(experts.each[number](token[None]).norm())
                    counts[number] += 1

        mixture_of(layer).experts.register_forward_hook(see)
    with torch.no_grad():
        model(torch.from_numpy(TOKENS))
    return [(counts, sums / np.maximum(counts, 1)) for counts, sums in found]


@pytest.mark.parametrize(("family", "batch_size"), [("mixtral", 1), ("gpt_oss", 3), ("qwen2_moe", 7)])
def test_reap_scores_are_mean_weighted_norms_and_the_lowest_go(family: str, batch_size: int, tmp_path: Path) -> None:
    path = made(tmp_path, family)
    options = PruneConfig(
        method="reap", ratio=0.5, calibration=(str(tmp_path / "tokens.npy"),), batch_size=batch_size, keep_run=True
    )
    record = flap_stream.prune(path, tmp_path / "out", options).record
    with RunDirectory(tmp_path / "out.run") as run:
        layers = [run.statistics.read(i).experts for i, shape in enumerate(run.layer_shapes) if shape.experts]
    kept = [layer["kept_experts"] for layer in record["layers"] if "kept_experts" in layer]
    for found, (counts, means), left in zip(layers, reap_in_memory(load(path)), kept, strict=True):
        assert found is not None and found.count.tolist() == counts.tolist()
        np.testing.assert_allclose(found.mean, means, rtol=1e-6)
        assert left == sorted(np.argsort(means)[2:].tolist())
    expected, ids = masked_model(path, record), torch.from_numpy(random_tokens(3, 20, seed=5))
    with torch.no_grad():
        assert (load(tmp_path / "out")(ids).logits - expected(ids).logits).abs().max() <= 1e-5


def test_reap_meets_targets_on_any_number_of_ranks_and_refuses_what_leaves_too_few(tmp_path: Path) -> None:
    path, text = made(tmp_path, "llama4_text"), (str(tmp_path / "tokens.npy"),)
    flap_stream.collect(path, tmp_path / "run", CollectConfig(calibration=text, method="reap"))
    dense = flap_stream.plan(tmp_path / "run", method="reap", ratio=0.5).parameters_before
    target = flap_stream.plan(tmp_path / "run", method="reap", target_parameters=3 * dense // 4).target
    assert target is not None and target["reached"] <= 3 * dense // 4
    with pytest.raises(InvalidOption, match="removes 4 of 4 experts of layer 0, but 1 must stay"):
        flap_stream.plan(tmp_path / "run", method="reap", ratio=0.9)
    with pytest.raises(UnsupportedModel, match="no experts"):
        flap_stream.prune(made(tmp_path / "dense", "llama"), tmp_path / "out", method="reap", calibration=text)
    flap_stream.collect(path, tmp_path / "flap", CollectConfig(calibration=text))
    with pytest.raises(RunMismatch, match="collect again with --method reap"):
        flap_stream.plan(tmp_path / "flap", method="reap", ratio=0.5)
    job = RankJob(tmp_path / "ranks", tiny_config("mixtral", layers=2), method="reap", structure=None, ratio=0.5)
    assert job.trouble("two", 2) is None
