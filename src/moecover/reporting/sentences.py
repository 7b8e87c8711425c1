"""What was found, in sentences: the summary of a model, and lines on memory, usage and the grid."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from moecover.comparison.cells import FILE
from moecover.comparison.words import NONE_FOUND
from moecover.corpora.sources import in_rows
from moecover.evaluation.artifact import FULL
from moecover.planning.shapes import shape_name
from moecover.reporting.comparison_tables import mark_of
from moecover.reporting.data import Cell, Comparison, Run, Usage
from moecover.reporting.figures.heatmap import is_ranked
from moecover.reporting.figures.overlap import expected_overlap
from moecover.reporting.findings import Estimate, ModelFindings, Point, Series, failed
from moecover.reporting.hero import chosen
from moecover.reporting.numbers import percentage, perplexity_text, points, size
from moecover.text import counted, listed

if TYPE_CHECKING:
    from moecover.reporting.figures.style import Facts


def summary_of(model: ModelFindings) -> tuple[str, ...]:
    """The first sentences to read about a model."""
    sentences = [*_full_model(model), *_budgets(model), *_caveats(model)]
    firsts = {c.a: c.a.removesuffix(f", {model.shapes.get(c.a)}") for c in model.comparisons}
    for first in dict.fromkeys(firsts.values()):
        for kind, word in (("tasks", "accuracy"), ("perplexity", "perplexity")):
            mine = [c for c in model.comparisons if firsts[c.a] == first and c.kind == kind]
            sentences += [tally(mine, f"{first} on {word}")] if mine else []
    return tuple(sentences)


def verdicts_of(comparisons: Iterable[Comparison]) -> tuple[tuple[str, str], ...]:
    """The CSS class and the sentence of every comparison."""
    return tuple((mark_of(c.verdict), c.words) for c in comparisons if c.words)


def tally(comparisons: Iterable[Comparison], what: str) -> str:
    """How often the method was better, worse or neither, in a sentence."""
    verdicts = [mark_of(c.verdict) for c in comparisons]
    better, worse, same = (verdicts.count(v) for v in ("better", "worse", "same"))
    total = counted(len(verdicts), "comparison")
    return f"{what}: better in {better}, worse in {worse}, {NONE_FOUND} in {same} of {total}."


def map_words(facts: Facts, method: str) -> str:
    """How the heat map of a plan is read; ``method`` is what kept the experts."""
    if is_ranked(facts):
        return (
            f"Blue experts are kept by {method}, orange ones are removed; every panel is sorted from its corpus's best "
            "expert to the worst."
        )
    return f"Outlined experts are kept by {method}."


def _full_model(model: ModelFindings) -> list[str]:
    """How well the full model does."""
    full = model.full
    if full is None:
        return ["The full model was not evaluated, so the cost of pruning is unknown."]
    if full.mean:
        error = f" (standard error {points(full.mean.stderr)})" if full.mean.stderr is not None else ""
        tasks = counted(len(model.tasks), "task")
        return [
            f"The full model answers {points(full.mean.value)}% of the questions correctly{error}, the mean of {tasks}."
        ]
    if full.perplexity:
        known = [f"{perplexity_text(e.value)} on {text}" for text, e in full.perplexity.items()]
        return [f"The full model's perplexity is {listed(known)}."]
    return []


def _budgets(model: ModelFindings) -> list[str]:
    """What the main method reaches, budget by budget, largest first."""
    if model.main is None:
        return ["No pruned variant finished."]
    return [_at_budget(model, series, p) for series, p in chosen(model)]


def _caveats(model: ModelFindings) -> list[str]:
    """What the run cannot say."""
    found: list[str] = []
    if not model.series:
        return found
    if not model.tasks:
        found.append("No tasks were scored: perplexity alone does not say what a model can still do.")
    if not model.comparisons and len(model.series) == 1:
        found.append("Only one method was run, so there is nothing to compare it with.")
    elif not model.comparisons:
        found.append("No comparison was tested: read differences between methods with care.")
    if all(p.runs == 1 for s in model.series for p in s.points):
        found.append(
            "Every method ran once, on one calibration sample: single plans are compared here, and nothing follows for "
            "the methods. The error bars reflect the number of questions, not the variation over seeds and calibration "
            "samples."
        )
    return found


def _at_budget(model: ModelFindings, series: Series, p: Point) -> str:
    """One budget in a sentence: what the main method reaches, and the best of the others."""
    rivals_of = [s for s in model.series if s.base != series.base]
    others, method = [(_named(s, q), q) for s in rivals_of for q in s.points if q.retain == p.retain], series.name
    kept = f"{p.keep} per layer" if p.width is None else f"{p.keep} of {p.width} channels each per layer"
    head = f"With {percentage(p.retain)} of the {model.kept_of} ({kept}) {method} reaches"
    if p.mean:
        rivals = [(name, q.mean) for name, q in others if q.mean]
        best = max(rivals, key=lambda r: r[1].value, default=None)
        rest = f"; the best of the others is {best[0]} with {_accuracy(best[1])}" if best else ""
        return f"{head} {_accuracy(p.mean)}{rest}."
    if not p.perplexity:
        return f"{head} no result that all of its runs share."
    lower = []
    for text, e in p.perplexity.items():
        found = [(name, q.perplexity[text]) for name, q in others if text in q.perplexity]
        least = min(found, key=lambda r: r[1].value, default=None)
        if least and least[1].value < e.value and perplexity_text(least[1].value) != perplexity_text(e.value):
            lower.append(f"{least[0]} on {text} ({perplexity_text(least[1].value)})")
    reached = listed([f"{perplexity_text(e.value)} on {text}" for text, e in p.perplexity.items()])
    rest = f"; lower: {listed(lower)}" if lower else "; no other method is lower" if others else ""
    return f"{head} a perplexity of {reached}{rest}."


def _named(series: Series, p: Point) -> str:
    return series.name if p.width is None else f"{series.name}, {shape_name(p.keep, p.width)}"


def _accuracy(e: Estimate) -> str:
    return f"{points(e.value)}%{'' if e.stderr is None else f' ±{points(e.stderr)}'}"


# ---------------------------------------------------------------------------------------------------------- other lines
def memory_words(model: ModelFindings) -> str:
    """Peak memory of the run in a sentence; empty where it is not known."""
    peaks = [
        (model.about.get("peak_rss_bytes"), "of main memory"),
        (model.about.get("peak_device_bytes"), "of device memory"),
    ]
    known = [f"{size(value)} {what}" for value, what in peaks if isinstance(value, int)]
    if not known:
        return ""
    return f"The weights take as much memory as disk space. Profiling and evaluation used at most {listed(known)}."


def usage_words(usage: Usage) -> str:
    """How far utility on the corpora agrees with the tasks' use of experts, in a sentence; empty if not measured."""
    parts = []
    for corpus, tasks in usage.corpora.items():
        ranks = [v for t in tasks.values() for v in t.spearman if v is not None]
        overlaps = [v for t in tasks.values() for v in t.jaccard if v is not None]
        if ranks and overlaps:
            parts.append(f"{statistics.fmean(ranks):.2f} and {statistics.fmean(overlaps):.2f} on {corpus}")
    if not parts:
        return ""
    best = "the best experts"
    if usage.keep and usage.experts:
        chance = expected_overlap(usage.keep, usage.experts)
        best = f"the best {usage.keep} of {usage.experts} experts ({chance:.2f} by chance)"
    return (
        f"Rank correlation of utility with use by the tasks, and overlap of {best}, averaged over tasks and layers: "
        f"{listed(parts)}."
    )


