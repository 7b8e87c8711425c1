"""Numbers as text, as the page's tables and sentences write them. Reads and writes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import JsonValue


def size(num_bytes: float) -> str:
    """A size in decimal units, to three significant digits (`text.size_text` has two decimals)."""
    unit, divisor = units_of(num_bytes)
    value = num_bytes / divisor
    return f"{value:.0f} B" if unit == "B" else f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f} {unit}"


def units_of(num_bytes: float) -> tuple[str, float]:
    """The decimal unit for a size, and its bytes."""
    divisor, units = 1.0, ["B", "kB", "MB", "GB", "TB"]
    while num_bytes >= 1000 * divisor and len(units) > 1:
        divisor *= 1000
        units.pop(0)
    return units[0], divisor


def points(proportion: float) -> str:
    """A proportion from 0 to 1 as a percentage with one decimal, without the sign."""
    return f"{100 * proportion:.1f}"


def percentage(proportion: float) -> str:
    """A proportion as a percentage to three significant digits."""
    return f"{100 * proportion:.3g}%"


def perplexity_text(value: float, *, beside: float | None = None) -> str:
    """A perplexity with two decimals, none from 10,000; infinite or undefined ones as words.

    A standard error has the decimals of the value that it stands ``beside``.
    """
    if not math.isfinite(value):
        return "not finite"
    least = abs(value if beside is None else beside)
    return f"{value:,.2f}" if least < 1e4 else f"{value:,.0f}" if least < 1e6 else f"{value:.2e}"


def times(loss: float) -> str:
    """A difference of log perplexities as a factor, with two decimals."""
    return perplexity_text(math.exp(loss) if loss < 700 else math.inf)


def signed_points(difference: float) -> str:
    """A difference of proportions in points, with one decimal and its sign."""
    return minus(f"{100 * difference:+.1f}")


def p_text(p: float) -> str:
    """A p-value."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def minus(text: str) -> str:
    """A formatted number with a typographic minus sign."""
    return text.replace("-", "−")


def plain(value: JsonValue) -> str:
    """A value of a JSON record as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(v) for v in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "–" if value is None else str(value)
