"""Cells on texts and tasks, repaired and layer by layer, and cells that fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moecover.checkpoints.structure import read_structure
from moecover.cli.main import main
from moecover.comparison import engines, open_model
from moecover.errors import InputError
from moecover.evaluation.artifact import Evaluation
from moecover.planning.artifact import Plan
from moecover.profiling.artifact import Profile
from moecover.repairing.memory import needed_bytes
from moecover.repairing.targets import places_on_disk
from moecover.runtime import cost as cost_module
from moecover.runtime.cost import cost
from tests.support.grids import rows, run, write_arc, written

PLUGIN = """
from moecover.planning.methods import METHODS
@METHODS("NAME", paper="none")
def broken(profile, budget, *, seed: int = 0):
    '''Fails.'''
    raise ValueError("no such luck")
"""


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_cell_that_fails(grid: Callable[..., Path], tmp_path: Path, capsys: Any, jobs: int) -> None:
    name = f"broken{jobs}"  # the table of methods is the process's
    (tmp_path / "plugin.py").write_text(PLUGIN.replace("NAME", name))
    path, out = grid(methods=[name, "tb-coverage"], plugins=["plugin.py"]), tmp_path / "run"
    assert main(["compare", str(path), "-o", str(out), "-q", "--jobs", str(jobs)]) == 1
    shown = capsys.readouterr().out
    assert shown.count(f"FAILED qwen-{name}-a+b-0-keep6-seed") == 2
    assert "no such luck" in shown
    results = json.loads((out / "results.json").read_text())
    assert len(results["failed"]) == 2
    done = {c["id"]: c["status"] for c in results["cells"]}
    assert done["qwen-tb-coverage-contribution-a+b-0-keep6"] == "done"
    failed = json.loads((out / "cells" / f"qwen-{name}-a+b-0-keep6-seed0" / "cell.json").read_text())
    assert failed["status"] == "failed"
    assert "plugin.py, line 6" in failed["reason"]
    assert "## Failed" in (out / "results.md").read_text()
    before = written(out)
    assert main(["compare", str(path), "-o", str(out), "-q"]) == 1  # tried again
    after = written(out)
    assert {n for n in before if before[n] != after[n]} == {f"qwen-{name}-a+b-0-keep6-seed{s}" for s in (0, 1)}


def test_one_bad_plan_does_not_take_its_group_along(
    grid: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engines.evaluate

    def evaluate(structure: Any, plans: Any, **kwargs: Any) -> Any:
        if any("seed1" in name for name in plans):
            raise RuntimeError("out of memory")
        return real(structure, plans, **kwargs)

    monkeypatch.setattr(engines, "evaluate", evaluate)
    assert run(grid(methods=["random"]), tmp_path / "run") == 1
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["failed"] == ["qwen-random-keep6-seed1"]
    (reason,) = [c["reason"] for c in results["cells"] if c["status"] == "failed"]
    assert reason.startswith("not enough memory. Give")


def test_a_model_that_cannot_be_loaded_fails_by_itself(
    grid: Callable[..., Path], tmp_path: Path, monkeypatch: Any, checkpoints: Any
) -> None:
    real, asked = open_model.opened, list[str]()

    def opened(structure: Any, **kwargs: Any) -> Any:
        asked.append(structure.topology.family)
        if structure.topology.family == "mixtral":
            raise InputError("it has a hole")
        return real(structure, **kwargs)

    monkeypatch.setattr(open_model, "opened", opened)
    models = [{"model": str(checkpoints(f)), "name": f} for f in ("mixtral", "qwen2_moe")]
    assert run(grid(models=models, methods=["random", "tb-coverage"]), tmp_path / "run") == 1
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {c["model"]: c["status"] for c in results["cells"]} == {"mixtral": "failed", "qwen2_moe": "done"}
    assert asked.count("mixtral") == 1


def test_tasks(grid: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("lm_eval")
    write_arc(tmp_path / "data")
    path = grid(tasks=["arc_easy"], data_dir="data", limit=6, methods=["random", "tb-coverage"])
    out = tmp_path / "run"
    assert run(path, out) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["tasks"]["arc_easy"]["items"] == 6
    for cell in results["cells"]:
        found = Evaluation.load(out / "cells" / cell["id"])
        (row,) = found.rows
        items = found.items[row.name]["arc_easy"]["acc"]
        assert len(items) == 6
        assert row.tasks["arc_easy"]["acc"].value == pytest.approx(items.mean())
        assert row.perplexity["test"].perplexity > 1
        assert (row.perplexity["test"].kl is None) == (cell["method"] == "full")
    table = rows(out)
    means = [float(r["value"]) for r in table if r["kind"] == "mean"]
    assert means == [float(r["value"]) for r in table if r["kind"] == "task" and r["metric"] == "acc"]
    assert "### Tasks, qwen" in (out / "results.md").read_text()
    kinds = {(c["b"], c["kind"]) for c in results["comparisons"]}
    assert kinds == {("random", "tasks"), ("random", "perplexity")}
    assert all(c["words"] in (out / "results.md").read_text() for c in results["comparisons"])
    (facts,) = json.loads((out / "usage.json").read_text())
    assert facts["tasks"] == ["arc_easy"]
    assert facts["plans"].keys() == {c["id"] for c in results["cells"] if c["method"] != "full"}
    routed = Profile.load(out / "profiles" / "qwen" / "tasks").statistics["arc_easy"]
    plan = Plan.load(out / "plans" / f"{results['cells'][-1]['id']}.json")
    weight = routed["weight_sum"]
    kept = [weight[i][list(layer.kept)].sum() / weight[i].sum() for i, layer in enumerate(plan.layers)]
    assert facts["plans"][results["cells"][-1]["id"]]["arc_easy"]["kept_weight"] == pytest.approx(kept)
    assert "### Which experts the tasks use, qwen" in (out / "results.md").read_text()
    assert "### Routing weight of the tasks on kept experts, qwen" in (out / "results.md").read_text()
    made = (out / "profiles" / "qwen" / "tasks" / "profile.safetensors").stat().st_ino
    (out / "usage.json").unlink()
    assert run(path, out) == 0
    assert json.loads((out / "usage.json").read_text()) == [facts]
    assert (out / "profiles" / "qwen" / "tasks" / "profile.safetensors").stat().st_ino == made
    before = written(out)
    write_arc(tmp_path / "data", seed=1)  # other questions
    assert run(path, out) == 0
    assert json.loads((out / "usage.json").read_text()) != [facts]
    assert all(written(out)[name] != before[name] for name in before)
    capsys.readouterr()
    assert run(path, out, "--tasks", "arc_esy") == 2
    assert "moecover: --tasks: arc_esy: there is no such task. Did you mean arc_easy?" in capsys.readouterr().err
    (tmp_path / "data" / "arc_easy" / "test.jsonl").unlink()
    assert run(path, out) == 2
    error = capsys.readouterr().err
    assert f"{path}, line " in error
    assert "test.jsonl is missing" in error


def test_layer_by_layer(
    grid: Callable[..., Path], tmp_path: Path, checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that does not fit: the same figures, and all its plans in one evaluation."""
    model = checkpoints("qwen2_moe", num_hidden_layers=6, moe_intermediate_size=256)
    write_arc(tmp_path / "data")
    monkeypatch.setattr(cost_module, "OVERHEAD", 0)  # of libraries, which this process has loaded
    path = grid(
        models=[{"model": str(model), "name": "qwen"}],
        methods=["random", "expert-sparsity", {"method": "tb-coverage", "repair": ["none", "scale"]}],
        tasks=["arc_easy"],
        data_dir="data",
    )
    assert run(path, tmp_path / "whole") == 0
    structure = read_structure(model)
    extra = needed_bytes(structure, places_on_disk(structure), kind="ridge", keep=6, tokens=384, dtype="auto")
    found = cost(structure, tokens=400, batch_tokens=128, limit=0, head=True, extra=extra)
    assert run(path, tmp_path / "layers", "--memory-limit", str((found.whole + found.streamed) // 2)) == 0
    (about,) = json.loads((tmp_path / "layers" / "models.json").read_text())
    assert about["layer_by_layer"]
    assert about["batch_size"] > 0
    assert len(json.loads((tmp_path / "layers" / "usage.json").read_text())) == 1
    assert {row["kind"] for row in rows(tmp_path / "layers")} == {"size", "perplexity", "kl", "top1", "task", "mean"}
    for a, b in zip(rows(tmp_path / "whole"), rows(tmp_path / "layers"), strict=True):
        assert a["name"] == b["name"]
        assert float(a["value"]) == pytest.approx(float(b["value"]), rel=1e-4, abs=1e-6)
