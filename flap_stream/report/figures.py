"""The figures, drawn with matplotlib in the colours of a palette: real ones for PNG, names of CSS variables for a page.

Every function draws one figure's axes onto a parent, so that figures can stand alone or together.
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from flap_stream.config import PlanConfig
from flap_stream.errors import InvalidInput
from flap_stream.report.facts import Facts

try:
    import matplotlib
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ImportError as _error:
    raise InvalidInput("a report is drawn with matplotlib: pip install 'flap-stream[plots]'") from _error

WIDTH, _OVERVIEW_WIDTH = 9.0, 6.0  # inches
_MINUS = "\u2212"
_HEAT_COLUMNS, _MOST_DOTS, _MOST_LABELS = 160, 1200, 16
_HEAT = "cividis"  # even in lightness, and for people who see few colours


Parent = Figure | SubFigure


@dataclass(frozen=True)
class Palette:
    """Colours by what they mean. ink, soft, rule: text, lesser text, lines; page: behind everything."""

    ink: str
    soft: str
    rule: str
    kept: str
    gone: str
    page: str


LIGHT = Palette(ink="#1d2126", soft="#5f6872", rule="#c9ced4", kept="#1f5f99", gone="#d1702a", page="#ffffff")
DARK = Palette(ink="#e8eaed", soft="#a3abb5", rule="#464d56", kept="#79b4ea", gone="#f0a05c", page="#16191d")
# Stand in an SVG for variables of the page around it; no figure uses such colours otherwise.
_MARKS = Palette(ink="#010203", soft="#020304", rule="#030405", kept="#040506", gone="#050607", page="#060708")

_STYLE: dict[str, Any] = {
    **{"font.family": "sans-serif", "font.size": 8.5, "text.parse_math": False, "figure.constrained_layout.use": True},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7, "axes.titlelocation": "left"},
    **{"axes.titlesize": 9.5, "axes.titlepad": 7, "axes.labelsize": 8.5, "xtick.labelsize": 8, "ytick.labelsize": 8},
    **{"xtick.major.size": 3, "ytick.major.size": 3, "xtick.major.width": 0.7, "ytick.major.width": 0.7},
    **{"svg.fonttype": "none", "svg.hashsalt": "flap-stream", "legend.frameon": False},
}


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn of these facts: file name, title, what it says in numbers, height in inches."""

    name: str
    title: str
    caption: str
    height: float
    draw: Callable[[Any, Facts, Palette], None]


def svg(facts: Facts, drawing: Drawing) -> str:
    """An `<svg>` element whose colours are the page's variables (`var(--kept)`) and whose text is text."""
    body = _saved(facts, drawing, _MARKS, format="svg", transparent=True, metadata={"Date": None}).decode()
    body = body[body.index("<svg") :]
    for name, mark in vars(_MARKS).items():
        body = body.replace(mark, f"var(--{name})")
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", body)  # of groups: nothing refers to them, and figures repeat them
    for number, identity in enumerate(dict.fromkeys(re.findall(r' id="([^"]+)"', body))):
        body = re.sub(rf'(["#]){identity}([")])', rf"\g<1>{drawing.name}-{number}\2", body)  # matplotlib's vary
    body = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", body)
    body = re.sub(r"(<svg[^>]*?) height=\"[^\"]*\"", r"\1", body, count=1)
    return re.sub(r"(<svg[^>]*?) width=\"[^\"]*\"", r'\1 width="100%"', body, count=1)


def png(facts: Facts, drawing: Drawing) -> bytes:
    """The figure in light colours."""
    return _saved(facts, drawing, LIGHT, format="png", dpi=160, metadata={"Software": None})


