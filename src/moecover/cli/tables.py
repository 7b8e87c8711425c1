"""Tables for the terminal."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence


def aligned(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: int = 0,
    sections: Collection[int] = (),
    width: int = 110,
) -> str:
    """Rows as aligned text with a rule below the headings.

    Args:
        headings: one a column.
        rows: cells, as many as headings.
        left: how many columns, from the first on, are aligned to the left; the others to the right.
        sections: numbers of rows that have a rule above them.
        width: of the text at most, in characters.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, heading in enumerate(headings):
        drawn.add_column(heading, justify="left" if number < left else "right", no_wrap=True)
    for number, row in enumerate(rows):
        if number in sections:
            drawn.add_section()
        drawn.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=width).print(drawn)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines() if line.strip())
