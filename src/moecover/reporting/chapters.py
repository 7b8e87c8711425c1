"""A page before it is drawn: chapters of sections of blocks, and what stands above them. Data only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moecover.reporting.album import Album
    from moecover.reporting.sections import Content


@dataclass(frozen=True)
class ShownSection:
    """A section with its blocks."""

    name: str
    title: str
    blocks: Content


@dataclass(frozen=True)
class Chapter:
    """What the page says about one model, or about one size of it."""

    anchor: str
    name: str
    sections: tuple[ShownSection, ...]


@dataclass(frozen=True)
class Page:
    """A page: its title, the line above it, what it is about, chapters and sections, and its figures."""

    title: str
    kicker: str
    about: str
    facts: str
    chapters: Sequence[Chapter]
    run_sections: Sequence[ShownSection]
    album: Album
