"""What was found, in words and tables: reads what `findings` gives, gives sentences and tables for the page.

A table is data: every value has its text, what it sorts by, and a note in small letters (the standard error).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moecover.corpora.sources import in_rows, set_name
from moecover.reporting.data import (
    Cell,
    Comparison,
    Estimate,
    ModelFindings,
    Point,
    Run,
    TaskDifference,
    Tested,
    Usage,
    failed,
)

NONE_FOUND = "no significant difference"


@dataclass(frozen=True)
class Column:
    """A heading; ``first`` is the order of the first click."""

    name: str
    number: bool = True
    first: Literal["ascending", "descending"] = "descending"


@dataclass(frozen=True)
class Value:
    """What stands in a table: its text, what it sorts by (None: last), a small note, and a class that marks it."""

    text: str
    sort: float | str | None = None
    note: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """A table that sorts by any column."""

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Tile:
    """A large number, and what it is."""

    number: str
    words: str


@dataclass(frozen=True)
class Summary:
    """The first thing to read about a model."""

    tiles: tuple[Tile, ...] = ()
    sentences: tuple[str, ...] = ()
    verdicts: tuple[tuple[str, str], ...] = field(default=())  # verdict and its sentence


# --------------------------------------------------------------------------------------------------------------- numbers
def size(num_bytes: float) -> str:
    """A size in decimal units."""
    value, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.3g} {units[0]}"


def points(share: float) -> str:
    """A share from 0 to 1 as a percentage without its sign."""
    return f"{100 * share:.1f}"


def perplexity_text(value: float) -> str:
    """A perplexity, or that it is none."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"


def share_text(value: float) -> str:
    """A budget as a percentage."""
    return f"{100 * value:.3g}%"


