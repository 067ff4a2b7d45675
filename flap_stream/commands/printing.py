"""What verbs print at the end: lines for people, one JSON object for programs."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from flap_stream.progress import format_bytes, printable


def show(line: str) -> None:
    """Print a line that may quote names from files, with terminal control characters escaped."""
    print(printable(line))


def print_json(body: dict[str, Any]) -> None:
    """Print the object that --json promises."""
    print(json.dumps(body))


def print_sizes(record: dict[str, Any]) -> None:
    """Print parameters and ratios of a pruning.json, or of anything with the same fields."""
    parameters, ratios = record["parameters"], record["realised_ratio"]
    added = parameters.get("added_biases", 0)
    biases = f", {added:,} of them biases that compensate for what was removed" if added else ""
    print(f"parameters   {parameters['before']:,} -> {parameters['after']:,}{biases}")
    if "experts" in record:
        print(f"experts      {record['experts']['before']:,} -> {record['experts']['after']:,}")
    print(f"removed      {ratios['decoder']:.2%} of the prunable weights, {ratios['model']:.2%} of the model")


def print_layers(rows: Iterable[tuple[int, int, int, int, bool]]) -> None:
    """Print what each layer keeps: KV groups, of how many, neurons, of how many, and whether it stays at all."""
    print("layer   KV groups        neurons")
    for i, (groups, all_groups, neurons, all_neurons, is_kept) in enumerate(rows):
        gone = "" if is_kept else "  (removed)"
        print(f"{i:5d}   {groups:4d} of {all_groups:<6d}  {neurons:6d} of {all_neurons}{gone}")


def print_target(record: dict[str, Any]) -> None:
    """Print what a target asked for and what came of it, if there is one in a pruning.json."""
    if record.get("target"):
        from flap_stream.arithmetic.targets import target_sentence

        print(f"target       {target_sentence(record['target'])}")


def print_left_whole(record: dict[str, Any]) -> None:
    """Print what loses nothing, if a pruning.json names anything."""
    if record.get("left_whole"):
        print(f"left whole   {', '.join(record['left_whole'])}")


def totals(result: Any) -> dict[str, Any]:
    """Totals of a PruneResult, as printed by `--json`."""
    record, measured = result.record, result.measured
    return {
        "out": str(result.out),
        "realised_ratio": record["realised_ratio"],
        "parameters": record["parameters"],
        **({"target": record["target"]} if "target" in record else {}),
        "seconds": measured.seconds,
        "bytes_read": measured.bytes_read,
        "node_bytes_read": measured.node_bytes_read,
        "bytes_written": measured.bytes_written,
        "peak_host_bytes": measured.peak_host_bytes,
        "peak_device_bytes": measured.peak_device_bytes,
        "peak_device_allocated_bytes": measured.peak_device_allocated_bytes,
        "placement": asdict(measured.placement) if measured.placement else None,
    }


def print_result(result: Any) -> None:
    """Print a PruneResult in lines."""
    print_sizes(result.record)
    print_target(result.record)
    if result.measured.seconds:
        spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.measured.seconds.items())
        print(f"time         {spent}")
        print(f"peak memory  {format_bytes(result.measured.peak_host_bytes)}")
    show(f"result       {result.out}")
