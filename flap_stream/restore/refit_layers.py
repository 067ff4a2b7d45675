"""The refit before anything is cut: what each layer keeps is refitted on the inputs that the pruned prefix produces.

The calibration windows run through the model again, this time through its pruned layers (`sublayer.py`). The refitted
tensors of each layer are stored in the run directory, so that an interrupted refit can be resumed.

With several ranks, each runs its share of the windows, and rank 0 solves from the sums over all of them. A
reconstruction is fitted by rank 0 alone, on all windows: a step of so few tokens takes less time than sending a layer's
gradients.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from safetensors.torch import load_file

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.engine.device import device_record
from flap_stream.engine.layer_pass import LayerPass
from flap_stream.engine.placement.job import undivided_windows
from flap_stream.engine.placement.prediction import Placement
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import CorruptRun
from flap_stream.model.safetensors_format import FORWARD_DTYPES, TensorEntry, read_header, safetensors_header
from flap_stream.output.shard_plan import OutputTensor
from flap_stream.progress import Progress, Stage
from flap_stream.restore.reconstruction import reconstruct_layer
from flap_stream.restore.refit_pass import RefitPass
from flap_stream.restore.requirements import follows_dense, refit_record
from flap_stream.restore.sublayer import refit_layer
from flap_stream.storage.run_directory import RunDirectory


@dataclass(frozen=True)
class RefitJob:
    """What to refit and how to run the layers for it.

    keeps: of every layer. restore: one of config.REFITS. snapshot_interval: layers between two snapshots of the
    hidden states; None chooses it by their cost.
    """

    keeps: Sequence[LayerKeep]
    restore: str
    placement: Placement
    snapshot_interval: int | None = None


def refit_layers(model: StreamedModel, run: RunDirectory, job: RefitJob, progress: Progress) -> None:
    """Write the refitted tensors of all layers to the run directory, resuming where an earlier call stopped.

    All ranks of the model call this together; `run` is open for writing on the first.
    Raises NonFinite, naming the layer, if inputs hold NaN or infinity.
    """
    ranks, count = model.ranks, len(model.layers)
    if ranks.is_first:
        conditions = {"dtype": str(model.dtype), "batch_size": job.placement.batch_size, **device_record(model.device)}
        run.refits.begin({**conditions, **refit_record(job.restore, model.family)})
    complete = ranks.from_first(run.refits.complete_layers)
    with progress.stage("refit", count, device=model.device) as stage:
        if complete < count:
            without_graph = torch.no_grad() if job.restore == "reconstruct" else torch.inference_mode()
            with without_graph, ExitStack() as stack:
                _refit_rest(_refit_pass(model, run, job, stack), job, stage, complete)
        else:
            stage.skip(count)
    if ranks.is_first:
        run.refits.pruned_snapshots.drop()
        run.refits.dense_snapshots.drop()


def _refit_pass(model: StreamedModel, run: RunDirectory, job: RefitJob, stack: ExitStack) -> RefitPass:
    """A pass over this rank's windows. stack: closes their hidden states."""
    tokens, placement = run.tokens.read(), job.placement
    samples, length = tokens.shape
    fits = job.restore == "reconstruct"
    own = model.ranks.share(samples, undivided_windows((samples, length), placement.batch_size, fits))
    stores = [run.refits.pruned_snapshots]
    if follows_dense(job.restore, model.family):
        stores.append(run.refits.dense_snapshots)
    hidden = [
        stack.enter_context(model.hidden_states(placement.hidden_place, len(own), length, run.path)) for _ in stores
    ]
    batches = LayerPass(
        model,
        placement,
        tokens[own.start : own.stop],
        hidden,
        stores=stores,
        reductions=run.batch_reductions(model.ranks.from_first(lambda: f"restore {run.refits.job}")),
        windows=own,
    )
    sizes = zip(job.keeps, model.shapes, strict=True)
    cut = (i for i, (keep, shape) in enumerate(sizes) if keep.is_gone or keep.cost(shape) < shape.prunable)
    return RefitPass(batches, run, samples, next(cut, len(job.keeps)))


def _refit_rest(refit: RefitPass, job: RefitJob, stage: Stage, complete: int) -> None:
    """Refit every layer from `complete` on; layers before it only hand their hidden states on."""
    model, run, count = refit.model, refit.run, len(refit.model.layers)
    refitted_layer = reconstruct_layer if job.restore == "reconstruct" else refit_layer
    for i, weights in refit.batches.layers(stage, complete, job.snapshot_interval):
        prefix = model.family.layer_prefix(i)
        if job.keeps[i].is_gone:  # the pruned hidden states stay as they are
            if refit.dense is not None:
                refit.batches.run_all(i, weights, refit.dense)
            if i >= complete:
                _store(refit, i, prefix, {})
        elif i < complete:
            # Copies, which lie in memory as the tensors did when they were new: products may round by that.
            loaded = load_file(run.refits.path(i)).items()
            stored = {name.removeprefix(prefix): tensor.clone() for name, tensor in loaded}
            del loaded
            refitted_layer(refit, i, weights, job.keeps[i], stored)
        else:
            _store(refit, i, prefix, refitted_layer(refit, i, weights, job.keeps[i], is_read=i + 1 < count))


def _store(refit: RefitPass, layer: int, prefix: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a file of refitted tensors, unless the checkpoint has changed since they were read."""
    refit.model.checkpoint.require_unchanged()
    if refit.model.ranks.is_first:
        refit.run.refits.write(layer, _file_chunks(prefix, tensors))


def refitted_tensors(run: RunDirectory, count: int) -> dict[str, TensorEntry]:
    """Where the refitted tensors are, by their names in the pruned checkpoint.

    count: number of layers.
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
    """The bytes of a safetensors file: its header, then each tensor."""
    codes = {getattr(torch, name): code for code, name in FORWARD_DTYPES.items()}
    planned = [
        OutputTensor(prefix + name, codes[tensor.dtype], tuple(tensor.shape), tensor.nbytes, None)
        for name, tensor in tensors.items()
    ]
    yield safetensors_header(planned)
    for tensor in tensors.values():
        yield memoryview(tensor.contiguous().cpu().view(torch.uint8).view(-1).numpy())
