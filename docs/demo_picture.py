"""The chart above the README's table: reads docs/demo-results.json, draws what each method loses."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from moecover.cli.demo import rows_from_json
from moecover.cli.tour import Row

CALIBRATED = ("encyclopedia-heldout", "web-heldout")
SERIES = (("calibrated domains", CALIBRATED, "o"), ("a domain that no method was given", ("python-heldout",), "D"))


def name_of(row: Row) -> str:
    """The method of a row, without its shape or its seeds."""
    return row.label.partition(",")[0]


def ratio(row: Row, full: Row, texts: tuple[str, ...]) -> float:
    """Perplexity over the full model's, geometric mean over some texts."""
    return math.exp(statistics.fmean(math.log(row.mean(text) / full.mean(text)) for text in texts))


def draw_demo(results: Path, path: Path) -> None:
    """Draw one panel a budget: a row a method, the perplexity over the full model's on both kinds of domains."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from moecover.reporting.figures.style import COLOURS, STYLE

    full, *rows = rows_from_json(results.read_text(encoding="utf-8"))
    budgets = sorted({row.retain for row in rows}, reverse=True)
    last = sorted((row for row in rows if row.retain == budgets[-1]), key=lambda row: -row.geometric_mean())
    names = [name_of(row) for row in last]  # the same order in every panel
    with rc_context(STYLE):
        figure = Figure(figsize=(9.5, 3.0), layout="constrained")
        for axis, budget in zip(figure.subplots(1, len(budgets), sharey=True), budgets, strict=True):
            by_name = {name_of(row): row for row in rows if row.retain == budget}
            shown = [by_name[name] for name in names]
            for (label, texts, mark), colour in zip(SERIES, COLOURS, strict=False):
                values = [ratio(row, full, texts) for row in shown]
                axis.plot(values, range(len(values)), mark, color=colour, label=label)
            axis.set_yticks(range(len(names)), names)
            axis.set_xscale("log")
            ticks = [1, 1.5, 2, 3, 4, 6, 8]
            axis.set_xlim(0.97, 8.6)
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.set_xticks([], minor=True)
            axis.grid(axis="x")
            axis.set_title(f"{budget:.0%} of the experts' bytes")
            axis.set_xlabel("perplexity over the full model's (1: nothing lost)")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
        figure.savefig(path, dpi=130, metadata={"Software": None})
