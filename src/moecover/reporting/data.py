"""What a run of `compare` found, ready to be shown: reads results.json, usage.json and the plans of a run folder.

The runs of one method at one budget (seeds, calibration samples) become one estimate with its standard error. All numbers
are those of results.json; nothing is measured or tested here, the verdicts are those of `significance`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from moecover.corpora.sources import set_name
from moecover.errors import InputError

RESULTS, USAGE, SCHEMA = "results.json", "usage.json", 1
Kind = TypeVar("Kind")
OURS, FULL = "tb-coverage", "full"  # the method whose line is drawn first, and the name of the model as it was


# ------------------------------------------------------------------------------------------------------ what is on disk
class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore")


class ScoreRow(_Lenient):
    """One metric of one task: a share from 0 to 1, and the standard error that comes from the number of questions."""

    value: float
    stderr: float | None = None


class TextRow(_Lenient):
    """One perplexity text."""

    perplexity: float = Field(gt=0)
    tokens: int | None = None
    windows: int | None = None
    kl: float | None = None
    top1: float | None = None


class Row(_Lenient):
    """What was measured of one variant of a model."""

    keep: int
    experts: int
    num_bytes: int
    perplexity: dict[str, TextRow] = Field(default_factory=dict)
    tasks: dict[str, dict[str, ScoreRow]] = Field(default_factory=dict)


class Cell(_Lenient):
    """One cell of the grid: its coordinates, how it ended, and its row where it was finished."""

    id: str
    model: str
    method: str
    label: str
    retain: float
    status: Literal["done", "failed"]
    calibration: list[str] = Field(default_factory=list)
    sample: int | None = None
    seed: int | None = None
    keep: int | None = None
    reason: str | None = None
    wall_s: float | None = None
    plan: str | None = None
    row: Row | None = None


class Tested(_Lenient):
    """A further test of a comparison, with other units; uncorrected."""

    p: float | None = None
    effect: float | None = None
    test: str = ""


class TaskDifference(_Lenient):
    """The difference on one task alone, with its interval; no verdict."""

    value: float
    low: float | None = None
    high: float | None = None


class Comparison(_Lenient):
    """What `significance` says of two methods on one measure at one budget.

    ``value``, ``low`` and ``high`` are a difference of shares where ``kind`` is ``tasks``, of logarithms of perplexity else.
    """

    model: str
    retain: float
    kind: str
    name: str
    calibration: list[str] = Field(default_factory=list)
    a: str
    b: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    effect: float | None = None
    n: int | None = None
    test: str = ""
    verdict: str
    words: str = ""
    family: str = ""  # of comparisons, that p_holm was corrected for
    over_runs: Tested | None = None
    over_tasks: Tested | None = None
    by_task: dict[str, TaskDifference] = Field(default_factory=dict)

    @property
    def of_accuracy(self) -> bool:
        """Whether it is one of accuracies."""
        return self.kind == "tasks"


class TaskAgreement(_Lenient):
    """By MoE layer, how a corpus's utility agrees with the use by a task; None where that cannot be told."""

    jaccard: list[float | None]
    spearman: list[float | None]


class KeptWeight(_Lenient):
    """By MoE layer, the share of a task's routing weight on kept experts."""

    kept_weight: list[float]


class Usage(_Lenient):
    """usage.json, for one model: by corpus and task, and by cell and task; ``keep`` best of ``experts`` were compared."""

    model: str
    keep: int | None = None
    experts: int | None = None
    layers: list[int] = Field(default_factory=list)
    corpora: dict[str, dict[str, TaskAgreement]] = Field(default_factory=dict)
    plans: dict[str, dict[str, KeptWeight]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_value_a_layer(self) -> Usage:
        rows = [v for found in self.corpora.values() for t in found.values() for v in (t.jaccard, t.spearman)]
        if any(len(row) != len(self.layers) for row in rows):
            raise ValueError(f"a row has not one value for each of the {len(self.layers)} layers")
        return self


class Run(_Lenient):
    """results.json."""

    schema_version: Literal[1] = Field(alias="schema")
    created_by: Any = None
    command: str | list[str] | None = None
    models: list[dict[str, Any]] | dict[str, dict[str, Any]]
    texts: dict[str, dict[str, Any]] = Field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = Field(default_factory=dict)
    cells: list[Cell]
    comparisons: list[Comparison] = Field(default_factory=list)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}. Make it anew with `moecover compare`") from error


