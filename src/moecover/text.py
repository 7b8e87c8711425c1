"""Numbers in words: for what the verbs print and for the page. Pure."""

from __future__ import annotations


def size_text(num_bytes: float) -> str:
    """A size in decimal units."""
    value, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.2f} {units[0]}"
