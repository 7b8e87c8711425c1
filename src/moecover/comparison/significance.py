"""Which differences are more than chance: reads scores of items and windows as arrays, gives differences with tests.

Items are drawn within their task and count by the task's mean, so that a task of 300 questions weighs what one of 10,000
does; both methods answer the same items, so one draw serves both. Several runs of a method (seeds, calibration samples) are
averaged item by item, and their spread is added. docs/statistics.md has the formulas and the reasons.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.corpora.sources import set_name
from moecover.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Items = Mapping[str, NDArray[np.float64]]

ALPHA = 0.05
LEAST = 10  # units (items, windows) that there must be, and that must differ: fewer let chance alone look like a result
LEAST_RUNS, LEAST_PAIRS = 3, 6  # of a t-test; of Wilcoxon's, whose p cannot go below 0.05 with five pairs
DRAWS = 4_000_000  # numbers held at a time while drawing, 8 bytes each
BETTER, WORSE, NONE_FOUND = "better", "worse", "no significant difference"


@dataclass(frozen=True)
class Difference:
    """How much one method is above another.

    Attributes:
        value: first minus second: of the means of tasks, or of the log perplexities (nats).
        stderr: its standard error; None where it cannot be told.
        low: lower end of the 95 % interval of this comparison alone; None where there is none.
        high: upper end.
        p: two-sided, of the hypothesis that there is no difference; None where there are too few data.
        effect: Cohen's d_z (difference / standard deviation of the units' differences), or the rank-biserial correlation of
            Wilcoxon's test; None where nothing varies.
        n: units: items, windows, runs or tasks.
        test: its name in words; where p is None also why.
        p_holm: p after Holm's correction.
    """

    value: float
    stderr: float | None
    low: float | None
    high: float | None
    p: float | None
    effect: float | None
    n: int
    test: str
    p_holm: float | None = None


# -------------------------------------------------------------------------------------------------------------- estimates
def _finite(values: NDArray[np.float64], what: str) -> NDArray[np.float64]:
    if not len(values) or not np.isfinite(values).all():
        raise InputError(f"{what}: {'no values' if not len(values) else 'a value is not finite'}. Evaluate it again, a statistic over the rest would be of other items")  # fmt: skip
    return values


def mean_of_tasks(items: Items) -> tuple[float, float | None]:
    """Mean over tasks of the mean over their items, and its standard error.

    Args:
        items: by task, float64 ``[item]``.

    Returns:
        The mean, and sqrt(sum over tasks of s^2 / n) / tasks with s the standard deviation (n - 1) of a task's items; None
        where a task has a single item.

    Raises:
        InputError: no task, or a value that is not finite.
    """
    if not items:
        raise InputError("no task: a mean of tasks needs one")
    values = [_finite(np.asarray(v, dtype=np.float64), f"task {task}") for task, v in items.items()]
    mean = statistics.fmean(float(v.mean()) for v in values)
    if min(map(len, values)) < 2:
        return mean, None
    return mean, math.sqrt(sum(float(v.var(ddof=1)) / len(v) for v in values)) / len(values)


def _means(rows: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Means of rows ``[unit, column]`` drawn with replacement, ``[resample, column]``.

    How often equal rows are drawn is one multinomial number, so a task of 10,000 right or wrong answers costs three.
    """
    unique, counts = np.unique(rows, axis=0, return_counts=True)
    made = np.empty((resamples, rows.shape[1]))
    step = max(1, DRAWS // len(unique))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        made[start : start + size] = rng.multinomial(len(rows), counts / len(rows), size=size) @ unique / len(rows)
    return made


def _degrees(variances: Sequence[float], degrees: Sequence[int]) -> float:
    """Degrees of freedom of a sum of independent estimates of variance (Welch, Satterthwaite)."""
    below = sum(v * v / d for v, d in zip(variances, degrees, strict=True))
    return sum(variances) ** 2 / below if below > 0 else float(sum(degrees))


def _bootstrapped(
    value: float, draws: NDArray[np.float64], degrees: float, effect: float | None, n: int, differing: int, test: str
) -> Difference:
    """Interval and p from draws of the estimate ``[resample]`` whose spread is that of ``degrees`` degrees of freedom.

    A percentile interval is one of the normal distribution: too narrow for few units. Its levels are moved outwards to
    where Student's quantiles are (Hesterberg 2015), and p is the level at which that interval touches zero.
    """
    from scipy.stats import norm, t

    level = float(norm.cdf(t.ppf(ALPHA / 2, degrees)))
    low, high = (float(v) for v in np.quantile(draws, (level, 1 - level)))
    beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    p = min(1.0, 2 * float(t.sf(norm.isf((1 + beyond) / (1 + len(draws))), degrees)))
    enough = differing >= LEAST or not differing
    why = "" if enough else f"; no test: {differing} of {n} differ, {LEAST} are needed"
    return Difference(value, float(draws.std(ddof=1)), low, high, (p if differing else 1.0) if enough else None, effect, n, test + why)  # fmt: skip


def paired_bootstrap(a: Items, b: Items, *, resamples: int = 10_000, seed: int = 0) -> Difference:
    """Difference of two means of tasks by a paired bootstrap: items drawn within each task, the same for both.

    Args:
        a: by task, float64 ``[item]``.
        b: the same items in the same order.
        resamples: draws.
        seed: of the draws.

    Raises:
        InputError: other tasks or items, or a value that is not finite.
    """
    if a.keys() != b.keys() or not a:
        raise InputError(f"tasks {', '.join(a) or '(none)'} and {', '.join(b) or '(none)'}: only the same tasks can be compared")  # fmt: skip
    parts = []
    for task in a:
        one, two = (_finite(np.asarray(x[task], dtype=np.float64), f"task {task}") for x in (a, b))
        if one.shape != two.shape:
            raise InputError(f"task {task}: {len(one)} and {len(two)} items, only the same items can be compared. Evaluate both with the same --limit")  # fmt: skip
        parts.append(one - two)
    value = statistics.fmean(float(d.mean()) for d in parts)
    n, test = sum(map(len, parts)), f"paired bootstrap over items within {'tasks' if len(parts) > 1 else 'the task'}"
    if n < LEAST or min(map(len, parts)) < 2:
        return Difference(value, None, None, None, None, None, n, f"{test}; no test: {n} items, at least {LEAST} and 2 in every task are needed")  # fmt: skip
    rng, draws = np.random.default_rng(seed), np.full(resamples, value)
    for d in parts:
        scale = math.sqrt(len(d) / (len(d) - 1)) / len(parts)  # a draw's variance is short of the sample's by that
        draws += scale * (_means(d[:, None], resamples, rng)[:, 0] - d.mean())
    variances = [float(d.var(ddof=1)) for d in parts]
    degrees = _degrees([v / len(d) for v, d in zip(variances, parts, strict=True)], [len(d) - 1 for d in parts])
    spread = math.sqrt(statistics.fmean(variances))
    differing = sum(int(np.count_nonzero(d)) for d in parts)
    return _bootstrapped(value, draws, degrees, _effect(value, spread), n, differing, test)


def perplexity_difference(
    a: NDArray[np.float64], b: NDArray[np.float64], *, resamples: int = 10_000, seed: int = 0
) -> Difference:
    """Difference of two log perplexities (nats) by a paired bootstrap over windows, each weighing its scored tokens.

    Args:
        a: float64 ``[window, 2]``: summed negative log-likelihood, scored tokens.
        b: the same windows in the same order.
        resamples: draws.
        seed: of the draws.

    Raises:
        InputError: other windows, or a value that is not finite.
    """
    a, b = (_finite(np.asarray(x, dtype=np.float64), "perplexity windows") for x in (a, b))
    if a.shape != b.shape or not np.array_equal(a[:, 1], b[:, 1]):
        raise InputError(f"perplexity of {len(a)} and {len(b)} windows: only the same windows can be compared, and their scored tokens differ")  # fmt: skip
    rows, n = np.stack([a[:, 0] - b[:, 0], a[:, 1]], axis=1), len(a)
    value = math.fsum(rows[:, 0]) / math.fsum(rows[:, 1])
    test = "paired bootstrap over windows"
    if n < LEAST:
        return Difference(value, None, None, None, None, None, n, f"{test}; no test: {n} windows, {LEAST} are needed")
    sums = _means(rows, resamples, np.random.default_rng(seed))
    draws = value + math.sqrt(n / (n - 1)) * (sums[:, 0] / sums[:, 1] - value)
    spread = float(((rows[:, 0] - value * rows[:, 1]) / rows[:, 1].mean()).std(ddof=1))
    return _bootstrapped(value, draws, n - 1, _effect(value, spread), n, int(np.count_nonzero(rows[:, 0])), test)


def _effect(value: float, spread: float) -> float | None:
    """Cohen's d_z; None where nothing varies around a difference."""
    return value / spread if spread > 1e-12 * abs(value) else (None if value else 0.0)


# ---------------------------------------------------------------------------------------------------- runs and many tests
def over_seeds(
    a: NDArray[np.float64], b: NDArray[np.float64], *, paired: bool = True, test: str = "t", units: str = "runs"
) -> Difference:
    """Difference over runs (or other units, as tasks) of which each gives one number.

    Args:
        a: float64 ``[unit]``; a single number is a method that has one run, held against every one of the other.
        b: the same units in the same order if ``paired``.
        paired: the units belong together (the same calibration sample, the same task); else Welch's t-test.
        test: ``t`` or ``wilcoxon`` (paired only).
        units: what they are, for the name of the test.

    Raises:
        InputError: unequal numbers of paired units, or a value that is not finite.
    """
    from scipy import stats

    a, b = (_finite(np.atleast_1d(np.asarray(x, dtype=np.float64)), units) for x in (a, b))
    single = min(len(a), len(b)) == 1
    if not single and paired and len(a) != len(b):
        raise InputError(f"{len(a)} and {len(b)} {units}: pairs need the same ones on both sides")
    value = float(a.mean() - b.mean())
    if not (paired or single):
        n = min(len(a), len(b))
        if n < LEAST_RUNS or not (np.ptp(a) or np.ptp(b)):
            return Difference(value, None, None, None, None, None, n, f"Welch's t-test over {units}; no test: {len(a)} and {len(b)} of them, {LEAST_RUNS} that vary are needed")  # fmt: skip
        found = stats.ttest_ind(a, b, equal_var=False)
        low, high = found.confidence_interval(1 - ALPHA)
        variances = float(a.var(ddof=1)), float(b.var(ddof=1))
        stderr = math.sqrt(variances[0] / len(a) + variances[1] / len(b))
        return Difference(value, stderr, float(low), float(high), float(found.pvalue), _effect(value, math.sqrt(statistics.fmean(variances))), n, f"Welch's t-test over {units}")  # fmt: skip
    differences = a - b
    n = len(differences)
    name = f"Wilcoxon's signed-rank test over {units}" if test == "wilcoxon" else f"{'one-sample' if single else 'paired'} t-test over {units}"  # fmt: skip
    if not differences.any() and n > 1:
        return Difference(0.0, 0.0, 0.0, 0.0, 1.0, 0.0, n, name)
    spread = float(differences.std(ddof=1)) if n > 1 else 0.0
    effect = _effect(value, spread)
    stderr = spread / math.sqrt(n)
    if test == "wilcoxon":
        moved = differences[differences != 0]
        ranks = stats.rankdata(np.abs(moved))
        biserial = float((ranks * np.sign(moved)).sum() / ranks.sum())
        few = len(moved) < LEAST_PAIRS
        why = f"; no test: {len(moved)} that differ, {LEAST_PAIRS} are needed" if few else ""
        p = None if few else float(stats.wilcoxon(moved).pvalue)
        return Difference(value, stderr if n > 1 else None, None, None, p, biserial, n, name + why)
    if n < LEAST_RUNS or effect is None:
        why = f"{n} of them, {LEAST_RUNS} are needed" if n < LEAST_RUNS else "all differ by the same"
        return Difference(value, None, None, None, None, effect if n > 1 else None, n, f"{name}; no test: {why}")
    t_test = stats.ttest_1samp(differences, 0.0)
    low, high = t_test.confidence_interval(1 - ALPHA)
    return Difference(value, stderr, float(low), float(high), float(t_test.pvalue), effect, n, name)


def holm(p: Sequence[float | None]) -> list[float | None]:
    """p-values after Holm's step-down correction, in the given order.

    A comparison without a test (None) stays None and counts as one that was made: leaving it out would look at the data.
    """
    order = sorted((i for i, value in enumerate(p) if value is not None), key=lambda i: p[i] or 0.0)
    adjusted: list[float | None] = [None] * len(p)
    least = 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p) - rank) * (p[i] or 0.0)))
        adjusted[i] = least
    return adjusted


