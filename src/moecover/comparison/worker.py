"""A worker of a comparison: handles jobs one after another with the model of the last one kept open.

Knows nothing of the grid: `run` says what is to be done, `pool` runs several workers as processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from moecover.checkpoints.remote_code import trust_remote_code
from moecover.comparison.jobs import EvaluationJob, Job, PlanJob, Report, WorkerSetup
from moecover.comparison.measuring import evaluate_cells
from moecover.comparison.open_model import OpenModel
from moecover.comparison.planning_jobs import plan_cells, profile_tasks
from moecover.registry import load_plugin


@contextlib.contextmanager
def worker(setup: WorkerSetup) -> Iterator[Callable[[Job], Iterator[Report]]]:
    """A handler of jobs: it does a job and yields what there is to report, as it comes.

    An error in a cell is a report, it ends neither the job nor the worker.
    """
    if setup.threads is not None:
        import torch

        torch.set_num_threads(setup.threads)
    for path in setup.config.plugins:
        load_plugin(path)
    for entry in setup.config.models:
        if entry.trust_remote_code:
            trust_remote_code(setup.models[entry.name].path)
    with contextlib.closing(OpenModel(setup)) as model:

        def handle(job: Job) -> Iterator[Report]:
            match job:
                case PlanJob():
                    return plan_cells(model, job)
                case EvaluationJob():
                    return evaluate_cells(model, job)
                case _:
                    return profile_tasks(model, job)

        yield handle
