"""Tests over runs and tasks, against scipy; Holm by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from moecover.comparison.tests import holm, over_seeds
from moecover.errors import InputError


def test_runs_agree_with_scipy() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal(8) + 0.8, rng.standard_normal(8)
    pairs = over_seeds(a, b)
    expected = stats.ttest_rel(a, b)
    assert pairs.p == pytest.approx(expected.pvalue)
    assert (pairs.low, pairs.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert pairs.effect == pytest.approx(expected.statistic / math.sqrt(8))
    assert (pairs.test, pairs.n) == ("paired t-test over runs", 8)
    against_one = over_seeds(np.array([0.8]), b)
    assert against_one.p == pytest.approx(stats.ttest_1samp(0.8 - b, 0).pvalue)
    assert against_one.test == "one-sample t-test over runs"
    welch = over_seeds(a, b[:5], paired=False)
    assert welch.p == pytest.approx(stats.ttest_ind(a, b[:5], equal_var=False).pvalue)
    ranks = over_seeds(a, b, test="wilcoxon", units="tasks")
    assert ranks.p == pytest.approx(stats.wilcoxon(a, b).pvalue)
    differences = a - b
    above = sum(1 if differences[i] + differences[j] > 0 else -1 for i in range(8) for j in range(i + 1))
    assert ranks.effect == pytest.approx(above / 36)  # share of Walsh averages above zero less those below


def test_few_runs_are_not_tested() -> None:
    two = over_seeds(np.array([1.0, 2]), np.array([0.0, 0.5]))
    assert two.p is None
    assert two.test == "paired t-test over runs; no test: 2 of them, 3 are needed"
    assert over_seeds(np.array([1.0]), np.array([0.0])).p is None
    constant = over_seeds(np.array([1.0, 2, 3]), np.array([0.0, 1, 2]))
    assert (constant.value, constant.p, constant.effect) == (1, None, None)
    five = over_seeds(np.arange(1.0, 6), np.zeros(5), test="wilcoxon")
    assert (five.p, five.effect) == (None, 1)
    assert over_seeds(np.ones(2), np.zeros(4), paired=False).p is None


def test_equal_runs_are_no_difference() -> None:
    a = np.random.default_rng(0).integers(0, 2, 50).astype(float)
    for test in ("t", "wilcoxon"):
        assert over_seeds(a, a, test=test).p == 1


def test_runs_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(InputError, match="3 and 4 runs"):
        over_seeds(np.ones(3), np.ones(4))
    with pytest.raises(InputError, match="runs: no values"):
        over_seeds(np.ones(0), np.ones(4))


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([0.02, None]) == [0.04, None]  # what could not be tested was asked too
    assert holm([]) == []
