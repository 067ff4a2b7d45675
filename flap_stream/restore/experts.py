"""Least-squares fit of the experts of a layer: each one's output projection, to the tokens that are routed to it.

The router is the dense model's and reads the pruned model's hidden states, so it routes as in the pruned model. Experts
are fitted in groups, as many at once as their sums may take memory; in the pass for a group no other expert runs.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from flap_stream.arithmetic.least_squares import EXPERT_DAMPING, MomentSums, groups
from flap_stream.arithmetic.scoring import ChannelStatistics
from flap_stream.restore.output_projection import OutputProjection
from flap_stream.restore.pruned_sublayer import PrunedSublayer
from flap_stream.restore.stand_ins import Captures, ReadsKept, Supplies


def refit_experts(
    experts: Sequence[PrunedSublayer], stored: Mapping[str, torch.Tensor] | None, is_read: bool
) -> dict[str, torch.Tensor]:
    """Refit all experts of one layer, and hand the pruned model's hidden states on.

    Returns their output projections by relative name, in the dtypes of the checkpoint. One without neurons has none.
    stored, is_read: as of `sublayer.refit_layer`.
    """
    refitted, cut = dict[str, torch.Tensor](), list[OutputProjection]()
    for expert in experts:
        output = OutputProjection.of(expert)
        if output is None or output.is_whole:
            refitted |= expert.unchanged_output()
        elif output.kept:
            cut.append(output)
    if stored is None:
        for group in groups([(len(output.order), output.kept) for output in cut]):
            refitted |= _fitted(experts, cut[group.start : group.stop])
    else:
        names = tuple(f"{output.name}." for output in cut)
        refitted |= {name: tensor for name, tensor in stored.items() if name.startswith(names)}
    if is_read:
        experts[0].run_all({output.name: _of_kept(output, refitted) for output in cut})
    return refitted


def _fitted(experts: Sequence[PrunedSublayer], group: Sequence[OutputProjection]) -> dict[str, torch.Tensor]:
    """The output projections of some of the experts, fitted in one pass over the windows."""
    first = experts[0]
    statistics = first.refit.run.statistics.read(first.index).of(first.part.kind.name)
    sums, fitted = _summed(experts, group, statistics), dict[str, torch.Tensor]()
    for output, own in zip(group, sums, strict=True):
        fitted |= output.fitted(own, statistics, EXPERT_DAMPING)
    return fitted


def _summed(
    experts: Sequence[PrunedSublayer], group: Sequence[OutputProjection], statistics: ChannelStatistics
) -> Iterator[MomentSums]:
    """Sums of what the output projections of a group read, each to be used before the next is asked for."""
    refit = experts[0].refit
    sums = [output.sums(statistics, of_expert=True) for output in group]
    captures = [Captures(len(output.weight)) for output in group]
    waiting: list[list[torch.Tensor]] = [[] for _ in group]

    def add() -> None:
        for output, own, inputs in zip(group, sums, waiting, strict=True):
            if inputs:
                own.add_block(torch.cat(inputs)[:, output.order])
                inputs.clear()

    modules: dict[str, nn.Module] = {expert.part.kind.module: Supplies(expert.part.kind.name) for expert in experts}
    for output, capture in zip(group, captures, strict=True):
        del modules[output.sublayer.part.kind.module]
        modules[output.name] = capture
    for start, hidden in experts[0].forward(modules, keep_output=False):
        del hidden
        if start % refit.block_windows == 0:
            add()
        for capture, inputs in zip(captures, waiting, strict=True):
            inputs += capture.taken()
    add()
    sums.reverse()
    while sums:
        yield sums.pop()


def _of_kept(output: OutputProjection, refitted: Mapping[str, torch.Tensor]) -> ReadsKept:
    """The refitted projection of inputs in their dense order, on the device."""
    model = output.sublayer.refit.model
    weight, bias = (refitted[f"{output.name}.{name}"].to(model.device, model.dtype) for name in ("weight", "bias"))
    return ReadsKept(weight, bias, output.order[: output.kept])
