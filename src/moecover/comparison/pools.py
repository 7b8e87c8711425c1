"""Where the workers of a comparison run: on this machine, or on the machines of a Ray cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

from moecover.comparison import pool, ray_pool
from moecover.comparison.jobs import Job, Report, WorkerSetup
from moecover.comparison.pool import Died, Ended, Lost, Queue
from moecover.comparison.worker import worker
from moecover.errors import InputError, arg
from moecover.registry import unknown_name

LOCAL = "local"
Reports = Generator[tuple[Job, Report | Ended | Died | Lost]]


class Work(Protocol):
    """A pool, see `pool.work`."""

    def __call__(self, queue: Queue[Job], setup: WorkerSetup, *, jobs: int) -> Reports:
        """Handle all jobs of a queue by some workers."""
        ...


@contextlib.contextmanager
def _local(address: str | None, gpus: float) -> Iterator[Work]:
    """Processes of this machine.

    Raises:
        InputError: options of a cluster were given.
    """
    for name, value in (("address", address), ("gpus_per_job", gpus)):
        if value:
            raise InputError(f"{arg(name, value)} is for a cluster. Give {arg('engine', 'ray')} too")
    yield _in_processes


def _in_processes(queue: Queue[Job], setup: WorkerSetup, *, jobs: int) -> Reports:
    return pool.work(queue, partial(worker, setup), jobs=jobs)


@contextlib.contextmanager
def _ray(address: str | None, gpus: float) -> Iterator[Work]:
    """Actors of a Ray cluster."""
    cluster = ray_pool.Cluster(address, gpus)
    with cluster.connected():
        yield partial(ray_pool.work, cluster=cluster)


Engine = Callable[[str | None, float], AbstractContextManager[Work]]
ENGINES: dict[str, Engine] = {LOCAL: _local, "ray": _ray}


def opened_engine(name: str, *, address: str | None, gpus_per_job: float) -> AbstractContextManager[Work]:
    """What runs workers, ready to take jobs.

    Args:
        name: one of `ENGINES`.
        address: of a cluster, see `ray_pool.Cluster`.
        gpus_per_job: GPUs of each worker on a cluster.

    Raises:
        InputError: an unknown name; also on entering: no such cluster, or one that lacks what is asked for.
    """
    if name not in ENGINES:
        raise unknown_name("engine", name, list(ENGINES))
    if gpus_per_job < 0:
        raise InputError(f"{arg('gpus_per_job', gpus_per_job)} is out of range: 0 or more")
    return ENGINES[name](address, gpus_per_job)
