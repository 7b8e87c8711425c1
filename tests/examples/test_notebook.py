"""The notebook runs from an empty folder and shows tables, a picture and a proof; it is stored without outputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.pages import ROOT

NOTEBOOK = ROOT / "examples" / "shrink.ipynb"
nbformat = pytest.importorskip("nbformat", reason="the notebook needs nbclient and ipykernel, of the extra `dev`")


def test_it_is_valid_and_stored_without_outputs() -> None:
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    assert [cell.id for cell in book.cells if cell.cell_type == "code" and (cell.outputs or cell.execution_count)] == []


def test_it_runs_and_shows_what_it_makes(tmp_path: Path) -> None:
    from nbclient import NotebookClient

    book = nbformat.read(NOTEBOOK, as_version=4)
    settings = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(book, timeout=900, kernel_name="python3", resources=settings).execute()
    shown = [
        output.data for cell in book.cells if cell.cell_type == "code" for output in cell.outputs if "data" in output
    ]
    tables = [data["text/html"] for data in shown if "text/html" in data]
    assert sum("<table" in table for table in tables) >= 5
    assert any("image/png" in data for data in shown)
    assert "equal on" in tables[-1]
    assert (tmp_path / "half" / "config.json").is_file()
