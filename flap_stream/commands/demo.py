"""`flap-stream demo`: the main job on the bundled model and text, offline."""

import argparse
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

from flap_stream.commands import options as shared
from flap_stream.commands import printing
from flap_stream.config import EvaluateConfig, PruneConfig
from flap_stream.progress import format_bytes

EXAMPLES = (
    "demo",
    "demo --quiet",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "--out", metavar="OUT", help="directory to write the pruned checkpoint to (default: a new temporary one)"
    )
    parser.add_argument(
        "--ratio",
        default=PruneConfig.ratio,
        metavar="SHARE",
        help="share of the weights to remove (default: %(default)s)",
    )
    shared.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Prune the bundled model and print perplexity and sizes before and after."""
    out = Path(options.out or Path(tempfile.mkdtemp(prefix="flap-stream-demo-")) / "pruned")
    progress = shared.progress_of(options)
    with as_file(files("flap_stream") / "demo") as bundle:
        model, text = str(bundle / "model"), (str(bundle / "evaluation.txt"),)
        config = PruneConfig(ratio=options.ratio, calibration=(str(bundle / "calibration.txt"),), dtype="float32")
        with shared.loading(progress):
            from flap_stream.stages.evaluate import evaluate
            from flap_stream.stages.prune import prune

        measure = EvaluateConfig(text=text, dtype="float32")
        before = evaluate(model, measure, progress)
        result = prune(model, out, config, progress=progress)
        after = evaluate(str(out), measure, progress)
        dense_bytes, pruned_bytes = _weight_bytes(Path(model)), _weight_bytes(out)
    if options.json:
        perplexity = {"before": before.perplexity, "after": after.perplexity}
        weights = {"before": dense_bytes, "after": pruned_bytes}
        printing.print_json({**printing.totals(result), "perplexity": perplexity, "weight_bytes": weights})
        return
    print(f"perplexity   {before.perplexity:.2f} -> {after.perplexity:.2f}  (held-out text, windows of 128)")
    print(f"weights      {format_bytes(dense_bytes)} -> {format_bytes(pruned_bytes)}")
    printing.print_result(result)


def _weight_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
