"""Files compared at about equal bytes: with each other, and with the studied method at the budgets of that size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from moecover.comparison.comparisons import ComparisonRecord, comparisons
from moecover.comparison.measures import MeasuredCell

FILES: dict[str, Any] = {"method": "file", "retain": 1.0}
OURS: dict[str, Any] = {"method": "tb-coverage", "label": "TB", "calibration": ("w",)}


def cell(nll: float, num_bytes: int, **more: Any) -> MeasuredCell:
    """A cell of 30 windows whose mean loss is known."""
    noise = np.random.default_rng(num_bytes).normal(0, 0.5, 30)
    windows = np.stack([31 * nll + noise - noise.mean(), np.full(30, 31.0)], axis=1)
    return MeasuredCell(model="m", num_bytes=num_bytes, windows={"wiki": windows}, **more)


def found_of(*cells: MeasuredCell) -> dict[tuple[str, str], ComparisonRecord]:
    return {(c["a"], c["b"]): c for c in comparisons(cells, resamples=500)}


def test_rows_of_about_equal_bytes_are_compared() -> None:
    full = cell(3.0, 1000, method="full", label="full model", retain=1.0)
    q8, q4, cut = (cell(n, b, label=x, **FILES) for n, b, x in ((3.0, 530, "q8"), (3.1, 300, "q4"), (3.3, 265, "cut")))
    half, quarter = (cell(n, b, retain=r, **OURS) for n, b, r in ((3.2, 540, 0.5), (3.6, 280, 0.25)))
    rival = cell(3.4, 535, method="random", label="random", retain=0.5, seed=0)
    found = found_of(full, q8, q4, cut, half, quarter, rival)
    by_size = [pair for pair, c in found.items() if "sizes" in c]
    assert by_size == [("q8", "TB"), ("q4", "cut"), ("q4", "TB"), ("cut", "TB")]
    assert [pair for pair in found if pair not in by_size] == [("TB", "random")]
    tested = found["q4", "cut"]
    assert math.isclose(tested["value"], -0.2, rel_tol=1e-9)
    assert (tested["n"], tested["verdict"], tested["sizes"]) == (30, "better", [300, 265])
    assert tested["words"].startswith("With 300 B and 265 B, q4 is better than cut in perplexity on wiki: ")
    assert tested["family"] == "the 4 comparisons of files of m with what takes about their bytes"
    assert found["TB", "random"]["family"].startswith("the 1 comparison of TB on m: every other method")
    assert found["cut", "TB"]["words"].startswith("With 265 B and 280 B, cut is better than TB in perplexity on wiki: ")
    assert found["cut", "TB"]["words"].endswith(
        "One calibration sample says nothing about the methods: plan on several (`samples`)."
    )


def test_runs_of_a_method_are_averaged_and_files_need_no_method() -> None:
    q8 = cell(3.0, 530, label="q8", **FILES)
    runs = [cell(nll, 540, retain=0.5, sample=sample, **OURS) for sample, nll in enumerate((3.1, 3.3, 3.2))]
    tested = found_of(q8, *runs)["q8", "TB"]
    assert math.isclose(tested["value"], -0.2, rel_tol=1e-9)
    assert (tested["runs_a"], tested["runs_b"]) == (1, 3)
    assert list(found_of(q8, cell(3.1, 500, label="q6", **FILES))) == [("q8", "q6")]
