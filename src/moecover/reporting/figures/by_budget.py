"""The pictures of a run: reads what `findings` gives, gives figures of matplotlib. Writes nothing.

They are small and of one panel each, so that their letters can be read on a phone; lines are named where they end.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.reporting.data import Usage
from moecover.reporting.figures.plan_figures import expected_overlap
from moecover.reporting.figures.style import COLOURS, FAINT, MARKERS, REFERENCE, STROKES, layer_axis, page, short
from moecover.reporting.findings import Estimate, ModelFindings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.8, 3.5  # inches; the page shows an inch as 70 pixels on a phone, 120 on a desk
SMALL = 8.5  # points of the smallest letters
LETTERS = 18  # of a name beside a line, before it is broken
LOG_FROM = 3.0  # a scale of logarithms where the largest value is this many times the smallest


@dataclass(frozen=True)
class Line:
    """One line of a picture: a name, and an estimate for every x."""

    name: str
    points: tuple[tuple[float, Estimate], ...]


def look_of(turn: int) -> dict[str, Any]:
    """Colour, marker and stroke of the line at a turn: the colour changes fastest, no two of the first 90 are alike."""
    again = turn // len(COLOURS)
    marker = MARKERS[turn % len(MARKERS)]
    return {"color": COLOURS[turn % len(COLOURS)], "marker": marker, "linestyle": STROKES[again % len(STROKES)]}


def apart(wanted: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Places from 0 to 1 nearest to the wanted ones (least squares), in their order, so that no two labels overlap.

    Args:
        wanted: where the middle of each label would best be.
        heights: of the labels; where they do not all fit, they end above 1.
    """
    from scipy.optimize import isotonic_regression

    order = np.argsort(wanted, kind="stable")
    high = np.asarray(heights, dtype=np.float64)[order]
    steps = np.concatenate([[0.0], np.cumsum((high[:-1] + high[1:]) / 2)])
    room = max(0.0, 1.0 - steps[-1])
    places = np.clip(isotonic_regression(np.asarray(wanted, dtype=np.float64)[order] - steps).x, 0.0, room) + steps
    found = np.empty(len(order))
    found[order] = places
    return [float(v) for v in found]


def _finite(lines: Sequence[Line]) -> list[Line]:
    kept = [Line(x.name, tuple(p for p in x.points if math.isfinite(p[1].value))) for x in lines]
    return [x for x in kept if x.points]


