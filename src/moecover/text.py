"""Sizes, durations and tables as text, and the display of result objects in terminals and notebooks."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from moecover.errors import printable

if TYPE_CHECKING:
    import pandas

Cell = str | int | float | bool | None


def size_text(num_bytes: float) -> str:
    """A size in decimal units."""
    value, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.2f} {units[0]}"


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 task, 6 tasks, 2 processes."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def change_text(nats: float) -> str:
    """The relative change of a perplexity for a difference of losses in nats, with its sign: +1.2 %."""
    return f"{100 * math.expm1(nats):+.1f} %"


def duration_text(seconds: float) -> str:
    """A duration in seconds, minutes or hours, rounded for reading."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def cell_text(value: Cell) -> str:
    """The text of a table cell: floats with four significant digits, empty for None."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def markdown_table(
    rows: Sequence[Mapping[str, Cell]], *, columns: Sequence[str] | None = None, right: Collection[str] = ()
) -> str:
    """Rows as a markdown table: columns of numbers to the right; ``|`` in a cell is escaped.

    Args:
        rows: by column; a missing cell is empty.
        columns: which, in order; those of the first row where not given.
        right: columns to align right although their cells are text.
    """
    names = list(columns if columns is not None else rows[0] if rows else ())
    lines = ["| " + " | ".join(names) + " |"]
    lines.append("|" + "|".join("---:" if name in right or _numeric(rows, name) else "---" for name in names) + "|")
    for row in rows:
        cells = (markdown_cell(cell_text(row.get(name))) for name in names)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# What has a meaning in the middle of a line of markdown: escapes, code, emphasis, links, HTML and entities.
_MARKUP = re.compile(
    r"\\(?=[!-/:-@\[-`{-~])|[`*]|(?<![^\W_])_|_(?![^\W_])|~(?=~)|(?<=\])[(\[]|<(?=[A-Za-z/!?])|&(?=#?\w+;)"
)


def markdown_text(text: str) -> str:
    """Text that may come from a file, as a line of markdown shows it literally."""
    return _MARKUP.sub(lambda found: f"\\{found[0]}", printable(text))


def markdown_code(text: str) -> str:
    """Text as a code span of markdown, whatever backticks are in it."""
    text = printable(text)
    fence = "`" * (longest_run(text, "`") + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def markdown_block(text: str, language: str = "") -> str:
    """Text as a fenced block of code, whatever backticks are in it."""
    fence = "`" * max(3, longest_run(text, "`") + 1)
    return f"{fence}{language}\n{printable(text, lines=True)}\n{fence}"


def longest_run(text: str, character: str) -> int:
    """Length of the longest run of a character in a text."""
    return max(map(len, re.findall(f"{re.escape(character)}+", text)), default=0)


def markdown_cell(text: str) -> str:
    """Markdown as a cell of a table: no column of its own."""
    return text.replace("|", "\\|").replace("\n", " ")


def html_table(rows: Sequence[Mapping[str, Cell]], *, caption: str = "") -> str:
    """Rows as an HTML table; every cell is escaped."""
    names = list(rows[0]) if rows else []
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell_text(row.get(name)))}</td>" for name in names) + "</tr>"
        for row in rows
    )
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _numeric(rows: Sequence[Mapping[str, Cell]], name: str) -> bool:
    values = [value for row in rows if (value := row.get(name)) is not None]
    return bool(values) and all(isinstance(value, (int, float)) for value in values)


class Shown:
    """Base class of the results of public functions: a short ``repr``, a table in notebooks, a data frame with pandas.

    A subclass describes itself in one line (`summary`) and as the rows of a table (`rows_shown`).
    """

    def summary(self) -> str:
        """Describe the object in one line."""
        raise NotImplementedError

    def rows_shown(self) -> list[dict[str, Cell]]:
        """The object as table rows: dictionaries with the same keys."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.summary()}>"

    def _repr_html_(self) -> str:
        return html_table(self.rows_shown(), caption=self.summary())

    def to_frame(self) -> pandas.DataFrame:
        """The rows as a pandas data frame.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        return pandas.DataFrame(self.rows_shown())


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
