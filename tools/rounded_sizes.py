"""What rounding sizes is worth: one model pruned at one ratio to multiples of 1, 32, 64 and 256, timed side by side.

Times are medians over rounds in which every variant runs once, in turn; ratios are within a round. For the prompt one
window goes through the model, for generation single tokens with a cache.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from random_checkpoint import add_shape_arguments, config_of, make
from transformers import AutoModelForCausalLM, PreTrainedModel

import flap_stream
from flap_stream import CollectConfig, PlanConfig, RewriteConfig


def variants(model: Path, place: Path, multiples: list[int], ratio: float) -> dict[int, Path]:
    """A pruned checkpoint a multiple, all from one collection; sizes and realised ratios are printed."""
    tokens = np.random.default_rng(0).integers(0, 1000, (16, 128))
    np.save(place / "tokens.npy", tokens)
    flap_stream.collect(model, place / "run", CollectConfig(calibration=(str(place / "tokens.npy"),)))
    made = {}
    for multiple in multiples:
        plan = flap_stream.plan(place / "run", PlanConfig(ratio=ratio, round_neurons_to=multiple))
        widths = sorted({len(keep.neurons) for keep in plan.layers})
        assert all(width % multiple == 0 for width in widths)
        made[multiple] = place / f"pruned-{multiple}"
        flap_stream.rewrite(place / "run", made[multiple], RewriteConfig())
        print(
            f"multiple {multiple:4d}: ratio {plan.decoder_ratio:.5f}, {len(widths)} widths {widths[0]} to {widths[-1]}"
        )
    return made


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def decode(model: PreTrainedModel, prompt: torch.Tensor, steps: int) -> None:
    """Generate greedily."""
    model.generate(prompt, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, pad_token_id=0)


@torch.inference_mode()
def main() -> None:
    """Prune, time, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_shape_arguments(parser)
    parser.set_defaults(layers=4)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--multiples", type=int, nargs="+", default=[1, 32, 64, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=16, help="tokens generated")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        make(place / "model", config_of(options, options.layers), getattr(torch, options.dtype))
        paths = variants(place / "model", place, options.multiples, options.ratio)
        models = {
            multiple: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype="auto").eval()
            for multiple, path in paths.items()
        }
        ids = torch.randint(0, 1000, (1, options.prompt))
        kinds = {
            "prompt": lambda model: model(ids),
            "generation": lambda model: decode(model, ids[:, :8], options.steps),
        }
        for name, action in kinds.items():
            for model in models.values():
                action(model)
            rounds = [{m: seconds(lambda: action(models[m])) for m in models} for _ in range(options.rounds)]  # noqa: B023
            for multiple in models:
                own, first = (median(r[m] for r in rounds) for m in (multiple, options.multiples[0]))
                share = median(r[multiple] / r[options.multiples[0]] for r in rounds)
                print(f"{name:10s} multiple {multiple:4d}: {own:.4f} s, {share:.3f} of {first:.4f} s")


if __name__ == "__main__":
    main()