def lines_picture(
    lines: Sequence[Line],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    reference: tuple[str, float] | None = None,
    may_be_log: bool = False,
    percent: bool = False,
) -> Figure | None:
    """Estimates over the budgets, a bar of one standard error up and down, single runs as dots; None without any.

    Args:
        lines: x is the share of experts kept, in percent.
        title: of the picture.
        xlabel: of the x axis.
        ylabel: of the y axis.
        reference: name and value of the model as it was.
        may_be_log: a scale of logarithms where the values are far apart.
        percent: the values are shares, drawn as percentages.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    drawn = _finite(lines)
    if not drawn:
        return None
    factor = 100.0 if percent else 1.0
    names = [textwrap.wrap(short(x.name, 2 * LETTERS), LETTERS) or ["?"] for x in drawn]
    rows = sum(map(len, names)) + (1 if reference else 0)
    figure = page(WIDTH, max(HEIGHT, 1.5 + 0.17 * rows), title)
    axes: Axes = figure.subplots()
    axes.tick_params(labelsize=SMALL)
    budgets = sorted({x for line in drawn for x, _ in line.points})
    dodge = 0.012 * ((budgets[-1] - budgets[0]) or 50)
    values = [v * factor for line in drawn for _, e in line.points for v in (e.value, *e.runs) if math.isfinite(v)]
    values += [reference[1] * factor] if reference else []
    logarithmic = may_be_log and min(values) > 0 and max(values) > LOG_FROM * min(values)
    if logarithmic:
        axes.set_yscale("log")
    ends = []
    for turn, line in enumerate(drawn):
        look = look_of(turn)
        shift = (turn - (len(drawn) - 1) / 2) * dodge
        x = [p + shift for p, _ in line.points]
        y = [e.value * factor for _, e in line.points]
        error = [(e.stderr or 0.0) * factor for _, e in line.points]
        first: dict[str, Any] = (
            {"linewidth": 2.2, "markersize": 6.5} if turn == 0 else {"linewidth": 1.3, "markersize": 5}
        )
        style: dict[str, Any] = {"elinewidth": 1.1, "capsize": 2.5, "zorder": 4 if turn == 0 else 3}
        axes.errorbar(x, y, yerr=error if any(error) else None, **look, **first, **style)
        for place, (_, e) in zip(x, line.points, strict=True):
            if len(e.runs) > 1:
                runs = [v * factor for v in e.runs if math.isfinite(v)]
                axes.plot([place] * len(runs), runs, linestyle="none", marker=".", markersize=4, color=look["color"], alpha=0.5)  # fmt: skip
        ends.append((x[-1], y[-1], look["color"]))
    if reference:
        axes.axhline(reference[1] * factor, color=REFERENCE, linestyle="--", linewidth=1)
        ends.append((budgets[-1], reference[1] * factor, REFERENCE))
        names.append([short(reference[0], LETTERS)])
    span = (budgets[-1] - budgets[0]) or 50
    axes.set_xlim(budgets[0] - 0.08 * span, budgets[-1] + 0.08 * span)
    axes.set_xticks(budgets, labels=[f"{b:.3g}" for b in budgets])
    axes.set_xlabel(xlabel)
    axes.set_ylabel(f"{ylabel}, log scale" if logarithmic else ylabel)
    axes.grid(axis="y")
    if logarithmic:
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if max(values) > 12 * min(values) else (1, 1.5, 2, 3, 4, 6, 8), numticks=12)
        )
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    _name_ends(axes, names, ends, figure.get_figheight())
    return figure


def _name_ends(
    axes: Axes, names: Sequence[Sequence[str]], ends: Sequence[tuple[float, float, str]], high: float
) -> None:
    """Write every name to the right of where its line ends, apart from the others."""
    low, top = axes.get_ylim()
    axes.set_ylim(low, top)
    scale = math.log if axes.get_yscale() == "log" else float
    wanted = [(scale(y) - scale(low)) / (scale(top) - scale(low)) for _, y, _ in ends]
    heights = [(0.05 + 0.13 * len(name)) / (high - 1.1) for name in names]  # inches of a label, of those of the axes
    for name, (x, y, colour), place in zip(names, ends, apart(wanted, heights), strict=True):
        axes.annotate(
            "\n".join(name), (x, y), xytext=(1.07, place), textcoords="axes fraction", va="center", fontsize=SMALL,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.9, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)},
            annotation_clip=False,
        )  # fmt: skip


def accuracy_picture(model: ModelFindings) -> Figure | None:
    """Mean accuracy against the experts kept, by method: the first figure of the paper."""
    lines = [Line(s.name, tuple((100 * p.retain, p.mean) for p in s.points if p.mean)) for s in model.series]
    reference = ("full model", model.full.mean.value) if model.full and model.full.mean else None
    number = len(model.tasks)
    ylabel = f"mean accuracy of {number} tasks, %" if number > 1 else "accuracy, %"
    title = f"Accuracy by experts kept, {short(model.name, 48)}"
    return lines_picture(lines, title=title, xlabel="experts kept, %", ylabel=ylabel, reference=reference, percent=True)  # fmt: skip


def perplexity_picture(model: ModelFindings, text: str) -> Figure | None:
    """Perplexity on one text against the experts kept, by method."""
    lines = [
        Line(s.name, tuple((100 * p.retain, p.perplexity[text]) for p in s.points if text in p.perplexity))
        for s in model.series
    ]
    full = model.full.perplexity.get(text) if model.full else None
    reference = ("full model", full.value) if full and math.isfinite(full.value) else None
    title = f"Perplexity on {short(text, 24)}, {short(model.name, 48)}"
    return lines_picture(lines, title=title, xlabel="experts kept, %", ylabel="perplexity, lower is better", reference=reference, may_be_log=True)  # fmt: skip


# -------------------------------------------------------------------------------------------------------- the mechanism
def kept_weight_picture(model: ModelFindings, usage: Usage) -> Figure | None:
    """Share of the tasks' routing weight that went to kept experts, against the experts kept, by method."""
    lines = []
    for s in model.series:
        points = []
        for p in s.points:
            plans = [usage.plans[cell] for cell in p.cells if cell in usage.plans]
            runs = [float(np.mean([t.kept_weight for t in plan.values()])) for plan in plans if plan]
            if runs:
                points.append((100 * p.retain, Estimate(float(np.mean(runs)), None, tuple(runs))))
        lines.append(Line(s.name, tuple(points)))
    title = f"The tasks' routing weight that kept experts carry, {short(model.name, 48)}"
    return lines_picture(lines, title=title, xlabel="experts kept, %", ylabel="mean over tasks and layers, %", percent=True)  # fmt: skip


