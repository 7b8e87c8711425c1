"""Build hook: the README as the package's description, where a relative link would lead nowhere.

With `Repository` among the project's URLs, links and pictures get its address; without one they are their own text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


def description(text: str, home: str) -> str:
    """Markdown without relative links.

    Args:
        text: with links relative to the repository's root.
        home: address of the repository; empty for none.
    """

    def absolute(link: re.Match[str]) -> str:
        picture, words, path = link.groups()
        if not home:
            return f"*{words}*" if picture else words
        return f"{picture}[{words}]({home.rstrip('/')}/{'raw' if picture else 'blob'}/main/{path})"

    return LINK.sub(absolute, text)


class CustomMetadataHook(MetadataHookInterface):
    """Sets the description."""

    def update(self, metadata: dict[str, Any]) -> None:
        """See `hatchling`."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        home = metadata.get("urls", {}).get("Repository", "")
        metadata["readme"] = {"content-type": "text/markdown", "text": description(text, home)}
