"""Decoder layers as the refit runs them: attention and MLP one after the other, in the pruned and in the dense model.

For each of the two, its output projection is refitted and its outputs become the hidden states. With the target
`aligned`, the projections that read hidden states are refitted before that, and the head at the end; with `joint`, gate
and up take a Gauss-Newton step as well (`mlp_step.py`). Nothing is cut: modules stand in for the layer's own
(`stand_ins.py`).
"""

from collections.abc import Mapping

import torch
from torch import nn

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.layer_shape import Sublayer
from flap_stream.engine.hidden_states import Feed
from flap_stream.model.dtypes import stored_dtype
from flap_stream.restore.mlp_step import STEP_RUNS, MlpStep
from flap_stream.restore.output_projection import OutputProjection
from flap_stream.restore.pruned_sublayer import PrunedSublayer
from flap_stream.restore.refit_pass import RefitPass, aligned_rows
from flap_stream.restore.stand_ins import Supplies

_ALIGNMENT_RUNS = 2  # of the layer over all windows: in the dense model and in the pruned one


def refit_layer(
    refit: RefitPass,
    index: int,
    weights: Mapping[str, torch.Tensor],
    keep: LayerKeep,
    stored: Mapping[str, torch.Tensor] | None = None,
    is_read: bool = True,
) -> dict[str, torch.Tensor]:
    """Run one layer as pruned; returns its refitted tensors by relative name, in the dtypes of the checkpoint.

    stored: what an earlier call returned, which is then used instead of refitting again. is_read: whether anything
    reads the hidden states that leave the layer; they are not computed otherwise.
    """
    refitted: dict[str, torch.Tensor] = {}
    parts = refit.model.family.parts(refit.model.shapes[index])
    for part in parts:
        silent: dict[str, nn.Module] = {}
        for other in parts:
            if other is not part:
                silent |= {other.kind.module: Supplies(other.kind.name), **refit.without_norm(other)}
        sublayer = PrunedSublayer(refit, index, weights, part, part.own(keep.of(part.kind.name)), silent)
        refitted |= _refit_sublayer(sublayer, stored, is_read or part is not parts[-1])
    return refitted


def refit_head(refit: RefitPass) -> torch.Tensor:
    """The head, fitted to the pruned model's final hidden states after the norm; in the dtype of the checkpoint."""
    norm, sums, dense = refit.model.final_norm(), refit.alignment_sums(), refit.targets()
    for start, values in refit.hidden.stream(refit.sizes.first):
        both = [norm(values), norm(dense.take(start, len(values)))]
        sums.add(torch.cat(both, dim=-1).flatten(0, 1))
    matrix = refit.alignment(sums, "the head")
    return aligned_rows(refit.model.head_weight(), matrix, stored_dtype(refit.model.head_entry))


def _refit_sublayer(
    sublayer: PrunedSublayer, stored: Mapping[str, torch.Tensor] | None, is_read: bool
) -> dict[str, torch.Tensor]:
    """Refit attention or MLP, or take its tensors from `stored`, and hand the hidden states of both models on."""
    refit, has_units = sublayer.refit, len(sublayer.units) > 0
    readers: dict[str, torch.Tensor] = {}
    if refit.aligns and has_units:
        readers = _aligned_readers(sublayer, stored)
    if refit.dense is not None:
        sublayer.run_all(refit.dense)
    if refit.is_joint and sublayer.part.kind.name == Sublayer.MLP and has_units:
        readers = _stepped_readers(sublayer.arranged_with(readers), readers, stored)
    return readers | _refit_output(sublayer.arranged_with(readers), stored, is_read)


def _aligned_readers(sublayer: PrunedSublayer, stored: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """The kept rows of what reads hidden states, refitted to what it reads in the dense model."""
    refit, kind = sublayer.refit, sublayer.part.kind
    if stored is not None:
        refit.skip_runs(_ALIGNMENT_RUNS)
        return {name: stored[name] for name in sublayer.kept_rows()}
    assert refit.dense is not None
    silent, sums = Supplies(kind.name), refit.alignment_sums()
    samples, tokens, _ = refit.hidden.shape
    with refit.model.hidden_states(refit.placement.hidden_place, samples, tokens, refit.run.path) as targets:
        for start, _ in sublayer.forward(refit.dense, {kind.module: silent}, keep_output=False):
            targets.put(start, silent.read)
        targets.advance()
        wanted = Feed(targets, refit.sizes.first)
        for start, output in sublayer.forward(refit.hidden, {kind.module: silent}, keep_output=False):
            both = [silent.read, wanted.take(start, len(output))]
            sums.add(torch.cat(both, dim=-1).flatten(0, 1))
    matrix = refit.alignment(sums, f"{kind.module} in layer {sublayer.index}")
    return {
        name: aligned_rows(sublayer.weights[name][rows.to(refit.model.device)], matrix, sublayer.stored_dtype(name))
        for name, rows in sublayer.kept_rows().items()
    }


def _stepped_readers(
    sublayer: PrunedSublayer, readers: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """The kept rows of gate and up after a Gauss-Newton step from `readers`."""
    if stored is not None:
        sublayer.refit.skip_runs(STEP_RUNS)
        return {name: stored[name] for name in sublayer.kept_rows()}
    with sublayer.refit.runs_counted_as(STEP_RUNS):
        output = OutputProjection.of(sublayer)
        assert output is not None, "an MLP that has units has an output projection"
        return MlpStep(sublayer, output.fit()).take(readers)


def _refit_output(
    sublayer: PrunedSublayer, stored: Mapping[str, torch.Tensor] | None, is_read: bool
) -> dict[str, torch.Tensor]:
    """Refit the output projection, and hand the pruned model's hidden states on."""
    refit, output = sublayer.refit, OutputProjection.of(sublayer)
    if output is None or (output.is_whole and refit.dense is None):
        sublayer.run_all(refit.hidden)
        return sublayer.unchanged_output()
    if stored is None and not is_read:
        return output.fit()
    samples, tokens, _ = refit.hidden.shape
    place = refit.placement.hidden_place if output.kept else "host"
    with refit.model.hidden_states(place, samples, tokens, refit.run.path, width=output.kept) as cache:
        if stored is None:
            refitted = output.fit(cache)
        else:
            output.capture(cache)
            refitted = {name: tensor for name, tensor in stored.items() if name.startswith(f"{output.name}.")}
        cache.advance()
        output.hand_on(refitted, cache)
    return refitted
