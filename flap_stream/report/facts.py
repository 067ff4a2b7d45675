"""Everything a report shows, read from a run directory, or from pruning.json where there is no run directory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.arithmetic.scoring import channel_metric, fluctuation
from flap_stream.arithmetic.sizes import PrunedSizes, pruned_sizes
from flap_stream.arithmetic.targets import Target
from flap_stream.config import PlanConfig, RewriteConfig, require_restoration
from flap_stream.errors import CorruptCheckpoint, RunMismatch
from flap_stream.model.dense import nothing_pruned
from flap_stream.output.evaluations import Pair, saved_pairs
from flap_stream.output.pruning_record import RECORD_NAME, read_record
from flap_stream.stages.plan import unit_scores
from flap_stream.stages.targets import counts_of, run_target
from flap_stream.storage.collected import LayerCost
from flap_stream.storage.plan import parse_plan_options
from flap_stream.storage.run_directory import RunDirectory
from flap_stream.storage.run_manifest import Manifest

# Methods that score nothing smaller: what they score.
_WITHOUT_UNIT_SCORES = {"reap": "whole experts", "shortgpt": "whole layers"}


@dataclass(frozen=True)
class Units:
    """Units of one kind, KV groups or MLP neurons, in one layer.

    dense: how many the dense model has. kept: how many the plan keeps; None without a plan.
    keep: bool `[unit]`, True survives; None where the plan was not read.
    scores, fluctuations: float64 `[unit]`; a KV group's fluctuation is the mean over its channels. None until the
    statistics of all layers are there.
    """

    dense: int
    kept: int | None = None
    keep: np.ndarray | None = None
    scores: np.ndarray | None = None
    fluctuations: np.ndarray | None = None


@dataclass(frozen=True)
class Size:
    """A size of the whole model, before and after pruning."""

    name: str
    unit: str
    before: float
    after: float


@dataclass(frozen=True)
class Facts:
    """Everything a report can show.

    kv_groups, neurons: a value for each layer. decoder_ratio, model_ratio: removed share of the prunable weights and of
    all parameters. method: of the run. drawn_metric: the channels' metric that is drawn.
    costs: a value for each layer, None where none was recorded.
    curves: see `SweepStore.curves`. missing: sentences saying what cannot be shown, and how to get it.
    target: as `Target.record` makes it; None with a ratio. evaluations: those saved in a pruned checkpoint.
    """

    model: str
    place: str
    options: PlanConfig | None
    calibration: dict[str, Any]
    versions: dict[str, str]
    heads_per_group: int
    kv_groups: list[Units]
    neurons: list[Units]
    decoder_ratio: float | None
    model_ratio: float | None
    sizes: list[Size]
    method: str
    drawn_metric: str
    costs: list[LayerCost | None]
    curves: list[dict[str, Any]]
    missing: list[str]
    target: dict[str, Any] | None = None
    evaluations: Sequence[Pair] = ()

    @property
    def has_plan(self) -> bool:
        """Whether a plan says what each layer keeps."""
        return bool(self.kv_groups) and self.kv_groups[0].kept is not None

    @property
    def has_scores(self) -> bool:
        """Whether the method scores units, and their scores and fluctuations are known."""
        return self.method not in _WITHOUT_UNIT_SCORES and bool(self.kv_groups) and self.kv_groups[0].scores is not None


def read_facts(place: Path) -> Facts:
    """Facts of a run directory or a pruned checkpoint.

    Raises InvalidInput if it is neither, CorruptRun if one of its files was altered.
    """
    if (place / "run.json").exists():
        with RunDirectory(place, is_writer=False) as run:  # another process may be writing it
            return facts_of(run)
    record = read_record(place) if (place / RECORD_NAME).exists() else None
    if record is None:
        raise nothing_pruned(place)
    return _of_record(place, record)


def facts_of(run: RunDirectory) -> Facts:
    """Facts of an open run directory."""
    shapes, missing, place = run.layer_shapes, [], quote(str(run.path))
    options: PlanConfig | None = None
    keeps: list[LayerKeep] | None = None
    try:
        options, keeps = run.plan.read()
    except RunMismatch:
        missing.append(f"No plan yet, so nothing is marked as removed; run flap-stream plan {place} --ratio R.")
    if (done := run.statistics.complete_layers()) < len(shapes):
        missing.append(
            f"Only {done} of {len(shapes)} layers have statistics; run flap-stream collect again to continue."
        )
    shown = options or PlanConfig(method=run.manifest["options"]["method"])
    target = run_target(run, shown, _last_rewrite(run, shown))
    kv_groups, neurons = _units(run, shown, keeps, target)
    if shown.method in _WITHOUT_UNIT_SCORES:
        missing.append(f"{shown.method} scores {_WITHOUT_UNIT_SCORES[shown.method]}, so there are no scores of units.")
    costs, curves = run.statistics.costs(), run.sweeps.curves()
    if not any(costs):
        missing.append("Time and memory per layer were not recorded.")
    if not curves:
        missing.append(f"No sweep yet; run flap-stream sweep {place} --ratios 0.1:0.6:0.1 --evaluate TEXT.")
    pruned = None
    if options is not None and keeps is not None:
        pruned = pruned_sizes(shapes, keeps, run.manifest["parameters"], _restoration(run, options))
    return Facts(
        model=_short(run.manifest["source"]),
        place=run.path.name,
        options=options,
        calibration=run.manifest["calibration"],
        versions=run.manifest["versions"],
        heads_per_group=shapes[0].heads_per_group if shapes else 1,
        kv_groups=kv_groups,
        neurons=neurons,
        decoder_ratio=None if pruned is None else pruned.decoder_ratio,
        model_ratio=None if pruned is None else pruned.model_ratio,
        sizes=[] if pruned is None or keeps is None else _sizes(run.manifest, shapes, keeps, pruned),
        method=shown.method,
        drawn_metric=_drawn_metric(shown),
        costs=costs,
        curves=curves,
        missing=missing,
        target=None if target is None or keeps is None else target.record(counts_of(shapes, keeps)),
    )


def _units(
    run: RunDirectory, options: PlanConfig, keeps: Sequence[LayerKeep] | None, target: Target | None
) -> tuple[list[Units], list[Units]]:
    """KV groups and neurons of each layer, with everything the run directory says about them."""
    shapes = run.layer_shapes
    kv_groups, neurons = [Units(shape.kv_groups) for shape in shapes], [Units(shape.neurons) for shape in shapes]
    if keeps is not None:
        for i, keep in enumerate(keeps):
            kv_groups[i] = replace(kv_groups[i], **_planned(kv_groups[i].dense, keep.kv_groups))
            neurons[i] = replace(neurons[i], **_planned(neurons[i].dense, keep.neurons))
    if run.statistics.complete_layers() == len(shapes):
        for i, scores in enumerate(unit_scores(run, options, target)):
            of_groups, of_neurons = _fluctuations(run, i, shapes[i], options)
            kv_groups[i] = replace(kv_groups[i], scores=scores[0], fluctuations=of_groups)
            neurons[i] = replace(neurons[i], scores=scores[1], fluctuations=of_neurons)
    return kv_groups, neurons


def _planned(dense: int, kept: np.ndarray) -> dict[str, Any]:
    """Fields of `Units`. kept: indices of the units that the plan keeps."""
    keep = np.zeros(dense, dtype=bool)
    keep[kept] = True
    return {"kept": len(kept), "keep": keep}


def _last_rewrite(run: RunDirectory, options: PlanConfig) -> RewriteConfig:
    """How the checkpoint last written from the run was written; the defaults if there is none, or of another method."""
    written = run.journal.of_kind("rewrite")
    if not written or (options.method != "flap" and written[-1]["restore"] != "none"):
        return RewriteConfig()
    output_dtype = "fp8" if written[-1].get("fp8") else RewriteConfig.output_dtype
    return RewriteConfig(restore=written[-1]["restore"], output_dtype=output_dtype)


def _restoration(run: RunDirectory, options: PlanConfig) -> str:
    """The restoration of the checkpoint last written from the run; the method's default if there is none."""
    return require_restoration(options.method, _last_rewrite(run, options).restore)


