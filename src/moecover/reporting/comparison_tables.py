"""The tables of a model's comparisons: verdicts by budget, how they were tested, differences task by task.

Every number stands in one of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    "multiple comparisons, as p does. Not resolved is not equal."
)
FURTHER = {"over_runs": "p over runs alone", "over_tasks": "p over tasks"}  # secondary tests, with their headings


def measure(c: Comparison) -> str:
    """What a comparison measures, in words."""
    return f"accuracy, {c.name}" if c.of_accuracy else f"{c.kind}, {c.name}"


def mark_of(verdict: str) -> str:
    """The CSS class of a verdict."""
    return {"better": "better", "worse": "worse"}.get(verdict, "same")


@dataclass(frozen=True)
class _Names:
    """What all comparisons of a model have in common and rows therefore need not repeat."""

    first: str
    alone: bool  # a single method is compared with the others
    calibrated: bool  # on several calibration sets
    shapes: Mapping[str, str]  # of thinner experts, by label

    def against(self, c: Comparison) -> tuple[Value, ...]:
        """The cells that say what is compared; of two methods in one shape, the shape in a cell of its own."""
        a, b, shape = c.a, c.b, self.shapes.get(c.a, "")
        if shape and shape == self.shapes.get(c.b):
            a, b = (name.removesuffix(f", {shape}") for name in (a, b))
        name = b if self.alone else f"{a} against {b}"
        name += f", calibrated on {set_name(c.calibration, ' + ')}" if self.calibrated else ""
        found = Value(name, name.casefold())
        return (found, Value(shape or "whole", shape or "whole")) if self.shapes else (found,)

    @property
    def headings(self) -> tuple[Column, ...]:
        """The headings of the columns of those cells."""
        heading = text_column("against" if self.alone else "comparison")
        return (heading, text_column("experts")) if self.shapes else (heading,)


def _names(model: ModelFindings) -> _Names:
    shapes = {c.a: model.shapes[c.a] for c in model.comparisons if c.a in model.shapes}
    shapes |= {c.b: model.shapes[c.b] for c in model.comparisons if c.b in model.shapes}
    first = list(dict.fromkeys(c.a.removesuffix(f", {shapes.get(c.a)}") for c in model.comparisons))
    sets = {tuple(c.calibration) for c in model.comparisons}
    return _Names(first[0] if len(first) == 1 else "the first", len(first) == 1, len(sets) > 1, shapes)


def _difference(c: Comparison | TaskDifference, *, of_accuracy: bool) -> Value:
    """A difference with its interval: in points of accuracy, or in percent of perplexity."""
    if c.value is None:
        return MISSING

    def text(number: float) -> str:
        return minus(f"{100 * number:+.2f}" if of_accuracy else f"{100 * math.expm1(number):+.2f}%")

    interval = "" if c.low is None or c.high is None else f"[{text(c.low)}, {text(c.high)}]"
    return Value(text(c.value), c.value, interval)


def _tested(found: Tested | None, *, named: bool) -> Value:
    """The p-value of a secondary test, and the test's name unless it stands elsewhere."""
    return MISSING if found is None or found.p is None else Value(p_text(found.p), found.p, found.test if named else "")


def _by_budget(model: ModelFindings) -> list[Comparison]:
    """The comparisons in the order of the page: the largest budget first."""
    return sorted(model.comparisons, key=lambda c: -c.retain)


def verdict_table(model: ModelFindings) -> Table | None:
    """The verdict of every comparison with its difference, interval and p: a column per budget."""
    if not model.comparisons:
        return None
    names = _names(model)
    cells: dict[tuple[str, tuple[Value, ...]], dict[float, Value]] = {}
    for c in model.comparisons:
        cells.setdefault((measure(c), names.against(c)), {}).setdefault(c.retain, _verdict(c))
    budgets = sorted({c.retain for c in model.comparisons}, reverse=True)
    body = tuple(
        (*other, Value(what, what), *(found.get(b, MISSING) for b in budgets)) for (what, other), found in cells.items()
    )
    columns = (*names.headings, text_column("measure"), *(Column(f"{percentage(b)} kept") for b in budgets))
    families = dict.fromkeys(c.family for c in model.comparisons if c.family and c.p_holm is not None)
    corrected = f" p: after Holm's correction over {listed(list(families))}." if families else ""
    name = f"{names.first} against every other method" if names.alone else "Verdicts"
    note = UNITS.format(first=names.first) + corrected
    return Table("verdicts", f"{name} on {model.name}", columns, body, note, stacked=True)


