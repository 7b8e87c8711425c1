"""Fewer experts per token, and unequal numbers of experts, in a grid."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moecover.checkpoints.structure import read_structure
from moecover.comparison.reading import read
from moecover.comparison.variants import variants
from moecover.corpora.loading import load_corpora
from moecover.corpora.windows import load_windows
from moecover.evaluation.perplexity import perplexity
from moecover.evaluation.run import evaluate, skip_rules
from moecover.planning.artifact import Plan
from moecover.planning.masking import masked
from moecover.progress import Silent
from moecover.runtime.loading import load_model
from tests.support.grids import run, written


def test_every_plan_also_with_each_number(grid: Callable[..., Path]) -> None:
    """Of repaired ones none: a repair is fitted with the model's own number."""
    found = variants(read(grid(methods=["tb-coverage"], repairs=["none", "ridge"], top_ks=[3, 2]), {}))
    name = "TB-Coverage (contribution)"
    assert [(v.label, v.repair, v.top_k) for v in found] == [
        (name, "none", None),
        (f"{name} + ridge", "ridge", None),
        (f"{name}, top-3", "none", 3),
        (f"{name}, top-2", "none", 2),
    ]


def test_every_plan_also_with_skipped_experts(grid: Callable[..., Path]) -> None:
    """Of random plans too, which are blind otherwise: the thresholds need calibration text."""
    found = variants(read(grid(methods=["random"], repairs=["none", "ridge"], top_ks=[2]), {"skip": True}))
    assert [(v.label, v.repair, v.skip, v.blind) for v in found] == [
        ("random", "none", False, True),
        ("random + ridge", "ridge", False, False),
        ("random, top-2", "none", False, True),
        ("random, skipping", "none", True, False),
    ]


def test_a_number_that_the_model_cannot_have(
    grid: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(grid(top_ks=[2, 4]), tmp_path / "run") == 2
    assert "sends a token to 4. Give fewer" in capfd.readouterr().err


def test_a_grid(grid: Callable[..., Path], tmp_path: Path) -> None:
    """An extended run computes the new cells only; a plan that keeps all is the model with fewer experts a token."""
    out, methods = tmp_path / "run", [{"method": "global", "saliency": "reap"}]
    assert run(grid(methods=methods, retain=[0.5, 1.0]), out) == 0
    before = written(out)
    path = grid(methods=methods, retain=[0.5, 1.0], top_ks=[1], skip=True)
    assert run(path, out) == 0
    after = written(out)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 4
    structure = read_structure(read(path, {}).config.models[0].model)
    text = load_windows("test", tmp_path / "test.jsonl", structure=structure, length=32, windows=6)
    results = {(c["label"], c["keep"]): c for c in json.loads((out / "results.json").read_text())["cells"]}
    model = load_model(structure)
    label = "global (reap), top-1"
    for keep in (6, 12):
        cell = results[label, keep]
        plan = Plan.load(out / cell["plan"])
        assert (plan.top_k, cell["top_k"], plan.unequal) == (1, 1, True)
        with masked(model, structure, plan):
            expected = perplexity(model, text, batch_size=4)
        assert cell["row"]["perplexity"]["test"]["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert results["global (reap)", 12]["row"]["perplexity"] != results[label, 12]["row"]["perplexity"]
    given = [f"{name}={tmp_path / name}.jsonl" for name in "ab"]
    corpora = load_corpora(given, structure, {"sequences": 6, "length": 32}, progress=Silent())
    for keep in (6, 12):
        cell = results["global (reap), skipping", keep]
        one = {"p": Plan.load(out / cell["plan"])}
        rules = skip_rules(structure, one, model=model, corpora=corpora, batch_size=4)
        (row,) = evaluate(structure, one, model=model, texts=[text], full=False, skips=rules, batch_size=4).rows
        assert cell["row"]["perplexity"]["test"]["perplexity"] == row.perplexity["test"].perplexity
        assert cell["row"]["plan"]["skip"] == row.plan["skip"]
        assert row.plan["skip"]["text"] == "a, b"
        assert row.plan["skip"]["tokens"] == sum(corpus.num_tokens for corpus in corpora)
        assert 1 < row.plan["skip"]["active"] < structure.topology.top_k
