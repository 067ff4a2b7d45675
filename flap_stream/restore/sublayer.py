"""Decoder layers as least squares runs them: attention and MLP one after the other, each refitted in between.

For each of the two, its output projection is refitted and its outputs become the hidden states. Nothing is cut: modules
stand in for the layer's own (`stand_ins.py`).
"""

from collections.abc import Mapping

import torch
from torch import nn

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.restore.output_projection import OutputProjection
from flap_stream.restore.pruned_sublayer import PrunedSublayer
from flap_stream.restore.refit_pass import RefitPass
from flap_stream.restore.stand_ins import Supplies


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
        refitted |= _refit_output(sublayer.with_rows_arranged(), stored, is_read or part is not parts[-1])
    return refitted


def _refit_output(
    sublayer: PrunedSublayer, stored: Mapping[str, torch.Tensor] | None, is_read: bool
) -> dict[str, torch.Tensor]:
    """Refit the output projection, and hand the pruned model's hidden states on."""
    refit, output = sublayer.refit, OutputProjection.of(sublayer)
    if output is None or output.is_whole:
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
