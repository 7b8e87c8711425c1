"""Calibration text that is too little: one line in profile, plan and prune, and unused experts in the plan itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moecover.checkpoints.structure import read_structure
from moecover.planning.artifact import Plan
from moecover.planning.explaining.stability import settled_text
from moecover.planning.lines import stability_at_half, thin_line
from moecover.planning.run import plan
from moecover.profiling.artifact import Profile
from moecover.profiling.coverage import FEW, coverage_line, unused_experts
from moecover.profiling.run import profile
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
    few = [int(((row > 0) & (row < FEW)).sum()) for row in counts]
    span = f"{min(few) / 12:.0%}" + (f" to {max(few) / 12:.0%}" if len(set(few)) > 1 else "")
    line = (
        f"note: calibration text is thin: {number} of 24 experts ({share} of a layer) were never selected in its 3 "
        f"tokens; {sum(few)} of 24 experts ({span} of a layer) were selected for fewer than {FEW} tokens"
    )
    assert err.count(line) == 1
    assert f"{line}. All text of the corpora was read: give more of them, or longer ones (--corpus)" in err
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
    assert "never" not in coverage_line(made)
    assert "unused" not in plan(made, keep=3).to_json()
    for corpus in made.statistics.values():
        corpus["count"][:] = FEW // 2
    assert coverage_line(made) == ""
    made.statistics["a"]["count"][0, 1] -= 1
    assert coverage_line(made).startswith(
        f"note: calibration text is thin: 1 of 12 experts (0% to 17% of a layer) were selected for fewer than {FEW} "
    )
    for corpus in made.statistics.values():
        corpus["count"][1, 2:4] = 0
    assert unused_experts(made) == [[], [2, 3]]
    tokens = int(np.sum([s["num_tokens"][0, 0] for s in made.statistics.values()]))
    assert f"2 of 12 experts (0% to 33% of a layer) were never selected in its {tokens} tokens;" in coverage_line(made)
    assert [row.unused for row in plan(made, keep=3).layers] == [[], [2, 3]]
    assert [row.unused for row in plan(made, method="random", keep=3).layers] == [[], []]


def test_the_flag_that_mends_it(
    checkpoints: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More blocks where the corpus has them; and the plan's stability, where text still changes it."""
    model = checkpoints("qwen2_moe")
    rows = [{"input_ids": list(row)} for row in random_corpus("a", seed=1, sequences=40).tokens.tolist()]
    corpus = f"a={write_rows(tmp_path / 'a.jsonl', rows)}"
    options = ["--sequences", 16, "--batch-size", 1]
    status, out, err = run(capsys, "profile", model, "--corpus", corpus, *options, "-o", tmp_path / "p")
    assert status == 0
    assert err.count("Calibrate on more: --sequences 32") == 1
    made = Profile.load(tmp_path / "p")
    stable = stability_at_half(made)
    assert stable is not None
    assert f"stability of a plan for half of the experts: {settled_text(stable)}\n" in out
    status, _, err = run(capsys, "plan", tmp_path / "p", "--keep", 6, "-o", tmp_path / "plan.json")
    assert err.count(f"; {settled_text(stable)}. Calibrate on more: --sequences 32") == 1
    made.statistics["a"]["count"][:] = FEW
    assert bool(thin_line(plan(made, keep=6), made)) == (stable["enough_tokens"] is None)
    assert thin_line(plan(made, method="random", keep=6), made) == ""
