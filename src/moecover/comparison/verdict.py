"""What a comparison found, in a few lines: the best method at each budget, its worst text, what is not resolved.

Runs of a method (seeds, calibration samples) are averaged. Tasks decide where there are any, else the perplexity over
the full model's: its geometric mean over the texts. Sentences on every difference are in results.md.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moecover.comparison.cells import FILE, FULL
from moecover.comparison.words import BETTER, NONE_FOUND, WORSE
from moecover.corpora.sources import set_name
from moecover.text import listed

if TYPE_CHECKING:
    from moecover.comparison.comparisons import ComparisonRecord
    from moecover.comparison.results import ResultCell, Results

MOST = 3  # budgets, or models, that have a line of their own; methods that are named where nothing is resolved


def verdict(results: Results) -> list[str]:
    """Lines on the best method at each budget (of several models, at all budgets) and one on the differences.

    Args:
        results: the content of results.json.

    Returns:
        One to four lines.
    """
    models = list(dict.fromkeys(cell["model"] for cell in results["cells"]))
    found = {name: _best(name, results) for name in models}
    if len(models) == 1:
        lines = [f"best {one}" for one in found[models[0]]]
    else:
        lines = [f"{name}: best {'; '.join(best)}" for name, best in found.items() if best]
    if len(lines) > MOST:
        lines[MOST - 1 :] = [f"and {len(lines) - MOST + 1} more {'budgets' if len(models) == 1 else 'models'}"]
    return [*lines, _differences(results["comparisons"])]


def _best(model: str, results: Results) -> list[str]:
    """The best method of a model at each budget, with what it gives and its worst text."""
    done = [cell for cell in results["cells"] if cell["model"] == model and cell["row"] is not None]
    full = [cell for cell in done if cell["method"] == FULL]
    planned = [cell for cell in done if cell["method"] not in (FULL, FILE)]
    rows = [cell["row"] or {} for cell in done]
    metrics = {n: about["metric"] for n, about in results["tasks"].items() if all(n in row["tasks"] for row in rows)}
    texts = [name for name in results["texts"] if all(name in row["perplexity"] for row in rows)]
    found = []
    for retain in sorted({cell["retain"] for cell in planned}):
        groups: dict[str, list[ResultCell]] = {}
        for cell in planned:
            if cell["retain"] == retain:
                groups.setdefault(_name(cell, planned), []).append(cell)
        told = {name: _worth(cells, full, metrics, texts) for name, cells in groups.items()}
        best = min(told, key=lambda name: told[name][0])
        found.append(f"at {100 * retain:g} %: {best}, {told[best][1]}{_worst_text(groups[best], full, texts)}")
    return found if metrics or texts else []


def _name(cell: ResultCell, cells: Sequence[ResultCell]) -> str:
    """A method's label, with the calibration set where the label has several."""
    sets = {tuple(other["calibration"]) for other in cells if other["label"] == cell["label"]}
    return f"{cell['label']} on {set_name(cell['calibration'], ' + ')}" if len(sets) > 1 else cell["label"]


def _worth(
    cells: Sequence[ResultCell], full: Sequence[ResultCell], metrics: Mapping[str, str], texts: Sequence[str]
) -> tuple[float, str]:
    """What a method gives: a number of which less is better, and words."""
    if metrics:
        score = _score(cells, metrics)
        of_full = f" (full model {_score(full, metrics):.3f})" if full else ""
        tasks = f"mean of {len(metrics)} tasks" if len(metrics) > 1 else next(iter(metrics))
        return -score, f"{tasks} {score:.3f}{of_full}"
    mean, whole = (sum(_log(one, text) for text in texts) / max(len(texts), 1) for one in (cells, full or cells))
    return mean, f"perplexity x{math.exp(mean - whole):.2f}" if full else f"perplexity {math.exp(mean):.2f}"


def _score(cells: Sequence[ResultCell], metrics: Mapping[str, str]) -> float:
    """The mean over runs and tasks."""
    rows = [cell["row"] or {} for cell in cells]
    values: list[float] = [row["tasks"][task][metric]["value"] for row in rows for task, metric in metrics.items()]
    return statistics.fmean(values)


def _log(cells: Sequence[ResultCell], text: str) -> float:
    """The mean over runs of the log perplexity on a text."""
    return statistics.fmean(math.log((cell["row"] or {})["perplexity"][text]["perplexity"]) for cell in cells)


def _worst_text(cells: Sequence[ResultCell], full: Sequence[ResultCell], texts: Sequence[str]) -> str:
    """The text on which the perplexity rises most; nothing where the full model was not measured, or on one text."""
    if not full or len(texts) < 2:
        return ""
    lost = {text: _log(cells, text) - _log(full, text) for text in texts}
    worst = max(lost, key=lambda text: lost[text])
    return f", worst text {worst} x{math.exp(lost[worst]):.2f}"


def _differences(comparisons: Sequence[ComparisonRecord]) -> str:
    """How many differences of the studied method are resolved, and from which methods it is not told apart."""
    if not comparisons:
        return "no two methods are compared"
    verdicts = [one["verdict"] for one in comparisons]
    studied = listed(list(dict.fromkeys(one["a"] for one in comparisons))[:MOST])
    line = f"{studied}: {BETTER} in {verdicts.count(BETTER)} of {len(verdicts)} comparisons, "
    line += f"{WORSE} in {verdicts.count(WORSE)}"
    budgets: dict[str, dict[str, None]] = {}
    for one in comparisons:
        if one["verdict"] == NONE_FOUND:
            budgets.setdefault(one["b"], {})[f"{100 * one['retain']:g}"] = None
    if not budgets:
        return f"{line}; all are resolved"
    named = [f"{name} at {listed(list(at))} %" for name, at in list(budgets.items())[:MOST]]
    named += [f"{len(budgets) - MOST} more methods"] if len(budgets) > MOST else []
    reasons = {one["test"].partition("no test: ")[2] for one in comparisons if one["verdict"] == NONE_FOUND} - {""}
    why = f" (too little text: {'; '.join(sorted(reasons))})" if reasons else ""
    return f"{line}; {NONE_FOUND} against {listed(named)}{why}"