def overview(facts: Facts, drawings: Sequence[Drawing]) -> bytes:
    """All figures on one PNG, two a row, the highest first."""
    ordered = sorted(drawings, key=lambda drawing: -drawing.height)
    rows = [ordered[i : i + 2] for i in range(0, len(ordered), 2)]
    heights = [max(drawing.height for drawing in row) for row in rows]
    with _styled(LIGHT):
        figure = Figure(figsize=(2 * _OVERVIEW_WIDTH, sum(heights) + 0.25 * len(rows)), facecolor=LIGHT.page)
        bands = figure.subfigures(len(rows), 1, height_ratios=heights, hspace=0.05, squeeze=False)[:, 0]
        for band, row in zip(bands, rows, strict=True):
            for place, drawing in zip(band.subfigures(1, 2, wspace=0.04), row, strict=False):
                place.set_facecolor(LIGHT.page)
                place.suptitle(drawing.title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=LIGHT.ink)
                drawing.draw(place, facts, LIGHT)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _saved(facts: Facts, drawing: Drawing, palette: Palette, **how: Any) -> bytes:
    buffer = io.BytesIO()
    with _styled(palette):
        figure = Figure(figsize=(WIDTH, drawing.height), facecolor=palette.page)
        drawing.draw(figure, facts, palette)
        figure.savefig(buffer, **how)
    return buffer.getvalue()


@contextmanager
def _styled(palette: Palette) -> Iterator[None]:
    colours: dict[str, Any] = {
        **{"axes.edgecolor": palette.rule, "axes.labelcolor": palette.soft, "axes.titlecolor": palette.ink},
        **{"xtick.color": palette.rule, "ytick.color": palette.rule, "text.color": palette.ink},
        **{"xtick.labelcolor": palette.soft, "ytick.labelcolor": palette.soft, "axes.facecolor": "none"},
    }
    style: Any = {**matplotlib.rcParamsDefault, "backend": "agg", **_STYLE, **colours}
    with matplotlib.rc_context(style):
        yield


def drawings(facts: Facts) -> list[Drawing]:
    """The figures that these facts are enough for, in order."""
    found, layers, count = [], facts.layers, len(facts.layers)
    if facts.has_plan and facts.sizes:
        found.append(Drawing("sizes", "Before and after", _sizes_caption(facts), 1.4, _draw_sizes))
    if facts.curves:
        found.append(Drawing("sweep", "Perplexity against ratio", _sweep_caption(facts), 3.3, _draw_sweep))
    if facts.has_plan:
        found.append(Drawing("kept", "What stays in each layer", _kept_caption(facts), 2.5, _draw_kept))
    if count and layers[0].group_scores is not None:
        height = 2.8 if facts.has_plan and count <= 12 else 3.4
        found.append(Drawing("scores", "Scores and the cut", _scores_caption(facts), height, _draw_scores))
        height = min(6.0, 1.7 + 0.16 * count)
        found.append(Drawing("fluctuation", "Fluctuation", _fluctuation_caption(facts), height, _draw_fluctuation))
    if any(facts.costs):
        found.append(Drawing("cost", "Time and memory by layer", _cost_caption(facts), 2.4, _draw_cost))
    return found


# --- before and after ---


def quantity(value: float, unit: str) -> str:
    """A number for people: powers of 1024 for bytes, of 1000 for the rest. unit: empty for a count."""
    base, prefixes = (1024, ("", "Ki", "Mi", "Gi", "Ti")) if unit == "B" else (1000, ("", "k", "M", "G", "T", "P"))
    prefixes = prefixes if unit else ("", "k", "M", "B", "T")  # billions of parameters
    power = 0
    while value >= base and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    digits = 0 if power == 0 and float(value).is_integer() else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} {prefixes[power]}{unit}".rstrip()


def change(before: float, after: float) -> str:
    """A change in percent, its sign always there."""
    return f"{100 * (after / before - 1):+.1f} %".replace("-", _MINUS) if before else ""


def _sizes_caption(facts: Facts) -> str:
    if len(facts.sizes) == 1:
        return "Parameters of the whole model."
    return (
        "Of the whole model, in the checkpoint's own dtype, without the biases of a restoration. FLOPs are the "
        "products of one token with weights, those of the output head included."
    )


