"""`flap-stream inspect RUN|OUT`."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flap_stream.commands import options as shared
from flap_stream.commands import printing
from flap_stream.progress import format_bytes, printable

EXAMPLES = (
    "inspect pruned --verify",
    "inspect run",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("place", metavar="RUN|OUT", help="run directory, pruned checkpoint or dense model")
    parser.add_argument("--verify", action="store_true", help="check the digests of all files; fails if one is wrong")
    shared.add_output(parser, runs_layers=False)


def run(options: argparse.Namespace) -> None:
    """Print the progress of a run, the sizes and kept units of a pruned checkpoint, or the sizes of a dense model."""
    place = Path(options.place)
    if (place / "run.json").exists():
        _inspect_run(place, options.json, options.verify)
    elif (place / "pruning.json").exists() or options.verify:
        _inspect_output(place, options.json, options.verify)
    else:
        _inspect_dense(place, options.json)


def _inspect_run(place: Path, as_json: bool, verifies: bool) -> None:
    from flap_stream.errors import CorruptRun
    from flap_stream.storage.loss import LossStore
    from flap_stream.storage.run_directory import RunDirectory

    with RunDirectory(place, is_writer=verifies) as directory:  # a running job can be inspected, but not verified
        manifest, total = directory.manifest, len(directory.layer_shapes)
        body = {
            "run": str(place),
            "model": manifest["source"],
            "method": manifest["options"]["method"],
            "calibration": manifest["calibration"],
            "layers": total,
            "complete_layers": directory.statistics.complete_layers(),
            "has_plan": directory.plan.exists(),
            **_target(directory),
            "versions": manifest["versions"],
        }
        if verifies:
            wrong = directory.damaged() + LossStore.damaged(directory)
            if wrong:
                raise CorruptRun(
                    f"{place}: {'; '.join(wrong)}; snapshots, plans, refits and sweeps are rebuilt by rerunning the "
                    "command that created them; for tokens, statistics or loss scores delete the run directory and "
                    "collect again"
                )
            body["verified"] = True
    if as_json:
        printing.print_json(body)
        return
    printing.show(f"run of {body['model']}, method {body['method']}")
    print(f"statistics   {body['complete_layers']} of {total} layers")
    print(f"plan         {'made' if body['has_plan'] else 'none yet'}")
    printing.print_target(body)
    if verifies:
        print("verified: every completed part is unchanged since it was written")


def _target(run: Any) -> dict[str, Any]:
    """The target of a run's plan, if it has one that is whole. run: a RunDirectory."""
    from flap_stream.config import RewriteConfig
    from flap_stream.stages.targets import counts_of, run_target

    if not run.plan.exists() or any(run.files.damage_of(item) for item in run.plan.committed()):
        return {}
    options, keeps = run.plan.read()
    target = run_target(run, options, RewriteConfig())
    return {} if target is None else {"target": target.record(counts_of(run.layer_shapes, keeps))}


def _inspect_output(place: Path, as_json: bool, verifies: bool) -> None:
    from flap_stream.errors import CorruptCheckpoint
    from flap_stream.model.dense import nothing_pruned
    from flap_stream.output.digests import damaged_files
    from flap_stream.output.pruning_record import RECORD_NAME, read_record

    record = read_record(place) if (place / RECORD_NAME).exists() else None
    if record is None:
        raise nothing_pruned(place)
    wrong = damaged_files(place) if verifies else []
    if wrong:
        raise CorruptCheckpoint(f"{place}: {'; '.join(wrong)}; move it away and prune again")
    if as_json:
        printing.print_json({"out": str(place), **record, **({"verified": True} if verifies else {})})
        return
    options = record["options"]
    how = ", ".join(options[name] for name in ("method", "structure", *(["metric"] * (options["method"] == "flap"))))
    printing.show(f"pruned from {record['base']['name']} by {how}")
    printing.print_sizes(record)
    printing.print_target(record)
    kept = record.get("kept_layers", range(len(record["layers"])))
    printing.print_layers(
        (len(layer["kept_kv_groups"]), layer["kv_groups"], len(layer["kept_neurons"]), layer["neurons"], i in kept)
        for i, layer in enumerate(record["layers"])
    )
    printing.print_left_whole(record)
    if verifies:
        print("verified: every file is unchanged since it was written")


def _inspect_dense(place: Path, as_json: bool) -> None:
    from flap_stream.model.dense import dense_model, nothing_pruned

    model = dense_model(place)
    if model is None:
        raise nothing_pruned(place)
    if as_json:
        printing.print_json({"model": str(place), "is_dense": True, **asdict(model)})
        return
    groups = model.kv_heads or model.heads
    print(printable(f"{place} is {model}, not pruned"))
    if model.heads is not None and model.neurons is not None:
        print(f"each layer   {model.heads} heads in {groups} KV groups, {model.neurons} neurons")
    print(f"weights      {format_bytes(model.weight_bytes)}")
    if model.is_prunable:
        print(printable(f"next: flap-stream prune {place} OUT --ratio 0.2"))
    else:
        print(printable(f"flap-stream does not prune model_type {model.model_type}"))
