"""Perplexity of every method at every ratio, from one calibration text and one held-out text, in one run.

Prints Markdown: perplexities, and in brackets how much of FLAP's rise each method takes: r = ln(perplexity) - ln(dense
perplexity) as a share of the r of `flap, exact`. By default on the bundled model; any other that can be pruned will do.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import flap_stream
from flap_stream import CollectConfig, EvaluateConfig, PlanConfig, PruneConfig, RewriteConfig, SweepConfig
from flap_stream.config import TextConfig, parse_ratios
from flap_stream.model.families import FAMILIES
from flap_stream.progress import Progress
from flap_stream.storage.run_directory import RunDirectory
from flap_stream.text.tokenization import load_tokenizer
from flap_stream.text.windows import TextWanted, evaluation_tokens


@dataclass
class Bench:
    """What all methods are given. engine: options of `EngineConfig`; calibration: of `CollectConfig`.

    loss_windows: of the common collection; 0 if no method decides by the loss.
    """

    model: str
    calibration: dict[str, Any]
    text: tuple[str, ...]
    engine: dict[str, Any]
    place: Path
    progress: Progress
    loss_windows: int

    def collected(self) -> Path:
        """The run directory that serves all methods of one collection, made when it is first asked for."""
        run = self.place / "run"
        if not run.exists():
            config = CollectConfig(loss_windows=self.loss_windows, **self.calibration, **self.engine)
            flap_stream.collect(self.model, run, config, progress=self.progress)
        return run

    @property
    def length(self) -> int:
        """Tokens of a window, of all texts."""
        return int(self.calibration["sequence_length"])

    def dense(self) -> float:
        """Perplexity of the dense model."""
        return self.perplexity(self.model)

    def perplexity(self, model: str | Path) -> float:
        """Perplexity of a model that is written."""
        config = EvaluateConfig(text=self.text, sequence_length=self.length, **self.engine)
        return flap_stream.evaluate(model, config, self.progress).perplexity


def swept(bench: Bench, options: dict[str, Any], ratios: Sequence[float]) -> list[float]:
    """All ratios from the common collection and one reading of the model. options: of `SweepConfig`."""
    how = {"evaluate": bench.text, "sequence_length": bench.length, "round_neurons_to": 1, **bench.engine, **options}
    config = SweepConfig(ratios=tuple(ratios), **how)
    points = {
        point.ratio: point for point in flap_stream.sweep(bench.collected(), config, progress=bench.progress).points
    }
    return [float(points[ratio].perplexity or "nan") for ratio in ratios]


def pruned(bench: Bench, options: dict[str, Any], ratios: Sequence[float]) -> list[float]:
    """Each ratio by the whole job, its checkpoint evaluated and removed. options: of `PruneConfig`."""
    found = []
    for ratio in ratios:
        config = PruneConfig(ratio=ratio, round_neurons_to=1, **bench.calibration, **bench.engine, **options)
        out = bench.place / "out"
        flap_stream.prune(bench.model, out, config, progress=bench.progress)
        found.append(bench.perplexity(out))
        shutil.rmtree(out)
    return found


def rewritten(bench: Bench, options: dict[str, Any], ratios: Sequence[float]) -> list[float]:
    """Each ratio from the common collection, its checkpoint evaluated and removed.

    options: of `RewriteConfig`, and the metric of the plan.
    """
    config = RewriteConfig(**bench.engine, **{name: value for name, value in options.items() if name != "metric"})
    found = []
    for ratio in ratios:
        out = bench.place / "out"
        metric = options.get("metric", PlanConfig.metric)
        flap_stream.plan(bench.collected(), PlanConfig(ratio=ratio, metric=metric, round_neurons_to=1))
        flap_stream.rewrite(bench.collected(), out, config, progress=bench.progress)
        found.append(bench.perplexity(out))
        shutil.rmtree(out)
    return found


@torch.inference_mode()
def published(bench: Bench, options: dict[str, Any], ratios: Sequence[float]) -> list[float]:
    """The published refit (GRAIL): second moments about zero, and FLAP's bias on top. options: damping.

    In memory and on one device, for models whose layers are called as Llama's are.
    """
    run, found = bench.collected(), []
    with RunDirectory(run, is_writer=False) as directory:
        windows = torch.from_numpy(directory.tokens.read())
        statistics = [directory.statistics.read(i) for i in range(len(directory.layer_shapes))]
        shapes = directory.layer_shapes
    for ratio in ratios:
        keeps = flap_stream.plan(run, PlanConfig(ratio=ratio, round_neurons_to=1)).layers
        model = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32).eval()
        hidden = model.get_input_embeddings()(windows)
        for layer, keep, shape, own in zip(model.model.layers, keeps, shapes, statistics, strict=True):
            for part in FAMILIES[model.config.model_type].parts(shape):
                kind = part.kind
                linear = layer.get_submodule(kind.output.name)
                kept = torch.from_numpy(kind.output.kept_indices(keep.of(kind.name), part.units, shape))
                moments = torch.zeros(2 * [linear.in_features], dtype=torch.float64)
                handle = linear.register_forward_pre_hook(partial(_add_products, moments))
                _run(model, layer, hidden)
                handle.remove()
                mean = torch.from_numpy(own.of(kind.name).mean).index_fill(0, kept, 0.0)
                dense, damped = linear.weight.double(), moments[kept][:, kept]
                damped += options["damping"] * damped.diagonal().mean() * torch.eye(len(kept), dtype=torch.float64)
                columns = torch.linalg.solve(damped, moments[kept] @ dense.T).T
                linear.weight = nn.Parameter(torch.zeros_like(dense).index_copy_(1, kept, columns).float())
                linear.bias = nn.Parameter((dense @ mean).float())
            hidden = _run(model, layer, hidden)
        found.append(_perplexity_in_memory(model, bench))
    return found


def _add_products(moments: torch.Tensor, _module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    tokens = inputs[0].flatten(0, 1)
    moments += (tokens.T @ tokens).double()


def _run(model: Any, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """A layer's output `[sample, token, hidden]` over all windows."""
    places = torch.arange(hidden.shape[1])[None]
    rotary = model.model.rotary_emb(hidden[:1], places)
    outputs = [layer(batch, position_ids=places, position_embeddings=rotary) for batch in hidden.split(16)]
    return torch.cat([output[0] if isinstance(output, tuple) else output for output in outputs])


