"""Train a tiny mixture of experts on Python's standard library, and compare ways to prune it.

Prints Markdown: held-out perplexity where a share of the prunable weights is removed as neurons, as neurons and KV
groups, as whole experts, as all of them in one order, and as whole experts by REAP. A mixture that PLACE holds already
is used.
"""

import argparse
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
from train_demo_model import SETTINGS, Split, train, train_tokenizer
from transformers import AutoConfig, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import flap_stream
from flap_stream import CollectConfig, SweepConfig

_HELD_OUT = 12  # of so many files in a row, one is for calibration and one for evaluation
_FILE_CHARACTERS = 20_000  # of each at most, so that no file dominates
_WINDOW = 128  # tokens
_EVALUATED = 2400  # windows: 400 leave more noise than some of the differences
_NEURONS = 96  # of each expert
_DENSE_SHARE = 0.9  # of the training steps of an upcycled mixture


def standard_library() -> Split[str]:
    """The standard library's modules, whole files held out."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text("utf-8", errors="ignore")[:_FILE_CHARACTERS] for path in sorted(folder.glob("*.py"))]
    texts += [p.read_text("utf-8", errors="ignore")[:_FILE_CHARACTERS] for p in sorted(folder.glob("[a-z]*/*.py"))]
    own = {0: "calibration", 1: "evaluation"}
    parts: dict[str, list[str]] = {"training": [], "calibration": [], "evaluation": []}
    for number, text in enumerate(texts):
        parts[own.get(number % _HELD_OUT, "training")].append(text)
    return Split(*("\n\n".join(part) for part in parts.values()))


def untrained(experts: int, groups: int) -> PreTrainedModel:
    """A mixture of so many experts and KV groups in each layer, two experts for a token where there are as many."""
    kind: Any = Qwen3MoeConfig
    config = kind(
        vocab_size=1024, hidden_size=128, moe_intermediate_size=_NEURONS, num_hidden_layers=4, head_dim=32,
        num_attention_heads=max(4, groups), num_key_value_heads=groups,
        num_experts=experts, num_experts_per_tok=min(2, experts), max_position_embeddings=512,
        norm_topk_prob=True, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        output_router_logits=True, router_aux_loss_coef=0.01,
    )  # fmt: skip
    model: PreTrainedModel = Qwen3MoeForCausalLM(config)
    print(f"{experts} experts a layer, {model.num_parameters():,} parameters", file=sys.stderr)
    return model


def upcycle(dense: PreTrainedModel, mixture: PreTrainedModel) -> None:
    """Give all experts the weights of the one in `dense` ("sparse upcycling", arXiv 2212.05055), and no router any."""
    weights = mixture.state_dict()
    for name, tensor in dense.state_dict().items():
        if not name.endswith("mlp.gate.weight"):
            weights[name].copy_(tensor.expand_as(weights[name]))


def trained(place: Path, steps: int, experts: int, groups: int, upcycled: bool) -> Path:
    """The mixture in `place`, trained if it is not there, its calibration and evaluation texts beside it.

    experts, groups: how many experts and KV groups each layer has. upcycled: most steps train a model of one expert,
    and every expert starts as a copy of it. On one core, so that the same steps give the same weights.
    """
    model_path = place / "model"
    if model_path.exists():
        return model_path
    torch.manual_seed(SETTINGS["seed"])
    torch.set_num_threads(1)
    text = standard_library()
    model = untrained(experts, groups)
    tokenizer = train_tokenizer(text.training, model.config.vocab_size)
    tokens = Split(*(torch.tensor(tokenizer(part, verbose=False)["input_ids"]) for part in text))
    print(f"{len(tokens.training):,} tokens", file=sys.stderr)
    if upcycled:
        dense = untrained(1, groups)
        dense_steps = round(_DENSE_SHARE * steps)
        train(dense, tokens, dense_steps, 0)
        upcycle(dense, model)
        steps -= dense_steps
    train(model, tokens, steps, 0)
    model.config.output_router_logits = False  # it served the balance of experts in training
    place.mkdir(parents=True, exist_ok=True)
    for name in ("calibration", "evaluation"):
        (place / f"{name}.txt").write_text(getattr(text, name), "utf-8")
    model.save_pretrained(model_path)
    tokenizer.save_pretrained(model_path)
    return model_path


def table(model: Path, place: Path, ratios: tuple[float, ...], loss_windows: int) -> str:
    """Perplexities, and the removed share of the prunable weights where it is not the ratio, as Markdown."""
    calibration, text = (str(place / f"{name}.txt") for name in ("calibration", "evaluation"))
    common: dict[str, Any] = {"calibration": (calibration,), "samples": 512, "sequence_length": _WINDOW}
    runs = {name: place / f"run-{name}" for name in ("loss", "reap")}
    flap_stream.collect(model, runs["loss"], CollectConfig(loss_windows=loss_windows, whole_experts=True, **common))
    flap_stream.collect(model, runs["reap"], CollectConfig(method="reap", **common))
    by_loss: dict[str, Any] = {"metric": "fisher", "round_neurons_to": 1}
    whole: dict[str, Any] = {**by_loss, "whole_experts": True}
    all_heads = {"min_heads": AutoConfig.from_pretrained(model).num_attention_heads}
    only_whole = {**whole, **all_heads, "min_neurons": _NEURONS}
    methods: list[tuple[str, str, dict[str, Any]]] = [
        ("neurons", "loss", {**by_loss, **all_heads}), ("neurons, KV groups", "loss", by_loss),
        ("whole experts", "loss", only_whole),
        ("neurons, KV groups, whole experts", "loss", whole), ("whole experts, by REAP", "reap", {"method": "reap"}),
    ]  # fmt: skip
    rows = [f"| | {' | '.join(f'{ratio:.0%}' for ratio in ratios)} |", "|---" * (len(ratios) + 1) + "|"]
    for name, run, options in methods:
        config = SweepConfig(ratios=ratios, evaluate=(text,), sequence_length=_WINDOW, samples=_EVALUATED, **options)
        found = flap_stream.sweep(runs[run], config)
        if len(rows) == 2:
            rows.append("| dense" + f" | {found.dense_perplexity:.3f}" * len(ratios) + " |")
        cells = [
            f"{point.perplexity:.3f}" + (f" ({point.decoder_ratio:.1%})" if run == "reap" else "")
            for point in found.points
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Train unless it is done, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path, metavar="PLACE", help="where the mixture, its texts and its runs are kept")
    parser.add_argument("--steps", type=int, default=1800, help="of training, of 2048 tokens each (default 1800)")
    parser.add_argument("--experts", type=int, default=16, help="of each layer (default 16)")
    parser.add_argument("--kv-groups", type=int, default=2, help="of each layer (default 2)")
    parser.add_argument(
        "--upcycled",
        action="store_true",
        help=f"start from copies of one expert, trained for {_DENSE_SHARE:g} of the steps",
    )
    parser.add_argument("--loss-windows", type=int, default=256, help="that are swept (default 256)")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5], help="(default 0.3 0.5)")
    options = parser.parse_args()
    model = trained(options.place, options.steps, options.experts, options.kv_groups, options.upcycled)
    print(table(model, options.place, tuple(options.ratios), options.loss_windows))


if __name__ == "__main__":
    main()
