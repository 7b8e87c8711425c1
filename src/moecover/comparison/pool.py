"""Several processes that work on one list of jobs: takes jobs from a queue, gives what they report, as it comes.

A worker is a fresh process (spawn) with a bench of its own, on which it handles job after job; with one worker all runs in
this process. A worker that dies (killed, out of memory) costs the job it had and is replaced; the workers end with this
process, however that ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from moecover.signals import deliver_again


class Job(Protocol):
    """What a worker handles."""

    @property
    def model(self) -> str:
        """Jobs of the same model are preferred by the worker that has it open."""


Handle = Callable[[Any], Iterator[Any]]
Bench = Callable[[], AbstractContextManager[Handle]]


@dataclass(frozen=True)
class Died:
    """A worker's process ended in the middle of a job.

    Attributes:
        code: its exit status, negative for a signal.
    """

    code: int | None

    @property
    def reason(self) -> str:
        if self.code is not None and self.code < 0:
            name = signal.Signals(-self.code).name
            why = ", as the system does when memory runs out: fewer --jobs, or a smaller batch_size" if name == "SIGKILL" else ""  # fmt: skip
            return f"its process was ended by {name}{why}"
        return f"its process ended with status {self.code}"


@dataclass(frozen=True)
class Crash:
    """An error that no job may raise: passed on with its traceback as text."""

    text: str


END = "end"  # what a worker sends behind the reports of a job


def _work(bench: Bench, pipe: Connection) -> None:
    """Life of a worker."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the first process says when to end
    sys.unraisablehook = deliver_again
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with bench() as handle:
        while (job := pipe.recv()) is not None:
            try:
                for report in handle(job):
                    pipe.send(report)
                pipe.send(END)
            except Exception:
                import traceback

                pipe.send(Crash(traceback.format_exc()))
                raise


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    job: Any = None
    model: str = ""


def _started(bench: Bench) -> _Worker:
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=_work, args=(bench, its), daemon=True)
    process.start()
    its.close()
    return _Worker(process, mine)


def _next(queue: deque[Any], model: str) -> Any:
    job = next((job for job in queue if job.model == model), queue[0])
    queue.remove(job)
    return job


def work(queue: deque[Any], bench: Bench, *, jobs: int) -> Generator[tuple[Any, Any]]:
    """Handle all jobs of a queue, to which the caller may add between two reports.

    Args:
        queue: of jobs; emptied.
        bench: opens what a worker needs and gives its handler; picklable.
        jobs: workers.

    Yields:
        A job with a report of its handler, with `END` behind its last one, or with `Died`.

    Raises:
        RuntimeError: a handler let an error through.
    """
    if jobs == 1:
        with bench() as handle:
            model = ""
            while queue:
                job = _next(queue, model)
                model = job.model
                for report in handle(job):
                    yield job, report
                yield job, END
        return
    workers: list[_Worker] = []
    try:
        while queue or any(w.job is not None for w in workers):
            for worker in workers:
                if queue and worker.job is None:
                    _give(worker, queue)
            while queue and len(workers) < jobs:
                workers.append(_started(bench))
                _give(workers[-1], queue)
            busy = [w for w in workers if w.job is not None]
            wait([w.pipe for w in busy])
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


def _give(worker: _Worker, queue: deque[Any]) -> None:
    worker.job = _next(queue, worker.model)
    worker.model = worker.job.model
    with contextlib.suppress(BrokenPipeError):  # it is gone: the pipe's end says so
        worker.pipe.send(worker.job)


def _reports(worker: _Worker, workers: list[_Worker]) -> Iterator[tuple[Any, Any]]:
    """What a worker has sent so far, and its death: the pipe ends with the process."""
    job = worker.job
    try:
        while worker.job is not None and worker.pipe.poll():
            report = worker.pipe.recv()
            if isinstance(report, Crash):
                raise RuntimeError(report.text)
            if report == END:
                worker.job = None
            yield job, report
    except (EOFError, ConnectionResetError):
        workers.remove(worker)
        worker.process.join()
        worker.pipe.close()
        yield job, Died(worker.process.exitcode)
