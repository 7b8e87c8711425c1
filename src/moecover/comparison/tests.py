"""Tests over runs, tasks and calibration samples, and Holm's correction: reads numbers as arrays, gives differences.

Several runs of a method (seeds, calibration samples) are averaged item by item by the caller; `with_spread` adds their
spread to a bootstrap over items. docs/statistics.md has the formulas and the reasons.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from moecover.comparison.bootstrap import ALPHA, Difference, degrees_of_freedom, effect_size, finite, untested
from moecover.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

LEAST_RUNS = 3  # of a t-test
LEAST_PAIRS = 6  # of Wilcoxon's test, whose p-value cannot go below 0.05 with five pairs


def over_seeds(
    a: ArrayLike,
    b: ArrayLike,
    *,
    paired: bool = True,
    test: Literal["t", "wilcoxon"] = "t",
    units: str = "runs",
) -> Difference:
    """Difference over runs (or other units, as tasks) of which each gives one number.

    Args:
        a: float64 ``[unit]``; a single number is a method that has one run, compared with every run of the other.
        b: the same units in the same order if ``paired``.
        paired: the units belong together (the same calibration sample, the same task); else Welch's t-test.
        test: ``t`` or ``wilcoxon`` (paired only).
        units: what they are, for the name of the test.

    Returns:
        ``a`` minus ``b``.

    Raises:
        InputError: unequal numbers of paired units, or a value that is not finite.
    """
    a, b = (finite(np.atleast_1d(np.asarray(x, dtype=np.float64)), units) for x in (a, b))
    single = min(len(a), len(b)) == 1
    if not (paired or single):
        return _welch(a, b, units)
    if not single and len(a) != len(b):
        raise InputError(f"{len(a)} and {len(b)} {units}: pairs need the same ones on both sides")
    value, differences = float(a.mean() - b.mean()), a - b
    if test == "wilcoxon":
        return _wilcoxon(value, differences, f"Wilcoxon's signed-rank test over {units}")
    return _one_sample(value, differences, f"{'one-sample' if single else 'paired'} t-test over {units}")


def _welch(a: NDArray[np.float64], b: NDArray[np.float64], units: str) -> Difference:
    """Welch's t-test."""
    from scipy import stats

    value, n, name = float(a.mean() - b.mean()), min(len(a), len(b)), f"Welch's t-test over {units}"
    if n < LEAST_RUNS or not (np.ptp(a) or np.ptp(b)):
        why = f"{len(a)} and {len(b)} of them, {LEAST_RUNS} that vary are needed"
        return untested(value, n, f"{name}; no test: {why}")
    found = stats.ttest_ind(a, b, equal_var=False)
    low, high = found.confidence_interval(1 - ALPHA)
    variances = float(a.var(ddof=1)), float(b.var(ddof=1))
    stderr = math.sqrt(variances[0] / len(a) + variances[1] / len(b))
    effect = effect_size(value, math.sqrt(statistics.fmean(variances)))
    return Difference(value, stderr, float(low), float(high), float(found.pvalue), effect, n, name)


def _spread(differences: NDArray[np.float64]) -> float:
    return float(differences.std(ddof=1)) if len(differences) > 1 else 0.0


def _wilcoxon(value: float, differences: NDArray[np.float64], name: str) -> Difference:
    """Wilcoxon's signed-rank test of paired differences; ``value`` is their mean."""
    from scipy import stats

    n = len(differences)
    if not differences.any() and n > 1:
        return Difference(0.0, 0.0, 0.0, 0.0, 1.0, 0.0, n, name)
    nonzero = differences[differences != 0]
    ranks = stats.rankdata(np.abs(nonzero))
    biserial = float((ranks * np.sign(nonzero)).sum() / ranks.sum())
    stderr = _spread(differences) / math.sqrt(n) if n > 1 else None
    if len(nonzero) < LEAST_PAIRS:
        why = f"{len(nonzero)} that differ, {LEAST_PAIRS} are needed"
        return untested(value, n, f"{name}; no test: {why}", effect=biserial, stderr=stderr)
    return Difference(value, stderr, None, None, float(stats.wilcoxon(nonzero).pvalue), biserial, n, name)


def _one_sample(value: float, differences: NDArray[np.float64], name: str) -> Difference:
    """Student's t-test of differences against zero; ``value`` is their mean."""
    from scipy import stats

    n = len(differences)
    if not differences.any() and n > 1:
        return Difference(0.0, 0.0, 0.0, 0.0, 1.0, 0.0, n, name)
    spread = _spread(differences)
    effect = effect_size(value, spread)
    if n < LEAST_RUNS or effect is None:
        why = f"{n} of them, {LEAST_RUNS} are needed" if n < LEAST_RUNS else "all differ by the same"
        return untested(value, n, f"{name}; no test: {why}", effect=effect if n > 1 else None)
    found = stats.ttest_1samp(differences, 0.0)
    low, high = found.confidence_interval(1 - ALPHA)
    return Difference(value, spread / math.sqrt(n), float(low), float(high), float(found.pvalue), effect, n, name)


def holm(p: Sequence[float | None]) -> list[float | None]:
    """p-values after Holm's step-down correction, in the given order.

    A comparison without a test (None) stays None but counts as one that was made: leaving it out would depend on the
    data.
    """
    order = sorted((i for i, value in enumerate(p) if value is not None), key=lambda i: p[i] or 0.0)
    adjusted: list[float | None] = [None] * len(p)
    least = 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p) - rank) * (p[i] or 0.0)))
        adjusted[i] = least
    return adjusted


def with_spread(
    difference: Difference, degrees_of_items: int, runs: Sequence[tuple[float, int]], sources: str
) -> Difference:
    """A difference over items with the spread of runs added.

    The two sources of variance add up: other items, and other runs on the same items.

    Args:
        difference: from a bootstrap over items.
        degrees_of_items: degrees of freedom of its standard error.
        runs: variance of a mean over runs, and its degrees of freedom; one or two of them.
        sources: what the runs are, for the name of the test.
    """
    from scipy.stats import t

    if not runs or difference.stderr is None or difference.p is None:
        return difference
    variances = [difference.stderr**2, *(variance for variance, _ in runs)]
    stderr = math.sqrt(sum(variances))
    if stderr == 0:
        return difference
    degrees = degrees_of_freedom(variances, [degrees_of_items, *(n for _, n in runs)])
    reach = float(t.ppf(1 - ALPHA / 2, degrees)) * stderr
    p = 2 * float(t.sf(abs(difference.value) / stderr, degrees))
    low, high = difference.value - reach, difference.value + reach
    test = f"{difference.test}, with the spread over {sources}"
    return replace(difference, stderr=stderr, low=low, high=high, p=p, test=test)
