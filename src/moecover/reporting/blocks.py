"""What a section of the page is made of: tables, figures, paragraphs, lists. Data only; the template draws them.

Every text in a block is escaped when the page is drawn. A section that needs other HTML returns it as
`markupsafe.Markup`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal


# --------------------------------------------------------------------------------------------------------------- tables
@dataclass(frozen=True)
class Column:
    """A column heading; ``first`` is the sort order of the first click."""

    name: str
    number: bool = True
    first: Literal["ascending", "descending"] = "descending"


def text_column(name: str) -> Column:
    """A column of text, which sorts from A to Z first."""
    return Column(name, number=False, first="ascending")


@dataclass(frozen=True)
class Value:
    """A table cell: its text, its sort key (None sorts last), a note in small print line by line, and a CSS class."""

    text: str
    sort: float | str | None = None
    note: str = ""
    mark: str = ""


MISSING = Value("–")


@dataclass(frozen=True)
class Table:
    """A table that can be sorted by any column; ``name`` is unique in its section of the page.

    On a phone, a ``stacked`` one has its cells below each other, each with its heading, so that all columns are seen.
    """

    kind: ClassVar[str] = "table"
    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    note: str = ""
    stacked: bool = False


# --------------------------------------------------------------------------------------------------------------- others
@dataclass(frozen=True)
class Picture:
    """A figure on the page: its markup, its description for screen readers, and its caption."""

    name: str
    markup: str
    label: str
    caption: str
    kind: str  # "wide": may scroll sideways on a phone; "paper": that, and always on white; "": neither


@dataclass(frozen=True)
class Pictures:
    """Figures beside each other; a ``bare`` one has no caption."""

    kind: ClassVar[str] = "pictures"
    pictures: Sequence[Picture]
    bare: bool = False


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; ``mark`` is ``absent`` for what the run does not have, ``note`` for small print."""

    kind: ClassVar[str] = "paragraph"
    text: str
    mark: Literal["", "absent", "note"] = ""


def absent(text: str) -> Paragraph:
    """A paragraph that says what the run does not have."""
    return Paragraph(text, "absent")


@dataclass(frozen=True)
class Bullets:
    """A list; every item has a CSS class (or "") and its text."""

    kind: ClassVar[str] = "bullets"
    items: Sequence[tuple[str, str]]
    mark: str = ""


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away under a summary line; in print they are open, if they are ``printed``."""

    kind: ClassVar[str] = "details"
    summary: str
    blocks: Sequence[Block]
    opened: bool = False
    printed: bool = True


@dataclass(frozen=True)
class Code:
    """Text in a fixed-width font."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Record:
    """A named record as a list of terms: where a model, corpus or task comes from."""

    kind: ClassVar[str] = "record"
    name: str
    entries: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Number:
    """A large number, what it is, and its interval ("" where it is unknown)."""

    value: str
    words: str
    interval: str = ""


@dataclass(frozen=True)
class Tile:
    """A budget, and what is left there: numbers in groups beside each other, such as near and far texts."""

    heading: str
    groups: Sequence[tuple[str, Sequence[Number]]]


@dataclass(frozen=True)
class Lead:
    """The opening of a model's part: the main method with its tiles and a note on them, sentences, and figures."""

    kind: ClassVar[str] = "lead"
    method: str
    tiles: Sequence[Tile]
    note: str
    sentences: Sequence[str]
    pictures: Sequence[Picture]


Block = Table | Pictures | Paragraph | Bullets | Details | Code | Record | Lead
