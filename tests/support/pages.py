"""Pages of the documentation as their readers' programs see them: links, the anchors of headings, blocks of code."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NOT_RUN = "# not run here: "  # and the reason, as the first line of a block that no test runs


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line of the page where it begins."""

    language: str
    text: str
    line: int

    @property
    def is_run(self) -> bool:
        return self.language == "sh" and not self.text.startswith(NOT_RUN)


def _tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def links(page: Path) -> Iterator[str]:
    """Where links and pictures of a page lead, but for addresses elsewhere."""
    for token in _tokens(page):
        for child in token.children or ():
            target = child.attrs.get("href") or child.attrs.get("src")
            if isinstance(target, str) and not re.match(r"[a-z]+:", target):
                yield target


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings: lower case, spaces to hyphens, other marks left out."""
    tokens = _tokens(page)
    found: set[str] = set()
    for opening, inline in itertools.pairwise(tokens):
        if opening.type == "heading_open":
            words = "".join(child.content for child in inline.children or ()).lower()
            name = re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
            again = sum(1 for other in found if re.fullmatch(rf"{re.escape(name)}(-\d+)?", other))
            found.add(f"{name}-{again}" if again else name)
    return found


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, those within lists too."""
    return [Block(t.info.strip(), t.content, (t.map or [0])[0] + 1) for t in _tokens(page) if t.type == "fence"]
