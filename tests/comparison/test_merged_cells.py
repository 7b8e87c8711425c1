"""Merged cells: a merge is a coordinate of the grid, its figures are those of the written checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from moecover.checkpoints.structure import read_structure
from moecover.cli.main import main
from moecover.comparison.cells import Cell
from moecover.comparison.checks import checked
from moecover.comparison.reading import read
from moecover.comparison.variants import variants
from moecover.corpora.windows import load_windows
from moecover.errors import InputError
from moecover.evaluation.artifact import Evaluation
from moecover.evaluation.perplexity import perplexity
from moecover.progress import resolve
from moecover.runtime.loading import load_model
from tests.support.grids import rows, run


@pytest.mark.slow
def test_merged_cells(grid: Callable[..., Path], tmp_path: Path) -> None:
    out, path = tmp_path / "run", grid(methods=[{"method": "tb-coverage", "merge": ["none", "ream"]}])
    assert run(path, out) == 0
    found = {p.name: json.loads((p / "cell.json").read_text()) for p in (out / "cells").iterdir()}
    assert {c["label"]: c.get("merge") for c in found.values()} == {
        "full model": None,
        "TB-Coverage (contribution)": None,
        "TB-Coverage (contribution) + REAM": "ream",
    }
    assert {row["merge"] for row in rows(out)} == {"none", "ream"}
    name = "qwen-tb-coverage-contribution-+-ream-a+b-0-keep6"
    assert found[name]["repaired"]["merge"] == "ream"
    (row,) = Evaluation.load(out / "cells" / name).rows
    assert row.plan["merge"] == "ream"
    assert "repair" not in row.plan
    (model,) = yaml.safe_load(path.read_text())["models"]
    plan = ["prune", model["model"], "--plan", str(out / "plans" / f"{name}.json"), "-q"]
    corpora = [f"--corpus={n}={tmp_path / f'{n}.jsonl'}" for n in ("a", "b")]
    text = ["--sequences", "6", "--length", "32", *corpora]
    assert main([*plan, "--merge", "ream", *text, "-o", str(tmp_path / "cut")]) == 0
    structure = read_structure(tmp_path / "cut")
    windows = load_windows("test", str(tmp_path / "test.jsonl"), structure=structure, length=32, windows=6)
    assert perplexity(load_model(structure), windows, batch_size=4) == row.perplexity["test"].perplexity
    # A card of the checkpoint without a merge does not take these numbers.
    assert main([*plan, "-o", str(tmp_path / "plain"), "--evaluation", str(out / "cells" / name)]) == 2


def test_every_merge_is_made_with_every_repair(grid: Callable[..., Path]) -> None:
    methods = [{"method": "random", "seeds": 0}, {"method": "pooled", "saliency": "reap", "merge": "none"}]
    found = variants(read(grid(methods=methods, merges=["none", "hc-smoe"], repairs=["none", "ridge"]), {}))
    assert [(v.label, v.merge, v.repair, v.blind) for v in found] == [
        ("random", "none", "none", True),
        ("random + ridge", "none", "ridge", False),
        ("random + HC-SMoE", "hc-smoe", "none", False),
        ("random + HC-SMoE + ridge", "hc-smoe", "ridge", False),
        ("REAP", "none", "none", False),
        ("REAP + ridge", "none", "ridge", False),
    ]
    plain, merged = (Cell("tiny", found[at], ("a",), 0, 0.5, 6, 0) for at in (0, 2))
    assert (plain.repaired, merged.repaired) == (False, True)
    assert "merge" not in plain.to_json()
    assert merged.to_json()["merge"] == "hc-smoe"
    assert merged.id == "tiny-random-+-hc-smoe-a-0-keep6-seed0"


def test_unknown_merges_are_refused_with_their_line(grid: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"unknown merge 'some'\. Known: hc-smoe, m-smoe, none, ream"):
        checked(read(grid(merges=["some"]), {}), resolve(False))
