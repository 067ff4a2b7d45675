"""The README's table of families is what the other tests test."""

from pathlib import Path

from models import DENSE
from test_export_gguf import WRITTEN
from test_export_stock import WITH_BIASES

from flap_stream.architecture import FAMILIES
from flap_stream.export.gguf import _THROUGH_STOCK, _WITH_NORMS

README = Path(__file__).parent.parent / "README.md"


def gguf_cell(family: str) -> str:
    if family in _WITH_NORMS:
        return "one size, no biases"
    if family in WRITTEN:
        return "yes"
    return "through stock" if family in _THROUGH_STOCK else "no"


def table() -> str:
    rows = ["| family | prunes | loads | generates | GGUF | stock |", "|---|---|---|---|---|---|"]
    for family in sorted(FAMILIES):
        stock = "yes" if family in WITH_BIASES else "no biases" if family in DENSE else "no"
        rows.append(f"| {family} | yes | yes | yes | {gguf_cell(family)} | {stock} |")
    return "\n".join(rows)


def test_the_readme_shows_the_table_of_families() -> None:
    assert table() in README.read_text()
