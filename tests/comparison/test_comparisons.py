"""Comparisons of methods: what is compared, the spread of runs, the sentences; false alarms by simulation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from moecover.comparison.bootstrap import mean_of_tasks, paired_bootstrap
from moecover.comparison.comparisons import comparisons
from moecover.comparison.measures import MeasuredCell
from moecover.errors import InputError
from tests.support.scores import SIZES, Array, answers, windows


def cell(
    label: str,
    items: dict[str, Array] | None = None,
    text: Array | None = None,
    *,
    calibration: Sequence[str] = ("w", "c"),
    **about: Any,
) -> MeasuredCell:
    """A cell with made-up scores; its method follows from the label."""
    method = {"TB-Coverage": "tb-coverage", "random": "random", "full": "full"}.get(label, "pooled")
    scores = {"items": items or {}, "windows": {} if text is None else {"wiki": text}}
    fields = {"model": "m", "method": method, "label": label, "retain": 0.5, **scores, **about}
    return MeasuredCell(calibration=tuple(calibration), **fields)


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
        "not resolved",
        "not resolved",
    ]
    assert all(c["a"] == "TB-Coverage" and c["retain"] == 0.5 for c in found)
    assert found[0]["p_holm"] == pytest.approx(4 * found[0]["p"])
    assert (
        found[0]["family"]
        == "the 4 comparisons of TB-Coverage on m: every other method, budget, calibration set and measure"
    )
    assert found[0]["words"].startswith(
        "At 50 % of the experts, this plan of TB-Coverage is better than that of REAP on the mean of 2 tasks: +"
    )
    assert "points (95 % interval +" in found[0]["words"]
    assert found[1]["words"].startswith(
        "At 50 % of the experts, this plan of TB-Coverage is worse than that of REAP in perplexity on wiki: +"
    )
    assert found[2]["words"] == (
        "At 50 % of the experts, TB-Coverage and same do not differ on the mean of 2 tasks: every item gives the same."
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
    found = comparisons([*pair, *(replace(c, model="n") for c in pair)])
    assert [c["p_holm"] == c["p"] for c in found] == [True, True]


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
    mean = {t: np.mean([s.items[t] for s in seeds], axis=0) for t in sizes}
    alone = paired_bootstrap(ours.items, mean)
    numbers = [mean_of_tasks(s.items)[0] for s in seeds]
    assert found["value"] == pytest.approx(alone.value)
    assert alone.stderr is not None
    assert found["stderr"] == pytest.approx(math.sqrt(alone.stderr**2 + np.var(numbers, ddof=1) / 5))
    assert alone.p is not None
    assert alone.p < 0.05 < found["p"]
    assert found["verdict"] == "not resolved"
    assert found["test"].endswith("with the spread over 5 runs of random")
    assert ", mean of 5 runs of random)" in found["words"]
    assert (found["runs_a"], found["runs_b"]) == (1, 5)
    assert found["over_runs"]["p"] == pytest.approx(
        stats.ttest_1samp(mean_of_tasks(ours.items)[0] - np.array(numbers), 0).pvalue
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
    blind = [cell("random", c.items, calibration=[], seed=i) for i, c in enumerate(theirs)]
    (unpaired,) = comparisons([*ours, *blind])
    assert unpaired["stderr"] > 5 * found["stderr"]
    assert unpaired["over_runs"]["test"] == "Welch's t-test over runs"


def test_a_clear_difference_passes_the_correction_for_a_large_family() -> None:
    rng = np.random.default_rng(15)
    better = {"t": np.ones(400)}
    rivals = [cell(f"rival {i}", {"t": (rng.random(400) < 0.3).astype(float)}) for i in range(270)]
    found = comparisons([cell("TB-Coverage", better), *rivals], resamples=2000)
    assert {c["verdict"] for c in found} == {"better"}
    assert max(c["p_holm"] for c in found) < 1e-6


def test_one_calibration_sample_says_nothing_about_methods() -> None:
    a, b = answers(np.random.default_rng(16), SIZES, gain=0.5)
    (one,) = comparisons([cell("TB-Coverage", a), cell("REAP", b)])
    assert one["one_sample"] == ["TB-Coverage", "REAP"]
    assert "this plan of TB-Coverage is better than that of REAP" in one["words"]
    assert one["words"].endswith("One calibration sample says nothing about the methods: plan on several (`samples`).")
    several = [cell(label, items, sample=s) for s in range(3) for label, items in (("TB-Coverage", a), ("REAP", b))]
    (three,) = comparisons(several)
    assert three["one_sample"] == []
    assert "TB-Coverage is better than REAP" in three["words"]
    seeds = [cell("random", b, calibration=[], seed=s) for s in range(3)]  # needs no calibration text
    (mixed,) = comparisons([*several[::2], *seeds])
    assert mixed["one_sample"] == []


def test_false_alarms_with_seeds_by_simulation() -> None:
    """Plans that are all drawn alike: one of them against five others is declared different in 5 % at the most."""
    rng = np.random.default_rng(11)

    def run() -> dict[str, Array]:
        return {"t": (rng.random(300) < 0.5 + 0.03 * rng.standard_normal()).astype(float)}

    alarms, repetitions = 0, 250
    for i in range(repetitions):
        ours = [cell("TB-Coverage", run(), sample=s) for s in range(5)]
        seeds = [cell("random", run(), calibration=[], seed=s) for s in range(5)]
        alarms += comparisons([*ours, *seeds], resamples=500, seed=i)[0]["verdict"] != "not resolved"
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
    assert ", calibrated on w + c, this plan of TB-Coverage" in found[2]["words"]
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
    assert (found["verdict"], found["p"], found["p_holm"]) == ("not resolved", None, None)
    assert found["words"] == (
        "At 50 % of the experts, the difference between TB-Coverage and REAP on t is not resolved: "
        "+100.00 points, too little for a test (5 items, at least 10 and 2 in every task are needed)."
    )
