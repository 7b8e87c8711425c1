"""Variants: methods with their options, and labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moecover.comparison.reading import read
from moecover.comparison.variants import label_of, slug, variants


@pytest.mark.parametrize(
    ("method", "saliency", "options", "label"),
    [
        ("tb-coverage", "contribution", {}, "TB-Coverage (contribution)"),
        ("tb-coverage", "reap", {"protect": 0.25}, "TB-Coverage (reap, protect 0.25)"),
        ("pooled", "reap", {}, "REAP"),
        ("pooled", "ean", {}, "pooled (ean)"),
        ("pooled", "reap", {"protect_super_experts": True}, "REAP (protect super experts)"),
        ("expert-sparsity", None, {"mode": "progressive"}, "ExpertSparsity (mode progressive)"),
        ("random", None, {}, "random"),
    ],
)
def test_labels(method: str, saliency: str | None, options: dict[str, Any], label: str) -> None:
    assert label_of(method, saliency, options) == label
    assert "/" not in slug(label)


def test_methods_with_options(grid: Callable[..., Path]) -> None:
    methods = [
        {"method": "tb-coverage", "saliency": ["reap", "ean"], "protect": 1.0},
        {"method": "random", "seeds": 7},
        {"method": "pooled", "label": "ours"},
    ]
    found = variants(read(grid(methods=methods, saliencies=["frequency"]), {}))
    assert [(v.label, v.saliency, v.seeds) for v in found] == [
        ("TB-Coverage (reap, protect 1.0)", "reap", ()),
        ("TB-Coverage (ean, protect 1.0)", "ean", ()),
        ("random", None, (7,)),
        ("ours", "frequency", ()),
    ]


def test_default_methods(grid: Callable[..., Path]) -> None:
    """The paper's grid: random choice first, the default method last."""
    found = variants(read(grid(), {}))
    assert [v.label for v in found] == ["random", "REAP", "ExpertSparsity", "TB-Coverage (contribution)"]
    assert [v.seeds for v in found] == [(0, 1), (), (), ()]
    assert [v.blind for v in found] == [True, False, False, False]
    assert [v.searches for v in found] == [False, False, True, False]
