"""The first numbers about a model: what the main method loses at every budget, in the mean and at worst."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moecover.planning.shapes import shape_name
from moecover.reporting.blocks import Number, Tile
from moecover.reporting.data import Loss
from moecover.reporting.findings import ModelFindings, Point, Series
from moecover.reporting.losses import loss_of, worst_of
from moecover.reporting.numbers import percentage, points, signed_points, size, times
from moecover.reporting.values import interval
from moecover.text import counted, listed


def chosen(model: ModelFindings) -> list[tuple[Series, Point]]:
    """The main method at every budget, largest first; of several shapes and repairs the one that loses least."""
    rows = [_rows(model, budget) for budget in model.budgets]
    return [min(here, key=lambda row: _total(model, row[1])) for here in rows if here]


def tiles_of(model: ModelFindings) -> tuple[Tile, ...]:
    """A tile for every budget of `chosen`."""
    found = []
    for series, p in chosen(model) if model.full else ():
        if groups := [*_accuracy(model, p), *_perplexity(model, p)]:
            several = len(_rows(model, p.retain)) > 1
            found.append(Tile(_heading(model, series, p, several=several), groups))
    return tuple(found)


def note_on(model: ModelFindings, tiles: Sequence[Tile]) -> str:
    """What the numbers of the tiles are, in small print."""
    if not tiles:
        return ""
    parts = ["Against the full model"]
    if model.texts:
        parts.append("×: perplexity as a multiple of its, means are geometric")
    if model.near and model.far:
        parts.append(f"near: text of the kinds that were calibrated on ({listed(list(model.near))}); far: other text")
    elif model.near:
        parts.append("near: text of the kinds that were calibrated on; no other text was measured")
    numbers = [number for tile in tiles for _, group in tile.groups for number in group]
    known = any(number.interval for number in numbers)
    parts.append("in brackets the 95% interval" if known else "intervals are not known")
    if any(len(_rows(model, budget)) > 1 for budget in model.budgets):
        parts.append("of several shapes and repairs, the one with the least mean loss is shown")
    return "; ".join(parts) + "."


def _rows(model: ModelFindings, budget: float) -> list[tuple[Series, Point]]:
    """The main method's shapes and repairs at a budget."""
    base = model.main.base if model.main else None
    return [(s, p) for s in model.series if s.base == base for p in s.points if p.retain == budget]


def _total(model: ModelFindings, p: Point) -> float:
    """What is least for the point to show: the mean loss over the texts, else the accuracy below zero."""
    if (loss := loss_of(model, p, model.texts)) is not None:
        return loss.value
    return -p.mean.value if p.mean and not model.texts else math.inf


def _heading(model: ModelFindings, series: Series, p: Point, *, several: bool) -> str:
    shape = f"{p.keep} experts" if p.width is None else shape_name(p.keep, p.width)
    parts = [f"{percentage(p.retain)} of the {model.kept_of}", size(p.num_bytes)]
    if several:
        parts += [shape, *([series.changes] if series.changes else [])]
    return " · ".join(parts)


def _accuracy(model: ModelFindings, p: Point) -> list[tuple[str, Sequence[Number]]]:
    """The mean over the tasks, and the task that loses most."""
    if not model.full or not p.mean or not model.full.mean:
        return []
    value = p.mean.value - model.full.mean.value
    tasks = counted(len(model.tasks), "task")
    words = f"points of accuracy, mean of {tasks} ({points(model.full.mean.value)}% before)"
    numbers = [Number(signed_points(value), words, _interval(p.losses.get(("tasks", *model.tasks))))]
    lost = {t: e.value - model.full.tasks[t].value for t, e in p.tasks.items() if t in model.full.tasks}
    if len(lost) > 1:
        worst = min(lost, key=lambda task: lost[task])
        numbers.append(
            Number(signed_points(lost[worst]), f"worst task, {worst}", _interval(p.losses.get(("tasks", worst))))
        )
    return [("accuracy", numbers)]


def _perplexity(model: ModelFindings, p: Point) -> list[tuple[str, Sequence[Number]]]:
    """The mean over the near texts and the worst of them, and the same of the far ones."""
    found = list[tuple[str, Sequence[Number]]]()
    for side, texts in (("near", model.near), ("far", model.far)):
        mean, worst = loss_of(model, p, texts), worst_of(model, p, texts)
        if mean is None or worst is None:
            continue
        numbers = [_number(worst, worst.names[0] if len(texts) == 1 else f"worst, {worst.names[0]}")]
        if len(texts) > 1:
            numbers.insert(0, _number(mean, f"mean of {len(texts)} texts"))
        found.append((side if model.near else "perplexity", numbers))
    return found


def _number(loss: Loss, words: str) -> Number:
    return Number(f"×{times(loss.value)}", words, interval(loss))


def _interval(loss: Loss | None) -> str:
    return interval(loss) if loss else ""
