"""Pass 2 before anything is cut: what output projections keep is refitted on the inputs that the pruned prefix gives.

The calibration windows run through the model once more, this time through its pruned layers (`refitted_layers.py`);
what was refitted of each goes into the run directory, so that an interrupted pass goes on.

Of several ranks each runs its share of the windows, and rank 0 refits from the sums of all.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.gauss_newton import DIRECTIONS
from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.arithmetic.least_squares import DAMPING, product_windows
from flap_stream.config import ALIGNING_TARGETS
from flap_stream.engine.layer_pass import LayerPass
from flap_stream.engine.placement.job import Refit
from flap_stream.engine.placement.prediction import Placement
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import CorruptRun, UnsupportedModel
from flap_stream.model.architecture import Family
from flap_stream.model.safetensors_format import FORWARD_DTYPES, TensorEntry, read_header, safetensors_header
from flap_stream.model.units import ROWS
from flap_stream.output.shard_plan import OutputTensor
from flap_stream.progress import Progress
from flap_stream.restore.refitted_layers import refit_head, refit_layer
from flap_stream.restore.second_pass import SecondPass
from flap_stream.storage.run_directory import RunDirectory


def require_refittable(family: Family, shapes: Sequence[LayerShape], target: str, where: str) -> None:
    """Raise UnsupportedModel for what no refit is defined for."""
    if any(shape.experts for shape in shapes):
        raise UnsupportedModel(f"{where} has experts, whose projections are not refitted; use --restore bias")
    if target != "own" and family.norms_outputs:
        raise UnsupportedModel(
            f"{where} norms what attention and MLP give before it is added, so that the hidden states are no target of "
            "least squares; use --refit-target own"
        )


def refit_sizes(model: StreamedModel, target: str, keeps: Sequence[LayerKeep] | None = None) -> Refit:
    """The most that pass 2 has to refit, for the planner. keeps: of each layer; without them each could keep all."""
    hidden, aligns = model.hidden_size, target in ALIGNING_TARGETS
    projections, steps, readers = list[tuple[int, int, int]](), list[tuple[int, int, int]](), 0
    for i, shape in enumerate(model.shapes):
        for part in model.family.parts(shape):
            kind = part.kind
            kept = part.units if keeps is None else len(part.own(keeps[i].of(kind.name)))
            projections.append((hidden, kind.output.size(part.units, shape), kind.output.size(kept, shape)))
            stays, whole = (sum(p.size(n, shape) for p in kind.readers) for n in (kept, part.units))
            readers = max(readers, hidden * (whole + aligns * stays))
            projections += [(hidden, hidden, hidden)] * aligns
            if target == "joint" and kind.name == "mlp":
                steps.append((stays, kept, hidden))
    has_head = refits_head(model, target)
    projections += [(hidden, hidden, hidden)] * has_head
    return Refit(tuple(projections), target != "own", readers, has_head, tuple(steps))


def refits_head(model: StreamedModel, target: str) -> bool:
    """Whether the head is refitted; one that is the embedding stays."""
    return target in ALIGNING_TARGETS and not model.skeleton.tied


def refit_stored_bytes(model: StreamedModel, target: str) -> int:
    """Most bytes that the refitted tensors take in the run directory."""
    weights = (
        entries.get(f"{projection.name}.weight")
        for entries, shape in zip(model.layer_entries, model.shapes, strict=True)
        for part in model.family.parts(shape)
        for projection in part.kind.projections
        if target in ALIGNING_TARGETS or projection.axis != ROWS
    )
    stored = sum(weight.nbytes + weight.shape[0] * weight.item_bytes for weight in weights if weight is not None)
    return stored + (model.head_entry.nbytes if refits_head(model, target) else 0)


def refit_record(target: str) -> dict[str, Any]:
    """What decides a refit besides the plan and how layers are run."""
    return {"target": target, "damping": DAMPING, **({"directions": DIRECTIONS} if target == "joint" else {})}


def refit_layers(
    model: StreamedModel,
    run: RunDirectory,
    keeps: Sequence[LayerKeep],
    target: str,
    placement: Placement,
    progress: Progress,
    snapshot_interval: int | None = None,
) -> None:
    """Bring the refitted projections of all layers into the run directory, going on where an earlier call stopped.

    All ranks of the model do this together; `run` is open for writing on the first.

    Raises NonFinite, naming the layer, if inputs hold NaN or infinity.
    """
    ranks = model.ranks
    conditions = {"dtype": str(model.dtype), "device": model.device.type, "batch_size": placement.batch_size}
    if ranks.is_first:
        run.refits.begin({**conditions, **refit_record(target)})
    first, count = ranks.from_first(run.refits.complete_layers), len(model.layers)
    if first < count + refits_head(model, target):
        with progress.stage("refit", count, device=model.device) as stage, torch.inference_mode(), ExitStack() as stack:
            tokens = run.tokens.read()
            samples, length = tokens.shape
            own = ranks.share(samples, product_windows(placement.batch_size, length))
            stores = [run.refits.pruned_snapshots] + ([run.refits.dense_snapshots] if target != "own" else [])
            saved = [
                (store, stack.enter_context(model.hidden_states(placement.hidden_place, len(own), length, run.path)))
                for store in stores
            ]
            batches = LayerPass(
                model,
                placement,
                tokens[own.start : own.stop],
                [hidden for _, hidden in saved],
                stores=[store for store, _ in saved],
                reductions=run.batch_reductions("restore"),
                windows=own,
            )
            on = SecondPass(batches, run, samples, target)
            for i, weights in batches.layers(stage, first, snapshot_interval):
                if i < first:
                    refit_layer(on, i, weights, keeps[i], load_file(run.refits.path(i)))
                else:
                    is_read = i + 1 < count or refits_head(model, target)
                    refitted = refit_layer(on, i, weights, keeps[i], None, is_read)
                    model.checkpoint.require_unchanged()
                    if ranks.is_first:
                        run.refits.write(i, _file_chunks(f"{model.family.layers}.{i}.", refitted))
            if refits_head(model, target):
                head = refit_head(on)
                model.checkpoint.require_unchanged()
                if ranks.is_first:
                    run.refits.write(count, _file_chunks("", {model.family.head: head}))
    else:
        with progress.stage("refit", count) as stage:
            stage.skip(count)
    if ranks.is_first:
        run.refits.pruned_snapshots.drop()
        run.refits.dense_snapshots.drop()


def refitted_tensors(run: RunDirectory, count: int) -> dict[str, TensorEntry]:
    """Where the refitted tensors are, by the names that the pruned checkpoint has for them.

    count: of files: a layer's each, and one of the head if that is refitted.
    Raises CorruptRun if any is missing or altered.
    """
    complete = run.refits.complete_layers()
    if complete < count:
        raise CorruptRun(f"{run.refits.path(complete)} is missing or altered; run the same command again to refit")
    tensors = {}
    for layer in range(count):
        path = run.refits.path(layer)
        for entry in read_header(path)[0]:
            tensors[entry.name] = replace(entry, file=str(path.absolute()))
    return tensors


def _file_chunks(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """Bytes of a safetensors file."""
    codes = {getattr(torch, name): code for code, name in FORWARD_DTYPES.items()}
    planned = [
        OutputTensor(prefix + name, codes[tensor.dtype], tuple(tensor.shape), tensor.nbytes, None)
        for name, tensor in tensors.items()
    ]
    yield safetensors_header(planned)
    for tensor in tensors.values():
        yield memoryview(tensor.contiguous().cpu().view(torch.uint8).view(-1).numpy())
