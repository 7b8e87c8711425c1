"""What makes a finished cell be computed again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from moecover.checkpoints.structure import read_structure
from moecover.cli.main import main
from moecover.comparison.fingerprints import hashed_weights, weights_fingerprint
from moecover.progress import SILENT, Silent
from tests.support.grids import run, write_text_file, written
from tests.support.tiny import make_checkpoint

REPAIRED: list[Any] = [{"method": "random", "seeds": 0}, {"method": "tb-coverage", "repair": ["none", "ridge"]}]


@pytest.mark.parametrize(
    ("change", "stays"),
    [
        ({"windows": 5}, set()),
        ({"batch_size": 3}, set()),
        ({"sequences": 5}, {"qwen-full", "qwen-random-keep6-seed0", "qwen-random-keep6-seed1"}),
        (
            {"search_tokens": 64},
            {
                "qwen-full",
                "qwen-random-keep6-seed0",
                "qwen-random-keep6-seed1",
                "qwen-reap-a+b-0-keep6",
                "qwen-tb-coverage-contribution-a+b-0-keep6",
            },
        ),
    ],
)
def test_a_cell_with_other_inputs_is_recomputed(
    grid: Callable[..., Path], tmp_path: Path, capsys: Any, change: dict[str, Any], stays: set[str]
) -> None:
    out = tmp_path / "run"
    assert run(grid(), out) == 0
    before = written(out)
    assert main(["compare", str(grid(**change)), "-o", str(out)]) == 0
    after = written(out)
    assert "recomputed, because inputs have changed" in capsys.readouterr().err
    assert {name for name in before if after[name] == before[name]} == stays
    fresh = tmp_path / "fresh"
    assert run(grid(**change), fresh) == 0
    assert (fresh / "results.csv").read_bytes() == (out / "results.csv").read_bytes()


class Forbidden(Silent):
    """A progress that draws no bar."""

    def bar(self, label: str, total: int, *, unit: str = "tokens") -> NoReturn:
        raise AssertionError(label)


def test_cells_with_other_text_or_weights_are_recomputed(grid: Callable[..., Path], tmp_path: Path) -> None:
    out, model = tmp_path / "run", make_checkpoint(tmp_path / "model", "qwen3_moe")
    path = grid(models=[str(model)], methods=["tb-coverage"])
    assert run(path, out) == 0
    first = written(out)
    write_text_file(tmp_path / "a.jsonl", 77)
    assert run(path, out) == 0
    second = written(out)
    assert second["model-full"] == first["model-full"]
    assert second["model-tb-coverage-contribution-a+b-0-keep4"] != first["model-tb-coverage-contribution-a+b-0-keep4"]
    structure = read_structure(model)
    before = hashed_weights(structure, {}, SILENT)
    assert hashed_weights(structure, before, Forbidden()) == before  # remembered
    name = next(n for n in structure.checkpoint.tensors if "experts" not in n and "norm" in n)
    entry = structure.checkpoint.tensors[name]
    with (model / entry.shard).open("r+b") as file:  # not the routers, so the model's fingerprint stays
        file.seek(entry.end - 8)  # the last bytes of the tensor
        file.write(b"\x00" * 8)
    assert read_structure(model).model_fingerprint == structure.model_fingerprint
    after = hashed_weights(structure, before, SILENT)
    assert after == hashed_weights(structure, {}, SILENT)
    assert weights_fingerprint(structure, after) != weights_fingerprint(structure, before)
    assert run(path, out) == 0
    assert written(out)["model-full"] != second["model-full"]


def test_repaired_cells_with_other_repair_text_are_recomputed(grid: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(grid(methods=REPAIRED), out) == 0
    before = written(out)
    assert run(grid(methods=REPAIRED, repair_tokens=200), out) == 0
    after = written(out)
    assert {name for name in before if after[name] != before[name]} == {
        "qwen-tb-coverage-contribution-+-ridge-a+b-0-keep6"
    }
