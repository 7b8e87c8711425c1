"""The figures over the budgets: accuracy, perplexity and kept routing weight, a line per method. Writes nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from moecover.reporting.data import Usage
from moecover.reporting.figures.lines import Line, lines_picture
from moecover.reporting.figures.style import short
from moecover.reporting.findings import Estimate, ModelFindings, Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _families(model: ModelFindings) -> list[tuple[str, list[Point]]]:
    """The points of every line with its name: thinner experts have lines of their own."""
    split = [
        (s, thin, [p for p in s.points if (p.width is not None) is thin])
        for s in model.series
        for thin in (False, True)
    ]
    return [(f"{s.name}, thinner" if thin else s.name, points) for s, thin, points in split if points]


def accuracy_picture(model: ModelFindings) -> Figure | None:
    """Mean accuracy over the tasks against the experts kept, by method."""
    lines = [Line(name, tuple((100 * p.retain, p.mean) for p in points if p.mean)) for name, points in _families(model)]
    reference = ("full model", model.full.mean.value) if model.full and model.full.mean else None
    number = len(model.tasks)
    ylabel = f"mean accuracy of {number} tasks, %" if number > 1 else "accuracy, %"
    title = f"Accuracy by {model.kept_of} kept, {short(model.name, 48)}"
    return lines_picture(
        lines, title=title, xlabel=f"{model.kept_of} kept, %", ylabel=ylabel, reference=reference, percent=True
    )


def perplexity_picture(model: ModelFindings, text: str) -> Figure | None:
    """Perplexity on one text against the experts kept, by method."""
    lines = [
        Line(name, tuple((100 * p.retain, p.perplexity[text]) for p in points if text in p.perplexity))
        for name, points in _families(model)
    ]
    full = model.full.perplexity.get(text) if model.full else None
    reference = ("full model", full.value) if full and math.isfinite(full.value) else None
    title = f"Perplexity on {short(text, 24)}, {short(model.name, 48)}"
    ylabel = "perplexity, lower is better"
    return lines_picture(
        lines, title=title, xlabel=f"{model.kept_of} kept, %", ylabel=ylabel, reference=reference, may_be_log=True
    )


def kept_weight_picture(model: ModelFindings, usage: Usage) -> Figure | None:
    """Proportion of the tasks' routing weight that goes to kept experts against the experts kept, by method."""
    lines = []
    for name, points_of in _families(model):
        points = []
        for p in points_of:
            plans = [usage.plans[cell] for cell in p.cells if cell in usage.plans]
            runs = [float(np.mean([t.kept_weight for t in plan.values()])) for plan in plans if plan]
            if runs:
                points.append((100 * p.retain, Estimate(float(np.mean(runs)), None, tuple(runs))))
        lines.append(Line(name, tuple(points)))
    title = f"The tasks' routing weight on kept experts, {short(model.name, 48)}"
    return lines_picture(
        lines, title=title, xlabel=f"{model.kept_of} kept, %", ylabel="mean over tasks and layers, %", percent=True
    )
