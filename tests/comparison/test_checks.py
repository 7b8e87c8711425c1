"""What is refused before the first cell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moecover.runtime import cost as cost_module
from tests.support import zoo
from tests.support.grids import run


def test_a_family_that_cannot_be_repaired(grid: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    zoo.make_model("gpt_oss").save_pretrained(tmp_path / "gpt", save_original_format=True)
    path = grid(
        models=[{"model": str(tmp_path / "gpt"), "name": "gpt"}], methods=[{"method": "tb-coverage", "repair": "ridge"}]
    )
    assert run(path, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert ": gpt: merge and repair do not run on gpt_oss: its experts have biases" in error
    assert f"{path}, line " in error


def test_tasks_that_need_the_model_in_memory(
    grid: Callable[..., Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are refused before the first cell where it does not fit."""
    monkeypatch.setattr(cost_module, "OVERHEAD", 0)  # of libraries, which this process has loaded
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    for split in ("train", "test"):
        lines = [json.dumps({"question": f"What is {i} and 2?", "answer": f"#### {i + 2}"}) + "\n" for i in range(6)]
        (tmp_path / "data" / "gsm8k" / f"{split}.jsonl").write_text("".join(lines))
    path = grid(tasks=["gsm8k"], data_dir="data", methods=["random"], limit=2)
    assert run(path, tmp_path / "run", "--memory-limit", "1MB") == 2
    assert f"{path}, line " in (error := capsys.readouterr().err)
    assert "qwen: gsm8k needs the model in memory" in error
    assert not (tmp_path / "run" / "cells").exists()