def _of_record(place: Path, record: dict[str, Any]) -> Facts:
    layers = record["layers"]
    known = {name: value for name, value in record["options"].items() if name in PlanConfig.__dataclass_fields__}
    try:
        options = parse_plan_options(known)
    except ValueError as error:
        raise CorruptCheckpoint(f"{place / RECORD_NAME} is not a valid pruning record: {error}") from error
    return Facts(
        model=record["base"]["name"],
        place=place.name,
        options=options,
        calibration=record.get("calibration", {}),
        versions={},
        heads_per_group=1,
        kv_groups=[Units(layer["kv_groups"], len(layer["kept_kv_groups"])) for layer in layers],
        neurons=[Units(layer["neurons"], len(layer["kept_neurons"])) for layer in layers],
        decoder_ratio=record["realised_ratio"]["decoder"],
        model_ratio=record["realised_ratio"]["model"],
        sizes=[
            Size(name, "", record[name]["before"], record[name]["after"])
            for name in ("parameters", "experts")
            if name in record
        ],
        method=options.method,
        drawn_metric=options.metric,
        costs=[],
        curves=[],
        target=record.get("target"),
        evaluations=saved_pairs(place, record),
        missing=[
            "Drawn from pruning.json only. Scores, fluctuations, sweeps, time and memory per layer, and sizes in bytes "
            "are in the run directory: prune with --keep-run, then report on that directory."
        ],
    )


