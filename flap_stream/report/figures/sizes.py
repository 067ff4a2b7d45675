"""The whole model before and after: parameters, bytes, KV cache, FLOPs."""

from flap_stream.report.drawing import Drawing, Palette, Parent, Table
from flap_stream.report.facts import Facts
from flap_stream.report.numbers import change, quantity

_HEIGHT = 1.4  # inches


def drawing(facts: Facts) -> Drawing | None:
    """Two bars for each size."""
    if not (facts.has_plan and facts.sizes):
        return None
    rows = [
        (size.name, quantity(size.before, size.unit), quantity(size.after, size.unit), change(size.before, size.after))
        for size in facts.sizes
    ]
    tables = [Table(("", "dense", "pruned", "change"), rows)]
    return Drawing("sizes", "Before and after", _caption(facts), _HEIGHT, _draw, tables)


def _caption(facts: Facts) -> str:
    if len(facts.sizes) == 1:
        return "Parameters of the whole model."
    flops = " FLOPs are those of one token's products with weights, including the output head."
    return (
        "The whole model in the checkpoint's own dtype, without the biases that a restoration adds."
        f"{flops if any(size.unit == 'FLOP' for size in facts.sizes) else ''}"
    )


def _draw(parent: Parent, facts: Facts, palette: Palette) -> None:
    thickness = 0.62 * min(1.0, _HEIGHT * parent.dpi / parent.bbox.height)
    for ax, size in zip(parent.subplots(1, len(facts.sizes), squeeze=False)[0], facts.sizes, strict=True):
        ax.set_title(size.name, fontsize=8.5)
        for y, value, text, fill, edge, ink in (
            (0.8 * thickness, size.before, "dense", "none", palette.soft, palette.ink),
            (-0.8 * thickness, size.after, "pruned", palette.kept, palette.kept, palette.page),
        ):
            ax.barh([y], [value], height=thickness, facecolor=fill, edgecolor=edge, linewidth=0.9)
            ax.text(size.before * 1.04, y, quantity(value, size.unit), va="center", fontsize=8)
            ax.text(size.before * 0.03, y, text, va="center", color=ink, fontsize=8)
        ax.text(0, -1.9 * thickness, change(size.before, size.after), va="center", weight="bold")
        ax.set(xlim=(0, size.before * 1.6), ylim=(-1.5, 0.95), xticks=[], yticks=[])
        ax.spines[["left", "bottom"]].set_visible(False)