def correlation_picture(model: ModelFindings, usage: Usage) -> Figure | None:
    """By task and layer, how the order of experts by utility on each corpus agrees with their use by the task."""
    corpora = {c: t for c, t in usage.corpora.items() if t}
    if not corpora:
        return None
    tasks = list(dict.fromkeys(task for found in corpora.values() for task in found))
    figure = page(
        WIDTH,
        1.6 + len(tasks) * max(0.3, 0.16 * len(corpora)),
        f"Utility on corpora and use by tasks, {short(model.name, 48)}",
    )
    axes: Axes = figure.subplots()
    axes.tick_params(labelsize=SMALL)
    step = 0.62 / len(corpora)
    for turn, (corpus, found) in enumerate(corpora.items()):
        look = look_of(turn)
        for row, task in enumerate(tasks):
            values = [v for v in (found[task].spearman if task in found else ()) if v is not None]
            if not values:
                continue
            y = row + (turn - (len(corpora) - 1) / 2) * step
            axes.plot([min(values), max(values)], [y, y], color=look["color"], linewidth=1.3, solid_capstyle="round")
            axes.plot(values, [y] * len(values), linestyle="none", marker="|", markersize=4, color=look["color"])
            name = short(corpus) if row == 0 else "_"
            axes.plot([float(np.mean(values))], [y], linestyle="none", marker=look["marker"], markersize=6, color=look["color"], label=name)  # fmt: skip
    axes.axvline(0, color=REFERENCE, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(tasks)), labels=[short(task, LETTERS) for task in tasks])
    axes.invert_yaxis()
    axes.set_xlabel("rank correlation with utility (Spearman)\nmark: mean, line: least to greatest layer")
    axes.grid(axis="x")
    figure.legend(loc="outside lower left", ncols=2)
    return figure


def usage_by_layer_picture(model: ModelFindings, usage: Usage) -> Figure | None:
    """By decoder layer, the overlap of each corpus's best experts with those that the tasks use most, mean of tasks."""
    layers = usage.layers
    corpora = {c: t for c, t in usage.corpora.items() if t}
    if not corpora or len(layers) < 2:
        return None
    figure = page(WIDTH, HEIGHT, f"Best experts of corpora and of tasks, {short(model.name, 48)}")
    axes: Axes = figure.subplots()
    axes.tick_params(labelsize=SMALL)
    for turn, (corpus, found) in enumerate(corpora.items()):
        look = look_of(turn)
        table = np.array([t.jaccard for t in found.values()], dtype=np.float64)
        axes.plot(layers, np.nanmean(table, axis=0), **look, markersize=4, linewidth=1.5, label=short(corpus))
        if len(table) > 1:
            axes.fill_between(layers, np.nanmin(table, axis=0), np.nanmax(table, axis=0), color=look["color"], alpha=0.15, linewidth=0)  # fmt: skip
    if usage.keep and usage.experts:
        axes.axhline(expected_overlap(usage.keep, usage.experts), color=REFERENCE, linestyle="--", linewidth=1)
    layer_axis(axes, layers)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("overlap with a task's best (Jaccard)", color=FAINT)
    axes.grid(axis="y")
    figure.legend(loc="outside lower left", ncols=2)
    return figure
