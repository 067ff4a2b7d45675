"""The fluctuation of all units as a heat map, a row for each layer, its units sorted by score."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from flap_stream.report.drawing import Drawing, Palette, Parent
from flap_stream.report.facts import Facts, Units
from flap_stream.report.figures.quantiles import quantile_table

_COLUMNS = 160  # at most, of the map; by eye
_COLOUR_MAP = "cividis"  # even in lightness, and readable with colour vision deficiencies
_METRIC_NAMES = {
    "wifv": "weighted fluctuation: variance of the input \u00d7 squared norm of its column",
    "ifv": "fluctuation: variance of the input",
    "wifn": "mean |weight| of the column \u00d7 root mean square of the input",
}


def drawing(facts: Facts) -> Drawing | None:
    """A map of KV groups and one of neurons."""
    if not facts.has_scores:
        return None
    height = min(6.0, 1.7 + 0.16 * len(facts.kv_groups))
    kinds = (facts.kv_groups, facts.neurons)
    units = ([layer.fluctuations for layer in layers if layer.fluctuations is not None] for layers in kinds)
    return Drawing("fluctuation", "Fluctuation", _caption(facts), height, _draw, [quantile_table(*units)])


def _metric_name(facts: Facts) -> str:
    if facts.method == "magnitude-sp":
        return "squared norm of the column"
    return _METRIC_NAMES["ifv" if facts.method == "wanda-sp" else facts.drawn_metric]


def _caption(facts: Facts) -> str:
    line = " Units to the right of the white line are removed." if facts.has_plan else ""
    scale = f"Colour, on a logarithmic scale: {_metric_name(facts)}."
    return f"{scale} Within each layer, units are sorted by score, the best on the left.{line}"


def _draw(parent: Parent, facts: Facts, palette: Palette) -> None:
    group_axes, neuron_axes = parent.subplots(1, 2)
    for ax, title, layers in (
        (group_axes, "KV groups", facts.kv_groups),
        (neuron_axes, "MLP neurons", facts.neurons),
    ):
        image = _image(layers)
        if not np.isfinite(image).any():
            ax.set_axis_off()
            continue
        low, high = np.nanquantile(image, [0.01, 0.99])
        shown = ax.imshow(
            image,
            aspect="auto",
            interpolation="nearest",
            cmap=_COLOUR_MAP,
            vmin=low,
            vmax=high if high > low else low + 1,
            extent=(0, 100, len(layers) - 0.5, -0.5),
        )
        if facts.has_plan:
            _draw_cut(ax, [_kept_share(layer) for layer in layers])
        ylabel = "layer" if ax is group_axes else None
        ax.set(ylabel=ylabel, xlabel="share of the layer's units, %", title=title)
        ax.yaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
        ax.spines[["left", "bottom"]].set_visible(False)
        bar = parent.colorbar(shown, ax=ax, fraction=0.05, pad=0.02, aspect=18)
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=high - low > 2))
        bar.ax.set_title("log₁₀", fontsize=8, color=palette.soft, loc="center", pad=4)


def _image(layers: Sequence[Units]) -> np.ndarray:
    """Logarithms of the fluctuations, float64 `[layer, column]`, the best units left; NaN where there is none."""
    rows = []
    for layer in layers:
        assert layer.scores is not None and layer.fluctuations is not None
        rows.append(layer.fluctuations[np.argsort(-layer.scores, kind="stable")])
    columns = min(_COLUMNS, max(map(len, rows)))
    return np.stack([_binned(_log10(row), columns) for row in rows])


def _kept_share(layer: Units) -> float:
    return float(layer.keep.mean()) if layer.keep is not None and len(layer.keep) else 1.0


def _draw_cut(ax: Any, shares: Sequence[float]) -> None:
    """A line between kept and removed units. shares: kept, of each layer."""
    at = np.repeat(100 * np.array(shares), 2)
    edges = np.repeat(np.arange(len(shares) + 1) - 0.5, 2)[1:-1]
    ax.plot(at, edges, color="#ffffff", linewidth=1.6, path_effects=[withStroke(linewidth=3, foreground="#000000")])


def _log10(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(values)
    return np.where(np.isfinite(logs), logs, np.nan)


def _binned(values: np.ndarray, columns: int) -> np.ndarray:
    """Means of neighbours, `[column]`; a row with fewer values than columns is stretched."""
    if len(values) == 0:
        return np.full(columns, np.nan)
    edges = np.linspace(0, len(values), columns + 1)
    firsts = np.minimum(edges[:-1].astype(int), len(values) - 1)
    lasts = np.maximum(np.ceil(edges[1:]).astype(int), firsts + 1)
    parts = [values[first:last] for first, last in zip(firsts, lasts, strict=True)]
    return np.array([np.nan if np.isnan(part).all() else np.nanmean(part) for part in parts])
