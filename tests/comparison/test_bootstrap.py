"""Bootstrap tests: against naive loops and scipy, and by simulation: false alarms, coverage, power."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from moecover.comparison.bootstrap import mean_of_tasks, paired_bootstrap, perplexity_difference
from moecover.errors import InputError
from tests.support.scores import SIZES, answers, windows


def test_mean_of_tasks_by_hand() -> None:
    value, stderr = mean_of_tasks({"a": np.array([1.0, 0, 1, 0]), "b": np.array([1.0, 1])})
    assert value == pytest.approx(0.75)
    assert stderr == pytest.approx(math.sqrt((1 / 3) / 4) / 2)
    assert mean_of_tasks({"a": np.array([1.0])}) == (1.0, None)
    with pytest.raises(InputError, match="task a: a value is not finite"):
        mean_of_tasks({"a": np.array([1.0, np.nan])})
    with pytest.raises(InputError, match="no task"):
        mean_of_tasks({})


def test_the_bootstrap_against_a_naive_loop() -> None:
    rng = np.random.default_rng(1)
    a, b = answers(rng, SIZES, gain=0.1)
    found = paired_bootstrap(a, b)
    assert found.value == pytest.approx(np.mean([a[t].mean() - b[t].mean() for t in SIZES]))
    draws = []
    for _ in range(4000):
        chosen = {t: rng.integers(0, n, size=n) for t, n in SIZES.items()}  # one draw for both methods
        draws.append(np.mean([a[t][i].mean() - b[t][i].mean() for t, i in chosen.items()]))
    assert found.stderr == pytest.approx(np.std(draws), rel=0.05)
    assert (found.low, found.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.006)
    assert found.n == sum(SIZES.values())
    assert found.effect == pytest.approx(found.value / math.sqrt(np.mean([(a[t] - b[t]).var(ddof=1) for t in SIZES])))
    assert found == paired_bootstrap(a, b)
    assert found != paired_bootstrap(a, b, seed=1)
    back = paired_bootstrap(b, a)
    assert back.value == -found.value
    assert back.p == pytest.approx(found.p, abs=0.025)


def test_tasks_weigh_the_same_whatever_their_size() -> None:
    a = {"small": np.ones(10), "large": np.zeros(1000)}
    b = {"small": np.zeros(10), "large": np.zeros(1000)}
    assert paired_bootstrap(a, b).value == 0.5


def test_one_task_agrees_with_scipy() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal(60) + 0.3, rng.standard_normal(60)
    found, t_test = paired_bootstrap({"t": a}, {"t": b}), stats.ttest_rel(a, b)
    interval = t_test.confidence_interval()
    assert found.p == pytest.approx(t_test.pvalue, rel=0.15)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.03)
    reference = stats.bootstrap((a - b,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(0))
    assert found.stderr == pytest.approx(reference.standard_error * math.sqrt(60 / 59), rel=0.05)


def test_perplexity_against_a_naive_loop() -> None:
    rng = np.random.default_rng(3)
    a, b = windows(rng, 40, shift=0.02)
    found = perplexity_difference(a, b)
    log = [x[:, 0].sum() / x[:, 1].sum() for x in (a, b)]
    assert found.value == pytest.approx(log[0] - log[1])
    draws = []
    for _ in range(4000):
        i = rng.integers(0, 40, size=40)
        draws.append(a[i, 0].sum() / a[i, 1].sum() - b[i, 0].sum() / b[i, 1].sum())
    assert found.stderr == pytest.approx(np.std(draws) * math.sqrt(40 / 39), rel=0.05)
    assert found.low is not None
    assert found.low < found.value


def test_standard_errors_of_few_units_are_those_of_the_sample() -> None:
    """s / sqrt(n) with n - 1 below s; plain draws would give 4.3 % less."""
    d = np.random.default_rng(14).standard_normal(12)
    expected = d.std(ddof=1) / math.sqrt(12)
    rows = np.stack([d, np.ones(12)], axis=1)
    zeros = np.stack([np.zeros(12), np.ones(12)], axis=1)
    assert paired_bootstrap({"t": d}, {"t": np.zeros(12)}, resamples=40_000).stderr == pytest.approx(
        expected, rel=0.015
    )
    assert perplexity_difference(rows, zeros, resamples=40_000).stderr == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize("kind", ["tasks", "windows"])
def test_false_alarms_and_coverage_by_simulation(kind: str) -> None:
    """Without a difference 5 % of the tests say there is one, and 95 % of the intervals hold the truth."""
    rng = np.random.default_rng(4)
    repetitions = 600
    null, shifted = [], []
    for i in range(repetitions):
        if kind == "tasks":
            null.append(paired_bootstrap(*answers(rng, SIZES), resamples=1000, seed=i))
            shifted.append(paired_bootstrap(*answers(rng, SIZES, gain=0.2), resamples=1000, seed=i))
        else:
            null.append(perplexity_difference(*windows(rng, 15), resamples=1000, seed=i))
            shifted.append(perplexity_difference(*windows(rng, 15, shift=0.1), resamples=1000, seed=i))
    truth = 0.3 * 0.2 if kind == "tasks" else 0.1
    false = sum(d.p < 0.05 for d in null) / repetitions
    inside = sum(d.low <= truth <= d.high for d in shifted) / repetitions
    assert 0.03 < false < 0.075  # four standard errors of 5 % are 3.6 points
    assert 0.92 < inside < 0.975
    agreeing = sum((d.p < 0.05) == (d.low > 0 or d.high < 0) for d in null) / repetitions
    assert agreeing > 0.98  # interval and test say the same


def test_a_large_difference_is_found() -> None:
    rng = np.random.default_rng(5)
    assert sum(paired_bootstrap(*answers(rng, SIZES, gain=0.5), resamples=2000).p < 0.01 for _ in range(50)) >= 48
    assert sum(perplexity_difference(*windows(rng, 20, shift=0.05), resamples=2000).p < 0.01 for _ in range(50)) >= 48


def test_p_has_no_floor() -> None:
    """Beyond the last draw p follows the tail of the draws: a clear difference passes a correction for any family."""
    rng = np.random.default_rng(8)
    a, b = {"t": np.ones(400)}, {"t": (rng.random(400) < 0.3).astype(float)}
    found = paired_bootstrap(a, b)
    z = found.value / (np.std(a["t"] - b["t"], ddof=1) / 20)
    assert math.log10(found.p) == pytest.approx(math.log10(2 * stats.t.sf(z, 399)), rel=0.15)
    one = np.stack([rng.normal(1, 0.5, 16), np.ones(16)], axis=1)
    two = np.stack([np.zeros(16), np.ones(16)], axis=1)
    windowed = perplexity_difference(one, two)
    assert math.log10(windowed.p) == pytest.approx(math.log10(stats.ttest_1samp(one[:, 0], 0).pvalue), rel=0.15)
    assert windowed.p * 270 < 0.05  # where 10,000 draws alone would give 0.002


@pytest.mark.parametrize("shift", [0.0, 0.35, 0.7])
def test_p_is_that_of_many_more_draws(shift: float) -> None:
    """On both sides of the share of draws from which the tail is fitted."""
    rng = np.random.default_rng(9)
    d = {"t": rng.standard_exponential(100) - 1 + shift}
    zero = {"t": np.zeros(100)}
    few = [paired_bootstrap(d, zero, resamples=10_000, seed=s).p for s in range(5)]
    many = paired_bootstrap(d, zero, resamples=200_000, seed=9).p
    assert np.median(np.log(few)) == pytest.approx(math.log(many), abs=0.35)


def test_p_falls_steadily_with_the_difference() -> None:
    rng = np.random.default_rng(10)
    noise, zero = rng.standard_normal(50), {"t": np.zeros(50)}
    found = [paired_bootstrap({"t": noise + shift}, zero).p for shift in np.linspace(0.4, 2, 40)]
    assert all(later < earlier for earlier, later in itertools.pairwise(found))


def test_what_is_too_little_for_a_test_says_so() -> None:
    few = paired_bootstrap({"a": np.ones(4)}, {"a": np.zeros(4)})
    assert (few.p, few.low, few.stderr) == (None, None, None)
    assert few.test.endswith("no test: 4 items, at least 10 and 2 in every task are needed")
    one = paired_bootstrap({"a": np.ones(40), "b": np.ones(1)}, {"a": np.zeros(40), "b": np.ones(1)})
    assert one.p is None
    a, b = np.zeros(500), np.zeros(500)
    a[:4] = 1  # all four in favour of a: happens by chance in one of eight cases
    nearly = paired_bootstrap({"t": a}, {"t": b})
    assert nearly.p is None
    assert nearly.low is not None
    assert "4 of 500 differ, 10 are needed" in nearly.test
    assert perplexity_difference(*windows(np.random.default_rng(0), 6)).test.endswith(
        "no test: 6 windows, 10 are needed"
    )


def test_equal_inputs_are_no_difference() -> None:
    a = np.random.default_rng(0).integers(0, 2, 50).astype(float)
    same = paired_bootstrap({"t": a}, {"t": a})
    assert (same.value, same.low, same.high, same.p, same.effect) == (0, 0, 0, 1, 0)
    rows = windows(np.random.default_rng(0), 30)[0]
    same = perplexity_difference(rows, rows)
    assert (same.value, same.low, same.high, same.p, same.effect) == (0, 0, 0, 1, 0)


def test_what_does_not_belong_together_is_refused() -> None:
    ten = np.ones(10)
    with pytest.raises(InputError, match="only the same tasks"):
        paired_bootstrap({"a": ten}, {"b": ten})
    with pytest.raises(InputError, match="task a: 10 and 9 items"):
        paired_bootstrap({"a": ten}, {"a": ten[1:]})
    with pytest.raises(InputError, match="task a: a value is not finite"):
        paired_bootstrap({"a": ten}, {"a": ten * np.nan})
    rows = windows(np.random.default_rng(0), 20)[0]
    with pytest.raises(InputError, match="only the same windows"):
        perplexity_difference(rows, rows + 1)
    with pytest.raises(InputError, match="windows: a value is not finite"):
        perplexity_difference(rows, np.where(rows == rows[0, 0], np.inf, rows))