def words_of(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def plural(number: int, word: str) -> str:
    """A number and its noun."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


MISSING = Value("–")


def share_value(e: Estimate | None, mark: str = "") -> Value:
    """An estimate of a share, in per cent, with its standard error."""
    if e is None:
        return MISSING
    return Value(points(e.value), e.value, "" if e.stderr is None else f"±{points(e.stderr)}", mark)


def perplexity_value(e: Estimate | None, mark: str = "") -> Value:
    """An estimate of a perplexity, with its standard error."""
    if e is None:
        return MISSING
    note = "" if e.stderr is None else f"±{perplexity_text(e.stderr)}"
    return Value(perplexity_text(e.value), e.value if math.isfinite(e.value) else None, note, mark)


def kl_value(e: Estimate | None) -> Value:
    """An estimate of a mean KL divergence in nats."""
    return MISSING if e is None else Value(f"{e.value:.3f}", e.value, "" if e.stderr is None else f"±{e.stderr:.3f}")


# ---------------------------------------------------------------------------------------------------------------- tables
def _lines(model: ModelFindings) -> list[tuple[str, Point]]:
    """The rows of the model's tables: the full model, then budget by budget from the largest, methods in their order."""
    budgets = sorted(model.budgets, reverse=True)
    rows = [(s.name, p) for b in budgets for s in model.series for p in s.points if p.retain == b]
    return [("full model", model.full), *rows] if model.full else rows


def _best(rows: Sequence[tuple[str, Point]], values: Sequence[Estimate | None], *, largest: bool) -> set[int]:
    """Rows that hold the best value of their budget, where a budget has two rows or more."""
    found = set()
    for budget in {p.retain for name, p in rows}:
        there = {
            i: e.value
            for i, ((_, p), e) in enumerate(zip(rows, values, strict=True))
            if p.retain == budget and e is not None
        }
        if len(there) > 1:
            best = max(there.values()) if largest else min(there.values())
            found |= {i for i, v in there.items() if v == best}
    return found


def _coordinates(name: str, p: Point) -> list[Value]:
    return [
        Value(name, name.casefold()),
        Value(share_text(p.retain), p.retain, f"{p.keep}"),
        Value(f"{p.runs}", p.runs),
    ]


COORDINATES = (Column("method", number=False, first="ascending"), Column("experts kept"), Column("runs"))


def accuracy_table(model: ModelFindings) -> Table | None:
    """Every task, method and budget."""
    if not model.tasks:
        return None
    rows = _lines(model)
    columns: list[list[Estimate | None]] = [[p.tasks.get(task) for _, p in rows] for task in model.tasks]
    if len(model.tasks) > 1:
        columns.append([p.mean for _, p in rows])
    best = [_best(rows, values, largest=True) for values in columns]
    full = model.full.mean.value if model.full and model.full.mean else None
    body = []
    for i, (name, p) in enumerate(rows):
        values = [share_value(c[i], "best" if i in b else "") for c, b in zip(columns, best, strict=True)]
        share = p.mean.value / full if p.mean and full else None
        of_full = MISSING if share is None else Value(f"{100 * share:.1f}%", share)
        body.append((*_coordinates(name, p), *values, of_full))
    heads = [Column(task) for task in model.tasks] + ([Column("mean")] if len(model.tasks) > 1 else [])
    return Table(
        "tasks", f"Accuracy by task on {model.name}, %", (*COORDINATES, *heads, Column("of the full model")), tuple(body),
        "± one standard error, from the number of questions and from the runs that differ in seed or calibration sample. "
        "Bold: highest of its budget, which is no claim of significance.",
    )  # fmt: skip


def perplexity_table(model: ModelFindings) -> Table | None:
    """Every text, method and budget."""
    if not model.texts:
        return None
    rows = _lines(model)
    values: list[list[Value]] = []
    for text in model.texts:
        found = [p.perplexity.get(text) for _, p in rows]
        best = _best(rows, found, largest=False)
        values.append([perplexity_value(e, "best" if i in best else "") for i, e in enumerate(found)])
    body = tuple((*_coordinates(name, p), *(v[i] for v in values)) for i, (name, p) in enumerate(rows))
    columns = tuple(Column(text, first="ascending") for text in model.texts)
    return Table(
        "perplexity", f"Perplexity on {model.name}, lower is better", (*COORDINATES, *columns), body,
        "± one standard error over the runs, where there are several. Means of perplexities are geometric. Bold: lowest of its "
        "budget, which is no claim of significance.",
    )  # fmt: skip


def agreement_with_full_table(model: ModelFindings) -> Table | None:
    """KL divergence from the full model and agreement with it on the next token, by text."""
    rows = [(name, p) for name, p in _lines(model) if p.kl or p.top1]
    if not rows:
        return None
    texts = [t for t in model.texts if any(t in p.kl or t in p.top1 for _, p in rows)]
    columns = [c for t in texts for c in (Column(f"{t}: KL", first="ascending"), Column(f"{t}: same next token, %"))]
    body = tuple(
        (*_coordinates(name, p), *(v for t in texts for v in (kl_value(p.kl.get(t)), share_value(p.top1.get(t)))))
        for name, p in rows
    )
    return Table(
        "distance", f"How far {model.name} has moved from the full model", (*COORDINATES, *columns), body,
        "KL: mean Kullback-Leibler divergence of the pruned model's next-token probabilities from the full model's, in nats a token.",
    )  # fmt: skip


def others_table(model: ModelFindings) -> Table | None:
    """The metrics that do not enter the mean."""
    rows = _lines(model)
    keys = sorted({key for _, p in rows for key in p.others})
    if not keys:
        return None
    body = tuple((*_coordinates(name, p), *(share_value(p.others.get(key)) for key in keys)) for name, p in rows)
    columns = tuple(Column(f"{task}: {metric}") for task, metric in keys)
    return Table("others", f"Other metrics on {model.name}, %", (*COORDINATES, *columns), body)


def _difference(c: Comparison | TaskDifference, *, of_accuracy: bool) -> Value:
    """A difference with its interval: points of accuracy, or per cent of perplexity."""
    if c.value is None:
        return MISSING

    def text(number: float) -> str:
        shown = f"{100 * number:+.2f}" if of_accuracy else f"{100 * math.expm1(number):+.2f}%"
        return shown.replace("-", "−")

    interval = "" if c.low is None or c.high is None else f"[{text(c.low)}, {text(c.high)}]"
    return Value(text(c.value), c.value, interval)


def _tested(found: Tested | None) -> Value:
    """The p of a further test, and which it is."""
    return MISSING if found is None or found.p is None else Value(p_text(found.p), found.p, found.test)


@dataclass(frozen=True)
class _Names:
    """What all comparisons of a model have in common, and so need not say in every row."""

    first: str
    alone: bool  # one method is held against the others
    calibrated: bool  # in several calibration sets

    def against(self, c: Comparison) -> Value:
        """Which methods are compared."""
        name = c.b if self.alone else f"{c.a} against {c.b}"
        name += f", calibrated on {set_name(c.calibration, ' + ')}" if self.calibrated else ""
        return Value(name, name.casefold())


def _names(model: ModelFindings) -> _Names:
    first = list(dict.fromkeys(c.a for c in model.comparisons))
    sets = {tuple(c.calibration) for c in model.comparisons}
    return _Names(first[0] if len(first) == 1 else "the first", len(first) == 1, len(sets) > 1)


UNITS = (
    "Differences of accuracy in points (above 0: {first} is better), of perplexity in per cent (below 0: {first} is better), each "
    "with its own 95% interval; verdicts are stricter, they hold after correction for the number of comparisons."
)  # fmt: skip


def verdict_table(model: ModelFindings) -> Table | None:
    """The verdict of every comparison: a row a rival and measure, a column a budget."""
    if not model.comparisons:
        return None
    names = _names(model)
    budgets = sorted({c.retain for c in model.comparisons}, reverse=True)
    body = []
    for what, other in dict.fromkeys((measure(c), names.against(c)) for c in model.comparisons):
        row = [Value(other.text, f"{other.sort} {what}", what)]
        for budget in budgets:
            found = [c for c in model.comparisons if c.retain == budget and measure(c) == what and names.against(c) == other]  # fmt: skip
            if not found:
                row.append(MISSING)
                continue
            shown, verdict = _difference(found[0], of_accuracy=found[0].of_accuracy), found[0].verdict
            row.append(Value(verdict, shown.sort, f"{shown.text} {shown.note}", mark_of(verdict)))
        body.append(tuple(row))
    heading = Column("against" if names.alone else "comparison", number=False, first="ascending")
    columns = (heading, *(Column(f"{share_text(b)} kept") for b in budgets))
    name = f"{names.first} against every other method" if names.alone else "Verdicts"
    return Table("verdicts", f"{name} on {model.name}", columns, tuple(body), UNITS.format(first=names.first))  # fmt: skip


def comparison_table(model: ModelFindings) -> Table | None:
    """Every comparison with its interval, test and verdict."""
    if not model.comparisons:
        return None
    names = _names(model)
    further = {"over_runs": "p over runs alone", "over_tasks": "p over tasks"}
    further = {name: heading for name, heading in further.items() if any(getattr(c, name) for c in model.comparisons)}
    body = []
    for c in model.comparisons:
        p = c.p if c.p_holm is None else c.p_holm
        body.append((
            names.against(c),
            Value(share_text(c.retain), c.retain),
            Value(measure(c), measure(c)),
            _difference(c, of_accuracy=c.of_accuracy),
            MISSING if p is None else Value(p_text(p), p),
            MISSING if c.effect is None else Value(f"{c.effect:.2f}".replace("-", "−"), c.effect),
            MISSING if c.n is None else Value(f"{c.n:,}", c.n),
            Value(c.test, c.test),
            *(_tested(getattr(c, name)) for name in further),
            Value(c.verdict, c.verdict, mark=mark_of(c.verdict)),
        ))  # fmt: skip
    columns = (
        Column("against" if names.alone else "comparison", number=False, first="ascending"), Column("experts kept"),
        Column("measure", number=False, first="ascending"), Column("difference [95%]"), Column("p, adjusted", first="ascending"),
        Column("effect"), Column("pairs"), Column("test", number=False, first="ascending"),
        *(Column(heading, first="ascending") for heading in further.values()), Column("verdict", number=False, first="ascending"),
    )  # fmt: skip
    families = dict.fromkeys(c.family for c in model.comparisons if c.family and c.p_holm is not None)
    corrected = f"p after Holm's correction over {words_of(list(families))}." if families else ""
    corrected += " The other p are of each test alone." if further else ""
    return Table(
        "comparisons", f"Comparisons{f' of {names.first}' if names.alone else ''} on {model.name}", columns, tuple(body),
        f"{UNITS.format(first=names.first)} {corrected}",
    )  # fmt: skip


def by_task_table(model: ModelFindings) -> Table | None:
    """Where the differences of mean accuracy come from: a column a task."""
    found = [c for c in model.comparisons if c.by_task]
    if not found:
        return None
    names, tasks = _names(model), list(dict.fromkeys(task for c in found for task in c.by_task))
    body = tuple(
        (
            names.against(c),
            Value(share_text(c.retain), c.retain),
            *(_difference(c.by_task[t], of_accuracy=True) if t in c.by_task else MISSING for t in tasks),
        )
        for c in found
    )
    columns = (Column("against" if names.alone else "comparison", number=False, first="ascending"), Column("experts kept"), *(Column(t) for t in tasks))  # fmt: skip
    return Table(
        "by-task", f"Difference of accuracy task by task{f', {names.first} against the others' if names.alone else ''} on {model.name}", columns, body,
        "Points, each with its own 95% interval, not corrected for their number: they show where a difference comes from and are no verdicts.",
    )  # fmt: skip


def measure(c: Comparison) -> str:
    """What a comparison measures, in words."""
    return f"accuracy: {c.name}" if c.of_accuracy else f"{c.kind}: {c.name}"


def p_text(p: float) -> str:
    """A p-value."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def mark_of(verdict: str) -> str:
    """The class of a verdict."""
    return {"better": "better", "worse": "worse"}.get(verdict, "same")


def size_table(model: ModelFindings) -> Table | None:
    """Size of the checkpoint before and after."""
    sizes = {p.retain: (p.keep, p.num_bytes) for s in model.series for p in s.points}
    before = model.full.num_bytes if model.full else model.about.get("num_bytes")
    experts = model.full.keep if model.full else model.about.get("experts")
    rows = [(1.0, experts, before)] if before else []
    rows += [(r, *sizes[r]) for r in sorted(sizes, reverse=True)]
    if not rows:
        return None
    body = tuple(
        (
            Value("full model" if r == 1.0 else f"{share_text(r)} of the experts", r),
            Value(f"{keep}" if keep else "–", keep),
            Value(size(b), b),
            Value(f"{b / before:.1%}", b / before) if before else MISSING,
        )
        for r, keep, b in rows
    )
    columns = (Column("what is kept", number=False), Column("experts a layer"), Column("size of the weights"), Column("of the full model"))  # fmt: skip
    return Table("size", f"Size of {model.name} before and after", columns, body)


def memory_words(model: ModelFindings) -> str:
    """What the run took of memory, in a sentence; empty where it is not known."""
    peaks = [
        (model.about.get("peak_rss_bytes"), "of the machine's memory"),
        (model.about.get("peak_device_bytes"), "of the device's memory"),
    ]
    known = [f"{size(value)} {what}" for value, what in peaks if isinstance(value, int)]
    return f"The weights take as much memory as on the disk. Profiling and evaluating took at most {words_of(known)}." if known else ""  # fmt: skip


def usage_words(usage: Usage) -> str:
    """How far utility on the corpora agrees with the use by the tasks, in a sentence; empty where it is not known."""
    from moecover.reporting.figures.plan_figures import expected_overlap

    parts = []
    for corpus, tasks in usage.corpora.items():
        ranks = [v for t in tasks.values() for v in t.spearman if v is not None]
        overlaps = [v for t in tasks.values() for v in t.jaccard if v is not None]
        if ranks and overlaps:
            parts.append(f"{statistics.fmean(ranks):.2f} and {statistics.fmean(overlaps):.2f} on {corpus}")
    chance = f" ({expected_overlap(usage.keep, usage.experts):.2f} by chance)" if usage.keep and usage.experts else ""
    best = f"the best {usage.keep} of {usage.experts} experts" if chance else "the best experts"
    return f"Rank correlation of utility with use by the tasks, and overlap of {best}{chance}, means over tasks and layers: {words_of(parts)}." if parts else ""  # fmt: skip


def usage_table(model: ModelFindings, usage: Usage) -> Table | None:
    """Share of every task's routing weight that went to kept experts."""
    plans = usage.plans
    rows = []
    tasks = list(dict.fromkeys(t for p in plans.values() for t in p))
    for name, p in _lines(model):
        mine = [plans[cell] for cell in p.cells if cell in plans]
        if mine:
            shares = {t: [statistics.fmean(plan[t].kept_weight) for plan in mine if t in plan] for t in tasks}
            values = [
                Value(points(statistics.fmean(v)), statistics.fmean(v)) if v else MISSING for v in shares.values()
            ]
            rows.append((*_coordinates(name, p), *values))
    if not rows:
        return None
    return Table(
        "usage", f"Routing weight of the tasks that goes to kept experts of {model.name}, %",
        (*COORDINATES, *(Column(t) for t in tasks)), tuple(rows), "Mean over the MoE layers, measured with the full model's routing.",
    )  # fmt: skip


def agreement_table(model: ModelFindings, explained: Sequence[tuple[float, Mapping[str, Any]]]) -> Table | None:
    """How far the corpora want the same experts, by budget; ``explained``: facts of `explaining.explain`."""
    from moecover.reporting.figures.plan_figures import expected_overlap

    rows = []
    for retain, facts in explained:
        for pair, found in facts["overall"]["agreement"].items():
            chance = expected_overlap(facts["keep"], facts["experts"])
            name = pair.replace(" | ", " and ")
            numbers = [Value("–" if v is None else f"{v:.2f}", v) for v in (found["jaccard"], chance, found["spearman"], found["kendall"])]  # fmt: skip
            rows.append((Value(name, name.casefold()), Value(share_text(retain), retain, str(facts["keep"])), *numbers))
    if not rows:
        return None
    columns = (
        Column("corpora", number=False, first="ascending"), Column("experts kept"), Column("overlap of the best"),
        Column("overlap by chance"), Column("Spearman, all experts"), Column("Kendall, all experts"),
    )  # fmt: skip
    return Table("overlap", f"How far the corpora agree on {model.name}", columns, tuple(rows), "Means over the MoE layers; overlap is the Jaccard index.")  # fmt: skip


def model_tables(model: ModelFindings) -> dict[str, Table]:
    """The tables of a model that need nothing but its rows, by name."""
    makers = (
        accuracy_table,
        perplexity_table,
        agreement_with_full_table,
        others_table,
        verdict_table,
        comparison_table,
        by_task_table,
        size_table,
    )
    found = [make(model) for make in makers]
    return {table.name: table for table in found if table is not None}


def failed_table(run: Run) -> Table | None:
    """The cells that were not finished, with their reasons."""
    cells = failed(run)
    if not cells:
        return None
    body = tuple(
        (
            Value(c.model, c.model.casefold()), Value(c.label, c.label.casefold()), Value(share_text(c.retain), c.retain),
            Value(set_name(c.calibration, " + ") or "–"), Value(c.reason or "no reason was recorded"), Value(c.id, c.id),
        )
        for c in cells
    )  # fmt: skip
    columns = (
        Column("model", number=False, first="ascending"), Column("method", number=False, first="ascending"), Column("experts kept"),
        Column("calibration", number=False, first="ascending"), Column("reason", number=False, first="ascending"),
        Column("cell", number=False, first="ascending"),
    )  # fmt: skip
    return Table("failed", "Cells that failed; they are in no figure", columns, body)


# -------------------------------------------------------------------------------------------------------------- in words
def _measured(model: ModelFindings, p: Point) -> tuple[str, float] | None:
    """The measure that speaks for a point: share of the full model's mean accuracy, else its perplexity's ratio."""
    if model.full is None:
        return None
    if p.mean and model.full.mean and model.full.mean.value > 0:
        return "accuracy", p.mean.value / model.full.mean.value
    for text, e in p.perplexity.items():
        before = model.full.perplexity.get(text)
        if before and math.isfinite(e.value) and math.isfinite(before.value):
            return text, e.value / before.value
    return None


def _tiles(model: ModelFindings) -> list[Tile]:
    tiles = []
    for p in reversed(model.main.points if model.main else ()):
        found = _measured(model, p)
        if found is None:
            continue
        what, ratio = found
        number = f"{100 * ratio:.1f}%" if what == "accuracy" else f"×{ratio:.2f}"
        of = "of the full model's mean accuracy" if what == "accuracy" else f"the full model's perplexity on {what}"
        tiles.append(Tile(number, f"{of} with {share_text(p.retain)} of the experts, {size(p.num_bytes)}"))
    return tiles


def tally(comparisons: Iterable[Comparison], what: str) -> str:
    """How often the method was better, worse or neither, in a sentence."""
    verdicts = [mark_of(c.verdict) for c in comparisons]
    better, worse, same = (verdicts.count(v) for v in ("better", "worse", "same"))
    return f"{what}: better in {better}, worse in {worse}, {NONE_FOUND} in {same} of {plural(len(verdicts), 'comparison')}."


def summary_of(model: ModelFindings) -> Summary:
    """Tiles, sentences and verdicts about a model."""
    sentences = []
    if model.full is None:
        sentences.append("The full model was not evaluated, so nothing says what was lost.")
    elif model.full.mean:
        error = f" (standard error {points(model.full.mean.stderr)})" if model.full.mean.stderr is not None else ""
        sentences.append(f"The full model answers {points(model.full.mean.value)}% right{error}, the mean of {plural(len(model.tasks), 'task')}.")  # fmt: skip
    elif model.full.perplexity:
        known = [f"{perplexity_text(e.value)} on {text}" for text, e in model.full.perplexity.items()]
        sentences.append(f"The full model's perplexity is {words_of(known)}.")
    if not model.series:
        sentences.append("No pruned variant was finished.")
    sentences += [_at_budget(model, p) for p in reversed(model.main.points if model.main else ())]
    if model.series and not model.tasks:
        sentences.append("No tasks were scored: perplexity alone does not say what a model can still do.")
    if len(model.series) == 1 and not model.comparisons:
        sentences.append("One method alone was run, so there is nothing to compare it with.")
    elif model.series and not model.comparisons:
        sentences.append("No comparison was tested: read differences between methods with care.")
    if model.series and all(p.runs == 1 for s in model.series for p in s.points):
        sentences.append("Every method ran once: the error bars know the number of questions, not the luck of seeds and calibration samples.")  # fmt: skip
    for first in dict.fromkeys(c.a for c in model.comparisons):
        for kind, word in (("tasks", "accuracy"), ("perplexity", "perplexity")):
            mine = [c for c in model.comparisons if c.a == first and c.kind == kind]
            sentences += [tally(mine, f"{first} on {word}")] if mine else []
    verdicts = [(mark_of(c.verdict), c.words) for c in model.comparisons if c.words]
    return Summary(tuple(_tiles(model)), tuple(sentences), tuple(verdicts))


def _at_budget(model: ModelFindings, p: Point) -> str:
    """One budget in a sentence: what the first method reaches, and the best of the others."""
    assert model.main is not None
    others = [(s.name, q) for s in model.series[1:] for q in s.points if q.retain == p.retain]
    head = f"With {share_text(p.retain)} of the experts ({p.keep} a layer) {model.main.name} reaches"
    if p.mean:
        rivals = [(name, q.mean) for name, q in others if q.mean]
        best = max(rivals, key=lambda r: r[1].value, default=None)
        text = f"{head} {points(p.mean.value)}%{_plus_minus(p.mean)}"
        return f"{text}; the best of the others is {best[0]} with {points(best[1].value)}%{_plus_minus(best[1])}." if best else f"{text}."  # fmt: skip
    if not p.perplexity:
        return f"{head} no result that all its runs share."
    lower = []
    for text, e in p.perplexity.items():
        found = [(name, q.perplexity[text]) for name, q in others if text in q.perplexity]
        least = min(found, key=lambda r: r[1].value, default=None)
        if least and least[1].value < e.value and perplexity_text(least[1].value) != perplexity_text(e.value):
            lower.append(f"{least[0]} on {text} ({perplexity_text(least[1].value)})")
    reached = words_of([f"{perplexity_text(e.value)} on {text}" for text, e in p.perplexity.items()])
    rest = f"; lower: {words_of(lower)}" if lower else "; no other method is lower" if others else ""
    return f"{head} a perplexity of {reached}{rest}."


def _plus_minus(e: Estimate) -> str:
    return "" if e.stderr is None else f" ±{points(e.stderr)}"


# ------------------------------------------------------------------------------------------------------------ provenance
def plain(value: Any) -> str:
    """A value of a record as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(v) for v in value)
    return (
        "–" if value is None else f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    )


@dataclass(frozen=True)
class Record:
    """A record of where something comes from: its name, and its entries as text."""

    name: str
    entries: tuple[tuple[str, str], ...]


def _entry(key: str, value: Any) -> str:
    return size(value) if key.endswith("_bytes") and isinstance(value, int) else plain(value)


def records_of(records: Mapping[str, Mapping[str, Any]], *, left_out: Sequence[str] = ()) -> list[Record]:
    """Records as they can be shown, but some entries."""
    return [
        Record(
            name, tuple((k.replace("_", " "), _entry(k, v)) for k, v in r.items() if k != "name" and k not in left_out)
        )
        for name, r in records.items()
    ]


def provenance_of(
    run: Run, models: Sequence[ModelFindings], corpora: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[Record]]:
    """Models, calibration corpora, texts and tasks, as they were recorded, by heading."""
    groups = {
        "Models": records_of({m.name: m.about for m in models}, left_out=("num_bytes_by_keep",)),
        "Calibration corpora": records_of(corpora),
        "Perplexity texts": records_of(run.texts),
        "Tasks": records_of(run.tasks),
    }
    return {heading: records for heading, records in groups.items() if records}


def cells_in_words(run: Run) -> str:
    """How many cells there are, and how they ended."""
    done, not_done = sum(c.status == "done" for c in run.cells), len(failed(run))
    hours = sum(c.wall_s or 0.0 for c in run.cells) / 3600
    took = f", {hours:.1f} hours of computing" if hours >= 0.1 else ""
    return f"{plural(done, 'cell')} done{f', {not_done} failed' if not_done else ''}{took}"


def coordinates_in_words(cells: Sequence[Cell]) -> str:
    """The grid in a sentence."""
    pruned = [c for c in cells if c.method != "full"]
    budgets = [share_text(r) for r in sorted({c.retain for c in pruned})]
    labels, samples = {c.label for c in pruned}, {c.sample for c in pruned if c.calibration}
    corpora = list(dict.fromkeys(itertools.chain.from_iterable(c.calibration for c in pruned)))
    if not pruned:
        return "No pruned variant was asked for."
    text = f"{plural(len(labels), 'method')} at {words_of(budgets)} of the experts"
    text += f", calibrated on {words_of(in_rows(corpora))}" if corpora else ""
    return f"{text}, {plural(len(samples), 'calibration sample')}." if len(samples) > 1 else f"{text}."
