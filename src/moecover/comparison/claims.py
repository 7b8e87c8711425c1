"""The jobs of a comparison as several processes share them: claims jobs by lock, finds cells that others have finished.

A cell and a profile have a lock file each in ``RUN/.claims``. The kernel drops the locks of a process that dies, so
what it left unfinished is free at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from moecover.comparison.cell_files import CELL, DONE, StoredCell, cell_path, stored_cell
from moecover.comparison.cells import Cell
from moecover.comparison.jobs import EvaluationJob, Job, PlanJob
from moecover.comparison.members import Members
from moecover.comparison.models import ComparedModel
from moecover.comparison.schedule import Schedule
from moecover.files.atomic import digest, stamp
from moecover.files.locks import claim


def _names(job: Job) -> list[str]:
    """The names of a job's claims."""
    return [cell.id for cell in job.cells] if isinstance(job, EvaluationJob) else [job.folder]


class SharedJobs:
    """The queue of a schedule, from which a job is taken once no other process has it; see `pool.Queue`.

    Args:
        run: the run folder.
        models: with their pending cells.
        schedule: of this process.
        members: the processes that fill the folder.
        jobs: number of workers of this process.
        found: called for every cell that another process has finished, or that has failed there.
        say: receives a line of log when nothing is left but what other processes have.
    """

    def __init__(
        self,
        run: Path,
        models: Sequence[ComparedModel],
        schedule: Schedule,
        members: Members,
        jobs: int,
        found: Callable[[Cell, StoredCell], None],
        say: Callable[[str], None],
    ) -> None:
        self._run, self._schedule, self._members, self._jobs, self._found = run, schedule, members, jobs, found
        self._fingerprints = {cell.id: m.fingerprints[cell.id] for m in models for cell in m.pending}
        self._before = {cell.id: self._stamp(cell) for m in models for cell in m.pending}
        self._say, self._said = say, False
        self._held: dict[str, Callable[[], None]] = {}  # what gives a claim back, by its name

    def __bool__(self) -> bool:
        """Whether jobs are left, although other processes may have all of them."""
        return bool(self._schedule.queue)

    def take(self, model: str) -> Job | None:
        """Claim a job: one of a model if there is one; None while other processes have every job that is left.

        Of cells only those are claimed that nobody has and that are not done; the others stay in the queue.
        """
        for job in sorted(self._schedule.queue, key=lambda job: job.model != model):
            if isinstance(job, EvaluationJob):
                cells = self._claimed(job)
                if cells:
                    return replace(job, cells=cells)
            elif self._claim(job.folder):
                self._replace(job)
                if not isinstance(job, PlanJob):
                    return job
                cells = tuple(cell for cell in job.cells if not self._is_settled(cell))
                if cells:
                    return replace(job, cells=cells)
                self.ended(replace(job, cells=()))
                return self.take(model)
        if self and not self._held and not self._said:
            self._said = True
            self._say("other processes have all cells that are left: waiting for them")
        return None

    def ended(self, job: Job) -> None:
        """A job that was taken has ended: give its claims back, and queue what waited for it."""
        self.release(_names(job))
        self._schedule.ended(job)

    def again(self, job: Job, left: Job | None) -> None:
        """The worker of a job was lost: give its claims back, and queue what is left of it first."""
        if left is None:
            self.ended(job)
        else:
            self.release(_names(job))
            self._schedule.queue.appendleft(left)

    def release(self, names: Iterable[str]) -> None:
        """Give claims back that are still held; a cell's has the name of its id."""
        for name in names:
            if name in self._held:
                self._held.pop(name)()

    def close(self) -> None:
        """Give all claims back."""
        self.release(list(self._held))

    def _claimed(self, job: EvaluationJob) -> tuple[Cell, ...]:
        """The cells of a job that this process is to evaluate now; those of others stay in the queue."""
        size, mine, left = self._share(job), list[Cell](), list[Cell]()
        for cell in job.cells:
            if len(mine) == size or not self._claim(cell.id):
                left.append(cell)
            elif self._is_settled(cell):
                self.release([cell.id])
            else:
                mine.append(cell)
        self._replace(job, *([replace(job, cells=tuple(left))] if left else []))
        return tuple(mine)

    def _share(self, job: EvaluationJob) -> int:
        """How many cells of a job this process takes at once: among several, an equal share of the model's."""
        others = self._members.others()
        if not others:
            return len(job.cells)
        of_model = (one for one in self._schedule.queue if isinstance(one, EvaluationJob) and one.model == job.model)
        return max(1, -(-sum(len(one.cells) for one in of_model) // ((others + 1) * self._jobs)))

    def _replace(self, job: Job, *by: Job) -> None:
        """Replace a job of the queue in its place."""
        queue = self._schedule.queue
        place = next(i for i, one in enumerate(queue) if one is job)
        del queue[place]
        for one in by:
            queue.insert(place, one)

    def _claim(self, name: str) -> bool:
        """Claim a cell or a profile's folder."""
        give_back = claim(self._members.folder / f"{digest(name)}.lock")
        if give_back is None:
            return False
        self._held[name] = give_back
        return True

    def _is_settled(self, cell: Cell) -> bool:
        """Whether another process has finished a cell, or failed with it since this one began; it is told if so."""
        found, is_new = stored_cell(self._run, cell), self._stamp(cell) != self._before[cell.id]
        if found is None or found["fingerprint"] != self._fingerprints[cell.id]:
            return False
        if found["status"] == DONE or is_new:
            self._found(cell, found)
            return True
        return False

    def _stamp(self, cell: Cell) -> list[int] | None:
        """What tells whether cell.json was written again."""
        try:
            return stamp(self._run / cell_path(cell) / CELL)
        except OSError:
            return None
