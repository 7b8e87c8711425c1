"""Working through the pending cells of a run: gives jobs to workers, counts cells, writes those that failed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from moecover.comparison.cell_files import write_cell
from moecover.comparison.cells import Cell
from moecover.comparison.display import Display
from moecover.comparison.jobs import CellDone, CellFailed, Job, ModelRan, Note, RunFacts, TaskProfileJob, WorkerSetup
from moecover.comparison.models import ComparedModel, with_peaks
from moecover.comparison.pool import Died, Ended, work
from moecover.comparison.schedule import Schedule
from moecover.comparison.worker import worker
from moecover.errors import MoecoverError
from moecover.text import duration_text


def work_through(
    setup: WorkerSetup,
    models: Sequence[ComparedModel],
    schedule: Schedule,
    jobs: int,
    facts: dict[str, RunFacts],
    display: Display,
) -> None:
    """Work through all pending cells and task profiles; ``facts``, how the models ran, is brought up to date."""
    total = sum(len(m.pending) for m in models)
    reports = work(schedule.queue, partial(worker, setup), jobs=jobs)
    with contextlib.closing(reports), display.bar("comparing", total, unit="cells") as advance:
        count = _Count(total, advance, display)
        progress = _Progress(setup.run, models, schedule, count, display)
        with _noted(count):
            for job, report in reports:
                match report:
                    case CellDone():
                        progress.done(report)
                    case CellFailed():
                        progress.failed(report.cell, report.reason)
                    case ModelRan():
                        facts[report.model] = with_peaks(report.facts, facts.get(report.model))
                    case Note():
                        display.say(report.line)
                    case Died() | Ended():
                        progress.ended(job, report)


class _Count:
    """Cells that are done, with an estimate for the rest."""

    def __init__(self, total: int, advance: Callable[[int], None], display: Display) -> None:
        self.total, self.done, self._started = total, 0, time.monotonic()
        self._advance, self._say = advance, display.say

    def add(self, cell: Cell, words: str) -> None:
        """One cell more is done, or has failed."""
        self.done += 1
        self._advance(1)
        left = (time.monotonic() - self._started) / self.done * (self.total - self.done)
        rest = f"; about {duration_text(left)} to go" if self.done < self.total else ""
        self._say(f"[{self.done}/{self.total}] {cell.words}: {words}{rest}")


class _Progress:
    """What becomes of reports: counts cells, writes those that failed, tells the schedule."""

    def __init__(
        self, run: Path, models: Sequence[ComparedModel], schedule: Schedule, count: _Count, display: Display
    ) -> None:
        self._run, self._schedule, self._count, self._say = run, schedule, count, display.say
        self._fingerprints = {name: one for m in models for name, one in m.fingerprints.items()}
        self._settled: set[str] = set()

    def done(self, report: CellDone) -> None:
        """A worker has written a cell."""
        self._settled.add(report.cell.id)
        self._count.add(report.cell, report.words)

    def failed(self, cell: Cell, reason: str) -> None:
        """A cell failed: say so in its folder."""
        self._settled.add(cell.id)
        write_cell(self._run, cell, self._fingerprints[cell.id], reason=reason)
        self._schedule.failed(cell)
        self._count.add(cell, f"FAILED: {reason}")

    def ended(self, job: Job, report: Died | Ended) -> None:
        """A job has ended; if its worker died, cells without a report have failed."""
        if isinstance(report, Died):
            if isinstance(job, TaskProfileJob):
                self._say(f"{job.model}: which experts the tasks use is unknown: {report.reason}")
            for cell in job.cells:
                if cell.id not in self._settled:
                    self.failed(cell, report.reason)
        self._schedule.ended(job)


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