def _draw_sizes(parent: Parent, facts: Facts, palette: Palette) -> None:
    thickness = 0.62 * min(1.0, 1.4 * 72 / parent.bbox.height * parent.dpi / 72)
    for ax, size in zip(parent.subplots(1, len(facts.sizes), squeeze=False)[0], facts.sizes, strict=True):
        ax.set_title(size.name, fontsize=8.5)
        for y, value, text, fill, edge, ink in (
            (0.8 * thickness, size.before, "dense", "none", palette.soft, palette.ink),
            (-0.8 * thickness, size.after, "pruned", palette.kept, palette.kept, palette.page),
        ):
            ax.barh([y], [value], height=thickness, facecolor=fill, edgecolor=edge, linewidth=0.9)
            ax.text(size.before * 1.04, y, quantity(value, size.unit), va="center", fontsize=8)
            ax.text(size.before * 0.03, y, text, va="center", color=ink, fontsize=7.5)
        ax.text(0, -1.9 * thickness, change(size.before, size.after), va="center", weight="bold")
        ax.set(xlim=(0, size.before * 1.6), ylim=(-1.5, 0.95), xticks=[], yticks=[])
        ax.spines[["left", "bottom"]].set_visible(False)


# --- what stays ---


def _kept_caption(facts: Facts) -> str:
    groups, neurons = ([getattr(layer, name) for layer in facts.layers] for name in ("groups", "neurons"))
    left_groups = [layer.kept_groups or 0 for layer in facts.layers]
    left_neurons = [layer.kept_neurons or 0 for layer in facts.layers]
    return (
        f"{sum(left_groups):,} of {sum(groups):,} KV groups stay (by layer {min(left_groups)} to {max(left_groups)}), "
        f"and {sum(left_neurons):,} of {sum(neurons):,} neurons ({min(left_neurons):,} to {max(left_neurons):,})."
    )


def _draw_kept(parent: Parent, facts: Facts, palette: Palette) -> None:
    heads = f", {facts.heads_per_group} query heads each" if facts.heads_per_group > 1 else ""
    for ax, name, title in zip(
        parent.subplots(1, 2), ("groups", "neurons"), (f"KV groups{heads}", "MLP neurons"), strict=True
    ):
        dense = np.array([getattr(layer, name) for layer in facts.layers])
        kept = np.array([getattr(layer, f"kept_{name}") for layer in facts.layers])
        at = np.arange(len(dense))
        few = len(at) <= _MOST_LABELS
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
                fontsize=7.5,
            )
        ax.set_title(title)
        _layer_axis(ax, len(dense))
        ax.set_ylim(0, dense.max() * (1.02 if few else 1.12) or 1)
        ax.set_yticks([0, dense.max()], ["0", f"{dense.max():,}"])


def _layer_axis(ax: Any, count: int) -> None:
    ax.set(xlabel="layer", xlim=(-0.6, count - 0.4))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))


# --- scores ---


def _cut(facts: Facts) -> float | None:
    """Where the one global sort was cut: the highest score that goes. None where each layer has a cut of its own."""
    if facts.options is None or facts.options.structure != "al-am" or not facts.has_plan:
        return None
    gone = [scores[~stays] for scores, stays in _scored(facts, 0) + _scored(facts, 1)]
    return float(max((part.max() for part in gone if len(part)), default=np.nan))


