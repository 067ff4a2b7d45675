"""The notebook of tools/, run by a real kernel."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "tools" / "first_model.ipynb"


@pytest.mark.slow
def test_the_notebook_prunes_and_shows_the_report(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    assert not any(cell.get("outputs") for cell in notebook.cells)  # none are kept in the repository
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in said)
    before, after = (float(part) for part in next(line for line in text.splitlines() if "->" in line).split(" -> "))
    assert 1 < before < after < 2 * before and "pruned | " in text
    assert any("<svg" in output.get("data", {}).get("text/html", "") for output in said)
    assert (tmp_path / "pruned" / "evaluations.json").exists()
