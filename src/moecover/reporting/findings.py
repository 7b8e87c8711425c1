"""What a run of `compare` found: reads a `Run`, gives one estimate for each model, method and budget.

The runs of one method at one budget (seeds, calibration samples) become one estimate with its standard error. All
numbers come from results.json: nothing is measured or tested here, and the verdicts are those of `compare`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue

from moecover.comparison.cells import FILE
from moecover.corpora.sources import set_name
from moecover.corpora.windows import split_by_kind
from moecover.evaluation.artifact import FULL
from moecover.planning.methods import default_method
from moecover.reporting.data import Cell, Comparison, Cut, Loss, Row, Run, ScoreRow, Usage


@dataclass(frozen=True)
class Estimate:
    """The mean of one or more runs, its standard error (None if unknown), and the runs themselves."""

    value: float
    stderr: float | None
    runs: tuple[float, ...]


def over_runs(runs: Sequence[float], stderrs: Sequence[float | None] = ()) -> Estimate:
    """Combine runs into one estimate.

    Two variances add up: that between runs (sample variance divided by the number of runs), and that of the sampled
    questions (the mean squared standard error, which further runs on the same questions do not reduce). If neither is
    known, there is no standard error.

    Args:
        runs: the value of each run.
        stderrs: the standard error of each run over its questions; None where unknown.
    """
    if not all(map(math.isfinite, runs)):
        return Estimate(next(v for v in runs if not math.isfinite(v)), None, tuple(runs))
    between = statistics.variance(runs) / len(runs) if len(runs) > 1 else None
    known = [s**2 for s in stderrs if s is not None]
    within = statistics.fmean(known) if known and len(known) == len(runs) else None
    parts = [p for p in (between, within) if p is not None]
    return Estimate(statistics.fmean(runs), math.sqrt(sum(parts)) if parts else None, tuple(runs))


def over_runs_log(runs: Sequence[float]) -> Estimate:
    """Combine perplexities into their geometric mean; its standard error is that of the mean log times the mean."""
    logs = over_runs([math.log(v) for v in runs])
    value = math.exp(logs.value) if math.isfinite(logs.value) else logs.value
    return Estimate(value, None if logs.stderr is None else value * logs.stderr, tuple(runs))


@dataclass(frozen=True)
class Point:
    """One method at one budget.

    ``num_bytes`` is the size of the weights, ``retain`` the proportion of experts kept, or of their bytes where they
    are thinner: of ``width`` channels, None for all.
    """

    retain: float
    keep: int
    width: int | None
    num_bytes: int
    tasks: dict[str, Estimate]
    mean: Estimate | None
    perplexity: dict[str, Estimate]
    kl: dict[str, Estimate]
    top1: dict[str, Estimate]
    others: dict[tuple[str, str], Estimate]  # by task and metric: those that do not enter the mean
    runs: int
    cells: tuple[str, ...]
    losses: Mapping[tuple[str, ...], Loss]  # against the full model, by kind, then the tasks or texts of a mean


@dataclass(frozen=True)
class Series:
    """One method with one merge and repair, over the budgets, largest first, whole experts before thinner ones.

    ``method`` is its name in plans, ``base`` its label on the page without merge and repair, which ``changes`` names.
    """

    base: str
    changes: str
    method: str
    points: tuple[Point, ...]

    @property
    def name(self) -> str:
        """Its label on the page."""
        return f"{self.base} + {self.changes}" if self.changes else self.base


@dataclass(frozen=True)
class ModelFindings:
    """The results of one model."""

    name: str
    about: dict[str, JsonValue]
    full: Point | None
    series: tuple[Series, ...]
    tasks: tuple[str, ...]  # those that enter the mean
    texts: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    plans: tuple[Cell, ...]  # cells of the main method whose kept experts are shown, one per budget
    cut: tuple[Cut, ...] = ()  # tasks with items that are longer than the model's positions
    by_size: tuple[Comparison, ...] = ()  # of files with what takes about their bytes
    files: tuple[tuple[str, Point], ...] = ()  # further files of the model, by name
    near: tuple[str, ...] = ()  # texts of the kind of a calibration corpus, as far as their names tell
    shapes: Mapping[str, str] = field(default_factory=dict)  # of thinner experts, by the label that ends with it

    @property
    def far(self) -> tuple[str, ...]:
        """The texts that are not near."""
        return tuple(text for text in self.texts if text not in self.near)

    @property
    def kept_of(self) -> str:
        """What budgets are a proportion of."""
        return "experts' bytes" if self.thin else "experts"

    @property
    def budgets(self) -> list[float]:
        """The proportions of experts kept, largest first: the order of everything on the page."""
        return sorted({p.retain for s in self.series for p in s.points}, reverse=True)

    @property
    def thin(self) -> bool:
        """Whether some experts are thinner, so that budgets are shares of bytes."""
        return any(p.width is not None for s in self.series for p in s.points)

    @property
    def main(self) -> Series | None:
        """The method that the page is about: its series comes first."""
        return self.series[0] if self.series else None


def mean_metric(run: Run, task: str) -> str:
    """The metric of a task that enters the mean."""
    return str(run.tasks.get(task, {}).get("metric") or "acc")


def mean_over_tasks(scores: Iterable[ScoreRow]) -> ScoreRow:
    """Mean over tasks; the standard error treats the tasks' questions as independent samples."""
    rows = list(scores)
    errors = [row.stderr for row in rows]
    stderr = None if None in errors else math.sqrt(sum(e**2 for e in errors if e is not None)) / len(rows)
    return ScoreRow(value=statistics.fmean(row.value for row in rows), stderr=stderr)