def _with_spread(d: Difference, degrees_of_items: int, runs: Sequence[tuple[float, int]], what: str) -> Difference:
    """The difference with the spread of runs added to that of the items; ``runs``: variance of a mean and its degrees.

    Two sources add up: other items, and other runs on the same items.
    """
    from scipy.stats import t

    if not runs or d.stderr is None or d.p is None:
        return d
    variances = [d.stderr**2, *(v for v, _ in runs)]
    stderr = math.sqrt(sum(variances))
    if stderr == 0:
        return d
    degrees = _degrees(variances, [degrees_of_items, *(n for _, n in runs)])
    reach = float(t.ppf(1 - ALPHA / 2, degrees)) * stderr
    p = 2 * float(t.sf(abs(d.value) / stderr, degrees))
    return replace(d, stderr=stderr, low=d.value - reach, high=d.value + reach, p=p, test=f"{d.test}, with the spread over {what}")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ comparisons
Cell = Mapping[str, Any]


def _runs(cells: Sequence[Cell]) -> dict[tuple[int, int | None], Cell]:
    """The runs of one method by sample and seed."""
    return {(c["sample"], c["seed"]): c for c in cells}


def _averaged(cells: Sequence[Cell], kind: str, name: str) -> NDArray[np.float64]:
    """Items of a task, or windows of a text, averaged over runs."""
    found = [np.asarray(c[kind][name], dtype=np.float64) for c in cells]
    if len({f.shape for f in found}) > 1 or (kind == "windows" and any(not np.array_equal(f[:, 1], found[0][:, 1]) for f in found)):  # fmt: skip
        raise InputError(f"{name}: the runs of {cells[0]['label']} have other {kind}. Evaluate them anew with the same settings")  # fmt: skip
    averaged: NDArray[np.float64] = np.sum(found, axis=0) / len(found)  # sums of 0 and 1 are exact: equal stays equal
    return averaged


