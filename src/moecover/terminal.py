"""What fits the terminal: tables that turn into rows, lines that fold between words.

The width is the exported ``COLUMNS``, else that of the terminal that output goes to. Output that goes to a pipe or a
file has none: there a table is as wide as it is and a fact stays on its line, for grep and awk.
"""

from __future__ import annotations

import io
import os
import re
import sys
import textwrap
from collections.abc import Collection, Sequence
from typing import TextIO

from moecover.errors import printable

LEAST = 40  # columns: in a narrower terminal lines fold at this width
GAP = 3  # spaces between two columns of a table
EDGE = 2  # spaces at the sides of a table
INDENT = "  "
# Lines with a command, which a fold would be copied with: at the beginning, after a colon or in a column.
WHOLE = re.compile(r"^next: |(?:^\s*|: |\s{2,})(?:\S*/)?moecover [a-z]+ ")
LABEL = re.compile(r"\s*(?:\S+ )*\S+\s{2,}|\s+")  # what a folded line hangs from: a label with its spaces, or an indent


def columns(file: TextIO | None = None) -> int | None:
    """Width of what a file (stdout by default) goes to, in characters; None where nothing limits it."""
    file = sys.stdout if file is None else file
    told = os.environ.get("COLUMNS", "")
    if told.isdecimal() and int(told):
        return max(LEAST, int(told))
    try:
        return max(LEAST, os.get_terminal_size(file.fileno()).columns or LEAST) if file.isatty() else None
    except (OSError, ValueError, AttributeError):  # closed, or not a file of the system
        return None


def folded(text: str, width: int | None) -> str:
    """Text with its longer lines folded between words, under their first word or after their label.

    Commands stay as they are, to be copied, and so do paths and other words that are longer than a line.

    Args:
        text: lines, printable.
        width: of a line at most; None folds nothing.
    """
    if width is None:
        return text
    return "\n".join(line if len(line) <= width else _folded(line, width) for line in text.split("\n"))


def _folded(line: str, width: int) -> str:
    if WHOLE.search(line):
        return line
    label = found[0] if (found := LABEL.match(line)) and len(found[0]) <= width // 2 else ""
    hanging = " " * len(label) if label else INDENT
    return textwrap.fill(
        line[len(label) :],
        width,
        initial_indent=label,
        subsequent_indent=hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )


def aligned(
    headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 0, sections: Collection[int] = ()
) -> str:
    """Rows as aligned text with a rule below the headings, no wider than the terminal.

    Headings take several lines where that is enough. A table that is wider still is turned, its rows into columns; if
    that does not fit either, every row becomes lines of a heading and a cell each.

    Args:
        headings: one a column.
        rows: cells, as many as headings; taken literally.
        left: how many columns, from the first on, are aligned to the left; the others to the right.
        sections: numbers of rows that have a rule above them.
    """
    headings, rows = [printable(one) for one in headings], [[printable(cell) for cell in row] for row in rows]
    width = columns()
    if (fitting := _narrowed(headings, rows, width)) is not None:
        return _drawn(fitting, rows, left=left, sections=sections)
    first, *others = headings
    turned: list[list[str]] = [[name, *cells] for name, *cells in zip(others, *(row[1:] for row in rows), strict=True)]
    if (fitting := _narrowed([first, *(row[0] for row in rows)], turned, width)) is not None:
        return _drawn(fitting, turned, left=1, sections=())
    longest = max(map(_cells, others), default=0)
    lines = []
    for row in rows:
        lines.append(f"{first} {row[0]}".strip())
        lines += [
            f"{INDENT}{_padded(name, longest)}  {cell}" for name, cell in zip(others, row[1:], strict=True) if cell
        ]
    return folded("\n".join(line.rstrip() for line in lines), width)


def _cells(text: str) -> int:
    """Characters that a text takes on a terminal: some are two wide."""
    from rich.cells import cell_len

    return max(map(cell_len, text.split("\n")))


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _cells(text))


def _narrowed(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> list[str] | None:
    """Headings folded so far that the table has a width at most; None where its cells are too wide for that."""
    if width is None:
        return list(headings)
    room = width - EDGE - GAP * (len(headings) - 1)
    words = [[*heading.split(" "), *(row[number] for row in rows)] for number, heading in enumerate(headings)]
    least = [max(map(_cells, column)) for column in words]
    if sum(least) > room:
        return None
    wide = least
    while (folds := _most_folded(headings, wide)) is not None and sum(wide) < room:
        wide = [size + (number == folds) for number, size in enumerate(wide)]
    return [_heading(*one) for one in zip(headings, wide, strict=True)]


def _heading(heading: str, width: int) -> str:
    return "\n".join(textwrap.wrap(heading, width, break_long_words=False, break_on_hyphens=False))


def _most_folded(headings: Sequence[str], widths: Sequence[int]) -> int | None:
    """The column whose heading takes the most lines; None where each takes one."""
    lines = [_heading(*one).count("\n") for one in zip(headings, widths, strict=True)]
    return lines.index(max(lines)) if any(lines) else None


def _drawn(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int, sections: Collection[int]) -> str:
    """A table that is as wide as its cells."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, heading in enumerate(headings):
        drawn.add_column(Text(heading), justify="left" if number < left else "right", no_wrap=True, vertical="bottom")
    for number, row in enumerate(rows):
        if number in sections:
            drawn.add_section()
        drawn.add_row(*map(Text, row))
    out = io.StringIO()
    wide = sum(max(map(_cells, column)) + GAP for column in zip(headings, *rows, strict=True)) + EDGE
    Console(file=out, width=wide).print(drawn)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines() if line.strip())
