"""The tables of a model's comparisons: verdicts by budget, every comparison with its test, differences task by task."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moecover.corpora.sources import set_name
from moecover.reporting.blocks import MISSING, Column, Table, Value, text_column
from moecover.reporting.data import Comparison, TaskDifference, Tested
from moecover.reporting.findings import ModelFindings
from moecover.reporting.numbers import minus, p_text, percentage
from moecover.text import listed

UNITS = (
    "Differences in accuracy are in percentage points (above 0: {first} is better), in perplexity in percent (below 0: "
    "{first} is better), each with its own 95% interval. Verdicts are stricter: they hold after correction for "
    "multiple comparisons."
)
FURTHER = {"over_runs": "p over runs alone", "over_tasks": "p over tasks"}  # secondary tests, with their headings


def measure(c: Comparison) -> str:
    """What a comparison measures, in words."""
    return f"accuracy: {c.name}" if c.of_accuracy else f"{c.kind}: {c.name}"


def mark_of(verdict: str) -> str:
    """The CSS class of a verdict."""
    return {"better": "better", "worse": "worse"}.get(verdict, "same")


@dataclass(frozen=True)
class _Names:
    """What all comparisons of a model have in common and rows therefore need not repeat."""

    first: str
    alone: bool  # a single method is compared with the others
    calibrated: bool  # on several calibration sets

    def against(self, c: Comparison) -> Value:
        """The cell that says which methods are compared."""
        name = c.b if self.alone else f"{c.a} against {c.b}"
        name += f", calibrated on {set_name(c.calibration, ' + ')}" if self.calibrated else ""
        return Value(name, name.casefold())

    @property
    def heading(self) -> Column:
        """The heading of the column of those cells."""
        return text_column("against" if self.alone else "comparison")


def _names(model: ModelFindings) -> _Names:
    first = list(dict.fromkeys(c.a for c in model.comparisons))
    sets = {tuple(c.calibration) for c in model.comparisons}
    return _Names(first[0] if len(first) == 1 else "the first", len(first) == 1, len(sets) > 1)


def _difference(c: Comparison | TaskDifference, *, of_accuracy: bool) -> Value:
    """A difference with its interval: in points of accuracy, or in percent of perplexity."""
    if c.value is None:
        return MISSING

    def text(number: float) -> str:
        return minus(f"{100 * number:+.2f}" if of_accuracy else f"{100 * math.expm1(number):+.2f}%")

    interval = "" if c.low is None or c.high is None else f"[{text(c.low)}, {text(c.high)}]"
    return Value(text(c.value), c.value, interval)


def _tested(found: Tested | None) -> Value:
    """The p-value of a secondary test, and the test's name."""
    return MISSING if found is None or found.p is None else Value(p_text(found.p), found.p, found.test)


def verdict_table(model: ModelFindings) -> Table | None:
    """The verdict of every comparison: a row per rival and measure, a column per budget."""
    if not model.comparisons:
        return None
    names = _names(model)
    cells: dict[tuple[str, Value], dict[float, Value]] = {}
    for c in model.comparisons:
        shown = _difference(c, of_accuracy=c.of_accuracy)
        cell = Value(c.verdict, shown.sort, f"{shown.text} {shown.note}", mark_of(c.verdict))
        cells.setdefault((measure(c), names.against(c)), {}).setdefault(c.retain, cell)
    budgets = sorted({c.retain for c in model.comparisons}, reverse=True)
    body = tuple(
        (Value(other.text, f"{other.sort} {what}", what), *(found.get(b, MISSING) for b in budgets))
        for (what, other), found in cells.items()
    )
    columns = (names.heading, *(Column(f"{percentage(b)} kept") for b in budgets))
    name = f"{names.first} against every other method" if names.alone else "Verdicts"
    return Table("verdicts", f"{name} on {model.name}", columns, body, UNITS.format(first=names.first))


def comparison_table(model: ModelFindings) -> Table | None:
    """Every comparison with its interval, test and verdict."""
    if not model.comparisons:
        return None
    names = _names(model)
    further = {name: head for name, head in FURTHER.items() if any(getattr(c, name) for c in model.comparisons)}
    columns = (
        names.heading,
        Column(f"{model.kept_of} kept"),
        text_column("measure"),
        Column("difference [95%]"),
        Column("p, adjusted", first="ascending"),
        Column("effect"),
        Column("pairs"),
        text_column("test"),
        *(Column(heading, first="ascending") for heading in further.values()),
        text_column("verdict"),
    )
    families = dict.fromkeys(c.family for c in model.comparisons if c.family and c.p_holm is not None)
    corrected = f"Adjusted p-values: Holm's correction over {listed(list(families))}." if families else ""
    corrected += " The other p-values are not corrected." if further else ""
    return Table(
        "comparisons",
        f"Comparisons{f' of {names.first}' if names.alone else ''} on {model.name}",
        columns,
        tuple((names.against(c), *_comparison_values(c, list(further))) for c in model.comparisons),
        f"{UNITS.format(first=names.first)} {corrected}",
    )


def _comparison_values(c: Comparison, further: list[str]) -> list[Value]:
    """The cells of a comparison after its name."""
    p = c.p if c.p_holm is None else c.p_holm
    return [
        Value(percentage(c.retain), c.retain),
        Value(measure(c), measure(c)),
        _difference(c, of_accuracy=c.of_accuracy),
        MISSING if p is None else Value(p_text(p), p),
        MISSING if c.effect is None else Value(minus(f"{c.effect:.2f}"), c.effect),
        MISSING if c.n is None else Value(f"{c.n:,}", c.n),
        Value(c.test, c.test),
        *(_tested(getattr(c, name)) for name in further),
        Value(c.verdict, c.verdict, mark=mark_of(c.verdict)),
    ]


def by_task_table(model: ModelFindings) -> Table | None:
    """Where the differences of mean accuracy come from: a column per task."""
    found = [c for c in model.comparisons if c.by_task]
    if not found:
        return None
    names, tasks = _names(model), list(dict.fromkeys(task for c in found for task in c.by_task))
    body = tuple(
        (
            names.against(c),
            Value(percentage(c.retain), c.retain),
            *(_difference(c.by_task[t], of_accuracy=True) if t in c.by_task else MISSING for t in tasks),
        )
        for c in found
    )
    against = f", {names.first} against the others" if names.alone else ""
    return Table(
        "by-task",
        f"Difference in accuracy by task{against} on {model.name}",
        (names.heading, Column(f"{model.kept_of} kept"), *(Column(t) for t in tasks)),
        body,
        "Percentage points, each with its own 95% interval, not corrected for multiple comparisons: they show where a "
        "difference comes from and are not verdicts.",
    )