def _number(cell: Cell, tasks: Sequence[str], text: str | None) -> float:
    """What one run gives: the mean of tasks, or the log perplexity of a text."""
    if text is None:
        return mean_of_tasks({t: cell["items"][t] for t in tasks})[0]
    windows = _finite(np.asarray(cell["windows"][text], dtype=np.float64), f"perplexity windows of {text}")
    return math.fsum(windows[:, 0]) / math.fsum(windows[:, 1])


def _compare(
    ours: Sequence[Cell], theirs: Sequence[Cell], tasks: Sequence[str], text: str | None, **draws: int
) -> tuple[Difference, dict[str, Any]]:
    """The difference of two methods in one measure, and what else was found about it."""
    a, b = _runs(ours), _runs(theirs)
    common = [key for key in a if key in b]
    samples_only = all(seed is None for _, seed in (*a, *b))
    paired = samples_only and len(common) > 1
    if paired:
        a, b = {k: a[k] for k in common}, {k: b[k] for k in common}
    kind, names = ("items", tasks) if text is None else ("windows", [text])
    one = {name: _averaged(list(a.values()), kind, name) for name in names}
    two = {name: _averaged(list(b.values()), kind, name) for name in names}
    found = paired_bootstrap(one, two, **draws) if text is None else perplexity_difference(one[text], two[text], **draws)  # fmt: skip
    numbers_a = np.array([_number(c, tasks, text) for c in a.values()])
    numbers_b = np.array([_number(c, tasks, text) for c in b.values()])
    spread, what = [], []
    if paired:
        spread = [(float((numbers_a - numbers_b).var(ddof=1)) / len(a), len(a) - 1)]
        what = [f"{len(a)} calibration samples"]
    else:
        for cells, numbers in ((ours, numbers_a), (theirs, numbers_b)):
            if len(numbers) > 1:
                spread.append((float(numbers.var(ddof=1)) / len(numbers), len(numbers) - 1))
                what.append(f"{len(numbers)} runs of {cells[0]['label']}")
    also: dict[str, Any] = {"runs_a": len(a), "runs_b": len(b)}
    also["one_seed"] = [cells[0]["label"] for cells in (ours, theirs) if len(cells) == 1 and cells[0]["seed"] is not None]  # fmt: skip
    if len(a) > 1 or len(b) > 1:
        also["over_runs"] = asdict(over_seeds(numbers_a, numbers_b, paired=paired, units="calibration samples" if paired else "runs"))  # fmt: skip
    if text is None and len(tasks) > 1:
        means = [np.array([x[t].mean() for t in tasks]) for x in (one, two)]
        also["over_tasks"] = asdict(over_seeds(*means, test="wilcoxon", units="tasks"))
        each = {t: paired_bootstrap({t: one[t]}, {t: two[t]}, **draws) for t in tasks}
        also["by_task"] = {t: {"value": d.value, "low": d.low, "high": d.high, "n": d.n} for t, d in each.items()}
    return _with_spread(found, found.n - max(1, len(tasks)), spread, " and ".join(what)), also


