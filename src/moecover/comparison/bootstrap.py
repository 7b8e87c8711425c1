"""Bootstrap tests: reads scores of items and windows as arrays, gives differences with intervals and p-values.

Items are drawn within their task and count by the task's mean, so that a task of 300 questions weighs as much as one
of 10,000; both methods answer the same items, so one draw serves both. docs/statistics.md has formulas and reasons.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moecover.errors import InputError, arg

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Items = Mapping[str, NDArray[np.float64]]

ALPHA = 0.05
LEAST = 10  # units (items, windows) that there must be, and that must differ: fewer let chance alone look like a result
DRAWS = 4_000_000  # numbers held at a time while drawing, 8 bytes each


@dataclass(frozen=True)
class Difference:
    """How much one method is above another.

    Attributes:
        value: first minus second, of the means of tasks or of the log perplexities (nats).
        stderr: its standard error; None if the data are too few for one.
        low: lower end of the 95 % confidence interval of this comparison alone; None if there is none.
        high: upper end.
        p: two-sided p-value, of the null hypothesis of no difference; None if the data are too few for a test.
        effect: Cohen's d_z (difference / standard deviation of the units' differences), or the rank-biserial
            correlation of Wilcoxon's test; None if all units differ by the same.
        n: number of units: items, windows, runs or tasks.
        test: name of the test; if p is None, also the reason.
        p_holm: p-value after Holm's correction.
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


def untested(
    value: float, n: int, test: str, *, effect: float | None = None, stderr: float | None = None
) -> Difference:
    """A difference for whose test there are too few data."""
    return Difference(value, stderr, None, None, None, effect, n, test)


