"""The loss over shapes of equal bytes, and over sizes: reads what a plan and evaluations found, gives figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from moecover.reporting.figures.lines import look_of
from moecover.reporting.figures.style import BLUE, REFERENCE, VERMILION, page, percent, short
from moecover.reporting.numbers import minus, units_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 8.2, 4.6  # inches
MOST = 6  # corpora with a line of their own
ALIKE = 0.02  # sizes that differ by this share at most are about equal


class SizePoint(NamedTuple):
    """A checkpoint: its shape, its bytes, and by what share perplexity rises in the mean and on the worst text."""

    label: str
    num_bytes: int
    mean: float
    worst: float


def shapes_picture(shapes: Sequence[Mapping[str, Any]], keep: int, width: int | None, *, repaired: bool) -> Figure:
    """Held-out loss by shape, few whole experts on the left, many thin ones on the right.

    Args:
        shapes: entries of a plan's ``found["shapes"]``: ``keep``, ``width``, ``gap`` in nats by corpus, ``loss``, the
            mean with the worst corpus counted twice.
        keep: experts of the shape that was chosen.
        width: channels of each, None for all.
        repaired: the checkpoint has a repair, which comes after the shapes were measured.
    """
    ordered = sorted(shapes, key=lambda one: one["keep"])
    chosen = next(i for i, one in enumerate(ordered) if (one["keep"], one["width"]) == (keep, width or one["width"]))
    shape = f"{ordered[chosen]['keep']} experts of {ordered[chosen]['width']} channels"
    least = ordered[chosen]["loss"] == min(one["loss"] for one in ordered)
    figure = page(WIDTH, HEIGHT, f"At this size {shape} {'lose least' if least else 'were chosen'} on held-out text")
    axes: Axes = figure.subplots()
    corpora = sorted(ordered[chosen]["gap"], key=lambda name: -ordered[chosen]["gap"][name])
    places = range(len(ordered))
    for turn, name in enumerate(corpora[:MOST]):
        axes.plot(places, [one["gap"][name] for one in ordered], **look_of(turn + 1), linewidth=1, label=short(name))
    axes.plot(
        places, [one["loss"] for one in ordered], color=BLUE, marker="o", linewidth=2.5, label="mean, the worst twice"
    )
    axes.axvline(chosen, color=REFERENCE, linestyle="--", linewidth=1, label="chosen")
    axes.set_xticks(places, [f"{one['keep']} x {one['width']}" for one in ordered])
    axes.set_xlabel("experts x channels of each, about the same bytes")
    axes.set_ylabel("loss before the repair, nats" if repaired else "loss, nats")
    axes.grid(axis="y")
    figure.legend(loc="outside lower left", ncols=4)
    return figure


def best_of_size(points: Sequence[SizePoint]) -> list[SizePoint]:
    """Of the points of about equal bytes, the one with the least mean; largest first."""
    groups: list[list[SizePoint]] = []
    for point in sorted(points, key=lambda one: -one.num_bytes):
        if groups and point.num_bytes >= (1 - ALIKE) * groups[-1][0].num_bytes:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [min(group, key=lambda one: one.mean) for group in groups]


def sizes_picture(points: Sequence[SizePoint], full: int) -> Figure:
    """Perplexity against the model's own over the size of the checkpoint, the largest first.

    Lines join the best of every size; its other shapes are marks alone.

    Args:
        points: one a checkpoint.
        full: bytes of the model itself.
    """
    from matplotlib.ticker import PercentFormatter

    line, worst = best_of_size(points), max(point.worst for point in points)
    cost = f"up to {percent(worst)}" if worst > 0 else f"nothing, {minus(percent(worst))}"
    figure = page(WIDTH, HEIGHT, f"What smaller costs: {cost} on the worst text")
    axes: Axes = figure.subplots()
    unit, divisor = units_of(full)
    at = [full / divisor, *(point.num_bytes / divisor for point in line)]
    axes.plot(at, [0, *(point.mean for point in line)], color=BLUE, marker="o", label="mean over texts")
    axes.plot(at, [0, *(point.worst for point in line)], color=VERMILION, marker="D", label="worst text")
    for point in points:
        x = point.num_bytes / divisor
        if point not in line:
            axes.plot([x], [point.mean], color=BLUE, marker="o", linestyle="none", markerfacecolor="none")
            axes.plot([x], [point.worst], color=VERMILION, marker="D", linestyle="none", markerfacecolor="none")
        place = (x, max(point.mean, point.worst))
        axes.annotate(point.label, place, textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
    axes.annotate("the model", (at[0], 0), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.margins(y=0.15)
    axes.invert_xaxis()
    axes.set_xlabel(f"size of the checkpoint, {unit}")
    axes.set_ylabel("perplexity against the model's own")
    axes.grid(axis="y")
    figure.legend(loc="outside lower left", ncols=2)
    return figure