def cells_in_words(run: Run) -> str:
    """How many cells there are, and how they ended."""
    done, not_done = sum(c.status == "done" for c in run.cells), len(failed(run))
    hours = sum(c.wall_s or 0.0 for c in run.cells) / 3600
    took = f", {hours:.1f} hours of computation" if hours >= 0.1 else ""
    return f"{counted(done, 'cell')} done{f', {not_done} failed' if not_done else ''}{took}"


def grid_in_words(cells: Sequence[Cell]) -> str:
    """The grid in a sentence: methods, budgets, calibration corpora and samples."""
    pruned = [c for c in cells if c.method not in (FULL, FILE)]
    if not pruned:
        return "No pruned variant was requested."
    budgets = [percentage(r) for r in sorted({c.retain for c in pruned}, reverse=True)]
    labels, samples = {c.parts[0] for c in pruned}, {c.sample for c in pruned if c.calibration}
    changes = [change or "without repair" for change in dict.fromkeys(c.parts[1] for c in pruned)]
    corpora = list(dict.fromkeys(itertools.chain.from_iterable(c.calibration for c in pruned)))
    thin = "' bytes" if any(c.width is not None for c in pruned) else ""
    text = f"{counted(len(labels), 'method')}{f' ({listed(changes)})' if any(c.parts[1] for c in pruned) else ''}"
    text += f" at {listed(budgets)} of the experts{thin}"
    text += f", calibrated on {listed(in_rows(corpora))}" if corpora else ""
    return f"{text}, {counted(len(samples), 'calibration sample')}." if len(samples) > 1 else f"{text}."
