"""Processes that share work, as threads: what torch.distributed exchanges between processes, without starting any.

One thread runs at a time, up to its next exchange, so that what is global to a process does not get in the way.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from moecover.runtime.world import World

SIZE = 2


class _Exchange:
    """Where the processes meet; also what `distributed.store` gives."""

    def __init__(self) -> None:
        self._turn, self._here = threading.Condition(), threading.local()
        self._given: dict[int, Any] = {}
        self._found: list[Any] = []
        self._round, self._ended = 0, False

    def run(self, work: Callable[[World], Any], rank: int) -> Any:
        """The result of a process, or its error."""
        self._here.rank, self._here.barriers = rank, 0
        with self._turn:
            try:
                return work(World(rank=rank, size=SIZE, local_rank=rank, local_size=SIZE))
            except BaseException as error:
                return error
            finally:
                self._ended = True
                self._turn.notify_all()

    def exchange(self, value: Any) -> list[Any]:
        """What every process gives, in each of them."""
        number, self._given[self._here.rank] = self._round, value
        if len(self._given) == SIZE:
            self._found, self._given = list(map(self._given.__getitem__, range(SIZE))), {}
            self._round += 1
            self._turn.notify_all()
        self._turn.wait_for(lambda: self._round > number or self._ended)
        if self._round == number:  # as gloo says it
            raise RuntimeError("Connection closed by peer")
        return self._found

    def add(self, name: str, number: int) -> int:
        """A barrier, by the name of its counter; heartbeats are not counted."""
        if name != "arrived":
            return 0
        if number:
            self.exchange(None)
            self._here.barriers += 1
        return SIZE * int(self._here.barriers)

    def check(self, names: list[str]) -> bool:
        """Whether a process has said that it fails."""
        return False


def in_ranks(monkeypatch: pytest.MonkeyPatch, work: Callable[[World], Any]) -> list[Any]:
    """The results of two processes, each of which does some work, or the errors that end them."""
    meeting = _Exchange()

    def all_reduce(values: torch.Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> None:
        one, two = meeting.exchange(values.clone())
        values.copy_(torch.maximum(one, two) if op == torch.distributed.ReduceOp.MAX else one + two)

    def all_gather_object(everyone: list[Any], mine: Any) -> None:
        everyone[:] = pickle.loads(pickle.dumps(meeting.exchange(mine)))

    def broadcast_object_list(found: list[Any], src: int, device: torch.device) -> None:
        found[:] = pickle.loads(pickle.dumps(meeting.exchange(found[0])[src : src + 1]))

    with monkeypatch.context() as patched:
        for function in (all_reduce, all_gather_object, broadcast_object_list):
            patched.setattr(torch.distributed, function.__name__, function)
        patched.setattr(torch.distributed, "PrefixStore", lambda prefix, store: store)
        patched.setattr(torch.distributed, "init_process_group", lambda *arguments, **options: None)
        patched.setenv("OMP_NUM_THREADS", "1")
        patched.setattr("moecover.runtime.distributed.store", lambda: meeting)
        with ThreadPoolExecutor(SIZE) as pool:
            return list(pool.map(lambda rank: meeting.run(work, rank), range(SIZE)))
