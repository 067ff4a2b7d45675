"""Perplexity against the removed share, a curve for each sweep."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flap_stream.config import PlanConfig
from flap_stream.report.drawing import Drawing, Palette, Parent, Table
from flap_stream.report.facts import Facts
from flap_stream.report.figures.axes import DASHED, label_line
from flap_stream.report.numbers import change

Curve = dict[str, Any]  # as from `SweepStore.read`


@dataclass(frozen=True)
class _End:
    """The last point of a curve, which carries its name."""

    x: float
    y: float
    name: str
    colour: str


def drawing(facts: Facts) -> Drawing | None:
    """Axes for each text, with the curves measured on it."""
    if not facts.curves:
        return None
    tables = [_table(curve) for curves in curves_by_text(facts) for curve in curves]
    return Drawing("sweep", "Perplexity against ratio", _caption(facts), 3.3, _draw, tables)


def curves_by_text(facts: Facts) -> list[list[Curve]]:
    """Comparable curves: of the same windows in the same dtype; the newest text first, three texts at most."""
    groups: dict[tuple[str, str], list[Curve]] = {}
    for stored in reversed(facts.curves):
        curve = {**stored, "points": [point for point in stored["points"] if np.isfinite(point["perplexity"])]}
        groups.setdefault((curve["text"]["sha256"], curve["dtype"]), []).append(curve)
    return list(groups.values())[:3]


def curve_name(curve: Curve) -> str:
    """What distinguishes a curve from the others: method, options that are not at their default, and restoration."""
    options, method = curve["options"], str(curve["options"].get("method"))
    default = asdict(PlanConfig(method=method, statistics=options.get("statistics", PlanConfig.statistics)))
    default["statistics"] = PlanConfig.statistics
    others = {name: value for name, value in options.items() if value != default.get(name)}
    said = [value if isinstance(value, str) else f"{name} {value}" for name, value in sorted(others.items())]
    return ", ".join([method, *said, "no restoration" if curve["restore"] == "none" else curve["restore"]])


def _caption(facts: Facts) -> str:
    newest = curves_by_text(facts)[0][0]
    text, dense = newest["text"], newest["dense_perplexity"]
    rises = [
        f"{change(dense, point['perplexity'])} at {100 * point['decoder_ratio']:.0f} %"
        for point in _spread(newest["points"], 4)
    ]
    found = f"changes by {', '.join(rises)}" if rises else f"of the dense model, the only one measured: {dense:.4g}"
    return (
        f"Perplexity {found} ({curve_name(newest)}). On {text['shape'][0]:,} windows of "
        f"{text['shape'][1]} tokens of {', '.join(text['sources'])}, in {newest['dtype'].removeprefix('torch.')}."
    )


def _table(curve: Curve) -> Table:
    dense = curve["dense_perplexity"]
    rows = [
        (
            f"{point['ratio']:g}",
            f"{point['decoder_ratio']:.2%}",
            f"{point['parameters']:,}",
            f"{point['perplexity']:.4f}",
            change(dense, point["perplexity"]),
        )
        for point in curve["points"]
    ]
    heads = ("ratio", "of prunable", "parameters", "perplexity", f"over {dense:.4f}")
    return Table(heads, rows, f"Numbers: {curve_name(curve)}")


def _spread(points: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most `most` points, spread over the ratios."""
    if len(points) <= most:
        return list(points)
    wanted = np.linspace(points[0]["ratio"], points[-1]["ratio"], most)
    chosen = {int(np.argmin([abs(point["ratio"] - ratio) for point in points])) for ratio in wanted}
    return [points[i] for i in sorted(chosen)]


