"""Sections of the page: a user's file adds one, its errors name the file, and those of the run keep their order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moecover.errors import InputError
from moecover.registry import load_plugin
from moecover.reporting.blocks import Paragraph
from moecover.reporting.page import report
from moecover.reporting.sections import RUN_SECTIONS, SECTIONS
from tests.support.runs import make_run

SMALL = (("tiny", 3, 8),)

PLUGIN = """
from moecover.reporting.blocks import Column, Details, Paragraph, Table, Value, text_column
from moecover.reporting.sections import SECTIONS


@SECTIONS("mine", title="What it cost <in hours>")
def mine(data):
    hours = sum(cell.wall_s or 0 for cell in data.of.run.cells) / 3600
    row = (Value(data.model.name, data.model.name), Value(f"{hours:.2f}", hours))
    table = Table("cost", "Cost", (text_column("model"), Column("hours")), (row,))
    return [Paragraph("a < b"), Details("All cells", [table])]
"""


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    with SECTIONS.restored(), RUN_SECTIONS.restored():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sections") / "run"
    return make_run(folder, models=SMALL, texts=("c4",), tasks=(), budgets=(0.5,), usage=False, plans=False)


def test_a_file_of_the_user_adds_a_section(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    load_plugin(tmp_path / "mine.py")
    made = report(run, tmp_path / "page.html")
    page = Path(made["page"]).read_text()
    assert "<h3>What it cost &lt;in hours&gt;</h3>" in page
    assert "<p>a &lt; b</p>" in page
    assert '<table class="sortable" id="m1-tiny-cost">' in page
    assert page.index("What it cost") > page.index("Size before and after")


def test_an_error_in_a_section_names_the_file(run: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(PLUGIN.replace("3600", "0"))
    load_plugin(tmp_path / "broken.py")
    with pytest.raises(InputError, match=r"broken.py, line 8: section of the page mine raised ZeroDivisionError"):
        report(run, tmp_path / "page.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.py"]


def test_a_plugin_cannot_take_the_name_of_a_section(tmp_path: Path) -> None:
    (tmp_path / "taken.py").write_text(PLUGIN.replace('"mine"', '"size"'))
    with pytest.raises(InputError, match=r"taken.py: section of the page size exists already"):
        load_plugin(tmp_path / "taken.py")


def test_a_section_without_blocks_is_left_out_and_one_of_the_run_is_in_the_contents(run: Path, tmp_path: Path) -> None:
    SECTIONS("empty", title="Never shown")(lambda data: [])
    RUN_SECTIONS("thanks", title="Thanks")(lambda data: [Paragraph("to all")])
    page = Path(report(run, tmp_path / "page.html")["page"]).read_text()
    assert "Never shown" not in page
    assert '<li><a href="#thanks">thanks</a></li>' in page
    assert page.index('<section id="provenance"') < page.index('<section id="thanks"')


def test_what_is_returned_shows_itself(run: Path, tmp_path: Path) -> None:
    made = report(run, tmp_path / "page.html")
    assert repr(made).startswith(f"<Report {tmp_path}/page.html: ")
    assert [row["kind"] for row in made.rows_shown()] == ["page", "figure", "figure"]
    assert made["page"] == str(tmp_path / "page.html")
    assert dict(made).keys() == {"page", "bytes", "figures", "pictures"}
