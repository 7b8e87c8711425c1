"""Numbers as text, as the page's tables and sentences write them. Reads and writes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import JsonValue


def size(num_bytes: float) -> str:
    """A size in decimal units, to three significant digits (`text.size_text` has two decimals)."""
    value, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.3g} {units[0]}"


def points(proportion: float) -> str:
    """A proportion from 0 to 1 as a percentage with one decimal, without the sign."""
    return f"{100 * proportion:.1f}"


def percentage(proportion: float) -> str:
    """A proportion as a percentage to three significant digits."""
    return f"{100 * proportion:.3g}%"


def perplexity_text(value: float) -> str:
    """A perplexity; infinite or undefined ones as words."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"


def p_text(p: float) -> str:
    """A p-value."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def minus(text: str) -> str:
    """A formatted number with a typographic minus sign."""
    return text.replace("-", "−")


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 task, 6 tasks."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def plain(value: JsonValue) -> str:
    """A value of a JSON record as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(v) for v in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "–" if value is None else str(value)
