"""What a model's tables share: their rows (a method at a budget), their first columns, and estimates as cells."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moecover.planning.shapes import shape_name
from moecover.reporting.blocks import MISSING, Column, Value, text_column
from moecover.reporting.figures.style import Facts
from moecover.reporting.findings import Estimate, ModelFindings, Point
from moecover.reporting.numbers import percentage, perplexity_text, points

FULL_MODEL = "full model"
OF_FULL = "of the full model"


def coordinate_columns(model: ModelFindings) -> tuple[Column, ...]:
    """The columns of `coordinates`."""
    return text_column("method"), Column(f"{model.kept_of} kept"), Column("runs")


def share_value(e: Estimate | None, mark: str = "") -> Value:
    """A proportion in percent, with its standard error."""
    if e is None:
        return MISSING
    return Value(points(e.value), e.value, "" if e.stderr is None else f"±{points(e.stderr)}", mark)


def perplexity_value(e: Estimate | None, mark: str = "") -> Value:
    """A perplexity, with its standard error."""
    if e is None:
        return MISSING
    note = "" if e.stderr is None else f"±{perplexity_text(e.stderr)}"
    return Value(perplexity_text(e.value), e.value if math.isfinite(e.value) else None, note, mark)


def kl_value(e: Estimate | None) -> Value:
    """A mean KL divergence in nats per token, with its standard error."""
    return MISSING if e is None else Value(f"{e.value:.3f}", e.value, "" if e.stderr is None else f"±{e.stderr:.3f}")


def method_rows(model: ModelFindings) -> list[tuple[str, Point]]:
    """The rows of a model's tables: the full model, then budget by budget, largest first, methods in their order."""
    budgets = sorted(model.budgets, reverse=True)
    rows = [(s.name, p) for b in budgets for s in model.series for p in s.points if p.retain == b]
    return [(FULL_MODEL, model.full), *rows] if model.full else rows


def best_rows(
    rows: Sequence[tuple[str, Point]], values: Sequence[Estimate | None], *, largest: bool = True
) -> set[int]:
    """Indices of the rows with the best value of their budget, for budgets with at least two values."""
    found = set()
    for budget in {p.retain for _, p in rows}:
        known = {
            i: e.value
            for i, ((_, p), e) in enumerate(zip(rows, values, strict=True))
            if p.retain == budget and e is not None
        }
        if len(known) > 1:
            best = max(known.values()) if largest else min(known.values())
            found |= {i for i, v in known.items() if v == best}
    return found


def kept_in(facts: Facts) -> str:
    """The shape of an explained plan in short."""
    return shape_name(facts["keep"], facts.get("channels", {}).get("width"))


def width_words(facts: Facts) -> str:
    """How wide the kept experts of an explained plan are; empty where they are whole."""
    return f": {facts['keep']} experts, {facts['channels']['width']} channels of each" if "channels" in facts else ""


def coordinates(name: str, p: Point) -> list[Value]:
    """The cells of a row in the columns `coordinate_columns`."""
    return [
        Value(name, name.casefold()),
        Value(percentage(p.retain), p.retain, shape_name(p.keep, p.width)),
        Value(f"{p.runs}", p.runs),
    ]
