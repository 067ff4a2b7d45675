"""How any figure becomes an image: matplotlib in one style, with real colours for PNG and CSS variables for a page."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flap_stream.errors import InvalidInput
from flap_stream.report.facts import Facts

try:
    import matplotlib
    from matplotlib.figure import Figure, SubFigure
except ImportError as _error:
    raise InvalidInput("report needs matplotlib; install it with pip install 'flap-stream[plots]'") from _error

WIDTH, _OVERVIEW_WIDTH = 9.0, 6.0  # inches

Parent = Figure | SubFigure


@dataclass(frozen=True)
class Palette:
    """Colours by meaning. ink, soft, rule: text, secondary text, lines; gone: removed units; page: the background."""

    ink: str
    soft: str
    rule: str
    kept: str
    gone: str
    page: str


LIGHT = Palette(ink="#1d2126", soft="#5f6872", rule="#c9ced4", kept="#1f5f99", gone="#d1702a", page="#ffffff")
DARK = Palette(ink="#e8eaed", soft="#a3abb5", rule="#464d56", kept="#79b4ea", gone="#f0a05c", page="#16191d")
# Placeholders in an SVG for the page's CSS variables; no figure uses these colours for anything else.
_MARKS = Palette(ink="#010203", soft="#020304", rule="#030405", kept="#040506", gone="#050607", page="#060708")

_STYLE: dict[str, Any] = {
    **{"font.family": "sans-serif", "font.size": 8.5, "text.parse_math": False, "figure.constrained_layout.use": True},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7, "axes.titlelocation": "left"},
    **{"axes.titlesize": 9.5, "axes.titlepad": 7, "axes.labelsize": 8.5, "xtick.labelsize": 8, "ytick.labelsize": 8},
    **{"xtick.major.size": 3, "ytick.major.size": 3, "xtick.major.width": 0.7, "ytick.major.width": 0.7},
    **{"svg.fonttype": "none", "svg.hashsalt": "flap-stream", "legend.frameon": False},
}


@dataclass(frozen=True)
class Table:
    """Numbers behind a figure. rows: a cell for each heading."""

    heads: Sequence[str]
    rows: Sequence[Sequence[object]]
    summary: str = "Numbers"


@dataclass(frozen=True)
class Drawing:
    """A figure for which the facts are sufficient.

    name: of its file. caption: sentences for the page. height: inches. draw: adds its axes to a figure or to a
    part of one, so that figures can be saved separately or together. tables: the same in numbers.
    """

    name: str
    title: str
    caption: str
    height: float
    draw: Callable[[Parent, Facts, Palette], None]
    tables: Sequence[Table] = ()


def to_svg(facts: Facts, drawing: Drawing) -> str:
    """An `<svg>` element whose colours are the page's variables (`var(--kept)`) and whose text is selectable."""
    body = _saved(facts, drawing, _MARKS, format="svg", transparent=True, metadata={"Date": None}).decode()
    body = body[body.index("<svg") :]
    for name, mark in vars(_MARKS).items():
        body = body.replace(mark, f"var(--{name})")
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", body)  # of groups: unused, and repeated in other figures
    for number, identity in enumerate(dict.fromkeys(re.findall(r' id="([^"]+)"', body))):
        body = re.sub(rf'(["#]){identity}([")])', rf"\g<1>{drawing.name}-{number}\2", body)  # matplotlib's own vary
    body = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", body)
    body = re.sub(r"(<svg[^>]*?) height=\"[^\"]*\"", r"\1", body, count=1)
    return re.sub(r"(<svg[^>]*?) width=\"[^\"]*\"", r'\1 width="100%"', body, count=1)


def to_png(facts: Facts, drawing: Drawing) -> bytes:
    """The figure in light colours, as the bytes of a PNG file."""
    return _saved(facts, drawing, LIGHT, format="png", dpi=160, metadata={"Software": None})


def overview_png(facts: Facts, drawings: Sequence[Drawing]) -> bytes:
    """All figures in one PNG, two to a row, the tallest first."""
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
