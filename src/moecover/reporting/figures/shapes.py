"""The loss over shapes of equal bytes, and over sizes: reads what a plan and evaluations found, gives figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moecover.reporting.figures.lines import look_of
from moecover.reporting.figures.style import BLUE, REFERENCE, VERMILION, page, percent, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 8.2, 4.6  # inches
MOST = 6  # corpora with a line of their own


def shapes_picture(shapes: Sequence[Mapping[str, Any]], keep: int, width: int | None) -> Figure:
    """Held-out loss by shape, few whole experts on the left, many thin ones on the right.

    Args:
        shapes: entries of a plan's ``found["shapes"]``: ``keep``, ``width``, ``gap`` in nats by corpus, ``loss``, the
            mean with the worst corpus counted twice.
        keep: experts of the shape that was chosen.
        width: channels of each, None for all.
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
    axes.set_ylabel("loss before the repair, nats")
    axes.grid(axis="y")
    figure.legend(loc="outside lower left", ncols=4)
    return figure


def sizes_picture(points: Sequence[tuple[str, float, float, float]], full: float) -> Figure:
    """Perplexity against the model's own over the size of the checkpoint.

    Args:
        points: label, megabytes, mean increase and the worst text's, as proportions.
        full: megabytes of the model itself.
    """
    from matplotlib.ticker import PercentFormatter

    ordered = sorted(points, key=lambda one: one[1])
    worst = max(point[3] for point in ordered)
    figure = page(WIDTH, HEIGHT, f"What smaller costs: up to {percent(worst)} on the worst text")
    axes: Axes = figure.subplots()
    sizes = [point[1] for point in ordered]
    axes.plot([*sizes, full], [*(point[2] for point in ordered), 0], color=BLUE, marker="o", label="mean over texts")
    axes.plot([*sizes, full], [*(point[3] for point in ordered), 0], color=VERMILION, marker="D", label="worst text")
    for label, megabytes, _, top in ordered:
        axes.annotate(label, (megabytes, top), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
    axes.annotate("the model", (full, 0), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.margins(y=0.15)
    axes.set_xlabel("size of the checkpoint, MB")
    axes.set_ylabel("perplexity against the model's own")
    axes.grid(axis="y")
    figure.legend(loc="outside lower left", ncols=2)
    return figure
