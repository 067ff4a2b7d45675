"""Before a collection begins: that the job is possible and fits, where it will run, what run.json says of it."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from flap_stream.arithmetic.allocation import allocate, require_minimum
from flap_stream.config import CollectConfig, PlanConfig, PruneConfig, part_of
from flap_stream.config.rules import FED_ON
from flap_stream.engine.device import device_record
from flap_stream.engine.placement import Job
from flap_stream.engine.placement.prediction import Placement
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.output.destination import estimated_bytes, require_space
from flap_stream.output.fp8_config import fp8_linears
from flap_stream.restore.requirements import refit_sizes, refit_stored_bytes, require_refittable
from flap_stream.stages.loss_sizes import kept_input_bytes
from flap_stream.stages.same_source import absolute
from flap_stream.stages.targets import expected_ratio, rehearse, sizes_of, unscored
from flap_stream.storage import files
from flap_stream.storage.loss import LossStore, loss_job
from flap_stream.storage.run_directory import RunDirectory, stored_bytes
from flap_stream.storage.run_manifest import tokens_digest
from flap_stream.text.windows import Windows


def calibration_record(options: CollectConfig) -> dict[str, Any]:
    """The calibration as asked for, as run.json and pruning.json record it."""
    if options.method == "magnitude-sp":
        return {}
    sources = [Path(source).name for source in options.calibration]
    asked = ("samples", "sequence_length", "seed", "bos", "text_column", "chat_template")
    return {"sources": sources, **{key: getattr(options, key) for key in asked}}


def require_possible(model: StreamedModel, options: CollectConfig) -> None:
    """Raise what deciding and refitting, if this job does so, would raise for this model whatever the scores."""
    if isinstance(options, PruneConfig):
        require_minimum(model.shapes, options)
        fp8_linears(model.checkpoint, options, model.skeleton)
        rehearse(model, options)
        if options.refit is not None:
            require_refittable(model, options.refit)
    elif options.method == "wanda-sp":  # decides while statistics are collected
        plan = part_of(options, PlanConfig)
        require_minimum(model.shapes, plan)
        allocate(unscored(model.shapes, plan), model.shapes, plan)


def _refit(options: CollectConfig) -> str | None:
    """The refit after this collection; None if this call does not refit."""
    return options.refit if isinstance(options, PruneConfig) else None


def require_free_space(
    model: StreamedModel, options: CollectConfig, tokens: int, run: Path, out: Path, backward: Job | None
) -> None:
    """Raise InsufficientSpace unless OUT and the run directory fit; what an interrupted call has written counts."""
    refit = _refit(options)
    ratio, linears = options.ratio, None
    if isinstance(options, PruneConfig):
        ratio, linears = expected_ratio(model, options), fp8_linears(model.checkpoint, options, model.skeleton)
    written = estimated_bytes(model.checkpoint, model.shapes, ratio, linears)
    written -= files.tree_bytes(files.partial_path(out))
    kept = stored_bytes(model.shapes, tokens) - files.tree_bytes(run)
    kept += 0 if refit is None else refit_stored_bytes(model, refit)
    if backward is not None:
        job = loss_job(backward.samples, options.whole_experts, options.depth)
        kept += 0 if LossStore.has_all_scores(run, job, len(model.shapes)) else kept_input_bytes(backward)
    require_space(out, max(0, written), run, max(0, kept))


def place_collection(
    model: StreamedModel, options: CollectConfig, windows: Windows, run: Path, backward: Job | None
) -> Placement:
    """How to run the layers, such that what follows fits, too: a backward pass, a refit whatever the plan."""
    refit, job = _refit(options), model.job(*windows.tokens.shape)
    then = [] if refit is None else [model.refit_after(job, refit_sizes(model, refit, windows.tokens.size))]
    then += [] if backward is None else [backward]
    return model.place(options, job, then=then, recorded=RunDirectory.recorded_batch_size(run))


def manifest_contents(
    model: StreamedModel, options: CollectConfig, windows: Windows, batch_size: int
) -> dict[str, Any]:
    """What the statistics depend on (`model`, `tokens`, `options`), and what planning needs to know of the model."""
    sizes, whole = sizes_of(model), model.family.left_whole(model.checkpoint.tensors, model.shapes)
    decides: dict[str, Any] = {"method": options.method}
    if options.method != "magnitude-sp":
        decides |= {"dtype": str(model.dtype), **device_record(model.device), "batch_size": batch_size}
    if options.method == "wanda-sp":
        decides |= {name: getattr(options, name) for name in FED_ON}
    return {
        "model": model.checkpoint.fingerprint,
        "tokens": {"sha256": tokens_digest(windows.tokens), "shape": list(windows.tokens.shape)},
        "options": decides,
        "source": absolute(model.checkpoint.source),
        "calibration": calibration_record(options),
        "window_prefix": list(windows.prefix),
        "threads": torch.get_num_threads(),
        "parameters": model.checkpoint.parameters,
        "sizes": {
            "hidden": model.hidden_size,
            **({} if model.skeleton.state.is_plain else {"state": model.skeleton.state.width}),
            "vocabulary": model.vocab_size,
            "weight_bytes": model.checkpoint.nbytes,
            "expert_share": model.expert_share,
            "unit_bytes": [list(own) for own in sizes.unit_bytes],
            "header_bytes": list(sizes.header_bytes),
            **({"expert_bytes": list(sizes.expert_bytes)} if any(sizes.expert_bytes) else {}),
            **({} if sizes.fp8 is None else {"fp8": asdict(sizes.fp8)}),
        },
        **({"left_whole": whole} if whole else {}),
        "layers": [asdict(shape) for shape in model.shapes],
    }


def place_backward(
    model: StreamedModel, options: CollectConfig, backward: Job, collected: Placement, loss: LossStore | None = None
) -> Placement:
    """How to run the backward pass. collected: the placement of the collection.

    loss: the store of a backward pass that begins now or goes on, with the batch size recorded there.
    """
    ranks = model.ranks
    recorded = None if loss is None else ranks.from_first(loss.recorded_batch_size)
    job = replace(backward, base_bytes=collected.base_bytes, keeps_batch_size=recorded is not None)
    wanted = replace(options, batch_size=recorded or collected.batch_size)
    placement = model.place(wanted, job, recorded=recorded)
    if loss is not None and recorded is None and ranks.is_first:
        loss.begin(placement.batch_size)
    return placement
