"""Sizes, durations and tables as text, and what result objects show."""

from __future__ import annotations

import pytest

from moecover.text import (
    Cell,
    Shown,
    duration_text,
    html_table,
    markdown_block,
    markdown_code,
    markdown_table,
    markdown_text,
    size_text,
)

ROWS: list[dict[str, Cell]] = [
    {"name": "a|b", "value": 1.23456, "count": 3},
    {"name": "<c>", "value": None, "count": 12},
]


@pytest.mark.parametrize(
    "num_bytes, text",
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (28_600_000_000, "28.60 GB"), (5e15, "5000.00 TB")],
)
def test_sizes(num_bytes: float, text: str) -> None:
    assert size_text(num_bytes) == text


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_markdown() -> None:
    assert markdown_table(ROWS).splitlines() == [
        "| name | value | count |",
        "|---|---:|---:|",
        "| a\\|b | 1.235 | 3 |",
        "| <c> |  | 12 |",
    ]
    assert markdown_table(ROWS, columns=["count"]).splitlines() == ["| count |", "|---:|", "| 3 |", "| 12 |"]


@pytest.mark.parametrize(
    "text, markdown",
    [
        ("Qwen1.5-MoE_A2.7B (50 %), p < 0.001", "Qwen1.5-MoE_A2.7B (50 %), p < 0.001"),
        ("*b* _i_ `c` ~~s~~", r"\*b\* \_i\_ \`c\` \~~s\~~"),
        ("<script>x</script><!-- -->", r"\<script>x\</script>\<!-- -->"),
        ("[text](http://e.org) ![i](x)", r"[text]\(http://e.org) ![i]\(x)"),
        ("&lt; a & b", r"\&lt; a & b"),
        ("\\`x", r"\\\`x"),
        ("two\nlines\x1b[1m", "two lines\\x1b[1m"),
    ],
)
def test_text_within_markdown_is_literal(text: str, markdown: str) -> None:
    assert markdown_text(text) == markdown


def test_code_within_markdown_cannot_be_left() -> None:
    assert markdown_code("a b") == "`a b`"
    assert markdown_code("a`b``c") == "```a`b``c```"
    assert markdown_code("`a") == "`` `a ``"
    assert markdown_block("x\n```\ny") == "````\nx\n```\ny\n````"


def test_html_is_escaped() -> None:
    assert html_table(ROWS[1:], caption="a < b") == (
        "<table><caption>a &lt; b</caption><thead><tr><th>name</th><th>value</th><th>count</th></tr></thead>"
        "<tbody><tr><td>&lt;c&gt;</td><td></td><td>12</td></tr></tbody></table>"
    )


class Result(Shown):
    def summary(self) -> str:
        return "two rows"

    def rows_shown(self) -> list[dict[str, Cell]]:
        return ROWS


def test_a_result_shows_itself() -> None:
    result = Result()
    assert repr(result) == "<Result two rows>"
    assert type(result)._repr_html_(result) == html_table(ROWS, caption="two rows")
    frame = result.to_frame()
    assert list(frame.columns) == ["name", "value", "count"]
    assert list(frame["count"]) == [3, 12]
