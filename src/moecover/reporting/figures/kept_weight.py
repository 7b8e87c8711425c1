"""What plans keep of the tasks' routing weight by layer: reads a usage entry, gives a figure with a panel per task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.errors import InputError
from moecover.reporting.figures.style import (
    COLOURS,
    MARKERS,
    REFERENCE,
    STROKES,
    Facts,
    Look,
    layer_axis,
    page,
    percent,
    short,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from numpy.typing import NDArray

PANEL, PANEL_HIGH = 3.2, 2.1  # inches
COLUMNS = 3


def kept_by_layer_picture(facts: Facts, methods: Mapping[str, Sequence[str]], keep: int) -> Figure:
    """Proportion of routing weight that each method keeps, by task and decoder layer.

    Args:
        facts: of `task_usage.usage`, one model's entry of usage.json.
        methods: by label, the names of its plans, all of the same budget; several (seeds, samples) are drawn as their
            mean with a band from the least to the greatest.
        keep: experts per layer that these plans keep.

    Raises:
        InputError: no method, or one without plans.
    """
    from matplotlib.ticker import PercentFormatter

    missing = [name for names in methods.values() for name in names if name not in facts["plans"]]
    if not methods or not all(methods.values()) or missing:
        raise InputError(f"nothing to draw: {'no plan ' + ', '.join(missing) if missing else 'a method has no plan'}")
    tasks, layers, chance = facts["tasks"], facts["layers"], keep / facts["experts"]
    columns = min(COLUMNS, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    names_a_line = max(2, columns)
    legend = 0.22 * math.ceil((len(methods) + 1) / names_a_line) + 0.1
    kept = f"{keep} of {facts['experts']} ({percent(chance)}) kept"
    title = f"The tasks' routing weight on kept experts: {kept}"
    figure = page(max(5.5, columns * PANEL), 0.8 + lines * PANEL_HIGH + legend, title)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    lowest, handles = chance, list[Any]()
    for number, (task, axes) in enumerate(zip(tasks, grid.flat, strict=False)):
        plans = facts["plans"]
        runs = [np.array([plans[name][task]["kept_weight"] for name in names]) for names in methods.values()]
        handles = _draw_runs(axes, layers, runs)
        handles.append(axes.axhline(chance, color=REFERENCE, linestyle="--", linewidth=1))
        lowest = min(lowest, *(float(values.min()) for values in runs))
        axes.set_title(short(task), loc="left")
        axes.grid(axis="y")
        layer_axis(axes, layers)
        if number + columns < len(tasks):
            axes.set_xlabel("")
        axes.tick_params(labelbottom=number + columns >= len(tasks))
    for axes in grid.flat[len(tasks) :]:
        axes.remove()
    grid[0, 0].set_ylim(max(0.0, lowest - 0.05), 1.02)
    grid[0, 0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.supylabel("share of routing weight", fontsize=9)
    labels = [f"{short(label)}{f', {len(names)} plans' if len(names) > 1 else ''}" for label, names in methods.items()]
    figure.legend(handles, [*labels, "share of experts kept"], loc="outside lower left", ncols=names_a_line)
    return figure


def _draw_runs(axes: Axes, layers: Sequence[int], methods: Sequence[NDArray[np.float64]]) -> list[Line2D]:
    """Draw each method's runs ``[run, layer]`` as their mean, with a band if there are several; gives the lines."""
    handles = []
    size = 4 if len(layers) <= 12 else 2.5
    for i, runs in enumerate(methods):
        colour, turn = COLOURS[i % len(COLOURS)], i // len(COLOURS)
        marker, stroke = MARKERS[i % len(MARKERS)], STROKES[turn % len(STROKES)]
        look = Look(color=colour, marker=marker, linestyle=stroke)
        handles += axes.plot(layers, runs.mean(axis=0), markersize=size, linewidth=1.2, **look)
        if len(runs) > 1:
            axes.fill_between(layers, runs.min(axis=0), runs.max(axis=0), color=colour, alpha=0.2, linewidth=0)
    return handles
