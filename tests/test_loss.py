"""Scores by the loss: the streamed backward pass against autograd through the whole model."""

import copy
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from masked import mixture_of
from models import GEMMA4_EXPERTS, fisher_draw, random_tokens, save, save_tokens, tiny_config, tiny_model
from torch.nn import functional
from warm_commands import run_warm

import flap_stream
from flap_stream.arithmetic.layer_shape import Sublayer
from flap_stream.cli import main
from flap_stream.config import CollectConfig, PlanConfig, SweepConfig
from flap_stream.engine import head_gradient
from flap_stream.engine.head_gradient import fisher_slopes
from flap_stream.engine.wide_attention import wide_attention
from flap_stream.errors import NonFinite, RunMismatch
from flap_stream.storage import files
from flap_stream.storage.loss import KINDS, LossScores, LossStore
from flap_stream.storage.run_directory import RunDirectory

TOKENS = random_tokens(7, 24)
WINDOWS = 5

Key = tuple[int, str]  # layer and kind of unit


class Reads:
    """What the output projections of a whole model read, by layer, kind and expert, when it runs.

    inputs: `[window, token, channel]`; of an expert `[routed token, channel]`, with `tokens` the places of these tokens
    in all windows, one after another.
    """

    def __init__(self, model: Any) -> None:
        self.inputs: dict[tuple[int, str, int], torch.Tensor] = {}
        self.tokens: dict[tuple[int, str, int], torch.Tensor] = {}
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.register_forward_pre_hook(partial(self._see, (i, "attention", 0)))
            if hasattr(mixture_of(layer), "experts"):
                experts = mixture_of(layer).experts
                experts.forward = partial(self._run_experts, i, experts)
            else:
                layer.mlp.down_proj.register_forward_pre_hook(partial(self._see, (i, "mlp", 0)))

    def _see(self, key: tuple[int, str, int], _module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        self.inputs[key] = inputs[0]

    def _run_experts(
        self, layer: int, experts: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """As transformers' `MixtralExperts`, whose intermediate activations no hook can see."""
        result = torch.zeros_like(hidden)
        for number in range(experts.num_experts):
            token, choice = torch.where(index == number)
            gate, up = functional.linear(hidden[token], experts.gate_up_proj[number]).chunk(2, dim=-1)
            inputs = experts.act_fn(gate) * up
            self.inputs[layer, "mlp", number], self.tokens[layer, "mlp", number] = inputs, token
            output = functional.linear(inputs, experts.down_proj[number]) * weights[token, choice, None]
            result = result.index_add(0, token, output)
        return result

    def summed(self, key: tuple[int, str, int], terms: torch.Tensor) -> torch.Tensor:
        """Sums over the tokens of each window, `[window, unit]`."""
        if terms.ndim == 3:
            return terms.sum(dim=1)
        windows = self.tokens[key] // TOKENS.shape[1]
        return terms.new_zeros(WINDOWS, terms.shape[1]).index_add(0, windows, terms)


def scores_in_memory(model: Any, run: RunDirectory, dtype: torch.dtype) -> dict[Key, np.ndarray]:
    """F of all units, one layer's after another; x and g in `dtype`, sums in float64."""
    model = copy.deepcopy(model).to(dtype)
    reads, tokens = Reads(model), torch.from_numpy(TOKENS[:WINDOWS])
    logits = model(tokens).logits
    gradients = torch.autograd.grad(logits, list(reads.inputs.values()), fisher_draw(logits))
    found: dict[Key, list[torch.Tensor]] = {}
    done: dict[Key, int] = {}
    for (key, inputs), gradient in zip(reads.inputs.items(), gradients, strict=True):
        i, kind, _ = key
        shape, first = run.layer_shapes[i], done.get((i, kind), 0)
        if not shape.units(Sublayer(kind)):
            found[i, kind] = [torch.zeros(0)]
            continue
        mean = torch.from_numpy(getattr(run.statistics.read(i), kind).mean)[first : first + inputs.shape[-1]]
        done[i, kind] = first + inputs.shape[-1]
        terms = (inputs.detach().double() - mean) * gradient.double()
        units = shape.kv_groups if kind == "attention" else inputs.shape[-1]
        squares = terms.unflatten(-1, (units, -1)).sum(dim=-1).square()
        found.setdefault((i, kind), []).append(reads.summed(key, squares).mean(dim=0))
    return {key: torch.cat(parts).numpy() for key, parts in found.items()}


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def collected(model: Any, place: Path, batch_size: int = 2) -> dict[Key, np.ndarray]:
    """The scores of a model, saved and collected at a place."""
    place.mkdir(exist_ok=True)
    path, text = save(model, place / "model"), save_tokens(place / "tokens.npy", TOKENS)
    options = CollectConfig(calibration=(text,), batch_size=batch_size, loss_windows=WINDOWS)
    flap_stream.collect(path, place / "run", options)
    with RunDirectory(place / "run") as run:
        store = LossStore.of(run)
        return {(i, kind): getattr(store.read(i), kind) for i in range(len(run.layer_shapes)) for kind in KINDS}


@pytest.mark.parametrize(
    ("family", "batch_size"),
    [("llama", 1), ("qwen3", 2), ("gemma2", 3), ("mixtral", 4), ("llama", 5), ("gemma3n_text", 3), ("gemma4_text", 2)],
)
def test_scores_are_those_of_autograd_through_the_whole_model(tmp_path: Path, family: str, batch_size: int) -> None:
    model = tiny_model(tiny_config(family, **(GEMMA4_EXPERTS if family == "gemma4_text" else {})))
    found = collected(model, tmp_path, batch_size)
    with RunDirectory(tmp_path / "run") as run:
        single, double = (scores_in_memory(model, run, dtype) for dtype in (torch.float32, torch.float64))
    assert found.keys() == single.keys()
    for key, scores in found.items():
        if not len(scores):
            continue
        # transformers runs the two projections of an expert in one product, with other roundings
        assert difference(scores, single[key]) < (2e-6 if family == "gemma4_text" else 1e-6)
        # what float32 loses by itself, whoever runs the model, is up to 3e-6 here
        assert difference(scores, double[key]) < max(1e-6, 2 * difference(single[key], double[key]))


def test_attention_is_wide_only_in_half_precision_on_a_cpu() -> None:
    q = torch.randn(1, 2, 8, 16, dtype=torch.bfloat16)
    with wide_attention(torch.bfloat16, "cpu"):
        wide = functional.scaled_dot_product_attention(q, q, value=q)
    with wide_attention(torch.bfloat16, "cuda"):
        narrow = functional.scaled_dot_product_attention(q, q, value=q)
    expected = functional.scaled_dot_product_attention(q.float(), q.float(), q.float()).bfloat16()
    assert torch.equal(wide, expected) and not torch.equal(narrow, expected)


@pytest.mark.parametrize("scale", [2.0**-10, 16.0], ids=["tiny", "large"])
def test_gradients_in_half_precision_neither_vanish_nor_overflow(tmp_path: Path, scale: float) -> None:
    model = tiny_model(tiny_config(layers=2, vocab_size=1000))
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)  # so are the gradients, and a large one's losses
    found = collected(model.half(), tmp_path)
    with RunDirectory(tmp_path / "run") as run:
        expected = scores_in_memory(model, run, torch.float32)
    for key, scores in found.items():
        assert difference(scores, expected[key]) < 0.02  # half precision keeps three digits


@pytest.mark.parametrize("power", [-60, 60])
def test_gradients_of_any_size_in_half_precision_give_the_same_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, power: int
) -> None:
    model = tiny_model(tiny_config(layers=2)).half()  # whose numbers are between 2^-24 and 2^16
    plain = collected(model, tmp_path / "plain")
    monkeypatch.setattr(
        head_gradient, "fisher_slopes", lambda logits, signs: fisher_slopes(logits, signs).mul_(2.0**power)
    )
    scaled = collected(model, tmp_path / "scaled")
    assert all(np.array_equal(scores, plain[key] * 4.0**power) for key, scores in scaled.items())


