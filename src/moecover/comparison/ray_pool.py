"""A pool of Ray actors that work on the jobs of a comparison on the machines of a cluster: `pool.work` for a cluster.

An actor is a process with a model of its own; a job's reports come back as they are made. An actor that dies, alone or
with its machine, is replaced, and its job is reported as lost. To one whose machine does not see the run folder goes
what a job reads, and what it writes comes back. Needs the extra ``ray``.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import platform
import socket
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecover import rehearsal
from moecover.comparison.jobs import Job, Report, WorkerSetup
from moecover.comparison.pool import POLL_S, Ended, Lost, Queue
from moecover.comparison.remote import RemoteWorker, remote_worker
from moecover.comparison.shipping import Arrivals, Piece, pieces, read_by
from moecover.errors import InputError, MoecoverError, arg

REACH_S = 10  # for the first answer of a cluster
STARTS = 5  # actors in a row that die before they are ready
CLOSE_S = 10  # for idle actors to remove what they have on disk


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
        """Be connected to the cluster; in a dry run only its address is looked at.

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
        if rehearsal.on():
            yield
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that is started here
        try:
            ray.init(address=self.address, log_to_driver=False, configure_logging=False)
        except Exception as error:  # Ray raises Exception itself
            raise self._not_connected(str(error)) from error
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
        return InputError(
            f"{arg('address', self.address)}: no Ray cluster answers ({why}). Start one: ray start --head"
        )

    def _not_connected(self, why: str) -> InputError:
        text = " ".join(why.split())
        if self.address is None:
            return InputError(f"{arg('engine', 'ray')}: Ray could not be started on this machine: {text}")
        if self.address == "auto":
            return self._unreachable(text)
        return InputError(
            f"{arg('address', self.address)}: what answers there does not take this process in ({text}). Have the "
            "cluster's version of Ray; where it asks for a token, set RAY_AUTH_MODE=token"
        )


class _Actor:
    """Handles jobs in a process of the cluster; the worker is opened by `open`."""

    def __init__(self, setup: bytes) -> None:
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # as the command does, before torch is imported
        self._setup, self._stack = setup, contextlib.ExitStack()
        self._worker: RemoteWorker | None = None

    def open(self) -> tuple[str, bool]:
        """Open what the jobs need; gives the name of the machine, and whether it works in a copy of the run folder."""
        self._worker = self._stack.enter_context(remote_worker(pickle.loads(self._setup)))
        return platform.node(), self._worker.copies

    def receive(self, piece: Piece) -> None:
        """Take a piece of what the next job reads."""
        assert self._worker is not None
        self._worker.receive(piece)

    def handle(self, job: Job) -> Iterator[Report | Piece]:
        """The reports on a job."""
        assert self._worker is not None
        yield from self._worker.do(job)

    def close(self) -> None:
        """Free the model, and remove what is on disk."""
        self._stack.close()


@dataclass
class _Worker:
    """An actor, as this process knows it.

    Attributes:
        actor: its handle; Ray gives no types.
        arrivals: what it has sent for the run folder.
        waits_for: a reference to what `open` gives, then the reports on a job; None while idle.
        job: what it does.
        model: of its last job.
        machine: its name; empty before it is open.
        copies: whether it works in a copy of the run folder.
    """

    actor: Any
    arrivals: Arrivals
    waits_for: Any
    job: Job | None = None
    model: str = ""
    machine: str = ""
    copies: bool = False

    def lost(self) -> Lost:
        """That it has died."""
        self.arrivals.close()
        return Lost(f"the worker on {self.machine} died, or its machine did")


def work(
    queue: Queue[Job], setup: WorkerSetup, *, jobs: int, cluster: Cluster
) -> Generator[tuple[Job, Report | Ended | Lost]]:
    """Handle all jobs of a queue on a cluster that is connected.

    Args:
        queue: of jobs; emptied.
        setup: of the actors.
        jobs: number of actors; those that find no room wait for it.
        cluster: where they run.

    Yields:
        A job with a report, with `Ended` after the last one, or with `Lost`.

    Raises:
        MoecoverError: actors cannot be started, or a machine cannot do the jobs.
        RuntimeError: an actor raised another error.
    """
    import ray

    kind = ray.remote(num_cpus=1, num_gpus=cluster.gpus, max_restarts=0)(_Actor)
    pickled, workers, starts = pickle.dumps(setup), list[_Worker](), 0
    try:
        while queue or any(w.job is not None for w in workers):
            while queue and len(workers) < jobs:
                actor = kind.remote(pickled)
                workers.append(_Worker(actor, Arrivals(setup.run), actor.open.remote()))
            for worker in list(workers):
                job = queue.take(worker.model) if worker.waits_for is None else None
                if job is not None and not _given(worker, job, setup.run):
                    workers.remove(worker)
                    yield job, worker.lost()
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
                elif (report := _report(worker, workers)) is not None:
                    yield report
    finally:
        _ended(workers)


def _ended(workers: list[_Worker]) -> None:
    """End all actors, those that are idle with what they have on disk."""
    import ray

    with contextlib.suppress(Exception):  # the cluster may be gone; Ray raises Exception itself
        idle = [w.actor.close.remote() for w in workers if w.machine and w.job is None]
        ray.wait(idle, num_returns=max(1, len(idle)), timeout=CLOSE_S) if idle else None
    for worker in workers:
        worker.arrivals.close()
        ray.kill(worker.actor)


def _given(worker: _Worker, job: Job, run: Path) -> bool:
    """Whether an actor has a job, with what the job reads where it does not see the run folder; else it has died."""
    import ray

    try:
        for piece in pieces(run, read_by(job)) if worker.copies else ():
            ray.get(worker.actor.receive.remote(piece))
    except ray.exceptions.RayTaskError as error:
        raise _of_worker(error) from error
    except ray.exceptions.RayActorError:
        return False
    worker.job, worker.model = job, job.model
    worker.waits_for = worker.actor.handle.options(num_returns="streaming").remote(job)
    return True


def _is_started(worker: _Worker, workers: list[_Worker]) -> bool:
    """Whether an actor has opened what it needs; one that has died is removed."""
    import ray

    try:
        (worker.machine, worker.copies), worker.waits_for = ray.get(worker.waits_for), None
    except ray.exceptions.RayTaskError as error:
        raise _of_worker(error) from error
    except ray.exceptions.RayActorError:
        workers.remove(worker)
        return False
    return True


def _report(worker: _Worker, workers: list[_Worker]) -> tuple[Job, Report | Ended | Lost] | None:
    """The next report on a job; None for a piece of what the job has written, which is taken into the run folder."""
    import ray

    job = worker.job
    assert job is not None
    try:
        report: Report | Piece = ray.get(next(worker.waits_for))
    except StopIteration:
        worker.job = worker.waits_for = None
        return job, Ended()
    except ray.exceptions.RayTaskError as error:
        raise _of_worker(error) from error
    except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError):
        workers.remove(worker)
        return job, worker.lost()
    if isinstance(report, Piece):
        worker.arrivals.take(report)
        return None
    return job, report


def _of_worker(error: Any) -> Exception:
    """The error that was raised on another machine."""
    cause = error.cause
    return cause if isinstance(cause, MoecoverError) else RuntimeError(str(error))
