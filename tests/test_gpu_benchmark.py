"""The benchmark of GPUs runs, on the CPU and with little text."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import gpu

QUICK = ["loading", "profile", "evaluate", "generate", "repair", "layer by layer"]


def measured(monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> dict[str, dict[str, object]]:
    monkeypatch.setattr(sys, "argv", ["gpu", str(folder), "--device", "cpu", "--small", *more])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 0
    parts: dict[str, dict[str, object]] = json.loads((folder / "gpu.json").read_text())["parts"]
    return parts


def test_timed_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = measured(monkeypatch, tmp_path / "out", "--parts", *QUICK)
    assert list(parts) == QUICK
    ratio = parts["profile"]["profile over plain"]
    assert isinstance(ratio, float)
    assert f"| profile | profile over plain | {ratio:.3g} |" in capsys.readouterr().out


def test_a_part_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The others are measured, and the exit status says it."""

    def broken(bench: gpu.Bench) -> dict[str, object]:
        raise ValueError("no such kernel")

    monkeypatch.setattr(gpu, "PARTS", {"loading": broken, "repair": lambda bench: {"seconds": 1.0}})
    monkeypatch.setattr(
        sys, "argv", ["gpu", str(tmp_path), "--device", "cpu", "--small", "--parts", "loading", "repair"]
    )
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert ended.value.code == 1
    assert parts["loading"]["failed"] == "ValueError: no such kernel"
    assert parts["repair"]["seconds"] == 1.0


@pytest.mark.slow
def test_all_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the CPU itself every check is exact."""
    parts = measured(monkeypatch, tmp_path / "out")
    for name in gpu.MODELS:
        checks = parts[f"checks, {name}"]
        assert checks["profile twice: equal bits"] is True
        assert checks["ridge: largest difference of a weight"] == 0.0
