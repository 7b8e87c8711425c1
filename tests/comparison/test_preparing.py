"""Notes on texts and samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moecover.cli.main import main


def test_samples_of_nearly_all_the_text_are_said(grid: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    """Their spread is not that of new text."""
    most = 120
    for sequences, said in ((6, False), (most, True)):
        path = grid(samples=[0, 1], sequences=sequences, methods=["tb-coverage"])
        assert main(["compare", str(path), "-o", str(tmp_path / f"run{sequences}")]) == 0
        assert ("so the samples overlap" in capsys.readouterr().err) == said


def test_calibration_text_in_a_test_text_is_said(grid: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    path = grid(perplexity=["again=a.jsonl", "test=test.jsonl"], methods=["random"], seeds=[0], sequences=120)
    assert main(["compare", str(path), "-o", str(tmp_path / "run"), "--method", "tb-coverage"]) == 0
    err = capsys.readouterr().err
    assert "of the text again is in the calibration text too" in err
    assert "of the text test is in" not in err
