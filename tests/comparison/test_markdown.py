"""results.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moecover.comparison.markdown import markdown
from moecover.comparison.tables import ReadCell
from moecover.evaluation.artifact import Evaluation, Row, TextResult
from tests.support.grids import rows, run


def test_names_and_notes_are_text(tmp_path: Path) -> None:
    hostile = "a|b <i>`c`"
    row = Row("full", None, 8, 8, 1000, perplexity={hostile: TextResult(2.5, 0.9, 10, 1)})
    record: Any = {"model": hostile, "id": "x", "keep": 8, "label": hostile, "method": "full", "calibration": []}
    cell = ReadCell(record, Evaluation({"name": hostile}, rows=[row]))  # type: ignore[typeddict-item]
    failed = ReadCell({**record, "id": "y", "reason": "<b>\x1b[31m"}, None)
    model: Any = {"name": hostile, "experts": 8, "top_k": 2, "layers": 2, "num_bytes": 1000}
    text = markdown(
        [cell, failed],
        command="compare `x`",
        models=[model],
        texts=[hostile],
        tasks={},
        notes={hostile: ["task <b>: 4 of 5 items are longer"]},
        sentences={hostile: ["<script>"]},
    )
    assert "`` compare `x` ``" in text
    assert r"| a\|b \<i>\`c\` | all | 0.0 | 1 | 2.50 |" in text
    assert r"Note: task \<b>: 4 of 5 items are longer." in text
    assert r"- \<script>" in text
    assert "- y: \\<b>\\x1b[31m" in text
    assert "\x1b" not in text


def test_the_mean_over_cells_in_the_table(grid: Callable[..., Path], tmp_path: Path) -> None:
    assert run(grid(methods=["random"], seeds=[0, 1, 2]), tmp_path / "run") == 0
    values = [
        float(r["value"]) for r in rows(tmp_path / "run") if r["kind"] == "perplexity" and r["method"] == "random"
    ]
    line = next(x for x in (tmp_path / "run" / "results.md").read_text().splitlines() if x.startswith("| random"))
    assert len(values) == 3
    assert line.endswith(f"| 3 | {np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} |")
