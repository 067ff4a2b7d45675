"""What rounding sizes is worth: one model pruned at one ratio to multiples of 1, 32, 64 and 256, timed side by side.

Times are medians over rounds in which every variant runs once, in turn, as in `flap-stream bench-inference`; ratios are
within a round. For the prompt one window goes through the model, for generation single tokens with its cache.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch
from random_checkpoint import add_shape_arguments, config_of, make

import flap_stream
from flap_stream import CollectConfig, PlanConfig, RewriteConfig
from flap_stream.config import BenchInferenceConfig
from flap_stream.progress import Progress
from flap_stream.stages.bench_inference import Setting, side_by_side


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
        settings = [Setting(1, options.prompt, options.steps)]
        config = BenchInferenceConfig(rounds=options.rounds)
        names = {str(multiple): str(path) for multiple, path in paths.items()}
        _, (rounds,) = side_by_side(names, settings, config, Progress())
        first = str(options.multiples[0])
        for part in ("prompt", "generation"):
            times = [{name: getattr(one[name], f"{part}_seconds") for name in names} for one in rounds]
            for name in names:
                own, base = (median(one[n] for one in times) for n in (name, first))
                share = median(one[name] / one[first] for one in times)
                print(f"{part:10s} multiple {name:>4s}: {own:.4f} s, {share:.3f} of {base:.4f} s")


if __name__ == "__main__":
    main()
