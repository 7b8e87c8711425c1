"""Differences and their tests: against naive loops and scipy, and by simulation: false alarms, coverage, power."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from moecover.comparison.bootstrap import mean_of_tasks, paired_bootstrap, perplexity_difference
from moecover.comparison.comparisons import comparisons
from moecover.comparison.tests import holm, over_seeds
from moecover.errors import InputError

Array = NDArray[np.float64]
SIZES = {"arc": 40, "boolq": 150, "piqa": 80}


def answers(
    rng: np.random.Generator, sizes: dict[str, int], gain: float = 0.0, agree: float = 0.7
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Right and wrong answers of two methods to the same items; they share an answer with probability ``agree``."""
    a, b = {}, {}
    for i, (task, n) in enumerate(sizes.items()):
        level = 0.4 + 0.1 * i
        b[task] = (rng.random(n) < level).astype(float)
        a[task] = np.where(rng.random(n) < agree, b[task], rng.random(n) < level + gain).astype(float)
    return a, b


def windows(rng: np.random.Generator, n: int, shift: float = 0.0) -> tuple[Array, Array]:
    """Windows of unequal length of two methods whose log perplexities differ by ``shift`` in truth."""
    tokens = rng.integers(50, 400, size=n).astype(float)
    hardness = 3 + 0.5 * rng.standard_normal(n)
    b = np.stack([tokens * hardness, tokens], axis=1)
    a = np.stack([tokens * (hardness + shift + 0.03 * rng.standard_normal(n)), tokens], axis=1)
    return a, b


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
    for test in ("t", "wilcoxon"):
        assert over_seeds(a, a, test=test).p == 1


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
    with pytest.raises(InputError, match="3 and 4 runs"):
        over_seeds(np.ones(3), np.ones(4))
    with pytest.raises(InputError, match="runs: no values"):
        over_seeds(np.ones(0), np.ones(4))


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


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([0.02, None]) == [0.04, None]  # what could not be tested was asked too
    assert holm([]) == []


# ------------------------------------------------------------------------------------------------------------ comparisons
def cell(label: str, items: dict[str, Array] | None = None, text: Array | None = None, **about: Any) -> dict[str, Any]:
    method = {"TB-Coverage": "tb-coverage", "random": "random", "full": "full"}.get(label, "pooled")
    return {
        "model": "m",
        "method": method,
        "label": label,
        "retain": 0.5,
        "calibration": ["w", "c"],
        "sample": 0,
        "seed": None,
        "items": items or {},
        "windows": {} if text is None else {"wiki": text},
        **about,
    }


