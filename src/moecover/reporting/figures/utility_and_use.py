"""How far utility on the corpora agrees with the tasks' use of experts, as figures: reads a usage entry."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moecover.reporting.data import TaskAgreement, Usage
from moecover.reporting.figures.lines import HEIGHT, LETTERS, SMALL, WIDTH, look_of
from moecover.reporting.figures.overlap import expected_overlap
from moecover.reporting.figures.style import FAINT, REFERENCE, Look, layer_axis, page, short
from moecover.reporting.findings import ModelFindings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def correlation_picture(model: ModelFindings, usage: Usage) -> Figure | None:
    """Rank correlation of the experts' utility on each corpus with their use by each task, over the layers."""
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
        shift = (turn - (len(corpora) - 1) / 2) * step
        _correlations(axes, found, tasks, shift, look_of(turn), short(corpus))
    axes.axvline(0, color=REFERENCE, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(tasks)), labels=[short(task, LETTERS) for task in tasks])
    axes.invert_yaxis()
    axes.set_xlabel("rank correlation with utility (Spearman)\nmark: mean, line: range over layers")
    axes.grid(axis="x")
    figure.legend(loc="outside lower left", ncols=2)
    return figure


def _correlations(
    axes: Axes, found: dict[str, TaskAgreement], tasks: list[str], shift: float, look: Look, name: str
) -> None:
    """Draw one corpus: by task a tick per layer, a line from the least to the greatest, and a mark at the mean."""
    colour = look["color"]
    for row, task in enumerate(tasks):
        values = [v for v in (found[task].spearman if task in found else ()) if v is not None]
        if not values:
            continue
        y = row + shift
        axes.plot([min(values), max(values)], [y, y], color=colour, linewidth=1.3, solid_capstyle="round")
        axes.plot(values, [y] * len(values), linestyle="none", marker="|", markersize=4, color=colour)
        mean, label = float(np.mean(values)), name if row == 0 else "_"  # "_": not in the legend
        axes.plot([mean], [y], linestyle="none", marker=look["marker"], markersize=6, color=colour, label=label)


def usage_by_layer_picture(model: ModelFindings, usage: Usage) -> Figure | None:
    """Overlap of each corpus's best experts with those that the tasks use most, by decoder layer, mean over tasks."""
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
            least, greatest = np.nanmin(table, axis=0), np.nanmax(table, axis=0)
            axes.fill_between(layers, least, greatest, color=look["color"], alpha=0.15, linewidth=0)
    if usage.keep and usage.experts:
        axes.axhline(expected_overlap(usage.keep, usage.experts), color=REFERENCE, linestyle="--", linewidth=1)
    layer_axis(axes, layers)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("overlap with a task's best (Jaccard)", color=FAINT)
    axes.grid(axis="y")
    figure.legend(loc="outside lower left", ncols=2)
    return figure
