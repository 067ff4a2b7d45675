"""The scores of all units, those kept and those removed, and where the sort was cut."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter

from flap_stream.report.drawing import Drawing, Palette, Parent
from flap_stream.report.facts import Facts, Units
from flap_stream.report.figures.axes import DASHED, label_line
from flap_stream.report.figures.quantiles import quantile_table
from flap_stream.report.numbers import MINUS

_MOST_DOTS = 1200  # KV groups up to which each is a dot of its own; by eye
# Of many units, the best 0.5 % are beyond the right edge, so that a few outliers do not squeeze the rest together.
_SHOWN_SHARE, _MANY = 0.995, 400

Scored = tuple[np.ndarray, np.ndarray]  # finite scores, and a bool for each: True is kept


def drawing(facts: Facts) -> Drawing | None:
    """KV groups as dots in a row for each layer where they are few, else a histogram as for neurons."""
    if not facts.has_scores:
        return None
    height = 2.8 if facts.has_plan and len(facts.kv_groups) <= 12 else 3.4
    units = ([scores for scores, _ in scored(layers)] for layers in (facts.kv_groups, facts.neurons))
    return Drawing("scores", "Scores and the cut", _caption(facts), height, _draw, [quantile_table(*units)])


def cut_score(facts: Facts) -> float | None:
    """The highest score removed by the one sort over all layers.

    None where layers or kinds were cut separately, or units may have gone with their layer or expert.
    """
    if facts.options is None or facts.options.structure != "al-am" or not facts.has_plan or _removes_whole(facts):
        return None
    removed = [scores[~keep] for scores, keep in scored(facts.kv_groups) + scored(facts.neurons)]
    return float(max((part.max() for part in removed if len(part)), default=np.nan))


def scored(layers: Sequence[Units]) -> list[Scored]:
    """Scores of each layer's units and which are kept; units without a finite score are left out."""
    found = []
    for layer in layers:
        assert layer.scores is not None
        keep = np.ones(len(layer.scores), dtype=bool) if layer.keep is None else layer.keep
        finite = np.isfinite(layer.scores)
        found.append((layer.scores[finite], keep[finite]))
    return found


def _caption(facts: Facts) -> str:
    cut = cut_score(facts)
    is_standardised = facts.method == "flap" and not _is_fisher(facts)
    what = f"Each unit's score{', standardised within its layer' if is_standardised else ''}; higher is better."
    if not facts.has_plan:
        return f"{what} Without a plan there is no cut."
    if _removes_whole(facts):
        return f"{what} A layer or expert that is removed as a whole takes all of its units with it."
    if cut is None:
        return f"{what} Each layer or each kind of unit is cut separately."
    return f"{what} All layers and both kinds are sorted together and cut at {_number(cut, 3, facts)}."


def _number(cut: float, digits: int, facts: Facts) -> str:
    """The cut with fixed decimals; with significant digits for fisher, whose scores are far below 1."""
    return f"{cut:.{digits}{'g' if _is_fisher(facts) else 'f'}}"


def _removes_whole(facts: Facts) -> bool:
    return facts.options is not None and (facts.options.depth or facts.options.whole_experts)


def _is_fisher(facts: Facts) -> bool:
    return facts.options is not None and facts.options.metric == "fisher"


def _draw(parent: Parent, facts: Facts, palette: Palette) -> None:
    cut = cut_score(facts)
    group_axes, neuron_axes = parent.subplots(1, 2)
    groups, neurons = scored(facts.kv_groups), scored(facts.neurons)
    has_dots = sum(len(scores) for scores, _ in groups) <= _MOST_DOTS
    for ax, title, units, as_dots in (
        (group_axes, "KV groups", groups, has_dots),
        (neuron_axes, "MLP neurons", neurons, False),
    ):
        values, keep = (np.concatenate(column) for column in zip(*units, strict=True))
        if not len(values):
            ax.set_axis_off()
            continue
        low, high = np.quantile(values, [0, _SHOWN_SHARE if len(values) > _MANY else 1])
        margin = 0.04 * (high - low or 1)
        ax.set_xlim(low - margin, high + margin)
        beyond = int((values > high).sum())
        if as_dots:
            _draw_dots(ax, units, palette)
        else:
            _draw_histogram(ax, (values, keep), (low, high), palette)
        ax.set_title(title)
        ax.set_xlabel("score" + (f" ({beyond:,} beyond the right edge)" if beyond else ""))
        if cut is not None and low - margin < cut < high + margin:
            ax.axvline(cut, color=palette.ink, linewidth=0.8, linestyle=DASHED)
            label_line(ax, cut, f"cut {_number(cut, 2, facts)}".replace("-", MINUS), palette)
        if facts.has_plan:
            _add_key(ax, palette)


def _draw_dots(ax: Any, layers: Sequence[Scored], palette: Palette) -> None:
    for row, (scores, keep) in enumerate(layers):
        ax.plot(scores[keep], np.full(keep.sum(), row), "o", ms=5, color=palette.kept, mew=0, alpha=0.85)
        ax.plot(scores[~keep], np.full((~keep).sum(), row), "o", ms=4.6, mfc="none", mec=palette.gone, mew=1.1)
    ax.set(ylim=(len(layers) - 0.4, -0.6 - 0.12 * len(layers)), ylabel="layer")
    ax.set_yticks(range(0, len(layers), -(-len(layers) // 8)))


def _draw_histogram(ax: Any, units: Scored, ends: tuple[float, float], palette: Palette) -> None:
    """Bars of both kept and removed units, the removed in front. ends: of the score axis."""
    scores, keep = units
    edges = np.linspace(*ends, 61) if ends[1] > ends[0] else np.array([ends[0] - 0.5, ends[0] + 0.5])
    kept, removed = (np.histogram(scores[chosen], edges)[0] for chosen in (keep, ~keep))
    ax.stairs(kept + removed, edges, fill=True, facecolor=palette.kept, linewidth=0)
    ax.stairs(removed, edges, fill=True, facecolor=palette.gone, hatch="////", edgecolor=palette.page, linewidth=0)
    ax.set(yscale="log", ylim=(0.7, 4 * max(1, (kept + removed).max())), ylabel="units")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.minorticks_off()


def _add_key(ax: Any, palette: Palette) -> None:
    for x, text, colour in ((0, "kept", palette.kept), (-30, "removed", palette.gone)):
        ax.annotate(
            text,
            (1.0, 1.0),
            xycoords="axes fraction",
            xytext=(x, 7),
            textcoords="offset points",
            ha="right",
            color=colour,
            weight="bold",
        )
