"""Tables and lines on a terminal: no wider than it is; in a pipe as wide as they are."""

from __future__ import annotations

import pytest

from moecover.terminal import aligned, columns, folded

HEADINGS = ["row", "experts kept in a layer", "encyclopedia-heldout", "web-heldout"]
ROWS = [["full", "60", "76.71", "84.12"], ["half of them", "30", "80.02", "[b]86\x1b[1m"]]


def width(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setenv("COLUMNS", str(number))


def test_in_a_pipe_nothing_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert columns() is None
    head, rule, *rows = aligned(HEADINGS * 3, [row * 3 for row in ROWS], left=1).splitlines()
    assert head.split() == " ".join(HEADINGS * 3).split()
    assert set(rule.strip()) == {"─"}
    assert len(rows) == 2
    assert "[b]86\\x1b[1m" in rows[1]
    assert folded("word " * 100, None) == "word " * 100


def test_a_table_folds_its_headings_first(monkeypatch: pytest.MonkeyPatch) -> None:
    width(monkeypatch, 64)
    lines = aligned(HEADINGS, ROWS, left=1).splitlines()
    assert max(map(len, lines)) <= 64
    assert [" ".join(line.split()) for line in lines[:3]] == [
        "experts",
        "kept in a",
        "row layer encyclopedia-heldout web-heldout",
    ]
    assert len(lines) == 6


def test_then_rows_become_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    width(monkeypatch, 52)
    lines = aligned(HEADINGS, ROWS, left=1, sections=(1,)).splitlines()
    assert max(map(len, lines)) <= 52
    assert [line.split()[:2] for line in lines[:1]] == [["row", "full"]]
    assert [line.split()[-2:] for line in lines[2:4]] == [["60", "30"], ["76.71", "80.02"]]


def test_and_then_a_row_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    width(monkeypatch, 40)
    rows = [[f"method {n}", str(n), "", "7.5"] for n in range(9)]
    lines = aligned(HEADINGS, rows, left=1).splitlines()
    assert lines[:3] == ["row method 0", "  experts kept in a layer  0", "  web-heldout              7.5"]
    assert len(lines) == 27


@pytest.mark.parametrize(
    "line, lines",
    [
        ("family  qwen2 " + "word " * 9, ["family  qwen2 word word word word word", "        word word word word"]),
        ("a sentence of eleven words that does not fit a line", 2),
        ("next: moecover prune ./a-model --plan plan.json -o half", 1),
        ("to publish: moecover upload half OWNER/NAME, or hf upload OWNER/NAME half", 1),
        ("as a page: /home/me/.venv/bin/moecover report half-work -o half.html", 1),
        ("note: 15 experts do not suit sglang: moecover inspect model --keep 15", 1),
        ("moecover inspect model --keep 15 --width 40", 1),
        ("a line that says what the command moecover inspect prints", 2),
        ("/a/path/that/is/longer/than/any/line/of/this/terminal", 1),
    ],
)
def test_a_line_folds_under_what_it_says(line: str, lines: int | list[str]) -> None:
    found = folded(line.strip(), 40).split("\n")
    assert (found if isinstance(lines, list) else len(found)) == lines
    assert " ".join(" ".join(found).split()) == " ".join(line.split())
