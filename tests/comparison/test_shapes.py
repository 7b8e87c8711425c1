"""Thinner experts in a grid: shapes beside fractions of experts, their cells, tables, sizes, comparisons and page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moecover.checkpoints.structure import read_structure
from moecover.checkpoints.topology import ChannelAxis, Topology, Width
from moecover.cli.main import main
from moecover.comparison.cells import Cell, cells
from moecover.comparison.comparisons import comparisons
from moecover.comparison.measures import MeasuredCell
from moecover.comparison.reading import read, request
from moecover.corpora.windows import load_windows
from moecover.errors import InputError
from moecover.evaluation.perplexity import perplexity
from moecover.planning.artifact import Plan
from moecover.planning.masking import masked
from moecover.planning.run import plan_budgets
from moecover.profiling.artifact import Profile
from moecover.runtime.loading import load_model
from tests.support.grids import rows, run, written

TOPOLOGY, WIDTH = Topology("m", (1, 2), 60, 4, 8, 3), Width(64, (), {}, {})
BLOCKS = Width(64, (), {"down": ChannelAxis(2, group=32)}, {})
ASKED = {"models": ["m"], "calibration": ["wikitext2"], "perplexity": ["c4"], "seeds": [0]}


def expanded(width: Width | str = WIDTH, **fields: Any) -> list[Cell]:
    asked = request({**ASKED, **fields})
    return cells(asked, asked.config.models[0], TOPOLOGY, width)


def test_shapes_are_budgets_by_their_bytes() -> None:
    found = expanded(shapes=["25%", "30x32", 45, "45x48"], methods=["tb-coverage"])
    assert [(c.retain, c.keep, c.width, c.label) for c in found[1:]] == [
        (0.25, 15, None, "TB-Coverage (contribution)"),
        (0.25, 30, 32, "TB-Coverage (contribution), 30x32"),
        (0.75, 45, None, "TB-Coverage (contribution)"),
        (0.5625, 45, 48, "TB-Coverage (contribution), 45x48"),
    ]
    assert found[2].id.endswith("-keep30x32")
    assert found[2].to_json()["width"] == 32
    assert "width" not in found[1].to_json()
    assert {c.id for c in expanded(retain=[0.25, 0.75], methods=["tb-coverage"])} < {c.id for c in found}


def test_the_channels_of_random_experts_are_calibrated() -> None:
    whole, thin = expanded(shapes=["25%", "30x32"], methods=["random"])[1:]
    assert (whole.calibration, thin.calibration) == ((), ("wikitext2",))


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"shapes": ["30x33"]}, "no multiple of 8"),
        ({"shapes": ["2x32"]}, "fewer experts than the router's top-k"),
        ({"shapes": ["half"]}, "shape half: give experts .15., experts x channels"),
        ({"shapes": ["30x32", "30x32"]}, "`shapes` has 30x32 twice"),
        ({"shapes": ["15", "25%"]}, "the budgets keep 15, 15 experts: give every one once"),
        ({"shapes": ["30x32"], "keep": [15]}, "give one of `retain`"),
        ({"shapes": ["30x48"], "width": BLOCKS}, "in blocks of 32 channels, of which only whole ones can go"),
        ({"shapes": ["30x32"], "width": "its experts are quantised"}, "cannot be changed: its experts are quantised"),
    ],
)
def test_shapes_that_cannot_be(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        expanded(**fields)


def test_turns_of_channels_are_an_option_of_a_row(grid: Callable[..., Path], tmp_path: Path) -> None:
    methods = [{"method": "tb-coverage", "protect_channels": 0.5}, "tb-coverage"]
    found = expanded(shapes=["30x32", "15"], methods=methods)
    assert [c.label for c in found[1:]] == [
        "TB-Coverage (contribution, protect channels 0.5), 30x32",
        "TB-Coverage (contribution), 30x32",
        "TB-Coverage (contribution, protect channels 0.5)",
        "TB-Coverage (contribution)",
    ]
    for wrong, says in (1.5, "less than or equal to 1"), (-1, "greater than or equal to 0"):
        with pytest.raises(InputError, match=says):
            expanded(shapes=["30x32"], methods=[{"method": "pooled", "protect_channels": wrong}])
    with pytest.raises(InputError, match="protect_channels has no use here: no entry of `shapes` has channels"):
        expanded(retain=[0.5], methods=methods[:1])
    turns = {"method": "tb-coverage", "protect_channels": 1}
    assert run(grid(shapes=["12x8", "50%"], retain=None, methods=[turns]), tmp_path / "r") == 0
    plans = [Plan.load(path) for path in sorted((tmp_path / "r" / "plans").rglob("*.json"))]
    thin, profile = (
        next(p for p in plans if p.width == 8),
        Profile.load(next((tmp_path / "r").rglob("profile.safetensors")).parent),
    )
    expected, without = (plan_budgets(profile, keeps=[12], widths=[8], protect_channels=p)[0] for p in (1.0, 0.0))
    assert thin.channels == expected.channels != without.channels


def test_methods_are_compared_in_a_shape_and_shapes_of_the_method_at_equal_bytes() -> None:
    rng = np.random.default_rng(0)

    def cell(method: str, name: str, retain: float, shape: str = "") -> MeasuredCell:
        label = f"{name}, {shape}" if shape else name
        text = np.stack([rng.normal(60, 5, 30), np.full(30, 31.0)], axis=1)
        return MeasuredCell("m", method, label, retain, ("w",), shape=shape, windows={"wiki": text})

    found = comparisons(
        [
            cell("pooled", "REAP", 0.25),
            cell("tb-coverage", "TB", 0.25),
            cell("pooled", "REAP", 0.25, "30x32"),
            cell("tb-coverage", "TB", 0.25, "30x32"),
            cell("pooled", "REAP", 0.5625, "45x48"),
            cell("tb-coverage", "TB", 0.5625, "45x48"),
        ]
    )
    assert [(c["a"], c["b"], c["retain"]) for c in found] == [
        ("TB", "REAP", 0.25),
        ("TB", "TB, 30x32", 0.25),
        ("TB, 30x32", "REAP, 30x32", 0.25),
        ("TB, 45x48", "REAP, 45x48", 0.5625),
    ]
    assert [c["words"].startswith("At 25 % of the experts' bytes, ") for c in found[:3]] == [False, True, True]
    assert "budget, shape, calibration set" in found[0]["family"]


def test_a_grid_with_a_shape(grid: Callable[..., Path], tmp_path: Path) -> None:
    """A run of whole experts is extended; figures, sizes and tables of the thinner ones, and the page."""
    out, methods = tmp_path / "run", ["random", "tb-coverage"]
    assert run(grid(methods=methods, seeds=[0]), out) == 0
    before = written(out)
    path = grid(methods=methods, seeds=[0], retain=None, shapes=["50%", "12x8"])
    assert run(path, out) == 0
    after = written(out)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2
    structure = read_structure(read(path, {}).config.models[0].model)
    text = load_windows("test", tmp_path / "test.jsonl", structure=structure, length=32, windows=6)
    results = json.loads((out / "results.json").read_text())
    (thin,) = [c for c in results["cells"] if c["label"] == "TB-Coverage (contribution), 12x8"]
    plan = Plan.load(out / thin["plan"])
    assert (plan.keep, plan.width, thin["width"], thin["retain"]) == (12, 8, 8, 0.5)
    assert thin["row"]["num_bytes"] == structure.num_bytes(12, width=8) < structure.num_bytes(12)
    model = load_model(structure)
    with masked(model, structure, plan):
        expected = perplexity(model, text, batch_size=4)
    assert thin["row"]["perplexity"]["test"]["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert {(r["label"], r["keep"], r["width"]) for r in rows(out)} == {
        ("full model", "12", ""),
        ("random", "6", ""),
        ("TB-Coverage (contribution)", "6", ""),
        ("random, 12x8", "12", "8"),
        ("TB-Coverage (contribution), 12x8", "12", "8"),
    }
    assert "| TB-Coverage (contribution), 12x8 | 12x8 |" in (out / "results.md").read_text()
    assert [(c["a"], c["b"]) for c in results["comparisons"]] == [
        ("TB-Coverage (contribution)", "random"),
        ("TB-Coverage (contribution)", "TB-Coverage (contribution), 12x8"),
        ("TB-Coverage (contribution), 12x8", "random, 12x8"),
    ]
    (about,) = json.loads((out / "models.json").read_text())
    assert about["num_bytes_by_keep"]["12x8"] == structure.num_bytes(12, width=8)
    assert main(["report", str(out), "-o", str(tmp_path / "report.html"), "-q"]) == 0
    page = (tmp_path / "report.html").read_text()
    for part in ("experts' bytes kept", "12x8", "12 experts, 8 channels of each", "2 methods at 50%"):
        assert part in page
