"""Comparisons that are killed; a file of its own, so that the gate runs it beside the others."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.grids import cells_of, finished, run, start, written

pytestmark = pytest.mark.usefixtures("one_thread")  # as in the processes that `start` starts


def kill_after(cells: int, moment_s: float, path: Path, out: Path, jobs: int) -> None:
    """Start a comparison and kill it a moment after so many cells are there."""
    process = start(path, out, "--jobs", str(jobs))
    deadline = time.monotonic() + 300
    while process.poll() is None and cells_of(out) < cells and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(moment_s)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def goes_on(path: Path, out: Path, whole: Path, jobs: int) -> None:
    """The killed run ends as the whole one did, and keeps the cells that were finished."""
    left = finished(out)
    assert run(path, out, "--jobs", str(jobs)) == 0
    assert (out / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    assert not list((out / "cells").glob(".*"))
    kept = written(out)
    assert {name: kept[name] for name in left} == left


def test_killed_in_the_middle(grid: Callable[..., Path], tmp_path: Path) -> None:
    path, out, whole = grid(samples=[0, 1], retain=[0.5, 0.75]), tmp_path / "run", tmp_path / "whole"
    assert run(path, whole) == 0
    kill_after(3, 0, path, out, 1)
    assert 3 <= len(finished(out)) < len(written(whole))
    goes_on(path, out, whole, 1)


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_at_random_moments(grid: Callable[..., Path], tmp_path: Path, jobs: int) -> None:
    path, out, whole = grid(samples=[0, 1], retain=[0.5, 0.75]), tmp_path / "run", tmp_path / "whole"
    assert run(path, whole, "--jobs", str(jobs)) == 0
    rng = random.Random(jobs)
    for cells in (0, 3, 9):
        kill_after(cells, rng.uniform(0, 0.3) if cells else 3, path, out, jobs)
    assert len(finished(out)) >= 9
    goes_on(path, out, whole, jobs)