def test_a_gradient_that_overflows_is_said_with_its_layer(tmp_path: Path) -> None:
    model = tiny_model(tiny_config(layers=2))
    with torch.no_grad():  # the forward does not see how small the hidden states are that layer 0 normalises
        model.model.embed_tokens.weight.mul_(1e-4)
        model.model.layers[0].input_layernorm.weight.fill_(1000)
    with pytest.raises(NonFinite, match=r"input of layer 0 holds NaN or infinity; try --dtype float32"):
        collected(model.half(), tmp_path)


def test_statistics_that_are_complete_get_scores_later_and_a_plan_by_the_loss_keeps_the_ratio(tmp_path: Path) -> None:
    path = save(tiny_model(tiny_config("mixtral")), tmp_path / "model")
    text = save_tokens(tmp_path / "tokens.npy", TOKENS)
    together = CollectConfig(calibration=(text,), batch_size=2, loss_windows=5)
    flap_stream.collect(path, tmp_path / "together", together)
    flap_stream.collect(path, tmp_path / "later", CollectConfig(calibration=(text,), batch_size=2))
    flap_stream.collect(path, tmp_path / "later", together)
    plans = []
    for name in ("together", "later"):
        with RunDirectory(tmp_path / name) as run:
            assert not (run.path / "loss-inputs").exists()
        plans.append(flap_stream.plan(tmp_path / name, PlanConfig(ratio=0.3, metric="fisher", round_neurons_to=1)))
    assert [keep.neurons.tolist() for keep in plans[0].layers] == [keep.neurons.tolist() for keep in plans[1].layers]
    assert plans[0].decoder_ratio == pytest.approx(0.3, abs=0.01)


