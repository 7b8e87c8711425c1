"""Lines over the budgets with error bars: one small panel whose lines are labelled at their ends. Writes nothing.

The labels do not overlap, and the letters are large enough for a phone.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moecover.reporting.figures.style import COLOURS, MARKERS, REFERENCE, STROKES, Look, page, short
from moecover.reporting.findings import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.8, 3.5  # inches; the page shows an inch as 70 pixels on a phone, 120 on a desktop
SMALL = 8.5  # points: the smallest letters
LETTERS = 18  # of a label, before it is wrapped
LOG_FROM = 3.0  # a log scale is used if the largest value is this many times the smallest


@dataclass(frozen=True)
class Line:
    """One line of a figure: its name, and an estimate for every x, the largest first."""

    name: str
    points: tuple[tuple[float, Estimate], ...]


def look_of(turn: int) -> Look:
    """Colour, marker and stroke of the line at an index; the first 90 all differ, in colour first."""
    return {
        "color": COLOURS[turn % len(COLOURS)],
        "marker": MARKERS[turn % len(MARKERS)],
        "linestyle": STROKES[turn // len(COLOURS) % len(STROKES)],
    }


def lines_picture(
    lines: Sequence[Line],
    *,
    title: str,
    ylabel: str,
    xlabel: str,
    reference: tuple[str, float] | None = None,
    may_be_log: bool = False,
    percent: bool = False,
) -> Figure | None:
    """Draw estimates over the budgets: a bar of one standard error up and down, single runs as dots.

    Args:
        lines: x is the percentage that is kept.
        title: of the figure.
        ylabel: of the y axis.
        xlabel: of the x axis.
        reference: name and value of the full model.
        may_be_log: use a log scale if the values are far apart.
        percent: the values are proportions, drawn as percentages.

    Returns:
        The figure; None if there is no finite value.
    """
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
    span = (budgets[-1] - budgets[0]) or 50
    values = [v * factor for line in drawn for _, e in line.points for v in (e.value, *e.runs) if math.isfinite(v)]
    values += [reference[1] * factor] if reference else []
    logarithmic = may_be_log and min(values) > 0 and max(values) > LOG_FROM * min(values)
    if logarithmic:
        axes.set_yscale("log")
    ends = []
    for turn, line in enumerate(drawn):
        shift = -(turn - (len(drawn) - 1) / 2) * 0.012 * span  # side by side, so that bars do not overlap
        ends.append(_draw_line(axes, line, turn, shift, factor))
    if reference:
        axes.axhline(reference[1] * factor, color=REFERENCE, linestyle="--", linewidth=1)
        ends.append((budgets[0], reference[1] * factor, REFERENCE))
        names.append([short(reference[0], LETTERS)])
    axes.set_xlim(budgets[-1] + 0.08 * span, budgets[0] - 0.08 * span)  # the largest first, as in the tables
    axes.set_xticks(budgets, labels=[f"{b:.3g}" for b in budgets])
    axes.set_xlabel(xlabel)
    axes.set_ylabel(f"{ylabel}, log scale" if logarithmic else ylabel)
    axes.grid(axis="y")
    ticks(axes, values, logarithmic=logarithmic)
    label_ends(axes, names, ends, figure.get_figheight())
    return figure


def _finite(lines: Sequence[Line]) -> list[Line]:
    kept = [Line(x.name, tuple(p for p in x.points if math.isfinite(p[1].value))) for x in lines]
    return [x for x in kept if x.points]


def _draw_line(axes: Axes, line: Line, turn: int, shift: float, factor: float) -> tuple[float, float, str]:
    """Draw one line, the first one stronger; gives the x and y of its end, and its colour."""
    look, first = look_of(turn), turn == 0
    colour = look["color"]
    x = [p + shift for p, _ in line.points]
    y = [e.value * factor for _, e in line.points]
    error = [(e.stderr or 0.0) * factor for _, e in line.points]
    axes.errorbar(
        x,
        y,
        yerr=error if any(error) else None,
        **look,
        linewidth=2.2 if first else 1.3,
        markersize=6.5 if first else 5,
        elinewidth=1.1,
        capsize=2.5,
        zorder=4 if first else 3,
    )
    for place, (_, e) in zip(x, line.points, strict=True):
        if len(e.runs) > 1:
            runs = [v * factor for v in e.runs if math.isfinite(v)]
            axes.plot([place] * len(runs), runs, linestyle="none", marker=".", markersize=4, color=colour, alpha=0.5)
    return x[-1], y[-1], colour


def ticks(axes: Axes, values: Sequence[float], *, logarithmic: bool) -> None:
    """Put ticks on the y axis that fit the values."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    if not logarithmic:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        return
    subs = (1, 2, 5) if max(values) > 12 * min(values) else (1, 1.5, 2, 3, 4, 6, 8)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


# ----------------------------------------------------------------------------------------------------------- the labels
def apart(wanted: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Positions from 0 to 1 closest to the wanted ones (least squares), in their order, so that no two labels overlap.

    Args:
        wanted: the best position of the middle of each label.
        heights: of the labels; if they do not all fit, they end above 1.
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


def label_ends(
    axes: Axes, names: Sequence[Sequence[str]], ends: Sequence[tuple[float, float, str]], high: float
) -> None:
    """Write every name to the right of the end of its line; ``high``: height of the figure in inches."""
    low, top = axes.get_ylim()
    axes.set_ylim(low, top)
    scale = math.log if axes.get_yscale() == "log" else float
    wanted = [(scale(y) - scale(low)) / (scale(top) - scale(low)) for _, y, _ in ends]
    heights = [(0.05 + 0.13 * len(name)) / (high - 1.1) for name in names]  # inches of a label over those of the axes
    arrow = {"arrowstyle": "-", "linewidth": 0.9, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)}
    for name, (x, y, colour), place in zip(names, ends, apart(wanted, heights), strict=True):
        axes.annotate(
            "\n".join(name),
            (x, y),
            xytext=(1.07, place),
            textcoords="axes fraction",
            va="center",
            fontsize=SMALL,
            arrowprops={**arrow, "color": colour},
            annotation_clip=False,
        )
