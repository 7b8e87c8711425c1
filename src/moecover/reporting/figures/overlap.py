"""How far the calibration corpora agree, as a figure: overlap of their best experts, correlation of their orders."""

from __future__ import annotations

import itertools
import math
import textwrap
from typing import TYPE_CHECKING

import numpy as np

from moecover.planning.explaining.text import MOST_PAIRS
from moecover.reporting.figures.style import COLOURS, MARKERS, REFERENCE, STROKES, Facts, layer_axis, page, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray


def expected_overlap(keep: int, experts: int) -> float:
    """Mean Jaccard index of two sets of ``keep`` of ``experts``, drawn independently and uniformly at random."""
    ways = {
        common: math.comb(keep, common) * math.comb(experts - keep, keep - common)
        for common in range(max(0, 2 * keep - experts), keep + 1)
    }
    total = math.comb(experts, keep)
    return math.fsum(number / total * (common / (2 * keep - common)) for common, number in ways.items())


def overlap_picture(facts: Facts) -> Figure:
    """How far the corpora agree on their best experts and on the ranking of all, by decoder layer.

    With more than `MOST_PAIRS` pairs of corpora, two matrices of the means over the layers instead.

    Args:
        facts: of `explain`, with at least two corpora.
    """
    rows, keep = facts["layers"], facts["keep"]
    layers = [row["decoder_layer"] for row in rows]
    pairs = list(itertools.combinations(facts["corpora"], 2))
    if len(pairs) > MOST_PAIRS:
        return _matrices(facts)
    names = [f"{short(a)} and {short(b)}" for a, b in pairs]
    legend = 0.9 + 0.085 * max(len(name) for name in names)
    width = min(12.0, max(5.5, 4 + 0.12 * len(rows))) + legend
    figure = page(width, max(5.5, 1 + 0.22 * len(pairs)), _title(facts))
    upper, lower = figure.subplots(2, 1, sharex=True)
    parts = {
        "jaccard": (upper, expected_overlap(keep, facts["experts"]), f"overlap of the best {keep}\n(Jaccard index)"),
        "spearman": (lower, 0.0, "agreement on the ranking of all\n(Spearman's rank correlation)"),
    }
    size = 4 if len(rows) <= 30 else 2.5
    for measure, (axes, chance, label) in parts.items():
        for i, (a, b) in enumerate(pairs):
            values = np.array([row["agreement"][f"{a} | {b}"][measure] for row in rows], dtype=np.float64)
            turn = i // len(COLOURS)
            look = {"marker": MARKERS[turn % len(MARKERS)], "linestyle": STROKES[turn % len(STROKES)]}
            axes.plot(layers, values, color=COLOURS[i % len(COLOURS)], markersize=size, linewidth=1.2, **look)
        lines = axes.get_lines()
        reference = axes.axhline(chance, color=REFERENCE, linestyle="--", linewidth=1)
        known = [v for row in rows for pair in row["agreement"].values() if (v := pair[measure]) is not None]
        axes.set_ylim(min(0.0, min(known, default=0.0)) - 0.04, 1.04)
        axes.set_ylabel(label)
        axes.grid(axis="y")
    layer_axis(lower, layers)
    figure.legend([*lines, reference], [*names, "expected by chance"], loc="outside right upper")
    return figure


def _title(facts: Facts) -> str:
    return f"How far the corpora agree on their best {facts['keep']} of {facts['experts']} experts"


def _matrices(facts: Facts) -> Figure:
    """Two matrices, corpora by corpora, of means over the layers: overlap of the best experts, rank correlation."""
    corpora, keep = facts["corpora"], facts["keep"]
    side = max(3.2, 0.42 * len(corpora) + 0.07 * max(map(len, corpora)))
    figure = page(2 * side + 1.0, side + 1.3, f"{_title(facts)}, mean over {len(facts['layers'])} layers")
    chance = f"{expected_overlap(keep, facts['experts']):.2f}"
    parts = {
        "jaccard": f"overlap of the best {keep} (Jaccard index), by chance {chance}",
        "spearman": "agreement on the ranking of all\n(Spearman's rank correlation), by chance 0",
    }
    for axes, (measure, label) in zip(figure.subplots(1, 2, sharey=True), parts.items(), strict=True):
        table = np.full((len(corpora), len(corpora)), np.nan)
        for (i, one), (j, two) in itertools.combinations(enumerate(corpora), 2):
            value = facts["overall"]["agreement"][f"{one} | {two}"][measure]
            table[i, j] = table[j, i] = np.nan if value is None else value
        axes.imshow(table, cmap="cividis", vmin=min(0.0, np.nanmin(table, initial=0.0)), vmax=1.0)
        _write_values(axes, table)
        axes.set_xticks(range(len(corpora)), list(map(short, corpora)), rotation=90)
        axes.set_yticks(range(len(corpora)), list(map(short, corpora)))
        axes.set_title("\n".join(textwrap.wrap(label, 44)), fontsize=9)
    return figure


def _write_values(axes: Axes, table: NDArray[np.float64]) -> None:
    """Write every value off the diagonal into its cell, without the zero before the point; "-" where there is none."""
    for i, j in np.ndindex(table.shape):
        if i == j:
            continue
        value = float(table[i, j])
        if math.isnan(value):
            text, colour = "-", REFERENCE
        else:
            text = f"{value:.2f}"[1 if 0 <= value < 0.995 else 0 :]
            colour = "black" if value > 0.5 else "white"
        axes.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