def test_a_curve_of_other_scores_is_measured_anew(tmp_path: Path) -> None:
    path, run = save(tiny_model(tiny_config()), tmp_path / "model"), tmp_path / "run"
    tokens = save_tokens(tmp_path / "tokens.npy", TOKENS)
    how: dict[str, Any] = {"metric": "fisher", "ratios": (0.3,), "evaluate": (tokens,)}
    curves = []
    for windows in (1, len(TOKENS)):
        flap_stream.collect(path, run, CollectConfig(calibration=(tokens,), loss_windows=windows))
        curves += [flap_stream.sweep(run, SweepConfig(**how)).points[0].perplexity for _ in range(2)]
    assert curves[0] == curves[1] != curves[2] == curves[3]


def test_scores_of_two_sweeps_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, run = save(tiny_model(tiny_config()), tmp_path / "model"), tmp_path / "run"
    tokens = save_tokens(tmp_path / "tokens.npy", TOKENS)
    flap_stream.collect(path, run, CollectConfig(calibration=(tokens,), loss_windows=1))
    write, written = LossStore.write, list[int]()

    def write_two(store: LossStore, layer: int, scores: LossScores) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(layer)
        write(store, layer, scores)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LossStore, "write", write_two)
        flap_stream.collect(path, run, CollectConfig(calibration=(tokens,), loss_windows=WINDOWS))
    with pytest.raises(RunMismatch, match="holds no loss scores"):
        flap_stream.plan(run, PlanConfig(ratio=0.3, metric="fisher"))
    flap_stream.collect(path, run, CollectConfig(calibration=(tokens,), loss_windows=1))
    flap_stream.collect(path, tmp_path / "fresh", CollectConfig(calibration=(tokens,), loss_windows=1))
    kept = [
        flap_stream.plan(where, PlanConfig(ratio=0.3, metric="fisher")).layers for where in (run, tmp_path / "fresh")
    ]
    assert all(np.array_equal(a.of(k), b.of(k)) for a, b in zip(*kept, strict=True) for k in KINDS)


def test_a_sweep_killed_before_its_first_scores_leaves_those_of_the_last_one_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = save(tiny_model(tiny_config()), tmp_path / "model"), tmp_path / "run"
    tokens, remove = save_tokens(tmp_path / "tokens.npy", TOKENS), files.remove
    flap_stream.collect(path, run, CollectConfig(calibration=(tokens,), loss_windows=1))

    def killed(place: Path) -> None:
        remove(place)
        if place.parent.name == "loss.zarr" and place.name.isdigit():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "remove", killed)
        flap_stream.collect(path, run, CollectConfig(calibration=(tokens,), loss_windows=2))
    with pytest.raises(RunMismatch, match="holds no loss scores"):
        flap_stream.plan(run, PlanConfig(ratio=0.3, metric="fisher"))
    assert main(["inspect", str(run), "--verify"]) == 0
    flap_stream.collect(path, run, CollectConfig(calibration=(tokens,), loss_windows=2))
    flap_stream.plan(run, PlanConfig(ratio=0.3, metric="fisher"))


def test_altered_scores_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, run = save(tiny_model(tiny_config()), tmp_path / "model"), tmp_path / "run"
    tokens = save_tokens(tmp_path / "tokens.npy", TOKENS)
    flap_stream.collect(path, run, CollectConfig(calibration=(tokens,), loss_windows=1))
    file = next(path for path in (run / "loss.zarr" / "0001").rglob("0") if path.is_file())
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert main(["inspect", str(run), "--verify"]) == 1
    assert "loss.zarr/0001 is altered" in capsys.readouterr().err


@pytest.mark.slow
def test_the_graph_of_one_layer_is_in_memory_whatever_the_depth(tmp_path: Path) -> None:
    text, peaks = save_tokens(tmp_path / "tokens.npy", random_tokens(16, 128)), []
    for layers in (4, 12):
        sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 688, "max_position_embeddings": 128}
        path = save(tiny_model(tiny_config(layers=layers, **sizes)), tmp_path / f"model-{layers}", "20MB")
        command = [sys.executable, "-m", "flap_stream", "collect", str(path), str(tmp_path / f"run-{layers}"), "--json"]
        command += ["--quiet", "--calibration", text, "--samples", "16", "--loss-windows", "16", "--batch-size", "8"]
        measured = json.loads(run_warm(command).stdout)["measured"]
        peaks.append(measured["peak_host_bytes"])
        assert 0.9 < peaks[-1] / measured["placement"]["host_bytes"] <= 1
    assert abs(peaks[1] - peaks[0]) < 16 << 20  # the graph of one takes twice that
