"""A pool of Ray actors that work on one queue of jobs on the machines of a cluster: `pool.work` for a cluster.

An actor is a process with a model of its own; a job's reports come back as they are made. An actor that dies, alone or
with its machine, is replaced, and its job is reported as lost. Needs the extra ``ray``.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import platform
import socket
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Generic

from moecover.comparison.pool import POLL_S, Ended, J, Lost, Opened, Queue, R
from moecover.errors import InputError, MoecoverError, arg

REACH_S = 10  # for the first answer of a cluster
STARTS = 5  # actors in a row that die before they are ready


@dataclass(frozen=True)
class Cluster:
    """Where actors run.

    Attributes:
        address: ``auto`` (the cluster of this machine) or HOST:PORT; None starts one on this machine.
        gpus: of each actor.
    """

    address: str | None = None
    gpus: float = 0

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Be connected to the cluster.

        Raises:
            InputError: Ray is not installed, no cluster answers, or it has too few GPUs.
        """
        try:
            import ray
        except ImportError as error:
            raise InputError(
                f"{arg('engine', 'ray')} needs Ray, which is not installed. Install it: pip install 'moecover[ray]'"
            ) from error
        self._check_answers()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that is started here
        try:
            ray.init(address=self.address, log_to_driver=False, configure_logging=False)
        except Exception as error:  # Ray raises Exception itself
            raise self._unreachable(str(error)) from error
        try:
            found = ray.cluster_resources().get("GPU", 0)
            if found < self.gpus:
                raise InputError(
                    f"{arg('gpus_per_job', f'{self.gpus:g}')}: the cluster has {found:g} GPUs. Give fewer, or add some"
                )
            yield
        finally:
            ray.shutdown()

    def _check_answers(self) -> None:
        """Refuse an address where nothing answers, long before Ray gives up."""
        if self.address in (None, "auto"):
            return
        host, _, port = str(self.address).rpartition(":")
        if not host or not port.isdigit() or "/" in host:
            raise InputError(f"{arg('address', self.address)} is not an address. Give auto or HOST:PORT")
        try:
            socket.create_connection((host, int(port)), REACH_S).close()
        except OSError as error:
            raise self._unreachable(error.strerror or str(error)) from error

    def _unreachable(self, why: str) -> InputError:
        text = " ".join(why.split())
        if self.address is None:
            return InputError(f"{arg('engine', 'ray')}: Ray could not be started on this machine: {text}")
        return InputError(
            f"{arg('address', self.address)}: no Ray cluster answers ({text}). Start one: ray start --head"
        )


class _Actor:
    """Handles jobs in a process of the cluster; the handler is opened by `open`."""

    def __init__(self, opened: bytes) -> None:
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # as the command does, before torch is imported
        self._opened, self._stack = opened, contextlib.ExitStack()
        self._handle: Callable[[Any], Iterator[Any]] | None = None

    def open(self) -> str:
        """Open what the jobs need; gives the name of the machine."""
        opened = pickle.loads(self._opened)
        self._handle = self._stack.enter_context(opened())
        return platform.node()

    def handle(self, job: object) -> Iterator[object]:
        """The reports on a job."""
        assert self._handle is not None
        yield from self._handle(job)


@dataclass
class _Worker(Generic[J]):
    actor: Any  # Ray gives no types
    waits_for: Any  # a reference to what `open` gives, then the reports on a job; None while idle
    job: J | None = None
    model: str = ""
    machine: str = ""


def work(
    queue: Queue[J], opened: Opened[J, R], *, jobs: int, cluster: Cluster
) -> Generator[tuple[J, R | Ended | Lost]]:
    """Handle all jobs of a queue on a cluster that is connected.

    Args:
        queue: of jobs; emptied.
        opened: opens what an actor needs and gives its handler; picklable.
        jobs: number of actors; those that find no room wait for it.
        cluster: where they run.

    Yields:
        A job with a report of its handler, with `Ended` after the last one, or with `Lost`.

    Raises:
        MoecoverError: actors cannot be started.
        RuntimeError: a handler raised an error.
    """
    import ray

    kind = ray.remote(num_cpus=1, num_gpus=cluster.gpus, max_restarts=0)(_Actor)
    pickled, workers, starts = pickle.dumps(opened), list[_Worker[J]](), 0
    try:
        while queue or any(w.job is not None for w in workers):
            while queue and len(workers) < jobs:
                actor = kind.remote(pickled)
                workers.append(_Worker(actor, actor.open.remote()))
            for worker in workers:
                if worker.waits_for is None and (job := queue.take(worker.model)) is not None:
                    worker.job, worker.model = job, job.model
                    worker.waits_for = worker.actor.handle.options(num_returns="streaming").remote(job)
            busy = [w.waits_for for w in workers if w.waits_for is not None]
            if not busy:
                time.sleep(POLL_S if queue else 0)
                continue
            ready = ray.wait(busy, timeout=POLL_S)[0]
            for worker in [w for w in workers if any(w.waits_for is one for one in ready)]:
                if worker.job is None:
                    starts = 0 if _is_started(worker, workers) else starts + 1
                    if starts == STARTS:
                        raise MoecoverError(f"{STARTS} workers of the Ray cluster died at their start. See Ray's logs")
                else:
                    yield _report(worker, workers)
    finally:
        for worker in workers:
            ray.kill(worker.actor)


def _is_started(worker: _Worker[J], workers: list[_Worker[J]]) -> bool:
    """Whether an actor has opened what it needs; one that has died is removed."""
    import ray

    try:
        worker.machine, worker.waits_for = ray.get(worker.waits_for), None
    except ray.exceptions.RayTaskError as error:
        raise _of_handler(error) from error
    except ray.exceptions.RayActorError:
        workers.remove(worker)
        return False
    return True


def _report(worker: _Worker[J], workers: list[_Worker[J]]) -> tuple[J, Any]:
    """The next report on a job."""
    import ray

    job = worker.job
    assert job is not None
    try:
        return job, ray.get(next(worker.waits_for))
    except StopIteration:
        worker.job = worker.waits_for = None
        return job, Ended()
    except ray.exceptions.RayTaskError as error:
        raise _of_handler(error) from error
    except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError):
        workers.remove(worker)
        return job, Lost(f"the worker on {worker.machine} died, or its machine did")


def _of_handler(error: Any) -> Exception:
    """The error that a handler raised on another machine."""
    cause = error.cause
    return cause if isinstance(cause, MoecoverError) else RuntimeError(str(error))