def _estimated(scores: Sequence[ScoreRow]) -> Estimate:
    return over_runs([s.value for s in scores], [s.stderr for s in scores])


def _point(cells: Sequence[Cell], run: Run, tasks: Sequence[str], texts: Sequence[str]) -> Point:
    """Combine the runs of one method at one budget; results that some of them lack are left out."""
    rows = [cell.row for cell in cells if cell.row is not None]
    scores = _scores(rows, run, tasks)
    complete = bool(tasks) and len(scores) == len(tasks)
    means = [mean_over_tasks([found[i] for found in scores.values()]) for i in range(len(rows))] if complete else []
    texts_read = {t: [row.perplexity[t] for row in rows] for t in texts if all(t in row.perplexity for row in rows)}
    return Point(
        retain=cells[0].retain,
        keep=rows[0].keep,
        width=cells[0].width or (rows[0].plan.width if rows[0].plan else None),
        num_bytes=round(statistics.fmean(row.num_bytes for row in rows)),
        tasks={t: _estimated(s) for t, s in scores.items()},
        mean=_estimated(means) if complete else None,
        perplexity={t: over_runs_log([v.perplexity for v in found]) for t, found in texts_read.items()},
        kl=_known({t: [v.kl for v in found] for t, found in texts_read.items()}),
        top1=_known({t: [v.top1 for v in found] for t, found in texts_read.items()}),
        others=_other_metrics(rows, run),
        runs=len(rows),
        cells=tuple(cell.id for cell in cells),
        losses={
            (loss.kind, *loss.names): loss
            for loss in run.losses
            if (loss.model, loss.label, loss.retain, loss.calibration)
            == (cells[0].model, cells[0].label, cells[0].retain, cells[0].calibration)
        },
    )


def _scores(rows: Sequence[Row], run: Run, tasks: Sequence[str]) -> dict[str, list[ScoreRow]]:
    """The runs' scores by the metric that enters the mean, for each task that all runs have."""
    metrics = {task: mean_metric(run, task) for task in tasks}
    shared = [t for t in tasks if all(metrics[t] in row.tasks.get(t, {}) for row in rows)]
    return {t: [row.tasks[t][metrics[t]] for row in rows] for t in shared}


def _other_metrics(rows: Sequence[Row], run: Run) -> dict[tuple[str, str], Estimate]:
    """By task and metric, the scores that do not enter the mean, where all runs have them."""
    named = {(t, m) for row in rows for t, found in row.tasks.items() for m in found if m != mean_metric(run, t)}
    return {
        (t, m): _estimated([row.tasks[t][m] for row in rows])
        for t, m in sorted(named)
        if all(m in row.tasks.get(t, {}) for row in rows)
    }