def studied(cells: Sequence[Cell], against: str | None = None) -> str | None:
    """Label of the method that the others are held against: the given one, else the first of TB-Coverage, else None.

    Raises:
        InputError: no cell has the given label.
    """
    labels = list(dict.fromkeys(c["label"] for c in cells))
    if against is not None and against not in labels:
        raise InputError(f"no cell is labelled {against!r}. There are: {', '.join(labels)}")
    return against or next((c["label"] for c in cells if c["method"] == "tb-coverage"), None)


def comparisons(
    cells: Sequence[Cell], *, against: str | None = None, resamples: int = 10_000, seed: int = 0
) -> list[dict[str, Any]]:
    """The method under study against every other label, at every model, calibration set and budget.

    Args:
        cells: of cell.json (``model``, ``method``, ``label``, ``retain``, ``calibration``, ``sample``, ``seed``), with
            ``items``, by task float64 ``[item]`` of the metric that the task is known by, and ``windows``, by text
            float64 ``[window, 2]``. The full model, and cells that have neither, are left out. A method without calibration
            is compared in every calibration set.
        against: label of the method under study, see `studied`.
        resamples: draws of every bootstrap.
        seed: of the draws.

    Returns:
        A dict a comparison: ``model``, ``retain``, ``calibration``, ``kind`` (tasks or perplexity), ``name``, ``a``, ``b``, the
        fields of `Difference` (the studied method first: accuracy above 0 and log perplexity below 0 are better),
        ``verdict``, ``words``, ``family`` (what Holm's correction runs over), ``runs_a`` and ``runs_b``, ``one_seed`` (labels of methods
        that draw by chance and have a single seed), and where they can be told ``over_runs``, ``over_tasks`` and ``by_task``.

    Raises:
        InputError: no such label, items or windows that do not belong together, or a value that is not finite.
    """
    cells = [c for c in cells if c["method"] != "full" and (c.get("items") or c.get("windows"))]
    ours = studied(cells, against) if cells else None
    found: list[dict[str, Any]] = []
    for model in dict.fromkeys(c["model"] for c in cells):
        mine = [c for c in cells if c["model"] == model]
        made = _of_model(model, mine, ours, resamples=resamples, seed=seed) if ours is not None else []
        family = f"the {len(made)} comparison{'s' if len(made) != 1 else ''} of {ours} on {model}: every other method, budget, calibration set and measure"  # fmt: skip
        several = len({tuple(c["calibration"]) for c in mine if c["label"] == ours}) > 1
        for (at, d, also), p in zip(made, holm([d.p for _, d, _ in made]), strict=True):
            d = replace(d, p_holm=p)
            sign = d.value * (1 if at["kind"] == "tasks" else -1)
            verdict = NONE_FOUND if p is None or p >= ALPHA else BETTER if sign > 0 else WORSE
            words = _words(at, d, verdict, also, len(made), several=several)
            found.append({**at, **asdict(d), "verdict": verdict, "words": words, "family": family, **also})
    return found