def _perplexity_in_memory(model: Any, bench: Bench) -> float:
    vocabulary = model.config.vocab_size
    wanted = TextWanted(bench.text, None, bench.length, TextConfig(), evaluation=True)
    tokens = evaluation_tokens(wanted, lambda: load_tokenizer(Path(bench.model), False), vocabulary).tokens
    losses = []
    for batch in torch.from_numpy(tokens).split(16):
        logits = model(batch).logits[:, :-1].flatten(0, 1)
        losses.append(functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="none"))
    return float(torch.cat(losses).double().mean().exp())


@dataclass(frozen=True)
class Method:
    """A row of the table. measure: `swept` or `rewritten` where the common collection serves, else `pruned`."""

    name: str
    measure: Callable[[Bench, dict[str, Any], Sequence[float]], list[float]]
    options: dict[str, Any] = field(default_factory=dict)


REFERENCE = "flap, exact"
METHODS = [
    Method(REFERENCE, swept),
    Method("flap, released", swept, {"statistics": "released"}),
    Method("flap, exact, no bias", swept, {"restore": "none"}),
    Method("by the loss", swept, {"metric": "fisher"}),
    Method("wanda-sp", pruned, {"method": "wanda-sp"}),  # pruned layers feed the next: a collection a ratio
    Method("magnitude-sp", swept, {"method": "magnitude-sp"}),
    Method("published refit (moments about zero, FLAP's bias)", published, {"damping": 1e-3}),
    Method("least-squares", rewritten, {"restore": "least-squares"}),
    Method("least-squares, by the loss", rewritten, {"restore": "least-squares", "metric": "fisher"}),
    Method("reconstruct", rewritten, {"restore": "reconstruct"}),
    Method("reconstruct, by the loss", rewritten, {"restore": "reconstruct", "metric": "fisher"}),
]


def compare(bench: Bench, methods: Sequence[Method], ratios: Sequence[float]) -> dict[str, Any]:
    """Perplexities: `dense`, and of each method a list in order of ratios."""
    return {
        "model": Path(bench.model).name,
        "ratios": list(ratios),
        "dense": bench.dense(),
        "methods": {method.name: method.measure(bench, method.options, ratios) for method in methods},
    }


def rises(body: dict[str, Any]) -> dict[str, list[float]]:
    """ln(perplexity) - ln(dense perplexity) of each method."""
    return {name: [log(p / body["dense"]) for p in found] for name, found in body["methods"].items()}


def markdown(body: dict[str, Any]) -> str:
    """The table; in brackets the share of the reference's rise, if that was measured."""
    found, reference = rises(body), rises(body).get(REFERENCE)
    lines = ["| method | " + " | ".join(f"{ratio:.0%}" for ratio in body["ratios"]) + " |"]
    lines.append("|---" * (len(body["ratios"]) + 1) + "|")
    lines.append("| dense | " + " | ".join(f"{body['dense']:.2f}" for _ in body["ratios"]) + " |")
    for name, perplexities in body["methods"].items():
        cells = [f"{perplexity:.2f}" for perplexity in perplexities]
        if reference is not None and name != REFERENCE:
            cells = [f"{cell} ({r / own:.2f})" for cell, r, own in zip(cells, found[name], reference, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print the table, write it."""
    demo = files("flap_stream") / "demo"
    names = [method.name for method in METHODS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo / "model"), help="a directory or a Hub id (default: bundled)")
    parser.add_argument("--calibration", nargs="+", default=[str(demo / "calibration.txt")], metavar="TEXT")
    parser.add_argument("--evaluate", nargs="+", default=[str(demo / "evaluation.txt")], metavar="TEXT")
    parser.add_argument("--ratios", type=parse_ratios, default=(0.2, 0.3, 0.5), metavar="LIST")
    parser.add_argument("--methods", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--samples", type=int, default=1024, help="calibration windows (default: 1024)")
    parser.add_argument("--sequence-length", type=int, default=128, help="tokens a window (default: 128)")
    parser.add_argument(
        "--loss-windows", type=int, default=256, help="windows that the loss is swept over (default: 256)"
    )
    parser.add_argument("--dtype", default="float32", help="of the forward (default: float32)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--place", type=Path, help="folder for run directories and outputs (default: a temporary one)")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    chosen = [method for method in METHODS if method.name in options.methods]
    with tempfile.TemporaryDirectory(dir=options.place) as place:
        bench = Bench(
            model=options.model,
            calibration={
                "calibration": tuple(options.calibration),
                "samples": options.samples,
                "sequence_length": options.sequence_length,
            },
            text=tuple(options.evaluate),
            engine={"dtype": options.dtype, "device": options.device},
            place=Path(place),
            progress=Progress("auto"),
            loss_windows=options.loss_windows if any("metric" in method.options for method in chosen) else 0,
        )
        body = compare(bench, chosen, options.ratios)
    print(markdown(body), end="")
    if options.markdown:
        options.markdown.write_text(markdown(body))
    if options.json:
        options.json.write_text(json.dumps({**body, "rises": rises(body)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
