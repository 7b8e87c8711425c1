"""A worker of a comparison: handles jobs one after another with the model of the last one kept open.

Knows nothing of the grid: `run` says what is to be done, `pool` runs several workers as processes.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator

from moecover.comparison.cell_files import CONFIG
from moecover.comparison.jobs import EvaluationJob, Job, PlanJob, Report, WorkerSetup
from moecover.comparison.measuring import evaluate_cells
from moecover.comparison.open_model import OpenModel
from moecover.comparison.planning_jobs import plan_cells, profile_tasks
from moecover.errors import MoecoverError
from moecover.registry import load_plugin
from moecover.runtime.devices import check_device


def _check_machine(setup: WorkerSetup) -> None:
    """Refuse a machine of a cluster that would not give the cells that are asked for."""
    config, run, machine = setup.config, setup.run, platform.node()
    try:
        is_seen = (run / CONFIG).read_text(encoding="utf-8") == config.text()
    except OSError:
        is_seen = False
    if not is_seen:
        raise MoecoverError(f"{machine} does not see the run folder {run}. Give one that all machines share")
    device = check_device(config.dtype, config.device)
    if device != setup.device:
        raise MoecoverError(
            f"{machine} computes on {device}, the machine of the command on {setup.device}. "
            "Run the command on a machine like the workers', or give the device"
        )


@contextlib.contextmanager
def worker(setup: WorkerSetup) -> Iterator[Callable[[Job], Iterator[Report]]]:
    """A handler of jobs: it does a job and yields what there is to report, as it comes.

    An error in a cell is a report, it ends neither the job nor the worker.

    Raises:
        MoecoverError: on a machine that does not see the run folder, or that computes on another device.
    """
    _check_machine(setup)
    if setup.threads is not None:
        import torch

        torch.set_num_threads(setup.threads)
    for path in setup.config.plugins:
        load_plugin(path)
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