def finite(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """Values as float64, all of them finite.

    Args:
        values: numbers ``[unit]`` or ``[unit, column]``.
        name: of the values, for errors.

    Raises:
        InputError: there are none, or one is not finite.
    """
    found = np.asarray(values, dtype=np.float64)
    if not len(found) or not np.isfinite(found).all():
        wrong = "a value is not finite" if len(found) else "no values"
        raise InputError(f"{name}: {wrong}. Evaluate it again: a statistic over the rest would be of other items")
    return found


def mean_of_tasks(items: Items) -> tuple[float, float | None]:
    """The mean over tasks of the mean over their items, and its standard error.

    Args:
        items: by task, float64 ``[item]``.

    Returns:
        The mean, and sqrt(sum over tasks of s^2 / n) / tasks with s the standard deviation (n - 1) of a task's items;
        None if a task has a single item.

    Raises:
        InputError: no task, or a value that is not finite.
    """
    if not items:
        raise InputError("no task: a mean of tasks needs one")
    values = [finite(v, f"task {task}") for task, v in items.items()]
    mean = statistics.fmean(float(v.mean()) for v in values)
    if min(map(len, values)) < 2:
        return mean, None
    return mean, math.sqrt(sum(float(v.var(ddof=1)) / len(v) for v in values)) / len(values)


def _means(rows: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Means of rows ``[unit, column]`` drawn with replacement, ``[resample, column]``.

    One multinomial count is drawn for each distinct row, so 10,000 right or wrong answers need at most three.
    """
    unique, counts = np.unique(rows, axis=0, return_counts=True)
    made = np.empty((resamples, rows.shape[1]))
    step = max(1, DRAWS // len(unique))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        made[start : start + size] = rng.multinomial(len(rows), counts / len(rows), size=size) @ unique / len(rows)
    return made


def degrees_of_freedom(variances: Sequence[float], degrees: Sequence[int]) -> float:
    """Degrees of freedom of a sum of independent variance estimates (Welch-Satterthwaite equation).

    Args:
        variances: the estimates.
        degrees: degrees of freedom of each.
    """
    below = sum(v * v / d for v, d in zip(variances, degrees, strict=True))
    return sum(variances) ** 2 / below if below > 0 else float(sum(degrees))


FEW, MANY = 0.0025, 0.04  # shares of the draws between which the tail is fitted


def _normal_score(draws: NDArray[np.float64]) -> float:
    """Normal quantile of the share of the draws ``[resample]`` that lie beyond zero, on the side with fewer of them.

    Below a share of `FEW` the count of draws is too coarse. There the line through the quantiles at `FEW` and `MANY` of
    that side is continued on normal scores; a steeper line than the normal distribution of the same spread gives is not
    used, so that a tail without variation cannot make p too small.
    """
    from scipy.stats import norm

    above = np.sort(draws if np.median(draws) > 0 else -draws)  # few of them are below zero
    share = (1 + int((above <= 0).sum())) / (1 + len(above))
    if share > FEW:
        return float(norm.isf(share))
    low, high = (float(v) for v in np.quantile(above, (FEW, MANY)))
    first, second = float(norm.isf(FEW)), float(norm.isf(MANY))
    fitted = first + low * (first - second) / (high - low) if high > low else math.inf
    spread = float(above.std(ddof=1))
    return min(fitted, float(above.mean()) / spread) if spread > 0 else fitted


def _bootstrapped(
    value: float, draws: NDArray[np.float64], degrees: float, effect: float | None, n: int, differing: int, test: str
) -> Difference:
    """Interval and p-value from draws of the estimate ``[resample]`` with a number of degrees of freedom.

    A percentile interval uses normal quantiles and is too narrow for few units. Its levels are moved outwards to the
    quantiles of Student's distribution (Hesterberg 2015); p is the level at which that interval touches zero. Where
    hardly a draw is beyond zero, the level comes from a tail fitted to the draws (`_normal_score`), so that p has no
    floor and a correction for many comparisons can be passed.
    """
    from scipy.stats import norm, t

    level = float(norm.cdf(t.ppf(ALPHA / 2, degrees)))
    low, high = (float(v) for v in np.quantile(draws, (level, 1 - level)))
    p = min(1.0, 2 * float(t.sf(_normal_score(draws), degrees)))
    enough = differing >= LEAST or not differing
    why = "" if enough else f"; no test: {differing} of {n} differ, {LEAST} are needed"
    stderr = float(draws.std(ddof=1))
    return Difference(value, stderr, low, high, (p if differing else 1.0) if enough else None, effect, n, test + why)


def paired_bootstrap(a: Items, b: Items, *, resamples: int = 10_000, seed: int = 0) -> Difference:
    """Difference of two means of tasks by a paired bootstrap: items are drawn within each task, the same for both.

    Args:
        a: by task, float64 ``[item]``.
        b: the same items in the same order.
        resamples: number of bootstrap samples.
        seed: of the random numbers.

    Returns:
        ``a`` minus ``b``.

    Raises:
        InputError: other tasks or items, or a value that is not finite.
    """
    parts = _paired_items(a, b)
    value = statistics.fmean(float(d.mean()) for d in parts)
    n, test = sum(map(len, parts)), f"paired bootstrap over items within {'tasks' if len(parts) > 1 else 'the task'}"
    if n < LEAST or min(map(len, parts)) < 2:
        return untested(value, n, f"{test}; no test: {n} items, at least {LEAST} and 2 in every task are needed")
    rng, draws = np.random.default_rng(seed), np.full(resamples, value)
    for d in parts:
        scale = math.sqrt(len(d) / (len(d) - 1)) / len(parts)  # makes up for a draw's variance, which is smaller
        draws += scale * (_means(d[:, None], resamples, rng)[:, 0] - d.mean())
    variances = [float(d.var(ddof=1)) for d in parts]
    degrees = degrees_of_freedom(
        [v / len(d) for v, d in zip(variances, parts, strict=True)], [len(d) - 1 for d in parts]
    )
    spread = math.sqrt(statistics.fmean(variances))
    differing = sum(int(np.count_nonzero(d)) for d in parts)
    return _bootstrapped(value, draws, degrees, effect_size(value, spread), n, differing, test)


def _paired_items(a: Items, b: Items) -> list[NDArray[np.float64]]:
    """Differences of the items ``[item]`` of every task.

    Raises:
        InputError: other tasks or items, or a value that is not finite.
    """
    if a.keys() != b.keys() or not a:
        one, two = (", ".join(x) or "(none)" for x in (a, b))
        raise InputError(f"tasks {one} and {two}: only the same tasks can be compared")
    found = []
    for task in a:
        first, second = (finite(x[task], f"task {task}") for x in (a, b))
        if first.shape != second.shape:
            raise InputError(
                f"task {task}: {len(first)} and {len(second)} items, only the same items can be compared. "
                f"Evaluate both with the same {arg('limit')}"
            )
        found.append(first - second)
    return found


def perplexity_difference(
    a: NDArray[np.float64], b: NDArray[np.float64], *, resamples: int = 10_000, seed: int = 0
) -> Difference:
    """Difference of two log perplexities (nats) by a paired bootstrap over windows, each weighing its scored tokens.

    Args:
        a: float64 ``[window, 2]``: summed negative log-likelihood, scored tokens.
        b: the same windows in the same order.
        resamples: number of bootstrap samples.
        seed: of the random numbers.

    Returns:
        ``a`` minus ``b``.

    Raises:
        InputError: other windows, or a value that is not finite.
    """
    a, b = (finite(x, "perplexity windows") for x in (a, b))
    if a.shape != b.shape or not np.array_equal(a[:, 1], b[:, 1]):
        raise InputError(
            f"perplexity of {len(a)} and {len(b)} windows: only the same windows can be compared, and their scored "
            "tokens differ"
        )
    rows, n = np.stack([a[:, 0] - b[:, 0], a[:, 1]], axis=1), len(a)
    value = math.fsum(rows[:, 0]) / math.fsum(rows[:, 1])
    test = "paired bootstrap over windows"
    if n < LEAST:
        return untested(value, n, f"{test}; no test: {n} windows, {LEAST} are needed")
    sums = _means(rows, resamples, np.random.default_rng(seed))
    draws = value + math.sqrt(n / (n - 1)) * (sums[:, 0] / sums[:, 1] - value)
    spread = float(((rows[:, 0] - value * rows[:, 1]) / rows[:, 1].mean()).std(ddof=1))
    return _bootstrapped(value, draws, n - 1, effect_size(value, spread), n, int(np.count_nonzero(rows[:, 0])), test)


def effect_size(value: float, spread: float) -> float | None:
    """Cohen's d_z; None if all units differ by the same.

    Args:
        value: mean of the units' differences.
        spread: their standard deviation.
    """
    return value / spread if spread > 1e-12 * abs(value) else (None if value else 0.0)