def _draw(parent: Parent, facts: Facts, palette: Palette) -> None:
    texts = curves_by_text(facts)
    for ax, curves in zip(parent.subplots(1, len(texts), squeeze=False)[0], texts, strict=True):
        dense = curves[0]["dense_perplexity"]
        _draw_dense(ax, dense, palette)
        ends = [_draw_curve(ax, curves, number, palette) for number in range(len(curves))]
        if facts.decoder_ratio is not None:
            ax.axvline(100 * facts.decoder_ratio, color=palette.ink, linewidth=0.8, linestyle=(0, (1, 2)))
            label_line(ax, 100 * facts.decoder_ratio, f"plan, {100 * facts.decoder_ratio:.1f} %", palette)
        points = [point for curve in curves for point in curve["points"]]
        _perplexity_axis(ax, dense, max((point["perplexity"] for point in points), default=dense))
        right = max((100 * point["decoder_ratio"] for point in points), default=1)
        ax.set(xlabel="removed share of the prunable weights, %")
        ax.set_xlim(-1, right * (1.3 if len(texts) == 1 else 1.6))  # room for the names on the right
        _name_ends(ax, ends, 11 / (0.7 * parent.bbox.height * 72 / parent.dpi))


def _draw_dense(ax: Any, dense: float, palette: Palette) -> None:
    ax.axhline(dense, color=palette.soft, linewidth=0.8, linestyle=DASHED)
    ax.annotate(
        f"dense {dense:.4g}",
        (1.0, dense),
        xycoords=ax.get_yaxis_transform(),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color=palette.soft,
    )


def _draw_curve(ax: Any, curves: Sequence[Curve], number: int, palette: Palette) -> _End:
    """Draw one of the curves in its own style; the first one has its values written next to its points."""
    curve = curves[number]
    at = [0.0, *(100 * point["decoder_ratio"] for point in curve["points"])]
    values = [curves[0]["dense_perplexity"], *(point["perplexity"] for point in curve["points"])]
    colour, line = (palette.kept, palette.gone)[number % 2], ("-", "--", ":")[number // 2 % 3]
    ax.plot(at, values, marker="osD^"[number % 4], ms=4, linewidth=1.5, color=colour, linestyle=line)
    if number == 0:
        _label_points(ax, at, values, palette, below=len(curves) > 1)
    return _End(at[-1], values[-1], curve_name(curve), colour)


def _perplexity_axis(ax: Any, dense: float, highest: float) -> None:
    """Logarithmic if perplexities differ by more than a factor of 4."""
    ax.set_ylabel("perplexity")
    ax.margins(y=0.12)
    if highest > 4 * dense:
        ax.set_yscale("log")
        steps = (1, 1.5, 2, 3, 5, 7) if highest < 10 * dense else (1, 2, 5)
        ticks = [step * 10.0**power for power in range(-1, 9) for step in steps]
        shown = [tick for tick in ticks if 0.8 * dense <= tick <= 1.2 * highest]
        ax.set_yticks(shown, [f"{tick:,g}" for tick in shown])
        ax.minorticks_off()


def _name_ends(ax: Any, ends: Sequence[_End], gap: float) -> None:
    """Names next to the last points of curves, moved up where they would touch. gap: share of the axes' height."""
    lowest = -1.0
    places = [
        (ax.transLimits.transform(ax.transScale.transform((end.x, end.y)))[1], end.x, end.name, end.colour)
        for end in ends
    ]
    for place, x, name, colour in sorted(places):
        lowest = max(place, lowest + gap)
        ax.annotate(
            name,
            (x, lowest),
            xycoords=ax.get_xaxis_transform(),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            annotation_clip=False,
        )


def _label_points(ax: Any, at: Sequence[float], values: Sequence[float], palette: Palette, below: bool) -> None:
    """Values next to points that are far enough from the last one labelled. below: where no other curve is expected."""
    last, place = -1e9, {"xytext": (2, -11), "ha": "left"} if below else {"xytext": (-3, 6), "ha": "right"}
    for x, value in list(zip(at, values, strict=True))[1:-1]:
        if x - last > max(at) / 9:
            ax.annotate(
                f"{value:.4g}",
                (x, value),
                textcoords="offset points",
                color=palette.ink,
                fontsize=8,
                **place,
            )
            last = x
    ends: dict[str, Any] = {"xytext": (-4, -11) if below else (-7, 0), "ha": "right"}
    ax.annotate(f"{values[-1]:.4g}", (at[-1], values[-1]), textcoords="offset points", fontsize=8, **ends)
