"""Repaired cells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moecover.checkpoints.structure import read_structure
from moecover.cli.main import main
from moecover.comparison import engines, measuring
from moecover.comparison.reading import read
from moecover.comparison.run import compare
from moecover.corpora.arguments import parse_corpora
from moecover.corpora.windows import load_windows
from moecover.errors import InputError
from moecover.evaluation.artifact import Evaluation
from moecover.evaluation.perplexity import perplexity
from moecover.planning.artifact import Plan
from moecover.runtime.loading import load_model
from tests.support.grids import rows, run

REPAIRED: list[Any] = [{"method": "random", "seeds": 0}, {"method": "tb-coverage", "repair": ["none", "ridge"]}]


def test_repaired_cells(grid: Callable[..., Path], tmp_path: Path) -> None:
    """A repaired cell has the plan of the unrepaired one, and the perplexity of what `prune --repair` writes."""
    out, path = tmp_path / "run", grid(methods=REPAIRED, repairs=["none", "scale"])
    assert run(path, out) == 0
    found = {p.name: json.loads((p / "cell.json").read_text()) for p in (out / "cells").iterdir()}
    assert {c["label"]: c["repair"] for c in found.values()} == {
        "full model": "none",
        "random": "none",
        "random + scale": "scale",
        "TB-Coverage (contribution)": "none",
        "TB-Coverage (contribution) + ridge": "ridge",
    }
    assert {
        c["calibration"][0] if c["calibration"] else "" for c in found.values() if c["label"].startswith("random")
    } == {"", "a"}
    assert {row["repair"] for row in rows(out)} == {"none", "scale", "ridge"}
    assert not any((out / "repairs").iterdir())
    plain, name = "qwen-tb-coverage-contribution-a+b-0-keep6", "qwen-tb-coverage-contribution-+-ridge-a+b-0-keep6"
    assert Plan.load(out / "plans" / f"{plain}.json") == Plan.load(out / "plans" / f"{name}.json")
    plan = out / "plans" / f"{name}.json"
    (row,) = Evaluation.load(out / "cells" / name).rows
    assert row.plan["repair"] == "ridge"
    assert found[name]["repaired"]["tokens"] == 2 * 6 * 32
    assert found[name]["repaired"]["error_after"] < found[name]["repaired"]["error_before"]
    (model,) = yaml.safe_load(path.read_text())["models"]
    corpora = [f"{n}={tmp_path / f'{n}.jsonl'}" for n in ("a", "b")]
    assert list(parse_corpora(corpora)) == ["a", "b"]
    command = ["prune", model["model"], "--plan", str(plan), "--repair", "ridge", "--sequences", "6", "--length", "32"]
    assert main([*command, *(f"--corpus={c}" for c in corpora), "-o", str(tmp_path / "cut"), "-q"]) == 0
    structure = read_structure(tmp_path / "cut")
    text = load_windows("test", str(tmp_path / "test.jsonl"), structure=structure, length=32, windows=6)
    assert perplexity(load_model(structure), text, batch_size=4) == row.perplexity["test"].perplexity
    (other,) = Evaluation.load(out / "cells" / plain).rows
    assert other.perplexity["test"].perplexity != row.perplexity["test"].perplexity
    # A card of the checkpoint without a repair does not take these numbers.
    command = ["prune", model["model"], "--plan", str(plan), "-o", str(tmp_path / "plain"), "-q"]
    assert main([*command, "--evaluation", str(out / "cells" / name)]) == 2
    assert main([*command, "--evaluation", str(out / "cells" / plain)]) == 0


def test_a_repair_goes_on_where_it_was(
    grid: Callable[..., Path], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """What was repaired before an interrupt is not repaired again; a repair that fails affects its cell alone."""
    out, path = tmp_path / "run", grid(methods=[REPAIRED[1]], repairs=["scale"])
    evaluate, repair, fits = engines.evaluate, measuring.repair, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if kwargs["repairs"]:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(engines, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(read(path, {}), out)
    kept = sorted(p.name for p in (out / "repairs" / "qwen-tb-coverage-contribution-+-ridge-a+b-0-keep6").iterdir())
    assert len(kept) == len(Plan.load(next((out / "plans").iterdir())).layers)

    def failing(*args: Any, kind: str, **kwargs: Any) -> Any:
        if kind == "scale":
            raise InputError("no scale here")
        return repair(*args, kind=kind, **kwargs)

    monkeypatch.setattr(engines, "evaluate", evaluate)
    monkeypatch.setattr(measuring, "repair", failing)
    monkeypatch.setattr("moecover.repairing.store.repair_layers", lambda *args, **kwargs: fits.append(args))
    both = grid(methods=[{"method": "tb-coverage", "repair": ["none", "ridge", "scale"]}])
    assert run(both, out) == 1
    assert not fits
    assert "repairing: no scale here" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert {c["label"]: c["status"] for c in results["cells"]} == {
        "full model": "done",
        "TB-Coverage (contribution)": "done",
        "TB-Coverage (contribution) + ridge": "done",
        "TB-Coverage (contribution) + scale": "failed",
    }
