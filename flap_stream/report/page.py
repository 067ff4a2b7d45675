"""One self-contained HTML page: figures as SVG, their numbers as tables, styles for light, dark and print."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from pathlib import Path

from flap_stream.arithmetic.targets import target_sentence
from flap_stream.errors import InvalidOption
from flap_stream.output.evaluations import Pair
from flap_stream.report.drawing import DARK, LIGHT, Drawing, Palette, Table, overview_png, to_png, to_svg
from flap_stream.report.facts import Facts, read_facts
from flap_stream.report.figures import drawings
from flap_stream.report.numbers import change
from flap_stream.storage import files, places

_NO_ICON = '<link rel="icon" href="data:image/png,">'  # a browser would ask the server of --watch for one
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Noto Sans', 'DejaVu Sans', sans-serif"


def _variables(palette: Palette) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in vars(palette).items())


_CSS = f"""
:root {{ color-scheme: light dark; --font: {_FONT}; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 60rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 var(--font); font-variant-numeric: tabular-nums; }}
h1 {{ margin: 0; font-size: 1.7rem; line-height: 1.2; font-weight: 650; overflow-wrap: anywhere; }}
h2 {{ margin: 0; font-size: 1.1rem; font-weight: 650; }}
p {{ margin: 0.3rem 0 0; max-width: 46rem; color: var(--soft); overflow-wrap: anywhere; }}
section {{ margin-top: 2.4rem; padding-top: 1rem; border-top: 1px solid var(--rule); break-inside: avoid; }}
/* A narrower figure scrolls: shrunk to a phone, its text would have 4 px. */
svg {{ display: block; height: auto; min-width: 57rem; margin-top: 0.8rem; }}
table {{ border-collapse: collapse; margin-top: 0.8rem; font-size: 0.9rem; }}
th, td {{ padding: 0.25rem 1.4rem 0.25rem 0; text-align: right; border-bottom: 1px solid var(--rule); }}
th {{ font-weight: 400; color: var(--soft); }}
th:first-child, td:first-child {{ text-align: left; }}
details {{ margin-top: 0.6rem; font-size: 0.9rem; }}
summary {{ cursor: pointer; color: var(--soft); }}
summary:focus-visible {{ outline: 2px solid var(--kept); }}
.scroll {{ overflow-x: auto; }}
footer {{ margin-top: 3rem; font-size: 0.85rem; color: var(--soft); }}
@media print {{
  :root {{ color-scheme: light; {_variables(LIGHT)} }}
  body {{ max-width: none; padding: 0; font-size: 10pt; }}
  section {{ margin-top: 1.2rem; }}
  details {{ display: none; }}
  svg {{ min-width: 0; }}
  @page {{ margin: 16mm; }}
}}
"""


@dataclass(frozen=True)
class ReportResult:
    """Files and figures written, and sentences saying what could not be shown."""

    html: Path | None
    pngs: list[Path]
    figures: list[str]
    missing: list[str]


def write_report(place: str | Path, html: str | Path | None = None, png: str | Path | None = None) -> ReportResult:
    """Draw what a run directory or a pruned checkpoint holds.

    html: file of the page. png: directory for the same figures as PNG files, and for `overview.png`, which has all of
    them. Raises InvalidInput if `place` is neither, if html and png are both None, or without matplotlib.
    """
    if html is None and png is None:
        raise InvalidOption("the report has nowhere to go; give --html FILE or --png DIR")
    if html is not None:
        places.require_name(Path(html))
    facts = read_facts(Path(place))
    drawn = drawings(facts)
    pngs = []
    if html is not None:
        files.make_directory(Path(html).absolute().parent)
        files.write_committed(Path(html), page(facts, drawn).encode())
    if png is not None:
        files.make_directory(Path(png))
        images = {drawing.name: to_png(facts, drawing) for drawing in drawn}
        images |= {"overview": overview_png(facts, drawn)} if drawn else {}
        for name, image in images.items():
            pngs.append(Path(png) / f"{name}.png")
            files.write_committed(pngs[-1], image)
    return ReportResult(None if html is None else Path(html), pngs, [d.name for d in drawn], facts.missing)


def page(facts: Facts, drawn: Sequence[Drawing], status: str = "", refresh: int | None = None) -> str:
    """The whole page. status: a section on how far the job is. refresh: seconds after which it loads itself again."""
    sections = [*([status] if status else []), *(_section(facts, drawing) for drawing in drawn)]
    if facts.evaluations:
        sections.insert(1 if status else 0, _perplexities(facts.evaluations))
    missing = "".join(f"<li>{escape(sentence)}</li>" for sentence in facts.missing)
    if missing:
        sections.append(f"<section><h2>Not shown</h2><ul>{missing}</ul></section>")
    known = " ".join(f"{name} {number}" for name, number in sorted(facts.versions.items()))
    made = f"Drawn by flap-stream {version('flap-stream')} from {facts.place}."
    made += f" Collected with {known}." if known else ""
    return _document(_title(facts), _subtitle(facts), "\n".join(sections), made, refresh)


def plain_page(title: str, text: str, refresh: int | None = None) -> str:
    """A page without figures."""
    return _document(title, text, "", f"Made by flap-stream {version('flap-stream')}.", refresh)


def _document(title: str, subtitle: str, main: str, footer: str, refresh: int | None) -> str:
    again = "" if refresh is None else f'<meta http-equiv="refresh" content="{refresh}">\n'
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{_NO_ICON}\n{again}'
        f"<style>{_CSS}</style>\n</head>\n<body>\n<header>\n<h1>{escape(title)}</h1>\n<p>{escape(subtitle)}</p>\n"
        f"</header>\n<main>\n{main}\n</main>\n<footer>{escape(footer)}</footer>\n</body>\n</html>\n"
    )


def _title(facts: Facts) -> str:
    if facts.options is None or facts.decoder_ratio is None:
        return f"{facts.model}, not planned yet"
    ratio = facts.options.ratio if facts.target is None else round(facts.decoder_ratio, 3)
    return f"{facts.model}, pruned by {100 * ratio:g} %"


def _subtitle(facts: Facts) -> str:
    parts = []
    if facts.options is not None and facts.decoder_ratio is not None and facts.model_ratio is not None:
        options = facts.options
        parts.append(f"{options.method}, structure {options.structure}, metric {options.metric}, {options.statistics}.")
        parts.append(
            f"{facts.decoder_ratio:.2%} of the prunable weights removed, {facts.model_ratio:.2%} of the model."
        )
    if facts.target is not None:
        parts.append(f"Target: {target_sentence(facts.target)}.")
    calibration = facts.calibration
    if {"samples", "sequence_length", "sources"} <= calibration.keys():
        sources = ", ".join(map(str, calibration["sources"]))
        windows = f"{calibration['samples']} windows of {calibration['sequence_length']} tokens"
        parts.append(f"Calibrated on {windows} of {sources}.")
    return " ".join(parts)


def _section(facts: Facts, drawing: Drawing) -> str:
    caption = escape(drawing.caption)
    image = to_svg(facts, drawing)
    image = image.replace("<svg", f'<svg role="img" aria-label="{escape(drawing.title)}. {caption}"', 1)
    return (
        f'<section id="{drawing.name}">\n<h2>{escape(drawing.title)}</h2>\n<p>{caption}</p>\n'
        f'<div class="scroll" tabindex="0">{image}</div>\n'
        f"{''.join(map(_table, drawing.tables))}</section>"
    )


def _perplexities(evaluations: Sequence[Pair]) -> str:
    """What `evaluate --save` has found, text by text."""
    rows = [
        (
            ", ".join(pruned.text),
            f"{pruned.windows:,} of {pruned.sequence_length} tokens",
            "" if dense is None else f"{dense.perplexity:.2f}",
            f"{pruned.perplexity:.2f}",
            "" if dense is None else change(dense.perplexity, pruned.perplexity),
        )
        for dense, pruned in evaluations
    ]
    table = _cells(Table(("text", "windows", "dense", "pruned", "change"), rows))
    return f'<section id="perplexity">\n<h2>Perplexity on each text</h2>\n{table}\n</section>'


def _table(table: Table) -> str:
    """A table behind a summary that opens it."""
    return f"<details><summary>{escape(table.summary)}</summary>{_cells(table)}</details>\n"


def _cells(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
