"""Parts of axes that several figures have."""

from typing import Any

from matplotlib.ticker import MaxNLocator

from flap_stream.report.drawing import Palette

MOST_LABELS = 16  # layers up to which each one has its label or marker; by eye, at the page's width
DASHED = (0, (4, 2))


def layer_axis(ax: Any, count: int) -> None:
    """An x axis of layers."""
    ax.set(xlabel="layer", xlim=(-0.6, count - 0.4))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))


def label_line(ax: Any, x: float, text: str, palette: Palette) -> None:
    """A label at the top of a vertical line."""
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