def _drawn_metric(options: PlanConfig) -> str:
    """The metric of channels that is drawn: fisher scores whole units, so FLAP's own is drawn for it."""
    return "wifv" if options.metric == "fisher" else options.metric


def _fluctuations(
    run: RunDirectory, index: int, shape: LayerShape, options: PlanConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Fluctuations of KV groups and of neurons, float64 `[unit]`: the method's metric before it becomes a score."""
    statistics = run.statistics.read(index)
    if options.method == "magnitude-sp":
        attention, mlp = statistics.attention.weight_squared_norm, statistics.mlp.weight_squared_norm
    elif options.method == "wanda-sp":
        attention, mlp = (fluctuation(part, options.statistics) for part in (statistics.attention, statistics.mlp))
    else:
        attention, mlp = (
            channel_metric(part, _drawn_metric(options), options.statistics)
            for part in (statistics.attention, statistics.mlp)
        )
    grouped = attention.reshape(shape.kv_groups, -1) if shape.kv_groups else np.zeros((0, 1))
    return grouped.mean(axis=1), mlp


def _sizes(
    manifest: Manifest, shapes: Sequence[LayerShape], keeps: Sequence[LayerKeep], pruned: PrunedSizes
) -> list[Size]:
    """Sizes of the whole model, dense and as planned; those of attention only where it is pruned, and so known."""
    sizes, before, after = manifest["sizes"], pruned.parameters_before, pruned.parameters_after
    item_bytes = sizes["weight_bytes"] / before

    def cached(groups: Sequence[int]) -> float:
        return sum(2 * shape.head_dim * count for shape, count in zip(shapes, groups, strict=True)) * item_bytes

    def operations(units: Sequence[tuple[int, int, int]]) -> float:
        total: float = sizes["hidden"] * sizes["vocabulary"]
        for shape, (groups, neurons, experts) in zip(shapes, units, strict=True):
            share = sizes["expert_share"] * len(shape.experts) / experts if experts else 1
            total += groups * shape.group_cost + neurons * shape.neuron_cost * share
        return 2 * total

    dense = [(shape.kv_groups, shape.neurons, len(shape.experts)) for shape in shapes]
    kept = counts_of(shapes, keeps)
    experts = [sum(count for *_, count in units) for units in (dense, kept)]
    has_groups = any(shape.kv_groups for shape in shapes)
    return [
        Size("parameters", "", before, after),
        *([Size("experts", "", *experts)] if experts[1] < experts[0] else []),
        Size("weights", "B", sizes["weight_bytes"], after * item_bytes),
        *([Size("KV cache per token", "B", *(cached([g for g, *_ in units]) for units in (dense, kept)))] * has_groups),
        *([Size("FLOPs per token", "FLOP", operations(dense), operations(kept))] * (not manifest.get("left_whole"))),
    ]


def _short(source: str) -> str:
    """A Hub id, or the last two parts of a path."""
    return "/".join(Path(source).parts[-2:])
