"""Notes on texts and samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moecover.cli.main import main
from moecover.comparison.checks import checked
from moecover.comparison.reading import read
from moecover.planning.artifact import Plan
from moecover.progress import resolve


def test_samples_of_nearly_all_the_text_are_said(grid: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    """Their spread is not that of new text."""
    most = 120
    for sequences, said in ((6, False), (most, True)):
        path = grid(samples=[0, 1], sequences=sequences, methods=["tb-coverage"])
        assert main(["compare", str(path), "-o", str(tmp_path / f"run{sequences}")]) == 0
        assert ("so the samples overlap" in capsys.readouterr().err) == said


def test_calibration_text_in_a_test_text_is_said(grid: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    path = grid(perplexity=["again=a.jsonl", "test=test.jsonl"], methods=["random"], seeds=[0], sequences=120)
    assert main(["compare", str(path), "-o", str(tmp_path / "run"), "--method", "tb-coverage"]) == 0
    err = capsys.readouterr().err
    assert "of the text again is in the calibration text too" in err
    assert "of the text test is in" not in err


def test_weights_that_methods_ignore_are_said_once(
    grid: Callable[..., Path], tmp_path: Path, checkpoints: Callable[..., Path], capsys: Any
) -> None:
    """Before anything is computed, of all models and sets together; plans take the weights of a mix where they can."""
    (tmp_path / "mix.yaml").write_text("- {name: a, source: a.jsonl, weight: 3}\n- b=b.jsonl\n")
    models = [{"model": str(checkpoints("qwen2_moe")), "name": name} for name in ("one", "two")]
    sets = [["mix.yaml"], ["b=b.jsonl"]]
    asked = read(grid(models=models, calibration=sets, methods=["tb-coverage", "pooled", "worst-corpus", "random"]), {})
    checked(asked, resolve(True))
    note = "note: the weights of the mix (a) are not used: methods pooled, worst-corpus rate every corpus alike"
    assert capsys.readouterr().err.count(note) == 1
    path = grid(calibration="mix.yaml", methods=["tb-coverage"], seeds=None)
    assert main(["compare", str(path), "-o", str(tmp_path / "run")]) == 0
    assert "the weights of the mix" not in capsys.readouterr().err
    (plan,) = (tmp_path / "run/plans").glob("*.json")
    assert Plan.load(plan).options["weights"] == {"a": 3}
    assert Plan.load(plan).calibration["a"][0]["weight"] == 3
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert {name: one[0]["source"] for name, one in results["calibration"].items()} == {"a": "a.jsonl", "b": "b.jsonl"}
    assert results["calibration"]["a"] == Plan.load(plan).calibration["a"]
