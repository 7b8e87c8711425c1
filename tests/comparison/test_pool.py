"""The pool of processes."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from contextlib import contextmanager
from typing import Any

from moecover.comparison.jobs import EvaluationJob
from moecover.comparison.pool import Died, Ended, work


class Jobs(deque[EvaluationJob]):
    """A queue that nobody else works on."""

    def take(self, model: str) -> EvaluationJob | None:
        return self.popleft() if self else None


def _echo() -> Any:
    @contextmanager
    def bench() -> Any:
        def handle(job: EvaluationJob) -> Any:
            yield f"{job.model} begins"
            if job.model == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            yield f"{job.model} ends"

        yield handle

    return bench()


def test_a_worker_that_dies_costs_its_job_alone() -> None:
    jobs = Jobs(EvaluationJob(name, (), {}) for name in ("a", "dies", "b", "c"))
    found = [(job.model, report) for job, report in work(jobs, _echo, jobs=2)]
    assert sorted(r for _, r in found if isinstance(r, str)) == [
        "a begins",
        "a ends",
        "b begins",
        "b ends",
        "c begins",
        "c ends",
        "dies begins",
    ]
    (died,) = [r for m, r in found if m == "dies" and isinstance(r, Died)]
    assert died.code == -signal.SIGKILL
    assert "memory" in died.reason
    assert [m for m, r in found if isinstance(r, Ended)] == [
        m for m, r in found if isinstance(r, str) and r.endswith("ends")
    ]


class Dying:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(50):
            time.sleep(0.001)


def _told_while_dying() -> Any:
    """A handler that is told to end while a destructor runs, where Python drops the exception."""

    @contextmanager
    def bench() -> Any:
        def handle(job: Any) -> Any:
            Dying()
            time.sleep(20)
            yield "went on"

        yield handle

    return bench()


def test_a_worker_that_is_told_to_end_in_a_destructor_ends() -> None:
    jobs = Jobs([EvaluationJob("a", (), {})])
    ((_, report),) = work(jobs, _told_while_dying, jobs=2)
    assert isinstance(report, Died)
    assert report.code == 143
