"""The figures by which a size is chosen: what is lost against the bytes of the weights, in the mean and at worst.

A line is one method with one repair, of whole experts or of thinner ones. Writes nothing.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moecover.reporting.data import Loss
from moecover.reporting.figures.lines import HEIGHT, LETTERS, SMALL, WIDTH, label_ends, ticks
from moecover.reporting.figures.style import COLOURS, MARKERS, REFERENCE, page, short
from moecover.reporting.findings import ModelFindings, Point
from moecover.reporting.losses import loss_of, worst_of
from moecover.reporting.numbers import units_of
from moecover.text import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 8  # lines of a figure; with more of them, those that lie behind another everywhere are left out
REPAIRS = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Family:
    """One line: its name, whether experts are thinner, the turn of its stroke, and its sizes and losses."""

    name: str
    first: bool  # of the first method
    thin: bool
    stroke: int
    points: tuple[tuple[int, Loss, Loss], ...]  # bytes, mean loss, loss on the worst text; largest first


def loss_pictures(model: ModelFindings) -> dict[str, Figure]:
    """Loss by size: ``mean`` over the texts, and ``worst`` of several. Empty with fewer than two sizes.

    Both have the same scale. Sizes fall from left to right, as budgets do in all tables.
    """
    families = shown(families_of(model))
    if len({size for family in families for size, *_ in family.points}) < 2:
        return {}
    values = [math.exp(loss.value) for family in families for _, *pair in family.points for loss in pair]
    low, top = min(1.0, *values), max(values)
    scale = (low / (top / low) ** 0.08, top * (top / low) ** 0.12)  # long intervals end at the frame
    name, texts = short(model.name, 40), len(model.texts)
    mean = f"Mean loss over {texts} texts by size" if texts > 1 else f"Loss on {short(model.texts[0], 24)} by size"
    found = {"mean": _picture(model, families, f"{mean}, {name}", 0, scale)}
    if texts > 1:
        found["worst"] = _picture(model, families, f"Loss on the worst text by size, {name}", 1, scale)
    return found


def captioned(model: ModelFindings) -> str:
    """What marks and strokes mean in the figures of a model, and how many lines they leave out."""
    families = families_of(model)
    parts = ["Means are geometric."]
    if any(f.thin for f in families):
        parts.append("Hollow: thinner experts.")
    if any(f.stroke for f in families):
        parts.append("Broken lines: with the repair that the name says.")
    if left := len(families) - len(shown(families)):
        parts.append(f"Not drawn: {counted(left, 'line')} that others beat at every size.")
    if any(any(_reach(loss)) for f in families for _, *both in f.points for loss in both):
        parts.append("Bars: 95% intervals, cut at the frame.")
    return " ".join(parts)


def families_of(model: ModelFindings) -> list[Family]:
    """The lines, with the points that have every text; a further file of the model is a line of one point."""
    repairs = list(dict.fromkeys(["", *(s.changes for s in model.series)]))
    found = []
    for s in model.series:
        for thin in (False, True):
            points = [known for p in s.points if (p.width is not None) is thin and (known := _losses(model, p))]
            if points:
                name = f"{s.name}, thinner" if thin else s.name
                ordered = tuple(sorted(points, key=lambda point: -point[0]))
                found.append(Family(name, s.base == model.series[0].base, thin, repairs.index(s.changes), ordered))
    for name, p in model.files:
        if known := _losses(model, p):
            found.append(Family(name, False, False, 0, (known,)))
    return found


def _losses(model: ModelFindings, p: Point) -> tuple[int, Loss, Loss] | None:
    mean, worst = loss_of(model, p, model.texts), worst_of(model, p, model.texts)
    return None if mean is None or worst is None else (p.num_bytes, mean, worst)


def shown(families: Sequence[Family]) -> list[Family]:
    """The lines to draw: all of them up to `MOST`, else the first method's and those of which a point is on the front.

    A point is on the front if nothing of its size or smaller loses less in the mean.
    """
    if len(families) <= MOST:
        return list(families)
    points = [(size, mean.value) for family in families for size, mean, _ in family.points]

    def leads(family: Family) -> bool:
        return any(
            not any(other <= size and lost < mean.value for other, lost in points) for size, mean, _ in family.points
        )

    return [family for family in families if family.first or leads(family)]


def _reach(loss: Loss) -> tuple[float, float]:
    """How far the interval reaches below and above the value; 0 where it is unknown."""
    return (0.0, 0.0) if loss.low is None or loss.high is None else (loss.value - loss.low, loss.high - loss.value)


def _picture(
    model: ModelFindings, families: Sequence[Family], title: str, which: int, scale: tuple[float, float]
) -> Figure:
    """One panel: the mean (0) or the worst text (1)."""
    names = [textwrap.wrap(short(f.name, 3 * LETTERS), LETTERS) or ["?"] for f in families]
    figure = page(WIDTH, max(HEIGHT, 1.5 + 0.17 * (sum(map(len, names)) + 1)), title)
    axes: Axes = figure.subplots()
    axes.tick_params(labelsize=SMALL)
    axes.set_yscale("log")
    unit, divisor = units_of(max(size for family in families for size, *_ in family.points))
    ends = [_draw(axes, family, turn, which, divisor) for turn, family in enumerate(families)]
    axes.axhline(1, color=REFERENCE, linestyle="--", linewidth=1)
    smallest = min(x for x, _, _ in ends)
    whole = f"full model, {model.full.num_bytes / divisor:.3g} {unit}" if model.full else "full model"
    axes.invert_xaxis()
    axes.set_ylim(*scale)
    axes.set_xlabel(f"size of the weights, {unit}")
    axes.set_ylabel("perplexity, × the full model's, log scale")
    axes.grid(axis="y")
    ticks(axes, scale, logarithmic=True)
    label_ends(
        axes, [*names, textwrap.wrap(whole, LETTERS)], [*ends, (smallest, 1.0, REFERENCE)], figure.get_figheight()
    )
    return figure


def _draw(axes: Axes, family: Family, turn: int, which: int, divisor: float) -> tuple[float, float, str]:
    """Draw one line, the first method's stronger; gives the x and y of its end, and its colour."""
    colour = COLOURS[turn % len(COLOURS)]
    x = [size / divisor * (1 + 0.004 * turn) for size, *_ in family.points]  # side by side
    losses = [pair[which] for _, *pair in family.points]
    y = [math.exp(loss.value) for loss in losses]
    reach = [_reach(loss) for loss in losses]
    below = [v - math.exp(loss.value - r[0]) for v, loss, r in zip(y, losses, reach, strict=True)]
    above = [math.exp(loss.value + r[1]) - v for v, loss, r in zip(y, losses, reach, strict=True)]
    axes.errorbar(
        x,
        y,
        yerr=[below, above] if any(above) else None,
        color=colour,
        marker=MARKERS[turn % len(MARKERS)],
        linestyle=REPAIRS[family.stroke % len(REPAIRS)],
        markerfacecolor="none" if family.thin else colour,
        linewidth=2.0 if family.first else 1.2,
        markersize=6.5 if family.first else 5.5,
        elinewidth=0.9,
        capsize=2,
        zorder=4 if family.first else 3,
    )
    return x[-1], y[-1], colour
