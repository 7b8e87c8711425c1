"""What a model's tables share: their rows (a method at a budget), their first columns, and estimates as cells."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moecover.planning.shapes import shape_name
from moecover.reporting.blocks import MISSING, Column, Value, text_column
from moecover.reporting.data import Loss
from moecover.reporting.figures.style import Facts
from moecover.reporting.findings import Estimate, ModelFindings, Point, Series
from moecover.reporting.numbers import percentage, perplexity_text, points, signed_points, times

FULL_MODEL = "full model"
OF_FULL = "of the full model"


def coordinate_columns(model: ModelFindings) -> tuple[Column, ...]:
    """The columns of `coordinates`: merge and repair where there are any, runs where there are several."""
    changes = (text_column("repair"),) if _changed(model) else ()
    runs = (Column("runs"),) if _repeated(model) else ()
    experts = Column("experts × channels" if model.thin else "experts")
    return text_column("method"), *changes, Column(f"{model.kept_of} kept"), experts, *runs


def coordinates(model: ModelFindings, series: Series | None, p: Point) -> list[Value]:
    """The cells of a row in the columns `coordinate_columns`; None is the full model."""
    name, changes = (series.base, series.changes) if series else (FULL_MODEL, "")
    found = [Value(name, name.casefold())]
    found += [Value(changes, changes) if changes else MISSING] if _changed(model) else []
    found += [Value(percentage(p.retain), p.retain), shape_value(p)]
    return [*found, Value(f"{p.runs}", p.runs)] if _repeated(model) else found


def shape_value(p: Point) -> Value:
    """What is kept of every layer: experts, and channels of each where they are thinner."""
    return Value(shape_name(p.keep, p.width), p.keep)


def _changed(model: ModelFindings) -> bool:
    return any(s.changes for s in model.series)


def _repeated(model: ModelFindings) -> bool:
    return any(p.runs > 1 for s in model.series for p in s.points)


def share_value(e: Estimate | None, mark: str = "") -> Value:
    """A proportion in percent, with its standard error."""
    if e is None:
        return MISSING
    return Value(points(e.value), e.value, "" if e.stderr is None else f"±{points(e.stderr)}", mark)


def perplexity_value(e: Estimate | None, mark: str = "") -> Value:
    """A perplexity, with its standard error."""
    if e is None:
        return MISSING
    note = "" if e.stderr is None else f"±{perplexity_text(e.stderr, beside=e.value)}"
    return Value(perplexity_text(e.value), e.value if math.isfinite(e.value) else None, note, mark)


def loss_value(loss: Loss | None, note: str = "") -> Value:
    """A loss of log perplexity as what the full model's perplexity is multiplied by, with its interval."""
    if loss is None:
        return MISSING
    return Value(f"×{times(loss.value)}", loss.value, "\n".join(x for x in (interval(loss), note) if x))


def interval(loss: Loss) -> str:
    """The interval of a loss: in points of accuracy, or as factors of the perplexity; empty where there is none."""
    if loss.low is None or loss.high is None:
        return ""
    text = times if loss.kind == "perplexity" else signed_points
    return f"[{text(loss.low)}, {text(loss.high)}]"


def kl_value(e: Estimate | None) -> Value:
    """A mean KL divergence in nats per token, with its standard error."""
    return MISSING if e is None else Value(f"{e.value:.3f}", e.value, "" if e.stderr is None else f"±{e.stderr:.3f}")


def method_rows(model: ModelFindings) -> list[tuple[Series | None, Point]]:
    """The rows of a model's tables: the full model (None), then budget by budget, largest first, methods in order."""
    rows: list[tuple[Series | None, Point]] = [(None, model.full)] if model.full else []
    return rows + [(s, p) for b in model.budgets for s in model.series for p in s.points if p.retain == b]


def best_rows(
    rows: Sequence[tuple[Series | None, Point]], values: Sequence[Estimate | None], *, largest: bool = True
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
