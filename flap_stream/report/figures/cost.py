"""Time and peak memory of collection, layer by layer."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flap_stream.report.drawing import Drawing, Palette, Parent, Table
from flap_stream.report.facts import Facts
from flap_stream.report.figures.axes import DASHED, MOST_LABELS, layer_axis
from flap_stream.report.numbers import quantity
from flap_stream.storage.collected import LayerCost


def drawing(facts: Facts) -> Drawing | None:
    """Seconds as bars, peak memory as lines."""
    if not any(facts.costs):
        return None
    rows = [
        (i, f"{cost.seconds:.3f}", f"{cost.tokens:,}", f"{cost.peak_host_bytes:,}", f"{cost.peak_device_bytes:,}")
        for i, cost in enumerate(facts.costs)
        if cost is not None
    ]
    tables = [Table(("layer", "seconds", "tokens", "peak host bytes", "peak device bytes"), rows)]
    return Drawing("cost", "Time and memory per layer", _caption(facts), 2.4, _draw, tables)


def _caption(facts: Facts) -> str:
    known = [cost for cost in facts.costs if cost is not None]
    seconds, tokens = sum(cost.seconds for cost in known), known[-1].tokens
    rate = f", {tokens * len(known) / seconds:,.0f} tokens/s through a layer" if tokens and seconds else ""
    device = max(cost.peak_device_bytes for cost in known)
    return (
        f"Collection over {len(known)} layers took {_seconds(seconds)}{rate}; peak memory "
        f"{quantity(max(cost.peak_host_bytes for cost in known), 'B')}"
        + (f", on the device {quantity(device, 'B')}." if device else ".")
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def _draw(parent: Parent, facts: Facts, palette: Palette) -> None:
    at = np.array([i for i, cost in enumerate(facts.costs) if cost is not None])
    known = [cost for cost in facts.costs if cost is not None]
    time_axes, memory_axes = parent.subplots(1, 2)
    _draw_time(time_axes, at, known, palette)
    layer_axis(time_axes, len(facts.kv_groups))
    _draw_memory(memory_axes, at, known, palette)
    layer_axis(memory_axes, len(facts.kv_groups))


def _draw_time(ax: Any, at: np.ndarray, known: Sequence[LayerCost], palette: Palette) -> None:
    seconds = np.array([cost.seconds for cost in known])
    ax.bar(at, seconds, width=0.78, color=palette.kept)
    middle = float(np.median(seconds))
    ax.axhline(middle, color=palette.ink, linewidth=0.8, linestyle=DASHED)
    ax.set_title(f"seconds, median {middle:.3g}")
    ax.set_ylim(0, float(seconds.max()) * 1.1 or 1)


def _draw_memory(ax: Any, at: np.ndarray, known: Sequence[LayerCost], palette: Palette) -> None:
    lines = [("host", [cost.peak_host_bytes for cost in known], palette.kept, "o-")]
    if any(cost.peak_device_bytes for cost in known):
        lines.append(("device", [cost.peak_device_bytes for cost in known], palette.gone, "s--"))
    top = max(max(values) for _, values, _, _ in lines)
    base = 1024 ** int(np.log(max(top, 1)) / np.log(1024))
    for name, values, colour, style in lines:
        scaled = np.array(values) / base
        ax.plot(at, scaled, style if len(at) <= MOST_LABELS else style[1:], color=colour, ms=4, linewidth=1.5)
        ax.annotate(
            f"{name} {quantity(values[-1], 'B')}",
            (at[-1], scaled[-1]),
            xytext=(0, 6),
            textcoords="offset points",
            ha="right",
            color=colour,
        )
    unit = {1: "B", 1024: "KiB", 1024**2: "MiB", 1024**3: "GiB"}.get(base, "TiB")
    ax.set_title(f"peak memory so far, {unit}")
    ax.set_ylim(0, top / base * 1.25)
