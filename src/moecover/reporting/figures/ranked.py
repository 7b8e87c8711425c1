"""The heat map of a large model: reads the facts of `explain`, draws a corpus's experts from its best to its worst.

Where a cell is too small for an outline, ids say nothing and the order does: what stays is blue, what goes is orange.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.reporting.figures.style import REFERENCE, Facts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from numpy.typing import NDArray

SMALLEST = 16  # pixels of a cell's shorter side below which experts are ranked
KEPT, REMOVED = ("#D6E6F4", "#08306B"), ("#FCD5B5", "#8C2D04")  # colours of no utility and of the most


def colours(ends: tuple[str, str]) -> LinearSegmentedColormap:
    """The colour map between two colours."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("", ends)


def by_rank(facts: Facts, corpus: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """A corpus's utilities from the best expert to the worst of every layer, and which of them stay.

    Returns:
        Percent of the layer, float64 ``[layer, rank]``; kept, bool of the same shape.
    """
    values = 100 * np.asarray(facts["utility"][corpus], dtype=np.float64)
    kept = np.zeros(values.shape, dtype=bool)
    for of_layer, row in zip(kept, facts["layers"], strict=True):
        of_layer[list(row["kept"])] = True
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(kept, order, axis=1)


def ranked_map(axes: Axes, facts: Facts, corpus: str, norm: Normalize) -> None:
    """Draw a corpus's panel, and the line up to which nothing is removed."""
    values, kept = by_rank(facts, corpus)
    for ends, hidden in ((KEPT, ~kept), (REMOVED, kept)):
        shown = np.ma.masked_array(values, hidden)
        axes.imshow(shown, cmap=colours(ends), norm=norm, aspect="auto", interpolation="none")
    covered = facts["overall"]["covered_rank"].get(corpus)
    if covered:
        axes.axvline(covered - 0.5, color=REFERENCE, linewidth=1.2, linestyle="--")


def ranked_handles(facts: Facts) -> tuple[list[Any], list[str]]:
    """Handles and names of the legend, which has the line only where a panel has one."""
    from matplotlib.lines import Line2D

    square: dict[str, Any] = {"linestyle": "none", "marker": "s", "markersize": 9, "markeredgecolor": "none"}
    middle = (colours(KEPT)(0.6), colours(REMOVED)(0.5))
    handles: list[Any] = [Line2D([], [], markerfacecolor=colour, **square) for colour in middle]
    names = ["kept", "removed"]
    if any(facts["overall"]["covered_rank"].values()):
        handles.append(Line2D([], [], color=REFERENCE, linewidth=1.2, linestyle="--"))
        names.append("every layer keeps all experts left of the line")
    return handles, names