def _verdict(c: Comparison) -> Value:
    """A verdict with what it rests on; an interval that excludes 0 beside "not resolved" is explained."""
    shown, p = _difference(c, of_accuracy=c.of_accuracy), c.p if c.p_holm is None else c.p_holm
    lines = [shown.text, *([shown.note] if shown.note else [])]
    if p is not None:
        lines.append(f"p {p_text(p)}")
    elif reason := c.test.partition("no test: ")[2]:
        lines.append(f"no test: {reason}")
    excludes = c.low is not None and c.high is not None and c.low * c.high > 0
    if mark_of(c.verdict) == "same" and excludes:
        lines.append("interval of this one alone" if p is not None else "too little for a test")
    return Value(c.verdict, shown.sort, "\n".join(lines), mark_of(c.verdict))


def comparison_table(model: ModelFindings) -> Table | None:
    """How every comparison was tested: effect size, units, test, and the tests over other units.

    A test that is the same in all rows is named below the table, not in every row.
    """
    if not model.comparisons:
        return None
    names, rows = _names(model), _by_budget(model)
    further = {name: head for name, head in FURTHER.items() if any(getattr(c, name) for c in rows)}
    tests = {"test": {c.test for c in rows}}
    tests |= {name: {t.test for c in rows if (t := getattr(c, name)) and t.p is not None} for name in further}
    common = {name: found.pop() for name, found in tests.items() if len(found) == 1}
    columns = (
        *names.headings,
        Column(f"{model.kept_of} kept"),
        text_column("measure"),
        Column("effect size"),
        Column("pairs"),
        *(() if "test" in common else (text_column("test"),)),
        *(Column(heading, first="ascending") for heading in further.values()),
    )
    said = [f"{({'test': 'Test', **FURTHER})[name]}: {test}." for name, test in common.items() if test]
    said += ["The p-values here are not corrected: those of the verdicts are."] if further else []
    return Table(
        "comparisons",
        f"Tests of the comparisons{f' of {names.first}' if names.alone else ''} on {model.name}",
        columns,
        tuple((*names.against(c), *_test_values(c, list(further), common)) for c in rows),
        " ".join(said),
    )


def _test_values(c: Comparison, further: list[str], common: Mapping[str, str]) -> list[Value]:
    """The cells of a comparison's test after its name, without the names of tests that all rows have in ``common``."""
    return [
        Value(percentage(c.retain), c.retain),
        Value(measure(c), measure(c)),
        MISSING if c.effect is None else Value(minus(f"{c.effect:.2f}"), c.effect),
        MISSING if c.n is None else Value(f"{c.n:,}", c.n),
        *([] if "test" in common else [Value(c.test, c.test)]),
        *(_tested(getattr(c, name), named=name not in common) for name in further),
    ]


def by_task_table(model: ModelFindings) -> Table | None:
    """Where the differences of mean accuracy come from: a column per task."""
    found = [c for c in _by_budget(model) if c.by_task]
    if not found:
        return None
    names, tasks = _names(model), list(dict.fromkeys(task for c in found for task in c.by_task))
    body = tuple(
        (
            *names.against(c),
            Value(percentage(c.retain), c.retain),
            *(_difference(c.by_task[t], of_accuracy=True) if t in c.by_task else MISSING for t in tasks),
        )
        for c in found
    )
    against = f", {names.first} against the others" if names.alone else ""
    return Table(
        "by-task",
        f"Difference in accuracy by task{against} on {model.name}",
        (*names.headings, Column(f"{model.kept_of} kept"), *(Column(t) for t in tasks)),
        body,
        "Percentage points, each with its own 95% interval, not corrected for multiple comparisons: they show where a "
        "difference comes from and are not verdicts.",
    )
