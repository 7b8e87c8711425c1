"""The queue of jobs of a comparison, which grows as profiles and plans are finished."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from moecover.comparison.cells import Cell, Sample
from moecover.comparison.config import Config
from moecover.comparison.costs import cells_per_pass
from moecover.comparison.jobs import EvaluationJob, Job, ModelSetup, PlanJob, TaskProfileJob
from moecover.comparison.models import ComparedModel
from moecover.corpora.packing import Corpus

GROUP = 8  # cells of a model in memory that are measured together: they share the full model's logits


class Schedule:
    """Which job comes next.

    A model in memory evaluates its cells in groups of at most `GROUP`, those that need no profile first. A model that
    runs layer by layer is evaluated when all its plans exist, as many cells at once as memory allows: they share a read
    of its weights.

    Args:
        models: with their pending cells.
        setups: by name of the model.
        task_profiles: jobs that no cell waits for; they come last.
        config: the comparison.
        jobs: number of workers.

    Attributes:
        queue: jobs that can be done now.
    """

    def __init__(
        self,
        models: Sequence[ComparedModel],
        setups: Mapping[str, ModelSetup],
        task_profiles: Sequence[TaskProfileJob],
        config: Config,
        jobs: int,
    ) -> None:
        self.queue: deque[Job] = deque()
        self._jobs, self._failed = jobs, set[str]()
        self._models = {m.name: m for m in models}
        self._per_pass = {m.name: cells_per_pass(m, setups[m.name], config) for m in models}
        self._planning: dict[str, set[str]] = {}  # profiles of jobs that are not done
        self._gathered: dict[str, list[Cell]] = {}  # cells with a plan, layer by layer
        for model in models:
            self._enter(model)
        self.queue.extend(task_profiles)

    def _enter(self, model: ComparedModel) -> None:
        """Queue what can be done for a model from the beginning."""
        free = [cell for cell in model.pending if not cell.calibration]
        plannings = [
            PlanJob(model.name, corpora, sample[1], mine)
            for sample, corpora in model.samples.items()
            if (mine := tuple(c for c in model.pending if c.calibrated_on == sample))
        ]
        self._planning[model.name] = {job.folder for job in plannings}
        if self._per_pass[model.name] and plannings:
            self._gathered[model.name] = free
            self.queue.extend(plannings)
        else:
            self.queue.extend([*self._evaluations(model.name, free), *plannings])

    def _evaluations(self, name: str, cells: Sequence[Cell]) -> list[EvaluationJob]:
        """Jobs that evaluate cells of a model."""
        size = self._per_pass[name] or min(GROUP, -(-len(cells) // self._jobs))
        model = self._models[name]

        def fitted_on(part: Sequence[Cell]) -> dict[Sample, tuple[Corpus, ...]]:
            samples = dict.fromkeys(c.calibrated_on for c in part if c.fitted)
            return {sample: model.fitted_on[sample] for sample in samples}

        parts = [tuple(cells[start : start + size]) for start in range(0, len(cells), max(size, 1))]
        return [
            EvaluationJob(name, part, {c.id: model.fingerprints[c.id] for c in part}, fitted_on(part)) for part in parts
        ]

    def failed(self, cell: Cell) -> None:
        """A cell has failed: it is not evaluated."""
        self._failed.add(cell.id)

    def ended(self, job: Job) -> None:
        """A job has ended: queue what waited for it, before everything else."""
        if not isinstance(job, PlanJob):
            return
        self._planning[job.model].discard(job.folder)
        ready = [cell for cell in job.cells if cell.id not in self._failed]
        if self._per_pass[job.model]:
            gathered = self._gathered.setdefault(job.model, [])
            gathered += ready
            ready = [] if self._planning[job.model] else gathered
        self.queue.extendleft(reversed(self._evaluations(job.model, ready)))
