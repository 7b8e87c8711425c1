"""`moecover compare` from end to end: run, resumed, extended."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moecover.checkpoints.structure import read_structure
from moecover.cli.main import main
from moecover.comparison import schedule
from moecover.comparison.reading import read
from moecover.comparison.run import compare
from moecover.comparison.schedule import GROUP
from moecover.corpora.windows import load_windows
from moecover.evaluation.artifact import Evaluation
from moecover.evaluation.perplexity import perplexity
from moecover.planning.artifact import Plan
from moecover.planning.masking import masked
from moecover.runtime.loading import load_model
from tests.support.grids import finished, rows, run, write_text_file, written


def test_tiny_grid(grid: Callable[..., Path], tmp_path: Path) -> None:
    """Every cell is there with its figures, and they are those of the plan run by itself."""
    path, out = grid(samples=[0, 1], retain=[0.5, 0.75]), tmp_path / "run"
    assert run(path, out) == 0
    results = json.loads((out / "results.json").read_text())
    labels = [c["label"] for c in results["cells"]]
    assert labels.count("full model") == 1
    assert labels.count("random") == 4  # budgets x seeds: no calibration has a say
    for label in ("REAP", "ExpertSparsity", "TB-Coverage (contribution)"):
        assert labels.count(label) == 4  # budgets x samples
    assert len(labels) == 17
    assert results["failed"] == []
    asked = read(path, {})
    structure = read_structure(asked.config.models[0].model)
    text = load_windows("test", tmp_path / "test.jsonl", structure=structure, length=32, windows=6)
    model = load_model(structure)
    for cell in results["cells"]:
        (row,) = Evaluation.load(out / "cells" / cell["id"]).rows
        assert cell["row"]["num_bytes"] == structure.num_bytes(cell["keep"])
        if cell["method"] == "full":
            expected = perplexity(model, text, batch_size=4)
            assert cell["plan"] is None
        else:
            plan = Plan.load(out / cell["plan"])
            assert (plan.method, plan.keep) == (cell["method"], cell["keep"])
            with masked(model, structure, plan):
                expected = perplexity(model, text, batch_size=4)
        assert row.perplexity["test"].perplexity == pytest.approx(expected, rel=1e-6)
    table = rows(out)
    assert {r["kind"] for r in table} == {"size", "perplexity", "kl", "top1"}
    of_cell = {r["label"]: r for r in table if r["kind"] == "perplexity" and r["keep"] == "6" and r["sample"] == "1"}
    assert of_cell["REAP"]["calibration"] == "a+b"
    shown = (out / "results.md").read_text()
    assert "| TB-Coverage (contribution) | 6 |" in shown
    assert "±" in shown
    (about,) = json.loads((out / "models.json").read_text())
    assert about["num_bytes_by_keep"] == {str(k): structure.num_bytes(k) for k in (6, 9, 12)}
    assert about["peak_rss_bytes"] > 50_000_000
    assert {p.name for p in (out / "profiles" / "qwen").iterdir()} == {"a+b-0", "a+b-1"}


def test_a_second_run_does_nothing(grid: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    path, out = grid(), tmp_path / "run"
    assert run(path, out) == 0
    before, results = written(out), (out / "results.csv").read_bytes()
    capsys.readouterr()
    assert main(["compare", str(path), "-o", str(out)]) == 0
    assert "all 6 cells are done" in capsys.readouterr().err
    assert written(out) == before
    assert (out / "results.csv").read_bytes() == results
    for ahead in ("0 cells of qwen, 6 are done", "6 cells of qwen"):
        capsys.readouterr()
        assert main(["compare", str(path), "-o", str(out), "--dry-run", "--json"]) == 0
        steps = json.loads(capsys.readouterr().out)["steps"]
        assert [step["name"] for step in steps if step["kind"] == "run"] == [ahead]
        write_text_file(path.parent / "test.jsonl", 9)
    assert written(out) == before


def test_an_extension_makes_the_new_cells_alone(grid: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(grid(methods=["random", "tb-coverage"]), out) == 0
    before = written(out)
    assert (
        run(grid(methods=["random", "tb-coverage", "expert-sparsity"], retain=[0.5, 0.75], seeds=[0, 1, 2]), out) == 0
    )
    after = written(out)
    assert {name: after[name] for name in before} == before
    assert len(after) == 1 + 2 * 3 + 2 * 2
    assert {r["label"] for r in rows(out)} == {"full model", "random", "TB-Coverage (contribution)", "ExpertSparsity"}
    fresh = tmp_path / "fresh"
    assert (
        run(grid(methods=["random", "tb-coverage", "expert-sparsity"], retain=[0.5, 0.75], seeds=[0, 1, 2]), fresh) == 0
    )
    assert (fresh / "results.csv").read_bytes() == (out / "results.csv").read_bytes()


def test_a_smaller_grid_leaves_the_other_cells(grid: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    assert run(grid(methods=["random", "tb-coverage"]), out) == 0
    before = written(out)
    assert main(["compare", str(grid(methods=["random"])), "-o", str(out)]) == 0
    assert "1 cell in" in capsys.readouterr().err
    assert written(out) == before
    assert {r["label"] for r in rows(out)} == {"full model", "random"}


def test_a_damaged_cell_is_recomputed(grid: Callable[..., Path], tmp_path: Path) -> None:
    path, out = grid(methods=["random"]), tmp_path / "run"
    assert run(path, out) == 0
    results = (out / "results.csv").read_bytes()
    (out / "cells" / "qwen-full" / "cell.json").write_text("{")
    shutil.rmtree(out / "cells" / "qwen-random-keep6-seed0")
    (out / "cells" / ".qwen-full.abc.partial").mkdir()
    before = finished(out)
    assert run(path, out) == 0
    assert (out / "results.csv").read_bytes() == results
    assert not (out / "cells" / ".qwen-full.abc.partial").exists()
    assert written(out)["qwen-random-keep6-seed1"] == before["qwen-random-keep6-seed1"]


def test_groups_do_not_change_figures(grid: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    """What a cell gives does not depend on the cells beside it."""
    path = grid(seeds=list(range(3)))
    assert GROUP > 3
    compare(read(path, {}), tmp_path / "one")
    monkeypatch.setattr(schedule, "GROUP", 1)
    compare(read(path, {}), tmp_path / "two")
    assert (tmp_path / "one" / "results.csv").read_bytes() == (tmp_path / "two" / "results.csv").read_bytes()


def test_a_model_over_devices(grid: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a machine with one device the same cells; with several workers it is refused."""
    small = {"retain": [0.5], "methods": [{"method": "random"}], "seeds": [0]}
    path = grid(**small, device_map="auto", memory_limit="4GB")
    assert run(path, tmp_path / "run", "--jobs", "2") == 2
    assert "every worker would take all devices of `device_map`" in capsys.readouterr().err
    assert run(path, tmp_path / "run") == 0
    assert run(grid(**small), tmp_path / "plain") == 0
    assert written(tmp_path / "run").keys() == written(tmp_path / "plain").keys()
    found, expected = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "plain"))
    assert [cell["row"]["perplexity"] for cell in found["cells"]] == [
        cell["row"]["perplexity"] for cell in expected["cells"]
    ]
