"""Experts that the calibration text never used: one line in profile, plan and prune, and in the plan itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moecover.checkpoints.structure import read_structure
from moecover.planning.artifact import Plan
from moecover.planning.run import plan
from moecover.profiling.artifact import Profile
from moecover.profiling.run import profile
from moecover.profiling.unused import unused_experts, unused_text
from tests.conftest import random_corpus, write_rows
from tests.support.command_line import run


def test_few_tokens(checkpoints: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "r.jsonl", [{"input_ids": [3, 4, 5]}])
    model = checkpoints("qwen2_moe")
    command = ["profile", model, "--corpus", f"r={rows}", "-o", tmp_path / "p"]
    status, _, err = run(capsys, *command)
    assert status == 0
    counts = Profile.load(tmp_path / "p").statistics["r"]["count"]
    unused = [[e for e in range(12) if row[e] == 0] for row in counts]
    number, shares = sum(map(len, unused)), sorted(len(row) / 12 for row in unused)
    assert 0 < number < 24
    share = f"{shares[0]:.0%}" + (f" to {shares[1]:.0%}" if shares[1] > shares[0] else "")
    line = f"note: {number} of 24 experts ({share} of a layer) were never selected in the 3 tokens of calibration text"
    assert err.count(line) == 1
    status, _, err = run(capsys, "plan", tmp_path / "p", "--keep", 6, "-o", tmp_path / "plan.json")
    assert err.count(line) == 1
    made = Plan.load(tmp_path / "plan.json")
    assert [row.unused for row in made.layers] == unused
    kept = sum(len(set(row.unused) & set(row.kept)) for row in made.layers)
    status, _, err = run(capsys, "prune", model, "--plan", tmp_path / "plan.json", "-o", tmp_path / "cut")
    assert f"note: {number} of 24 experts ({share} of a layer) were never selected in the calibration text; " in err
    assert f"{kept} of them stay" in err
    status, _, err = run(capsys, "prune", model, "--corpus", f"r={rows}", "--keep", 6, "-o", tmp_path / "shot")
    assert err.count("were never selected") == 1
    assert (
        "random" not in run(capsys, "plan", tmp_path / "p", "--method", "random", "--keep", 6, "-o", tmp_path / "r")[2]
    )


def test_none(checkpoints: Callable[..., Path]) -> None:
    """Over all corpora together; a method that looks at none says nothing."""
    made = profile(read_structure(checkpoints("mixtral")), [random_corpus("a", seed=1), random_corpus("b", seed=2)])
    assert (made.pooled()["count"] > 0).all()
    assert unused_experts(made) == [[], []]
    assert unused_text(made) == ""
    assert "unused" not in plan(made, keep=3).to_json()
    for corpus in made.statistics.values():
        corpus["count"][1, 2:4] = 0
    assert unused_experts(made) == [[], [2, 3]]
    tokens = int(np.sum([s["num_tokens"][0, 0] for s in made.statistics.values()]))
    assert unused_text(made) == (
        f"note: 2 of 12 experts (0% to 33% of a layer) were never selected in the {tokens} tokens of calibration text: "
        "nothing is known of them"
    )
    assert [row.unused for row in plan(made, keep=3).layers] == [[], [2, 3]]
    assert [row.unused for row in plan(made, method="random", keep=3).layers] == [[], []]