def test_comparisons_say_what_was_found() -> None:
    rng = np.random.default_rng(7)
    good, rival = answers(rng, {"arc": 600, "piqa": 400}, gain=0.3)
    ours, theirs = windows(rng, 60, shift=0.05)
    cells = [
        cell("full", good, ours, retain=1.0, calibration=[]),
        cell("REAP", rival, theirs),
        cell("TB-Coverage", good, ours),
        cell("same", good, ours),
        cell("failed"),
    ]
    found = comparisons(cells)
    assert [(c["b"], c["kind"], c["name"]) for c in found] == [
        ("REAP", "tasks", "mean of 2 tasks"),
        ("REAP", "perplexity", "wiki"),
        ("same", "tasks", "mean of 2 tasks"),
        ("same", "perplexity", "wiki"),
    ]
    assert [c["verdict"] for c in found] == [
        "better",
        "worse",
        "no significant difference",
        "no significant difference",
    ]
    assert all(c["a"] == "TB-Coverage" and c["retain"] == 0.5 for c in found)
    assert found[0]["p_holm"] == pytest.approx(4 * found[0]["p"])
    assert (
        found[0]["family"]
        == "the 4 comparisons of TB-Coverage on m: every other method, budget, calibration set and measure"
    )
    assert found[0]["words"].startswith(
        "At 50 % of the experts, TB-Coverage is better than REAP on the mean of 2 tasks: +"
    )
    assert "points (95 % interval +" in found[0]["words"]
    assert found[1]["words"].startswith(
        "At 50 % of the experts, TB-Coverage is worse than REAP in perplexity on wiki: +"
    )
    assert (
        found[2]["words"]
        == "At 50 % of the experts, there is no significant difference between TB-Coverage and same on the mean of 2 tasks: every item gives the same."
    )
    assert found[0]["by_task"]["arc"]["value"] == pytest.approx(good["arc"].mean() - rival["arc"].mean())
    assert found[0]["over_tasks"]["p"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    turned = comparisons(cells, against="REAP")
    assert {c["verdict"] for c in turned if c["b"] == "TB-Coverage" and c["kind"] == "tasks"} == {"worse"}
    with pytest.raises(InputError, match="no cell is labelled 'reap'. There are: REAP, TB-Coverage, same"):
        comparisons(cells, against="reap")


def test_nothing_to_compare() -> None:
    rng = np.random.default_rng(0)
    a, _ = answers(rng, SIZES)
    assert comparisons([]) == []
    assert comparisons([cell("TB-Coverage", a)]) == []
    assert comparisons([cell("REAP", a), cell("random", a)]) == []  # nothing under study
    assert comparisons([cell("TB-Coverage", a), cell("REAP", a, retain=0.25)]) == []
    assert comparisons([cell("TB-Coverage", a), cell("REAP", a, calibration=["x"])]) == []
    assert comparisons([cell("TB-Coverage", a), cell("REAP", a, model="other")]) == []


def test_holm_runs_over_one_model() -> None:
    rng = np.random.default_rng(8)
    a, b = answers(rng, SIZES, gain=0.3)
    pair = [cell("TB-Coverage", a), cell("REAP", b)]
    assert [c["p_holm"] == c["p"] for c in comparisons([*pair, *({**c, "model": "n"} for c in pair)])] == [True, True]


def test_several_seeds_of_random_against_one_plan() -> None:
    """Another random plan is another result: what its seeds spread is part of the interval."""
    rng = np.random.default_rng(9)
    sizes = {"arc": 400, "piqa": 400}
    base = {t: rng.random(n) for t, n in sizes.items()}

    def answered(level: float) -> dict[str, Array]:
        return {t: (u < level).astype(float) for t, u in base.items()}

    ours = cell("TB-Coverage", answered(0.60))
    levels = (0.50, 0.66, 0.58, 0.47, 0.63)
    seeds = [cell("random", answered(v), calibration=[], seed=i) for i, v in enumerate(levels)]
    (found,) = comparisons([ours, *seeds])
    mean = {t: np.mean([s["items"][t] for s in seeds], axis=0) for t in sizes}
    alone = paired_bootstrap(ours["items"], mean)
    numbers = [mean_of_tasks(s["items"])[0] for s in seeds]
    assert found["value"] == pytest.approx(alone.value)
    assert alone.stderr is not None
    assert found["stderr"] == pytest.approx(math.sqrt(alone.stderr**2 + np.var(numbers, ddof=1) / 5))
    assert alone.p is not None
    assert alone.p < 0.05 < found["p"]
    assert found["verdict"] == "no significant difference"
    assert found["test"].endswith("with the spread over 5 runs of random")
    assert ", mean of 5 runs of random)" in found["words"]
    assert (found["runs_a"], found["runs_b"]) == (1, 5)
    assert found["over_runs"]["p"] == pytest.approx(
        stats.ttest_1samp(mean_of_tasks(ours["items"])[0] - np.array(numbers), 0).pvalue
    )


def test_calibration_samples_are_paired() -> None:
    """A sample that is good for one method is good for the other: the pairs differ less than the runs do."""
    rng = np.random.default_rng(10)
    base = rng.random(3000)
    levels = (0.45, 0.55, 0.65)
    ours = [cell("TB-Coverage", {"t": (base < v + 0.05).astype(float)}, sample=i) for i, v in enumerate(levels)]
    theirs = [cell("REAP", {"t": (base < v + 0.002 * i).astype(float)}, sample=i) for i, v in enumerate(levels)]
    (found,) = comparisons([*ours, *theirs])
    assert found["verdict"] == "better"
    assert found["over_runs"]["test"] == "paired t-test over calibration samples"
    (fewer,) = comparisons([*ours, *theirs[:2]])  # the third failed: two pairs are left
    assert (fewer["runs_a"], fewer["runs_b"]) == (2, 2)
    blind = [cell("random", c["items"], calibration=[], seed=i) for i, c in enumerate(theirs)]
    (unpaired,) = comparisons([*ours, *blind])
    assert unpaired["stderr"] > 5 * found["stderr"]
    assert unpaired["over_runs"]["test"] == "Welch's t-test over runs"


def test_false_alarms_with_seeds_by_simulation() -> None:
    """Plans that are all drawn alike: one of them against five others is declared different in 5 % at the most."""
    rng = np.random.default_rng(11)

    def run() -> dict[str, Array]:
        return {"t": (rng.random(300) < 0.5 + 0.03 * rng.standard_normal()).astype(float)}

    alarms, repetitions = 0, 250
    for i in range(repetitions):
        ours = [cell("TB-Coverage", run(), sample=s) for s in range(5)]
        seeds = [cell("random", run(), calibration=[], seed=s) for s in range(5)]
        alarms += comparisons([*ours, *seeds], resamples=500, seed=i)[0]["verdict"] != "no significant difference"
    assert alarms / repetitions < 0.08


def test_every_calibration_set_is_compared_in_itself() -> None:
    a, b = answers(np.random.default_rng(12), SIZES, gain=0.3)
    cells = [
        cell(label, items, calibration=c)
        for c in (["w"], ["w", "c"])
        for label, items in (("TB-Coverage", a), ("REAP", b))
    ]
    found = comparisons([*cells, cell("random", b, calibration=[], seed=0)])
    assert [(c["calibration"], c["b"]) for c in found] == [
        (["w"], "REAP"),
        (["w"], "random"),
        (["w", "c"], "REAP"),
        (["w", "c"], "random"),
    ]
    assert ", calibrated on w + c, TB-Coverage" in found[2]["words"]
    assert ", one seed of random: another may give more or less)" in found[3]["words"]
    assert (found[2]["one_seed"], found[3]["one_seed"]) == ([], ["random"])


@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x * np.nan])
def test_runs_of_other_items_are_refused(change: Callable[[Array], Array]) -> None:
    a, b = answers(np.random.default_rng(13), SIZES)
    odd = {**b, "piqa": change(b["piqa"])}
    cells = [cell("TB-Coverage", a), cell("random", b, seed=0), cell("random", odd, seed=1)]
    with pytest.raises(InputError, match="piqa"):
        comparisons(cells)


def test_too_few_items_are_said_in_words() -> None:
    a = {"t": np.ones(5)}
    (found,) = comparisons([cell("TB-Coverage", a), cell("REAP", {"t": np.zeros(5)})])
    assert (found["verdict"], found["p"], found["p_holm"]) == ("no significant difference", None, None)
    assert (
        found["words"]
        == "At 50 % of the experts, no significant difference between TB-Coverage and REAP on t can be shown: +100.00 points, too little for a test (5 items, at least 10 and 2 in every task are needed)."
    )
