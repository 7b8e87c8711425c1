"""results.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.support.grids import rows, run


def test_the_mean_over_cells_in_the_table(grid: Callable[..., Path], tmp_path: Path) -> None:
    assert run(grid(methods=["random"], seeds=[0, 1, 2]), tmp_path / "run") == 0
    values = [
        float(r["value"]) for r in rows(tmp_path / "run") if r["kind"] == "perplexity" and r["method"] == "random"
    ]
    line = next(x for x in (tmp_path / "run" / "results.md").read_text().splitlines() if x.startswith("| random"))
    assert len(values) == 3
    assert line.endswith(f"| 3 | {np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} |")
