"""Working through the pending cells of a run: gives jobs to workers, counts cells, writes those that failed.

Other processes may do the same in the same run folder: each takes what nobody else has, and all end when all is done.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moecover.comparison.cell_files import DONE, StoredCell, finished_cell, repair_path, write_cell
from moecover.comparison.cells import Cell
from moecover.comparison.claims import SharedJobs
from moecover.comparison.jobs import (
    CellDone,
    CellFailed,
    EvaluationJob,
    Job,
    ModelRan,
    Note,
    PlanJob,
    RunFacts,
    TaskProfileJob,
    WorkerSetup,
)
from moecover.comparison.members import Members
from moecover.comparison.models import ComparedModel, with_peaks
from moecover.comparison.pool import Died, Ended, Lost
from moecover.comparison.pools import Reports, Work
from moecover.comparison.schedule import Schedule
from moecover.corpora.sources import set_name
from moecover.errors import MoecoverError
from moecover.progress import Progress
from moecover.runtime.pass_state import remove
from moecover.text import counted, duration_text

RETRIES = 2  # of a cell whose worker was lost
WEIGHT = 2  # cells that the estimate before the first one is worth: a first cell also waits for the model


@dataclass(frozen=True)
class Workers:
    """What computes the cells.

    Attributes:
        work: the pool.
        jobs: number of workers.
        here: how many of them share this machine.
    """

    work: Work
    jobs: int
    here: int


def work_through(
    setup: WorkerSetup,
    models: Sequence[ComparedModel],
    schedule: Schedule,
    members: Members,
    workers: Workers,
    facts: dict[str, RunFacts],
    progress: Progress,
    *,
    seconds: float | None = None,
) -> int:
    """Work through all pending cells and task profiles, until this process or another one has done each.

    Args:
        setup: of the workers.
        models: with their pending cells.
        schedule: of this process.
        members: the processes that fill the run folder.
        workers: what computes the cells.
        facts: how the models ran here, by name; brought up to date.
        progress: shows cells and a line of log for each.
        seconds: how long it takes, as estimated; None where that is not known.

    Returns:
        How many cells this process has computed.
    """
    total = sum(len(m.pending) for m in models)
    with contextlib.ExitStack() as stack:
        count = _Count(total, seconds, progress.say)
        count.advance = stack.enter_context(progress.bar(count.now, total, unit="cells"))
        ledger = _Ledger(setup.run, models, schedule, count, progress)
        queue = SharedJobs(setup.run, models, schedule, members, workers.jobs, ledger.found, progress.say)
        stack.enter_context(contextlib.closing(queue))
        reports: Reports = workers.work(_Watched(queue, count.began), setup, jobs=workers.jobs)
        stack.enter_context(contextlib.closing(reports))
        with _noted(count):
            for job, report in reports:
                match report:
                    case CellDone():
                        ledger.done(report)
                        queue.release([report.cell.id])
                    case CellFailed():
                        ledger.failed(report.cell, report.reason)
                        queue.release([report.cell.id])
                    case ModelRan():
                        facts[report.model] = with_peaks(report.facts, facts.get(report.model))
                    case Note():
                        progress.say(report.line)
                    case Lost():
                        count.ended(job)
                        queue.again(job, ledger.lost(job, report))
                    case Died() | Ended():
                        count.ended(job)
                        ledger.ended(job, report)
                        queue.ended(job)
    if count.found:
        progress.say(f"{setup.run}: {count.found} of {total} cells came from other processes")
    return count.done - count.found


class _Count:
    """Cells that are done, what runs now, and an estimate for the rest.

    Args:
        total: number of cells.
        seconds: how long they take together, as estimated before; it weighs as much as `WEIGHT` cells that were timed.
        say: receives a line of log for every cell.
    """

    def __init__(self, total: int, seconds: float | None, say: Callable[[str], None]) -> None:
        self.total, self.done, self.found, self._say = total, 0, 0, say
        self._seconds, self._started = seconds, time.monotonic()
        self._last, self._running = self._started, dict[str, str]()
        self.advance: Callable[[int], None] = lambda amount: None

    def add(self, cell: Cell, words: str) -> None:
        """One cell more is done, or has failed."""
        self.done, self._last = self.done + 1, time.monotonic()
        self.advance(1)
        self._say(f"[{self.done}/{self.total}] {cell.words}: {'; '.join(filter(None, (words, self._rest())))}")

    def began(self, job: Job) -> None:
        """A worker has taken a job."""
        self._running[_key(job)] = _doing(job)

    def ended(self, job: Job) -> None:
        """A job has ended."""
        self._running.pop(_key(job), None)

    def now(self) -> str:
        """About how long the rest takes, and what runs now."""
        if not self._running:
            return "comparing"
        doing = list(self._running.values())
        more = f", {len(doing) - 1} more at once" if len(doing) > 1 else ""
        return ", ".join(filter(None, (self._rest(), f"{doing[-1]}{more}")))

    def _rest(self) -> str:
        """About how long the cells take that are left; empty where none is, or nothing is known."""
        left, timed = self.total - self.done, self._last - self._started
        weight = WEIGHT if self._seconds is not None else 0
        if not left or not weight + self.done:
            return ""
        each = (timed + weight * (self._seconds or 0) / self.total) / (weight + self.done)
        seconds = max(0.0, left * each - (time.monotonic() - self._last))
        return f"about {duration_text(seconds)} to go"


class _Watched:
    """A queue of which is known what runs."""

    def __init__(self, queue: SharedJobs, began: Callable[[Job], None]) -> None:
        self._queue, self._began = queue, began

    def __bool__(self) -> bool:
        return bool(self._queue)

    def take(self, model: str) -> Job | None:
        """See `SharedJobs.take`."""
        if (job := self._queue.take(model)) is not None:
            self._began(job)
        return job


def _key(job: Job) -> str:
    return " ".join(cell.id for cell in job.cells) if isinstance(job, EvaluationJob) else job.folder


def _doing(job: Job) -> str:
    """A job in a few words."""
    match job:
        case PlanJob():
            return f"{job.model}: profile on {set_name([corpus.name for corpus in job.corpora])}"
        case EvaluationJob():
            first, *more = job.cells
            others = f" and {counted(len(more), 'more cell')}" if more else ""
            return f"{job.model}: {first.label}{others}"
        case _:
            return f"{job.model}: profile on the texts of the tasks"


class _Ledger:
    """What becomes of reports: counts cells, writes those that failed, tells the schedule."""

    def __init__(
        self, run: Path, models: Sequence[ComparedModel], schedule: Schedule, count: _Count, progress: Progress
    ) -> None:
        self._run, self._schedule, self._count, self._say = run, schedule, count, progress.say
        self._fingerprints = {name: one for m in models for name, one in m.fingerprints.items()}
        self._settled: set[str] = set()
        self._losses = Counter[str]()  # of workers, by cell or by a job without cells

    def done(self, report: CellDone) -> None:
        """A worker has written a cell, which needs its repair no longer."""
        remove(self._run / repair_path(report.cell))
        self._settled.add(report.cell.id)
        self._count.add(report.cell, report.words)

    def failed(self, cell: Cell, reason: str) -> None:
        """A cell failed: say so in its folder, unless another process has finished it."""
        if (record := finished_cell(self._run, cell, self._fingerprints[cell.id])) is not None:
            self._schedule.failed(cell)
            self.found(cell, record)
            return
        self._settled.add(cell.id)
        write_cell(self._run, cell, self._fingerprints[cell.id], reason=reason)
        self._schedule.failed(cell)
        self._count.add(cell, f"FAILED: {reason}")

    def found(self, cell: Cell, record: StoredCell) -> None:
        """Another process has finished a cell, or failed with it."""
        self._settled.add(cell.id)
        self._count.found += 1
        done = record["status"] == DONE
        self._count.add(cell, "done by another process" if done else f"FAILED in another process: {record['reason']}")

    def lost(self, job: Job, report: Lost) -> Job | None:
        """A worker was lost: what is to be tried again of its job; cells that were lost too often have failed."""
        left = [cell for cell in job.cells if cell.id not in self._settled]
        names = [cell.id for cell in left] or [job.model]
        self._losses.update(names)
        again = [cell for cell in left if self._losses[cell.id] <= RETRIES]
        for cell in left:
            if cell not in again:
                self.failed(cell, f"{report.reason}, {RETRIES + 1} times")
        if isinstance(job, TaskProfileJob):
            is_tried = self._losses[job.model] <= RETRIES
            self._say(
                f"{job.model}: {report.reason}" + ("" if is_tried else ": which experts the tasks use is unknown")
            )
            return job if is_tried else None
        if again:
            self._say(f"{report.reason}: {counted(len(again), 'cell')} of it to be tried again")
        return replace(job, cells=tuple(again)) if again else None

    def ended(self, job: Job, report: Died | Ended) -> None:
        """A job has ended; if its worker died, cells without a report have failed."""
        if isinstance(report, Died):
            if isinstance(job, TaskProfileJob):
                self._say(f"{job.model}: which experts the tasks use is unknown: {report.reason}")
            for cell in job.cells:
                if cell.id not in self._settled:
                    self.failed(cell, report.reason)


@contextlib.contextmanager
def _noted(count: _Count) -> Iterator[None]:
    """Have an error or an interrupt say what was achieved."""
    try:
        yield
    except BaseException as error:
        text = f"{count.done} of {count.total} cells are done; rerun the same command to continue"
        if isinstance(error, MoecoverError):
            raise error.extended(text) from error
        error.add_note(text)
        raise
