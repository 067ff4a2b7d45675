"""How many KV groups and neurons each layer keeps."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flap_stream.report.drawing import Drawing, Palette, Parent, Table
from flap_stream.report.facts import Facts, Units
from flap_stream.report.figures.axes import MOST_LABELS, layer_axis


def drawing(facts: Facts) -> Drawing | None:
    """A bar for each layer and kind of unit, within a frame as high as the dense layer."""
    if not facts.has_plan:
        return None
    rows = [
        (i, f"{groups.kept} of {groups.dense}", f"{neurons.kept:,} of {neurons.dense:,}")
        for i, (groups, neurons) in enumerate(zip(facts.kv_groups, facts.neurons, strict=True))
    ]
    tables = [Table(("layer", "KV groups", "neurons"), rows)]
    return Drawing("kept", "Kept in each layer", _caption(facts), 2.5, _draw, tables)


def _caption(facts: Facts) -> str:
    groups, neurons = ([layer.kept or 0 for layer in layers] for layers in (facts.kv_groups, facts.neurons))
    all_groups, all_neurons = (sum(layer.dense for layer in layers) for layers in (facts.kv_groups, facts.neurons))
    of_neurons = f"{sum(neurons):,} of {all_neurons:,} neurons ({min(neurons):,} to {max(neurons):,} per layer)"
    if not all_groups:
        return f"{of_neurons} are kept. Attention is left whole."
    return (
        f"{sum(groups):,} of {all_groups:,} KV groups are kept ({min(groups)} to {max(groups)} per layer) "
        f"and {of_neurons}."
    )


def _draw(parent: Parent, facts: Facts, palette: Palette) -> None:
    heads = f", {facts.heads_per_group} query heads each" if facts.heads_per_group > 1 else ""
    group_axes, neuron_axes = parent.subplots(1, 2)
    _draw_bars(group_axes, f"KV groups{heads}", facts.kv_groups, palette)
    _draw_bars(neuron_axes, "MLP neurons", facts.neurons, palette)


def _draw_bars(ax: Any, title: str, layers: Sequence[Units], palette: Palette) -> None:
    dense = np.array([layer.dense for layer in layers])
    kept = np.array([layer.kept for layer in layers])
    at = np.arange(len(dense))
    few = len(at) <= MOST_LABELS
    ax.bar(at, dense, width=0.78, color="none", edgecolor=palette.rule, linewidth=0.8 if few else 0.3)
    ax.bar(at, kept, width=0.78, color=palette.kept)
    for i in at if few else np.unique([kept.argmin(), kept.argmax()]):
        inside = few and kept[i] > 0.14 * dense.max()
        ax.text(
            i,
            kept[i] - (0.02 if inside else -0.02) * dense.max(),
            f"{kept[i]:,}",
            ha="center",
            va="top" if inside else "bottom",
            color=palette.page if inside else palette.ink,
            fontsize=8,
        )
    ax.set_title(title)
    layer_axis(ax, len(dense))
    ax.set_ylim(0, dense.max() * (1.02 if few else 1.12) or 1)
    ax.set_yticks([0, dense.max()], ["0", f"{dense.max():,}"])