def _scored(facts: Facts, kind: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scores of a layer's units and whether each stays; those of which nothing is known left out."""
    found = []
    for layer in facts.layers:
        scores = layer.neuron_scores if kind else layer.group_scores
        assert scores is not None
        stays = np.ones(len(scores), dtype=bool) if layer.stays is None else layer.stays[kind]
        finite = np.isfinite(scores)
        found.append((scores[finite], stays[finite]))
    return found


def _scores_caption(facts: Facts) -> str:
    cut = _cut(facts)
    what = "Each unit's score, standardised within its layer, the better the higher."
    if not facts.has_plan:
        return f"{what} Without a plan nothing is cut."
    if cut is None:
        return f"{what} Every layer, or kind of unit, has a cut of its own."
    return f"{what} One sort over all layers and both kinds, cut at {cut:.3f}."


def _draw_scores(parent: Parent, facts: Facts, palette: Palette) -> None:
    cut = _cut(facts)
    for kind, (ax, title) in enumerate(zip(parent.subplots(1, 2), ("KV groups", "MLP neurons"), strict=True)):
        scored = _scored(facts, kind)
        values, stays = (np.concatenate(column) for column in zip(*scored, strict=True))
        if not len(values):
            ax.set_axis_off()
            continue
        low, high = np.quantile(values, [0, 0.995 if len(values) > 400 else 1])
        margin = 0.04 * (high - low or 1)
        ax.set_xlim(low - margin, high + margin)
        beyond = int((values > high).sum())
        if not kind and len(values) <= _MOST_DOTS:
            _draw_dots(ax, scored, palette)
        else:
            _draw_histogram(ax, values, stays, (low, high), palette)
        ax.set_title(title)
        ax.set_xlabel("score" + (f" ({beyond:,} beyond the right edge)" if beyond else ""))
        if cut is not None and low - margin < cut < high + margin:
            ax.axvline(cut, color=palette.ink, linewidth=0.8, linestyle=(0, (4, 2)))
            _tag(ax, cut, f"cut {cut:.2f}".replace("-", _MINUS), palette)
        _key(ax, facts, palette)


def _draw_dots(ax: Any, scored: list[tuple[np.ndarray, np.ndarray]], palette: Palette) -> None:
    for row, (values, stays) in enumerate(scored):
        ax.plot(values[stays], np.full(stays.sum(), row), "o", ms=5, color=palette.kept, mew=0, alpha=0.85)
        ax.plot(values[~stays], np.full((~stays).sum(), row), "o", ms=4.6, mfc="none", mec=palette.gone, mew=1.1)
    ax.set(ylim=(len(scored) - 0.4, -0.6 - 0.12 * len(scored)), ylabel="layer")
    ax.set_yticks(range(0, len(scored), -(-len(scored) // 8)))


def _draw_histogram(
    ax: Any, values: np.ndarray, stays: np.ndarray, ends: tuple[float, float], palette: Palette
) -> None:
    edges = np.linspace(*ends, 61) if ends[1] > ends[0] else np.array([ends[0] - 0.5, ends[0] + 0.5])
    kept, gone = (np.histogram(values[chosen], edges)[0] for chosen in (stays, ~stays))
    ax.stairs(kept + gone, edges, fill=True, facecolor=palette.kept, linewidth=0)
    ax.stairs(gone, edges, fill=True, facecolor=palette.gone, hatch="////", edgecolor=palette.page, linewidth=0)
    ax.set(yscale="log", ylim=(0.7, 4 * max(1, (kept + gone).max())), ylabel="units")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.minorticks_off()


def _tag(ax: Any, x: float, text: str, palette: Palette) -> None:
    ax.text(
        x,
        1.0,
        f" {text} ",
        transform=ax.get_xaxis_transform(),
        ha="left",
        va="top",
        fontsize=8,
        color=palette.ink,
        bbox={"facecolor": palette.page, "edgecolor": "none", "pad": 1.0, "alpha": 0.85},
    )


def _key(ax: Any, facts: Facts, palette: Palette) -> None:
    if facts.has_plan:
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


# --- fluctuation ---

_METRIC_NAMES = {
    "wifv": "weighted fluctuation: variance of the input \u00d7 squared norm of its column",
    "ifv": "fluctuation: variance of the input",
    "wifn": "mean |weight| of the column \u00d7 root mean square of the input",
}


def _metric_name(facts: Facts) -> str:
    method = "flap" if facts.options is None else facts.options.method
    if method == "magnitude-sp":
        return "squared norm of the column"
    return _METRIC_NAMES["ifv" if method == "wanda-sp" else facts.metric]


def _fluctuation_caption(facts: Facts) -> str:
    line = " What is right of the white line goes." if facts.has_plan else ""
    scale = f"By colour, on a logarithmic scale: {_metric_name(facts)}."
    return f"{scale} In each layer units stand by score, the best left.{line}"


def _draw_fluctuation(parent: Parent, facts: Facts, palette: Palette) -> None:
    for kind, (ax, title) in enumerate(zip(parent.subplots(1, 2), ("KV groups", "MLP neurons"), strict=True)):
        rows, shares = [], []
        for layer in facts.layers:
            scores, values = (
                (layer.neuron_scores, layer.neuron_fluctuations)
                if kind
                else (layer.group_scores, layer.group_fluctuations)
            )
            assert scores is not None and values is not None
            rows.append(values[np.argsort(-scores, kind="stable")])
            shares.append(1.0 if layer.stays is None else float(layer.stays[kind].mean()) if len(values) else 1.0)
        columns = min(_HEAT_COLUMNS, max(map(len, rows)))
        image = np.stack([_binned(_log10(row), columns) for row in rows])
        if not np.isfinite(image).any():
            ax.set_axis_off()
            continue
        low, high = np.nanquantile(image, [0.01, 0.99])
        shown = ax.imshow(
            image,
            aspect="auto",
            interpolation="nearest",
            cmap=_HEAT,
            vmin=low,
            vmax=high if high > low else low + 1,
            extent=(0, 100, len(rows) - 0.5, -0.5),
        )
        if facts.has_plan:
            at = np.repeat(100 * np.array(shares), 2)
            edges = np.repeat(np.arange(len(rows) + 1) - 0.5, 2)[1:-1]
            ax.plot(
                at, edges, color="#ffffff", linewidth=1.6, path_effects=[withStroke(linewidth=3, foreground="#000000")]
            )
        ax.set(ylabel="layer" if not kind else None, xlabel="share of the layer's units, %", title=title)
        ax.yaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
        ax.spines[["left", "bottom"]].set_visible(False)
        bar = parent.colorbar(shown, ax=ax, fraction=0.05, pad=0.02, aspect=18)
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=high - low > 2))
        bar.ax.set_title("log₁₀", fontsize=7.5, color=palette.soft, loc="center", pad=4)


def _log10(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(values)
    return np.where(np.isfinite(logs), logs, np.nan)


def _binned(values: np.ndarray, columns: int) -> np.ndarray:
    """Means of so many neighbours that `columns` are left; a row that has fewer is stretched."""
    if len(values) == 0:
        return np.full(columns, np.nan)
    edges = np.linspace(0, len(values), columns + 1)
    firsts = np.minimum(edges[:-1].astype(int), len(values) - 1)
    lasts = np.maximum(np.ceil(edges[1:]).astype(int), firsts + 1)
    parts = [values[first:last] for first, last in zip(firsts, lasts, strict=True)]
    return np.array([np.nan if np.isnan(part).all() else np.nanmean(part) for part in parts])


# --- the sweep ---


def curves_by_text(facts: Facts) -> list[list[dict[str, Any]]]:
    """Curves that may be compared: of the same windows in the same dtype; the newest text first, three at most."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for stored in reversed(facts.curves):
        curve = {**stored, "points": [point for point in stored["points"] if np.isfinite(point["perplexity"])]}
        groups.setdefault((curve["text"]["sha256"], curve["dtype"]), []).append(curve)
    return list(groups.values())[:3]


def curve_name(curve: dict[str, Any]) -> str:
    """What tells a curve from others: method, options that are not by default, and restoration."""
    options, method = curve["options"], str(curve["options"].get("method"))
    default = {field.name: field.default for field in fields(PlanConfig)}
    default |= {"method": method, "structure": "al-am" if method == "flap" else "ul-um"}
    others = {name: value for name, value in options.items() if value != default.get(name)}
    said = [value if isinstance(value, str) else f"{name} {value}" for name, value in sorted(others.items())]
    return ", ".join([method, *said, "no restoration" if curve["restore"] == "none" else curve["restore"]])


def _sweep_caption(facts: Facts) -> str:
    newest = facts.curves[-1]
    text, dense = newest["text"], newest["dense_perplexity"]
    rises = [
        f"{change(dense, point['perplexity'])} at {100 * point['decoder_ratio']:.0f} %"
        for point in _spread(newest["points"], 4)
    ]
    return (
        f"Perplexity rises by {', '.join(rises)} ({curve_name(newest)}). On {text['shape'][0]:,} windows of "
        f"{text['shape'][1]} tokens of {', '.join(text['sources'])}, in {newest['dtype'].removeprefix('torch.')}."
    )


def _spread(points: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """So many points at most, spread over the ratios."""
    if len(points) <= most:
        return list(points)
    wanted = np.linspace(points[0]["ratio"], points[-1]["ratio"], most)
    chosen = {int(np.argmin([abs(point["ratio"] - ratio) for point in points])) for ratio in wanted}
    return [points[i] for i in sorted(chosen)]


def _draw_sweep(parent: Parent, facts: Facts, palette: Palette) -> None:
    groups = curves_by_text(facts)
    for ax, curves in zip(parent.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        dense = curves[0]["dense_perplexity"]
        ends: list[tuple[float, float, str, str]] = []
        highest = max((p["perplexity"] for curve in curves for p in curve["points"]), default=dense)
        ax.axhline(dense, color=palette.soft, linewidth=0.8, linestyle=(0, (4, 2)))
        ax.annotate(
            f"dense {dense:.4g}",
            (1.0, dense),
            xycoords=ax.get_yaxis_transform(),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color=palette.soft,
        )
        for number, curve in enumerate(curves):
            at = [0.0, *(100 * p["decoder_ratio"] for p in curve["points"])]
            values = [dense, *(p["perplexity"] for p in curve["points"])]
            style = {"color": (palette.kept, palette.gone)[number % 2], "linestyle": ("-", "--", ":")[number // 2 % 3]}
            ax.plot(at, values, marker="osD^"[number % 4], ms=4, linewidth=1.5, **style)
            ends.append((at[-1], values[-1], curve_name(curve), style["color"]))
            if number == 0:
                _label_points(ax, at, values, palette, below=len(curves) > 1)
        if facts.decoder_ratio is not None:
            ax.axvline(100 * facts.decoder_ratio, color=palette.ink, linewidth=0.8, linestyle=(0, (1, 2)))
            _tag(ax, 100 * facts.decoder_ratio, f"plan, {100 * facts.decoder_ratio:.1f} %", palette)
        _perplexity_axis(ax, dense, highest)
        right = max((100 * p["decoder_ratio"] for curve in curves for p in curve["points"]), default=1)
        ax.set(xlabel="removed share of the prunable weights, %")
        ax.set_xlim(-1, right * (1.3 if len(groups) == 1 else 1.6))
        _name_ends(ax, ends, 11 / (0.7 * parent.bbox.height * 72 / parent.dpi))


def _perplexity_axis(ax: Any, dense: float, highest: float) -> None:
    """Logarithmic where perplexities differ much."""
    ax.set_ylabel("perplexity")
    ax.margins(y=0.12)
    if highest > 4 * dense:
        ax.set_yscale("log")
        steps = (1, 1.5, 2, 3, 5, 7) if highest < 10 * dense else (1, 2, 5)
        ticks = [step * 10.0**power for power in range(-1, 9) for step in steps]
        shown = [tick for tick in ticks if 0.8 * dense <= tick <= 1.2 * highest]
        ax.set_yticks(shown, [f"{tick:,g}" for tick in shown])
        ax.minorticks_off()


def _name_ends(ax: Any, ends: list[tuple[float, float, str, str]], gap: float) -> None:
    """Names beside the last points of curves, moved up where they would touch. gap: share of the axes' height."""
    lowest = -1.0
    places = [(ax.transLimits.transform(ax.transScale.transform((x, y)))[1], x, *rest) for x, y, *rest in ends]
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
    """Values beside points, where the one before is far enough. below: where no other curve is expected."""
    last, place = -1e9, {"xytext": (2, -11), "ha": "left"} if below else {"xytext": (-3, 6), "ha": "right"}
    for x, value in list(zip(at, values, strict=True))[1:-1]:
        if x - last > max(at) / 9:
            ax.annotate(
                f"{value:.4g}",
                (x, value),
                textcoords="offset points",
                color=palette.ink,
                fontsize=7.5,
                **place,
            )
            last = x
    ends: dict[str, Any] = {"xytext": (-4, -11) if below else (-7, 0), "ha": "right"}
    ax.annotate(f"{values[-1]:.4g}", (at[-1], values[-1]), textcoords="offset points", fontsize=7.5, **ends)


# --- what it took ---


def _cost_caption(facts: Facts) -> str:
    known = [cost for cost in facts.costs if cost is not None]
    seconds, tokens = sum(cost.seconds for cost in known), known[-1].tokens
    rate = f", {tokens * len(known) / seconds:,.0f} tokens/s through a layer" if tokens and seconds else ""
    device = max(cost.peak_device_bytes for cost in known)
    return (
        f"Pass 1 over {len(known)} layers took {_seconds(seconds)}{rate}; peak memory "
        f"{quantity(max(cost.peak_host_bytes for cost in known), 'B')}"
        + (f", on the device {quantity(device, 'B')}." if device else ".")
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def _draw_cost(parent: Parent, facts: Facts, palette: Palette) -> None:
    at = np.array([i for i, cost in enumerate(facts.costs) if cost is not None])
    known = [cost for cost in facts.costs if cost is not None]
    time_axes, memory_axes = parent.subplots(1, 2)
    seconds = np.array([cost.seconds for cost in known])
    time_axes.bar(at, seconds, width=0.78, color=palette.kept)
    middle = float(np.median(seconds))
    time_axes.axhline(middle, color=palette.ink, linewidth=0.8, linestyle=(0, (4, 2)))
    time_axes.set_title(f"seconds, median {middle:.3g}")
    time_axes.set_ylim(0, float(seconds.max()) * 1.1 or 1)
    _layer_axis(time_axes, len(facts.layers))
    lines = [("host", [cost.peak_host_bytes for cost in known], palette.kept, "o-")]
    if any(cost.peak_device_bytes for cost in known):
        lines.append(("device", [cost.peak_device_bytes for cost in known], palette.gone, "s--"))
    top = max(max(values) for _, values, _, _ in lines)
    base = 1024 ** int(np.log(max(top, 1)) / np.log(1024))
    for name, values, colour, style in lines:
        scaled = np.array(values) / base
        memory_axes.plot(at, scaled, style if len(at) <= _MOST_LABELS else style[1:], color=colour, ms=4, linewidth=1.5)
        memory_axes.annotate(
            f"{name} {quantity(values[-1], 'B')}",
            (at[-1], scaled[-1]),
            xytext=(0, 6),
            textcoords="offset points",
            ha="right",
            color=colour,
        )
    unit = {1: "B", 1024: "KiB", 1024**2: "MiB", 1024**3: "GiB"}.get(base, "TiB")
    memory_axes.set_title(f"peak memory so far, {unit}")
    memory_axes.set_ylim(0, top / base * 1.25)
    _layer_axis(memory_axes, len(facts.layers))