def _of_model(
    model: str, cells: Sequence[Cell], ours: str, **draws: int
) -> list[tuple[dict[str, Any], Difference, dict[str, Any]]]:
    made = []
    groups: dict[tuple[float, tuple[str, ...]], list[Cell]] = {}
    for c in cells:
        if c["label"] == ours:
            groups.setdefault((c["retain"], tuple(c["calibration"])), []).append(c)
    for (retain, calibration), mine in groups.items():
        for label in dict.fromkeys(c["label"] for c in cells if c["label"] != ours):
            theirs = [c for c in cells if c["label"] == label and c["retain"] == retain and tuple(c["calibration"]) in ((), calibration)]  # fmt: skip
            if not theirs:
                continue
            tasks, texts = ([n for n in mine[0].get(kind, {}) if all(n in c.get(kind, {}) for c in (*mine, *theirs))] for kind in ("items", "windows"))  # fmt: skip
            at = {"model": model, "retain": retain, "calibration": list(calibration)}
            measures: list[tuple[str, str, str | None]] = []
            if tasks:
                measures.append(("tasks", f"mean of {len(tasks)} tasks" if len(tasks) > 1 else tasks[0], None))
            measures += [("perplexity", text, text) for text in texts]
            for kind, name, text in measures:
                difference, also = _compare(mine, theirs, tasks if text is None else [], text, **draws)
                made.append(({**at, "kind": kind, "name": name, "a": ours, "b": label}, difference, also))
    return made


