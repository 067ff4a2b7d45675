"""Decoder layers as least squares runs them: attention and MLP one after the other, each refitted in between.

For each of the two, its output projection is refitted and its outputs become the hidden states, beside which those of
the dense model run, in most families, as the target. Nothing is cut: modules stand in for the layer's own
(`stand_ins.py`). A mixture's experts are refitted together (`experts.py`).
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.layer_shape import Sublayer
from flap_stream.restore.experts import refit_experts
from flap_stream.restore.output_projection import OutputProjection
from flap_stream.restore.pruned_sublayer import PrunedSublayer
from flap_stream.restore.refit_pass import RefitPass


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
    shape = refit.model.shapes[index]
    silent = {half: refit.silenced(other, shape) for half, other in zip(Sublayer, reversed(Sublayer), strict=True)}
    sublayers = [
        PrunedSublayer(refit, index, weights, part, units, silent[part.kind.name])
        for part, units in refit.model.family.kept_parts(shape, keep)
    ]
    experts = [sublayer for sublayer in sublayers if shape.experts and sublayer.part.kind.name is Sublayer.MLP]
    for sublayer in sublayers[: len(sublayers) - len(experts)]:
        refitted |= _refit_output(sublayer.with_rows_arranged(), stored, is_read or sublayer is not sublayers[-1])
    if not experts:
        return refitted
    with refit.model.rerouted(index, keep.neurons):
        return refitted | refit_experts(experts, stored, is_read)


def _refit_output(
    sublayer: PrunedSublayer, stored: Mapping[str, torch.Tensor] | None, is_read: bool
) -> dict[str, torch.Tensor]:
    """Refit the output projection, and hand the pruned model's hidden states on."""
    refit, output = sublayer.refit, OutputProjection.of(sublayer)
    if refit.dense is not None:
        exponent = sublayer.run_dense()
        output = None if output is None else replace(output, exponent=exponent)
    if output is None or (output.is_whole and (refit.dense is None or sublayer.is_before_any_cut)):
        sublayer.run_all({})
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