def read_run(folder: Path) -> Run:
    """The results of a run folder.

    Raises:
        InputError: the folder is no run, or its results.json is damaged or of another version; says where.
    """
    path = folder / RESULTS
    if not path.is_file():
        found = "is a file" if folder.is_file() else "is not there" if not folder.is_dir() else f"holds no {RESULTS}"
        raise InputError(f"{folder} is no run of `moecover compare`: it {found}. Give the folder that compare wrote")
    value = _json(path)
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        got = value.get("schema") if isinstance(value, dict) else None
        raise InputError(f"{path} has schema {got}, this version reads {SCHEMA}. Make it anew with `moecover compare`")
    return _checked(Run, value, path)


def _checked(kind: type[Kind], value: Any, path: Path) -> Kind:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path} is damaged: {where}: {first['msg']}. Make it anew with `moecover compare`") from error


def read_usage(folder: Path) -> list[Usage]:
    """The mechanism, one entry a model, from usage.json; empty where it was not asked for.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / USAGE
    if not path.is_file():
        return []
    value = _json(path)
    return _checked(list[Usage], value if isinstance(value, list) else [value], path)


# ---------------------------------------------------------------------------------------------------------- in estimates
@dataclass(frozen=True)
class Estimate:
    """Mean of the runs, and its standard error where there is one; the runs themselves."""

    value: float
    stderr: float | None
    runs: tuple[float, ...]


def over_runs(runs: Sequence[float], stderrs: Sequence[float | None] = ()) -> Estimate:
    """The runs as one estimate.

    Two sources add up: the runs differ (their variance over their number), and the questions are a sample (the mean of
    their squared standard errors, which more runs on the same questions do not make smaller). Where neither is known,
    there is no standard error.
    """
    if not all(map(math.isfinite, runs)):
        return Estimate(next(v for v in runs if not math.isfinite(v)), None, tuple(runs))
    between = statistics.variance(runs) / len(runs) if len(runs) > 1 else None
    known = [s**2 for s in stderrs if s is not None]
    within = statistics.fmean(known) if known and len(known) == len(runs) else None
    parts = [p for p in (between, within) if p is not None]
    return Estimate(statistics.fmean(runs), math.sqrt(sum(parts)) if parts else None, tuple(runs))


def over_runs_log(runs: Sequence[float]) -> Estimate:
    """The geometric mean of perplexities; the standard error is that of their logarithm, times the mean."""
    logs = over_runs([math.log(v) for v in runs])
    value = math.exp(logs.value) if math.isfinite(logs.value) else logs.value
    return Estimate(value, None if logs.stderr is None else value * logs.stderr, tuple(runs))


@dataclass(frozen=True)
class Point:
    """One method at one budget."""

    retain: float
    keep: int
    num_bytes: int
    tasks: dict[str, Estimate]
    mean: Estimate | None
    perplexity: dict[str, Estimate]
    kl: dict[str, Estimate]
    top1: dict[str, Estimate]
    others: dict[tuple[str, str], Estimate]  # by task and metric, what is not in the mean
    runs: int
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Series:
    """One method over the budgets, from the smallest."""

    name: str
    method: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class ModelFindings:
    """What was found on one model."""

    name: str
    about: dict[str, Any]
    full: Point | None
    series: tuple[Series, ...]
    tasks: tuple[str, ...]  # that enter the mean
    texts: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    plans: tuple[Cell, ...]  # of the first method, one a budget, whose experts are shown

    @property
    def budgets(self) -> list[float]:
        """The shares of experts that were tried, from the smallest."""
        return sorted({p.retain for s in self.series for p in s.points})

    @property
    def main(self) -> Series | None:
        """The method that the page speaks of first."""
        return self.series[0] if self.series else None


def mean_metric(run: Run, task: str) -> str:
    """The metric of a task that enters the mean."""
    metric: str = run.tasks.get(task, {}).get("metric") or "acc"
    return metric


def mean_of_tasks(scores: Iterable[ScoreRow]) -> ScoreRow:
    """The mean over tasks, whose questions are drawn apart."""
    rows = list(scores)
    errors = [row.stderr for row in rows]
    stderr = None if None in errors else math.sqrt(sum(e**2 for e in errors if e is not None)) / len(rows)
    return ScoreRow(value=statistics.fmean(row.value for row in rows), stderr=stderr)


def _estimated(scores: Sequence[ScoreRow]) -> Estimate:
    return over_runs([s.value for s in scores], [s.stderr for s in scores])


def _point(cells: Sequence[Cell], run: Run, tasks: Sequence[str], texts: Sequence[str]) -> Point:
    """The runs of one method at one budget; what only some of them measured is left out."""
    rows = [cell.row for cell in cells if cell.row is not None]
    metrics = {task: mean_metric(run, task) for task in tasks}
    there = [t for t in tasks if all(metrics[t] in row.tasks.get(t, {}) for row in rows)]
    scores = {t: [row.tasks[t][metrics[t]] for row in rows] for t in there}
    whole = bool(tasks) and len(there) == len(tasks)
    means = [mean_of_tasks([scores[t][i] for t in there]) for i in range(len(rows))] if whole else []
    read = [t for t in texts if all(t in row.perplexity for row in rows)]
    values = {t: [row.perplexity[t] for row in rows] for t in read}
    others = sorted(
        {(t, m) for row in rows for t, found in row.tasks.items() for m in found if m != mean_metric(run, t)}
    )

    def agreement(name: str) -> dict[str, Estimate]:
        found = {t: [getattr(v, name) for v in values[t]] for t in read}
        return {t: over_runs(v) for t, v in found.items() if None not in v}

    return Point(
        retain=cells[0].retain,
        keep=rows[0].keep,
        num_bytes=round(statistics.fmean(row.num_bytes for row in rows)),
        tasks={t: _estimated(s) for t, s in scores.items()},
        mean=_estimated(means) if whole else None,
        perplexity={t: over_runs_log([v.perplexity for v in values[t]]) for t in read},
        kl=agreement("kl"),
        top1=agreement("top1"),
        others={
            (t, m): _estimated([row.tasks[t][m] for row in rows])
            for t, m in others
            if all(m in row.tasks.get(t, {}) for row in rows)
        },
        runs=len(rows),
        cells=tuple(cell.id for cell in cells),
    )


def _names(cells: Sequence[Cell]) -> dict[str, str]:
    """What a reader calls the method of every cell: its label, and the calibration where one label has several."""
    calibrations: dict[str, set[tuple[str, ...]]] = {}
    for cell in cells:
        calibrations.setdefault(cell.label, set()).add(tuple(cell.calibration))
    return {
        cell.id: f"{cell.label} on {set_name(cell.calibration, ' + ')}" if len(calibrations[cell.label]) > 1 and cell.calibration else cell.label
        for cell in cells
    }  # fmt: skip


def _in_order(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _found_on(name: str, about: dict[str, Any], run: Run) -> ModelFindings:
    done = [c for c in run.cells if c.model == name and c.status == "done" and c.row is not None]
    rows = [c.row for c in done if c.row is not None]
    tasks = _in_order(t for row in rows for t in row.tasks)
    texts = _in_order(t for row in rows for t in row.perplexity)
    full = [c for c in done if c.method == FULL]
    pruned = sorted((c for c in done if c.method != FULL), key=lambda c: (0, -len(c.calibration)) if c.method == OURS else (1, 0))  # fmt: skip
    called = _names(pruned)
    series = []
    for label in _in_order(called[c.id] for c in pruned):
        mine = [c for c in pruned if called[c.id] == label]
        budgets = sorted({c.retain for c in mine})
        points = [_point([c for c in mine if c.retain == r], run, tasks, texts) for r in budgets]
        series.append(Series(label, mine[0].method, tuple(points)))
    shown: dict[float, Cell] = {}
    for cell in pruned:
        if cell.plan is not None and called[cell.id] == series[0].name:
            shown.setdefault(cell.retain, cell)
    return ModelFindings(
        name=name,
        about=about,
        full=_point(full[:1], run, tasks, texts) if full else None,
        series=tuple(series),
        tasks=tasks,
        texts=texts,
        comparisons=tuple(c for c in run.comparisons if c.model == name),
        plans=tuple(shown[r] for r in sorted(shown)),
    )


def findings(run: Run) -> list[ModelFindings]:
    """What was found, model by model, in the order of the run."""
    models = run.models if isinstance(run.models, list) else [{"name": k, **v} for k, v in run.models.items()]
    about: Mapping[str, dict[str, Any]] = {str(m.get("name")): m for m in models}
    return [_found_on(name, about.get(name, {}), run) for name in _in_order([*about, *(c.model for c in run.cells)])]


def failed(run: Run) -> list[Cell]:
    """The cells that were not finished."""
    return [cell for cell in run.cells if cell.status == "failed"]


def usage_of(model: ModelFindings, usages: Sequence[Usage]) -> Usage:
    """The mechanism of a model: the entry that has its cells, else the one of its name; empty where there is none."""
    cells = {cell for s in model.series for p in s.points for cell in p.cells}
    found = [u for u in usages if cells & u.plans.keys()] or [u for u in usages if u.model == model.name]
    return found[0] if found else Usage(model=model.name)
