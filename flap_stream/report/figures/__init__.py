"""The figures of a report, one a file; each file's `drawing` returns what to draw, or None without the facts for it."""

from flap_stream.report.drawing import Drawing
from flap_stream.report.facts import Facts
from flap_stream.report.figures import cost, fluctuation, kept, scores, sizes, sweep

_IN_ORDER = (sizes, sweep, kept, scores, fluctuation, cost)


def drawings(facts: Facts) -> list[Drawing]:
    """The figures for which the facts are sufficient, in the order of the page."""
    found = (figure.drawing(facts) for figure in _IN_ORDER)
    return [drawing for drawing in found if drawing is not None]