def _known(runs: Mapping[str, Sequence[float | None]]) -> dict[str, Estimate]:
    """The estimates of the texts for which every run has a value."""
    found = {t: [v for v in values if v is not None] for t, values in runs.items()}
    return {t: over_runs(values) for t, values in found.items() if len(values) == len(runs[t])}


def _names(cells: Sequence[Cell]) -> dict[str, tuple[str, str]]:
    """By cell id, the method's name on the page, and its merge and repair.

    The name is the label without these and without a shape, with the calibration set if one label has several.
    """
    calibrations: dict[str, set[tuple[str, ...]]] = {}
    for cell in cells:
        calibrations.setdefault(cell.label, set()).add(tuple(cell.calibration))
    found = {}
    for cell in cells:
        base, changes = cell.parts
        several = len(calibrations[cell.label]) > 1 and cell.calibration
        found[cell.id] = (f"{base} on {set_name(cell.calibration, ' + ')}" if several else base, changes)
    return found


def _unique(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _main_first(cell: Cell) -> tuple[int, int]:
    """Sort key: the main method before all others, calibrated on the most corpora first; stable for the rest."""
    return (0, -len(cell.calibration)) if cell.method == default_method().name else (1, 0)


def _found_on(name: str, about: dict[str, JsonValue], run: Run) -> ModelFindings:
    done = [c for c in run.cells if c.model == name and c.status == "done" and c.row is not None]
    rows = [c.row for c in done if c.row is not None]
    tasks = _unique(t for row in rows for t in row.tasks)
    texts = _unique(t for row in rows for t in row.perplexity)
    full, files = ([c for c in done if c.method == method] for method in (FULL, FILE))
    pruned = sorted((c for c in done if c.method not in (FULL, FILE)), key=_main_first)
    called = _names(pruned)
    series = []
    for base, changes in dict.fromkeys(called.values()):
        mine = [c for c in pruned if called[c.id] == (base, changes)]
        sizes = sorted({(-c.retain, c.width is not None, c.keep or 0, c.width or 0) for c in mine})
        points = [
            _point([c for c in mine if (-c.retain, c.keep or 0, c.width or 0) == (r, k, w)], run, tasks, texts)
            for r, _, k, w in sizes
        ]
        series.append(Series(base, changes, mine[0].method, tuple(points)))
    shown: dict[tuple[float, int], Cell] = {}  # by budget, and channels of thinner experts
    for cell in pruned:
        if cell.plan is not None and called[cell.id] == called[pruned[0].id]:
            shown.setdefault((-cell.retain, cell.width or 0), cell)
    return ModelFindings(
        name=name,
        about=about,
        full=_point(full[:1], run, tasks, texts) if full else None,
        series=tuple(series),
        tasks=tasks,
        texts=texts,
        comparisons=tuple(c for c in run.comparisons if c.model == name and not c.sizes),
        plans=tuple(shown[r] for r in sorted(shown)),
        cut=tuple(c for c in run.cut if c.model == name),
        by_size=tuple(c for c in run.comparisons if c.model == name and c.sizes),
        files=tuple((c.label, _point([c], run, tasks, texts)) for c in files),
        near=split_by_kind(texts, [corpus for c in pruned for corpus in c.calibration])[0],
        shapes={c.label: c.label.removeprefix(f"{c.variant}, ") for c in pruned if c.width is not None},
    )


def findings(run: Run) -> list[ModelFindings]:
    """The results model by model, in the order of the run."""
    models = run.models if isinstance(run.models, list) else [{"name": k, **v} for k, v in run.models.items()]
    about: Mapping[str, dict[str, JsonValue]] = {str(m.get("name")): m for m in models}
    return [_found_on(name, about.get(name, {}), run) for name in _unique([*about, *(c.model for c in run.cells)])]


def failed(run: Run) -> list[Cell]:
    """The cells that did not finish."""
    return [cell for cell in run.cells if cell.status == "failed"]


def usage_of(model: ModelFindings, usages: Sequence[Usage]) -> Usage:
    """Find a model's entry of usage.json by its cells, else by its name; an empty entry if there is none."""
    cells = {cell for s in model.series for p in s.points for cell in p.cells}
    found = [u for u in usages if cells & u.plans.keys()] or [u for u in usages if u.model == model.name]
    return found[0] if found else Usage(model=model.name)
