"""What `compare` ends with: the best method at each budget, its worst text, and what is not resolved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moecover.comparison import working
from moecover.comparison.verdict import verdict
from tests.support.runs import OURS, make_run

ONE = (("Qwen1.5-MoE-A2.7B", 24, 60),)


def results(folder: Path, **options: Any) -> Any:
    made = make_run(folder, plans=False, usage=False, models=options.pop("models", ONE), **options)
    return json.loads((made / "results.json").read_text())


def test_perplexity_decides_where_there_are_no_tasks(tmp_path: Path) -> None:
    found = results(tmp_path, tasks=())
    for cell in found["cells"]:
        for text, one in cell["row"]["perplexity"].items():
            worth = {"REAP": 3.0, "full model": 1.0}.get(cell["label"], 5.0)
            one["perplexity"] = worth * (2 if text == "c4" and cell["label"] == "REAP" else 1)
    *best, differences = verdict(found)
    assert best == [
        f"best at {budget} %: REAP, perplexity x4.24, worst text c4 x6.00"  # sqrt(3 * 6)
        for budget in (25, 50, 75)
    ]
    assert differences.startswith(f"{OURS}: better in ")


def test_tasks_decide_and_runs_are_averaged(tmp_path: Path) -> None:
    found = results(tmp_path, tasks=("boolq",), texts=("c4",), budgets=(0.5,))
    random = [c for c in found["cells"] if c["label"] == "random"]
    for cell in found["cells"]:
        cell["row"]["tasks"]["boolq"]["acc"]["value"] = 0.5
    for cell, value in zip(random, (0.9, 0.8, 0.7, 0.6, 0.5), strict=True):
        cell["row"]["tasks"]["boolq"]["acc"]["value"] = value
    assert verdict(found)[0] == "best at 50 %: random, boolq 0.700 (full model 0.500)"


def test_of_many_budgets_or_models_the_first_are_named(tmp_path: Path) -> None:
    found = results(tmp_path / "one", budgets=(0.2, 0.4, 0.6, 0.8))
    assert [line[:12] for line in verdict(found)] == ["best at 20 %", "best at 40 %", "and 2 more b", OURS[:12]]
    found = results(tmp_path / "two", models=(*ONE, ("other", 2, 8)))
    lines = verdict(found)
    assert [line.partition(":")[0] for line in lines[:2]] == [ONE[0][0], "other"]
    assert len(lines) == 3
    assert lines[0].count("; at ") == 2


def test_what_is_not_resolved_is_named_by_method_and_budget(tmp_path: Path) -> None:
    found = results(tmp_path, tasks=())
    for one in found["comparisons"]:
        close = one["b"] == "REAP" and one["retain"] < 0.6
        one["verdict"] = "not resolved" if close else "better"
    resolved = sum(one["verdict"] == "better" for one in found["comparisons"])
    assert verdict(found)[-1] == (
        f"{OURS}: better in {resolved} of {len(found['comparisons'])} comparisons, worse in 0; "
        "not resolved against REAP at 25 and 50 %"
    )
    assert verdict({**found, "comparisons": []})[-1] == "no two methods are compared"


def test_one_estimate_for_all_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(working.time, "monotonic", lambda: now[0])
    said: list[str] = []
    count = working._Count(10, 40.0, said.append)
    assert count.now() == "comparing"
    count._running["a"] = "qwen: full model"
    assert count.now() == "about 40 s to go, qwen: full model"
    now[0] += 16  # the first cell waits for the model
    count.add(type("Cell", (), {"words": "qwen, full model"})(), "c4 8.1")
    assert said == ["[1/10] qwen, full model: c4 8.1; about 72 s to go"]  # 9 cells of (2 * 4 + 16) / 3 s
    now[0] += 2
    assert count.now() == "about 70 s to go, qwen: full model"