def _words(
    at: Mapping[str, Any], d: Difference, verdict: str, also: Mapping[str, Any], family: int, *, several: bool
) -> str:
    """One sentence on a comparison; a difference that was not found is said like one that was."""
    tasks = at["kind"] == "tasks"

    def number(value: float) -> str:
        return f"{100 * (value if tasks else math.expm1(value)):+.2f}"

    def size(value: float) -> str:
        return f"{number(value)} {'points' if tasks else '%'}"

    where = f"At {100 * at['retain']:g} % of the experts{', calibrated on ' + set_name(at['calibration'], ' + ') if several else ''}, "  # fmt: skip
    on = f"on the {at['name']}" if at["name"].startswith("mean of") else f"on {at['name']}"
    on = on if tasks else f"in perplexity {on}"
    a, b = at["a"], at["b"]
    if d.p is None:
        return f"{where}no significant difference between {a} and {b} {on} can be shown: {size(d.value)}, too little for a test ({d.test.partition('no test: ')[2]})."  # fmt: skip
    runs = "".join(f", mean of {also[k]} runs of {label}" for k, label in (("runs_a", a), ("runs_b", b)) if also[k] > 1)
    runs += "".join(f", one seed of {label}: another may give more or less" for label in also["one_seed"])
    assert d.low is not None
    assert d.high is not None
    interval = f"{size(d.value)} (95 % interval {number(d.low)} to {number(d.high)}{runs})"
    p = "" if d.p_holm is None else f"p {'below 0.001' if d.p_holm < 0.001 else f'= {d.p_holm:.3f}'}{f' after correction for {family} comparisons' if family > 1 else ''}"  # fmt: skip
    if not d.value and not d.stderr:
        return f"{where}there is no significant difference between {a} and {b} {on}: every {'item' if tasks else 'window'} gives the same."  # fmt: skip
    if verdict == NONE_FOUND:
        return f"{where}there is no significant difference between {a} and {b} {on}: {interval}, {p}."
    return f"{where}{a} is {verdict} than {b} {on}: {interval}, {p}."
