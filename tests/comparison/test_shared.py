"""Several processes that fill one run folder; threads stand for them in the quick tests, locks hold between both."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from moecover.comparison import planning_jobs
from moecover.comparison.members import CLAIMS, Members
from moecover.comparison.results import Comparison
from moecover.comparison.run import compare
from moecover.comparison.working import _Count
from moecover.errors import InputError
from moecover.files.atomic import digest
from moecover.files.locks import locked
from tests.support.grids import cells_of, finished, run, start, written

pytestmark = pytest.mark.usefixtures("one_thread")  # as in the processes that `start` starts


def test_three_runs_share_the_cells(
    grid: Callable[..., Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out, alone = grid(seeds=list(range(8))), tmp_path / "run", tmp_path / "alone"
    compare(path, alone, progress=False)
    every, began, waited = threading.Barrier(3, timeout=60), _Count.began, set[int]()

    def together(self: _Count, job: Any) -> None:
        """No run goes on before each has a job."""
        if id(self) not in waited:
            waited.add(id(self))
            every.wait()
        began(self, job)

    monkeypatch.setattr(_Count, "began", together)
    with ThreadPoolExecutor(3) as pool:
        with locked(out):  # they begin together
            made: list[Comparison] = []
            running = [pool.submit(compare, path, out) for _ in range(3)]
            time.sleep(0.3)
        made = [one.result(timeout=60) for one in running]
    assert sum(one.made for one in made) == len(made[0].results["cells"]) == 12
    assert all(one.made < 12 for one in made)
    assert all(one.results["cells"] == made[0].results["cells"] for one in made)
    assert (out / "results.csv").read_bytes() == (alone / "results.csv").read_bytes()
    assert not (out / CLAIMS).exists()
    shown = capsys.readouterr().err
    assert "cells are shared with 1 other process" in shown
    assert "cells are shared with 2 other processes" in shown
    assert f"{out}: {12 - made[0].made} of 12 cells came from other processes" in shown


def test_what_fails_in_one_process_is_not_tried_by_the_others(
    grid: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All processes end with the failures of each."""
    tried = []

    def fails(*arguments: Any, **options: Any) -> Any:
        tried.append(options["method"])
        time.sleep(0.5)
        raise ValueError("broken")

    monkeypatch.setattr(planning_jobs, "plan_budgets", fails)
    path, out = grid(methods=["tb-coverage"]), tmp_path / "run"
    with ThreadPoolExecutor(2) as pool:
        with locked(out):
            running = [pool.submit(compare, path, out, progress=False) for _ in range(2)]
            time.sleep(0.3)
        made = [one.result(timeout=60) for one in running]
    assert [len(one.failures) for one in made] == [1, 1]
    assert tried == ["tb-coverage"]


def test_other_cells_wait_until_the_folder_is_free(grid: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    members = Members(tmp_path / "run")
    members.join("the cells of another grid")
    with pytest.raises(InputError, match="is being filled by another process with another grid.* Wait until it ends"):
        compare(grid(methods=["random"]), tmp_path / "run", progress=False)
    members.leave()
    assert compare(grid(methods=["random"]), tmp_path / "run", progress=False).made == 3


HOLDER = """
import fcntl, sys
held = [open(path, "a") for path in sys.argv[1:]]
for file in held:
    fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_process_had_claimed_is_taken_over(
    grid: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process is a member and has a cell, which it was writing when it was killed."""
    path, out, members = grid(methods=["random"]), tmp_path / "run", list[str]()
    join, held = Members.join, list[subprocess.Popen[str]]()

    def joined(self: Members, inputs: str) -> None:
        """The other process comes first."""
        self.folder.mkdir(parents=True)
        member, cell = self.folder / "member-0", self.folder / f"{digest('qwen-full')}.lock"
        member.write_text(inputs)
        command = [sys.executable, "-c", HOLDER, str(member), str(cell)]
        held.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert held[0].stdout is not None
        assert held[0].stdout.readline() == "held\n"
        (out / "cells" / ".qwen-full.0.partial").mkdir(parents=True)
        join(self, inputs)
        members.append(str(self.others()))

    def waited(seconds: float) -> None:
        """The killed process's claim is what is left to wait for."""
        assert cells_of(out) == 2
        held[0].kill()
        held[0].wait()

    monkeypatch.setattr(Members, "join", joined)
    monkeypatch.setattr("moecover.comparison.pool.time.sleep", waited)
    made = compare(path, out, progress=False)
    assert (made.made, made.failures, members) == (3, {}, ["1"])
    assert not list((out / "cells").glob(".*"))
    assert not (out / CLAIMS).exists()


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_three_processes_of_which_one_is_killed(grid: Callable[..., Path], tmp_path: Path, jobs: int) -> None:
    path, out, whole = grid(seeds=list(range(30)), samples=[0, 1]), tmp_path / "run", tmp_path / "whole"
    assert run(path, whole) == 0
    processes = [start(path, out, "--jobs", str(jobs)) for _ in range(3)]
    deadline = time.monotonic() + 300
    while cells_of(out) < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    left = finished(out)
    processes[0].send_signal(signal.SIGKILL)
    errors = [process.communicate(timeout=300)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [-9, 0, 0], errors
    assert (out / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    kept = written(out)
    assert {name: kept[name] for name in left} == left
    assert not list((out / "cells").glob(".*"))
    assert not (out / CLAIMS).exists()
