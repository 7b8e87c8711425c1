"""Comparisons that are killed at random moments; a file of its own, so that the gate runs it beside the others."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.grids import cells_of, finished, start, written


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_random_moments(grid: Callable[..., Path], tmp_path: Path, jobs: int) -> None:
    path, out, whole = grid(samples=[0, 1], retain=[0.5, 0.75]), tmp_path / "run", tmp_path / "whole"
    assert start(path, whole, "--jobs", str(jobs)).wait() == 0
    rng = random.Random(jobs)
    for wanted in (0, 3, 9):  # killed a moment after so many cells are there
        process = start(path, out, "--jobs", str(jobs))
        deadline = time.monotonic() + 300
        while process.poll() is None and cells_of(out) < wanted and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3) if wanted else 3)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    left = finished(out)
    assert len(left) >= 9
    process = start(path, out, "--jobs", str(jobs))
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert (out / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    assert not list((out / "cells").glob(".*"))
    kept = written(out)
    assert {name: kept[name] for name in left} == left
