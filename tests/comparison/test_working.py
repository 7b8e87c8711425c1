"""Workers: several processes, interrupted and killed."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moecover.comparison import pool
from moecover.comparison.jobs import CellDone, CellFailed, EvaluationJob
from moecover.comparison.pool import Died
from tests.support.grids import cells_of, rows, run, start

pytestmark = pytest.mark.usefixtures("one_thread")  # as in the processes that `start` starts


@pytest.mark.parametrize(
    ("number", "status", "jobs"),
    [(signal.SIGINT, 130, 1), pytest.param(signal.SIGTERM, 143, 2, marks=pytest.mark.slow)],
)
def test_an_interrupt_keeps_what_is_done(
    grid: Callable[..., Path], tmp_path: Path, number: int, status: int, jobs: int
) -> None:
    path, out = grid(seeds=list(range(24)), methods=["random"]), tmp_path / "run"
    process = start(path, out, "--jobs", str(jobs))
    while process.poll() is None and cells_of(out) < 2:
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors.decode()
    if number == signal.SIGINT:
        assert b"cells are done; rerun the same command to continue" in errors
    assert b"Traceback" not in errors, errors.decode()
    assert 2 <= cells_of(out) < 25
    assert not list((out / "cells").glob(".*"))
    assert run(path, out) == 0
    assert cells_of(out) == 25


def test_two_jobs_give_what_one_gives(grid: Callable[..., Path], tmp_path: Path, checkpoints: Any) -> None:
    models = [{"model": str(checkpoints(f)), "name": f} for f in ("qwen2_moe", "olmoe")]
    path = grid(models=models, methods=["random", "tb-coverage"])
    assert run(path, tmp_path / "one") == 0
    assert run(path, tmp_path / "two", "--jobs", "2") == 0
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) > 25
    for a, b in zip(one, two, strict=True):
        assert float(a.pop("value")) == pytest.approx(float(b.pop("value")), rel=1e-5)
        assert a == b


def test_a_dead_worker_fails_its_cells(grid: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    """Cells that were finished before the worker died stay."""

    def reports(queue: Any, bench: Any, *, jobs: int) -> Any:
        while queue:
            job = queue.take("")
            if isinstance(job, EvaluationJob):
                with bench() as handle:
                    first = next(r for r in handle(job) if isinstance(r, (CellDone, CellFailed)))
                for cell in job.cells[1:]:
                    shutil.rmtree(tmp_path / "run" / "cells" / cell.id, ignore_errors=True)
                yield job, first
                yield job, Died(-9)

    monkeypatch.setattr(pool, "work", reports)
    assert run(grid(methods=["random"]), tmp_path / "run") == 1
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["failed"] == ["qwen-random-keep6-seed0", "qwen-random-keep6-seed1"]
