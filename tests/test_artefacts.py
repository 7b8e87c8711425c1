"""Every file that the program reads back: a changed bit is found, or changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moecover.checkpoints.manifest import parsed_manifest
from moecover.cli.main import main
from moecover.comparison.cell_files import read_records
from moecover.errors import InputError
from moecover.evaluation.artifact import Evaluation
from moecover.files.hashing import sealed, unsealed
from moecover.files.reading import read_json
from moecover.planning.artifact import Plan
from moecover.reporting.data import read_run, read_usage
from tests.fuzz.base import made_base

FLIPS = 150


def evaluation_of(path: Path) -> object:
    found = Evaluation.load(path.parent)
    items = {k: {t: {m: v.tolist() for m, v in ms.items()} for t, ms in ts.items()} for k, ts in found.items.items()}
    windows = {k: {t: v.tolist() for t, v in ts.items()} for k, ts in found.windows.items()}
    return found.to_dict(), items, windows


READERS: dict[str, Callable[[Path], object]] = {
    "plan.json": lambda path: Plan.load(path).to_dict(),
    "cut/moecover.json": parsed_manifest,
    "evaluation/evaluation.json": evaluation_of,
    "evaluation/windows.parquet": evaluation_of,
    "evaluation/items.parquet": evaluation_of,
    "grid/models.json": read_records,
    "grid/results.json": lambda path: read_run(path.parent).model_dump(),
    "grid/weights.json": lambda path: unsealed(read_json(path)),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of every kind."""
    base = made_base(tmp_path_factory.mktemp("base"))
    assert main(["compare", str(base / "grid.yaml"), "-o", str(base / "grid"), "-q"]) == 0
    return base


@pytest.mark.parametrize("name", READERS)
def test_a_flipped_bit_is_found_or_changes_nothing(name: str, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree((base / name).parent, folder)
    path, read, found = folder / Path(name).name, READERS[name], 0
    content, expected, rng = path.read_bytes(), read(path), np.random.default_rng(0)
    for _ in range(FLIPS):
        changed = bytearray(content)
        changed[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            again = read(path)
        except (InputError, ValueError):
            found += 1
            continue
        assert again == expected
    assert found > FLIPS * 0.5  # the others fell on spaces between the values


def test_a_changed_cell_is_computed_again(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(base, tmp_path / "b")
    command = ["compare", str(tmp_path / "b" / "grid.yaml"), "-o", str(tmp_path / "b" / "grid")]
    cell = next((tmp_path / "b" / "grid" / "cells").glob("*full*")) / "cell.json"
    cell.write_text(cell.read_text().replace('"wall_s": ', '"wall_s": 1'))
    assert main(command) == 0
    assert "1 to go" in capsys.readouterr().err


def test_the_usage_of_experts_is_sealed(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "run", tmp_path / "run")
    path = tmp_path / "run" / "usage.json"
    (entry,) = read_json(path)
    for write, accepted in ((entry, True), (sealed(entry), True), ({**sealed(entry), "keep": 3}, False)):
        path.write_text(json.dumps([write]))
        if accepted:
            assert len(read_usage(tmp_path / "run")) == 1
            continue
        with pytest.raises(InputError, match="changed since it was written"):
            read_usage(tmp_path / "run")
