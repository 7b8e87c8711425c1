"""Task documents for the evaluation tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tasks import ARC, BLIMP, write_rows


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as ``--data-dir`` takes it, with a few documents of arc_easy and blimp."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra `tasks`)")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_rows(tmp_path / "data" / "arc_easy", test=ARC, validation=ARC[:2])
    write_rows(tmp_path / "data" / "blimp", blimp=BLIMP)
    return tmp_path / "data"
