"""`flap-stream bench-inference DENSE OUT`."""

import argparse
from dataclasses import asdict

from flap_stream.commands import options as shared
from flap_stream.commands import printing
from flap_stream.config import DTYPES, BenchInferenceConfig
from flap_stream.config.values import dtype_name
from flap_stream.progress import format_bytes

EXAMPLES = ("bench-inference ./model pruned --batch-sizes 1,8 --prompt-lengths 512 --generate 64",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("dense", metavar="DENSE", help="dense model: a directory or a Hub id")
    parser.add_argument("out", metavar="OUT", help="pruned checkpoint")
    group = parser.add_argument_group("what to time")
    group.add_argument(
        "--batch-sizes",
        default=BenchInferenceConfig.batch_sizes,
        metavar="N,N",
        help="prompts at once, for each setting (default: 1,8)",
    )
    group.add_argument(
        "--prompt-lengths",
        default=BenchInferenceConfig.prompt_lengths,
        metavar="N,N",
        help="tokens of a prompt, for each setting (default: 512)",
    )
    group.add_argument(
        "--generate",
        type=int,
        default=BenchInferenceConfig.generate,
        metavar="N",
        help="tokens after each prompt (default: %(default)s)",
    )
    group.add_argument(
        "--rounds",
        type=int,
        default=BenchInferenceConfig.rounds,
        metavar="N",
        help="times to run both models, in turn (default: %(default)s)",
    )
    group = parser.add_argument_group("device and models")
    group.add_argument(
        "--device",
        default=BenchInferenceConfig.device,
        metavar="NAME",
        help="auto, cpu, cuda or cuda:N (default: auto)",
    )
    group.add_argument(
        "--dtype",
        type=dtype_name,
        default=BenchInferenceConfig.dtype,
        choices=DTYPES,
        help="dtype of both (default: auto, the model's)",
    )
    shared.add_revision(group)
    group.add_argument("--trust-remote-code", action="store_true", help="allow code that comes with the models to run")
    shared.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Time both models and print their figures next to each other."""
    config = shared.values(options, BenchInferenceConfig)
    progress = shared.progress_of(options)
    with shared.loading(progress):
        from flap_stream.stages.bench_inference import bench_inference

    result = bench_inference(shared.model_of(options.dense, options), options.out, config, progress)
    if options.json:
        printing.print_json({"dense": options.dense, "out": options.out, **asdict(result)})
        return
    before, after = (format_bytes(result.weight_bytes[name]) for name in ("dense", "pruned"))
    print(f"weights {before} -> {after}; {result.device}, {result.dtype}, medians of {result.rounds} rounds")
    names = ("prompt tokens/s", "generation tokens/s", "peak memory", "KV cache at the end")
    print("batch  prompt   " + "".join(f"{name:30s}" for name in names).rstrip())
    for row in result.rows:
        dense, pruned, setting = row.dense, row.pruned, row.setting
        peaks = [m.peak_device_bytes or m.peak_host_bytes for m in (dense, pruned)]
        cells = [
            f"{setting.batch_size:5d}  {setting.prompt_length:6d}",
            _rates(dense.prompt_tokens_per_second, pruned.prompt_tokens_per_second, row.prompt_speedup),
            _rates(dense.generation_tokens_per_second, pruned.generation_tokens_per_second, row.generation_speedup),
            _sizes(*peaks),
            _sizes(dense.kv_cache_bytes, pruned.kv_cache_bytes),
        ]
        print("   ".join(cells).rstrip())


def _rates(before: float, after: float, speedup: float) -> str:
    return f"{f'{before:,.0f} -> {after:,.0f} ({speedup:.2f} x)':27s}"


def _sizes(before: int, after: int) -> str:
    return f"{f'{format_bytes(before)} -> {format_bytes(after)}':27s}"
