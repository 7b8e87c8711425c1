"""A pool of processes that work on one queue of jobs: yields what they report, as it comes.

A worker is a fresh process (spawn) that handles job after job; a single worker runs in this process. A worker that dies
(killed, out of memory) loses the job it had and is replaced. Workers end with this process, however that ends. While
others have all jobs of the queue that are left, it is asked again and again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Generic, Protocol, TypeVar

from moecover.signals import deliver_again

POLL_S = 0.5  # between two looks at a queue of which other pools have all jobs


class HasModel(Protocol):
    """A job, as far as the pool knows it."""

    @property
    def model(self) -> str:
        """The worker that has this model open prefers the job."""


J = TypeVar("J", bound=HasModel)
R = TypeVar("R")
T = TypeVar("T", covariant=True)


class Queue(Protocol[T]):
    """Jobs that are to be done; its owner may add some between two reports."""

    def __bool__(self) -> bool:
        """Whether jobs are left."""
        ...

    def take(self, model: str) -> T | None:
        """Take a job, one of a model if there is one; None while others have all jobs that are left."""
        ...


Opened = Callable[
    [], AbstractContextManager[Callable[[J], Iterator[R]]]
]  # opens what a worker needs, gives its handler


@dataclass(frozen=True)
class Ended:
    """A job has ended; follows its reports."""


@dataclass(frozen=True)
class Died:
    """The process of a worker ended in the middle of a job.

    Attributes:
        code: its exit status, negative for a signal.
    """

    code: int | None

    @property
    def reason(self) -> str:
        if self.code is None or self.code >= 0:
            return f"its process ended with status {self.code}"
        name = signal.Signals(-self.code).name
        killed = ", as the system does when memory runs out: fewer jobs, or a smaller batch_size"
        return f"its process was ended by {name}{killed if name == 'SIGKILL' else ''}"


@dataclass(frozen=True)
class Lost:
    """The worker of a job was lost for a reason that need not be the job's: it can be tried again.

    Attributes:
        reason: what was lost.
    """

    reason: str


@dataclass(frozen=True)
class Crash:
    """An error that a handler must not raise, with its traceback as text."""

    text: str


@dataclass
class _Worker(Generic[J]):
    process: BaseProcess
    pipe: Connection
    job: J | None = None
    model: str = ""


def work(queue: Queue[J], opened: Opened[J, R], *, jobs: int) -> Generator[tuple[J, R | Ended | Died]]:
    """Handle all jobs of a queue.

    Args:
        queue: of jobs; emptied.
        opened: opens what a worker needs and gives its handler; picklable.
        jobs: number of workers.

    Yields:
        A job with a report of its handler, with `Ended` after the last one, or with `Died`.

    Raises:
        RuntimeError: a handler raised an error.
    """
    if jobs > 1:
        yield from _in_processes(queue, opened, jobs)
        return
    with opened() as handle:
        model = ""
        while queue:
            if (job := queue.take(model)) is None:
                time.sleep(POLL_S if queue else 0)
                continue
            model = job.model
            for report in handle(job):
                yield job, report
            yield job, Ended()


def _in_processes(queue: Queue[J], opened: Opened[J, R], jobs: int) -> Generator[tuple[J, R | Ended | Died]]:
    workers: list[_Worker[J]] = []
    try:
        while queue or any(w.job is not None for w in workers):
            for worker in workers:
                if worker.job is None and (job := queue.take(worker.model)) is not None:
                    _give(worker, job)
            while len(workers) < jobs and (job := queue.take("")) is not None:
                workers.append(_started(opened))
                _give(workers[-1], job)
            busy = [w for w in workers if w.job is not None]
            if not busy:
                time.sleep(POLL_S if queue else 0)
                continue
            wait([w.pipe for w in busy], POLL_S if queue and len(busy) < jobs else None)
            for worker in busy:
                yield from _reports(worker, workers)
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join(10)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()


def _started(opened: Opened[J, R]) -> _Worker[J]:
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=_serve, args=(opened, its), daemon=True)
    process.start()
    its.close()
    return _Worker(process, mine)


def _serve(opened: Opened[J, R], pipe: Connection) -> None:
    """Handle jobs from a pipe until it says None: the main function of a worker's process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the first process ends the workers
    sys.unraisablehook = deliver_again
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with opened() as handle:
        while (job := pipe.recv()) is not None:
            try:
                for report in handle(job):
                    pipe.send(report)
                pipe.send(Ended())
            except Exception:
                import traceback

                pipe.send(Crash(traceback.format_exc()))
                raise


def _give(worker: _Worker[J], job: J) -> None:
    worker.job, worker.model = job, job.model
    with contextlib.suppress(BrokenPipeError):  # it has died: the end of its pipe will say so
        worker.pipe.send(job)


def _reports(worker: _Worker[J], workers: list[_Worker[J]]) -> Iterator[tuple[J, R | Ended | Died]]:
    """What a worker has sent so far, and its death: the pipe ends with the process."""
    job = worker.job
    assert job is not None
    try:
        while worker.job is not None and worker.pipe.poll():
            report = worker.pipe.recv()
            if isinstance(report, Crash):
                raise RuntimeError(report.text)
            if isinstance(report, Ended):
                worker.job = None
            yield job, report
    except (EOFError, ConnectionResetError):
        workers.remove(worker)
        worker.process.join()
        worker.pipe.close()
        yield job, Died(worker.process.exitcode)
