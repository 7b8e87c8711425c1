"""Losses against the full model: values and intervals against the bootstrap of the comparisons, near and far texts."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from moecover.comparison.bootstrap import paired_bootstrap, perplexity_difference
from moecover.comparison.losses import losses
from moecover.comparison.measures import MeasuredCell
from moecover.corpora.windows import split_by_kind
from tests.support.scores import answers, windows

TEXTS = ("wiki-heldout", "c4", "law")


def test_losses_are_those_of_a_paired_bootstrap() -> None:
    rng = np.random.default_rng(3)
    after, before = answers(rng, {"arc": 500, "piqa": 300}, gain=-0.3)
    pairs = {text: windows(rng, 120, shift=shift) for text, shift in zip(TEXTS, (-0.05, -0.1, -0.6), strict=True)}
    full = MeasuredCell("m", "full", "full model", 1.0, items=before, windows={t: b for t, (_, b) in pairs.items()})
    ours = MeasuredCell("m", "tb-coverage", "TB-Coverage", 0.5, ("wiki", "c4"), items=after)
    ours = replace(ours, windows={t: a for t, (a, _) in pairs.items()})
    found = {(r["kind"], *r["names"]): r for r in losses([full, ours])}
    assert [names for kind, *names in found if kind == "perplexity"] == [
        *([text] for text in TEXTS),
        [*TEXTS],
        [*TEXTS[:2]],
    ]
    drawn = paired_bootstrap(after, before)
    tasks = found["tasks", "arc", "piqa"]
    assert tasks["value"] == pytest.approx(drawn.value)
    assert [tasks["low"], tasks["high"]] == pytest.approx([drawn.low, drawn.high], abs=0.1 * (drawn.stderr or 0))
    for text, (a, b) in pairs.items():
        drawn, mine = perplexity_difference(a, b), found["perplexity", text]
        assert mine["value"] == pytest.approx(drawn.value)
        assert [mine["low"], mine["high"]] == pytest.approx([drawn.low, drawn.high], abs=0.15 * (drawn.stderr or 0))
    assert found["perplexity", *TEXTS]["value"] == pytest.approx(
        np.mean([found["perplexity", text]["value"] for text in TEXTS])
    )
    assert json.loads(json.dumps(losses([full, ours]), allow_nan=False)) == losses([full, ours])


def test_runs_widen_an_interval_and_few_windows_have_none() -> None:
    rng = np.random.default_rng(4)
    a, b = windows(rng, 40, shift=0.2)
    full = MeasuredCell("m", "full", "full model", 1.0, windows={"law": a})
    one = MeasuredCell("m", "random", "random", 0.5, seed=0, windows={"law": b})
    other = replace(one, seed=1, windows={"law": b + np.array([90.0, 0.0])})
    (single,), (both,) = losses([full, one]), losses([full, one, other])
    reach = [(r["high"] or 0) - (r["low"] or 0) for r in (single, both)]
    assert reach[1] > 2 * reach[0] > 0
    short, damaged = replace(full, windows={"law": a[:9]}), replace(one, windows={"law": b[:9] * np.inf})
    assert losses([short, replace(one, windows={"law": b[:9]})])[0]["low"] is None
    assert losses([short, damaged]) == losses([short, one]) == losses([one]) == []


def test_near_texts_are_those_of_the_corpora_names() -> None:
    assert split_by_kind(TEXTS, ["c4", "wiki"]) == (TEXTS[:2], TEXTS[2:])
    assert split_by_kind(TEXTS, []) == ((), TEXTS)
