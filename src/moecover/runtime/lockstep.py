"""Forward passes of several batches side by side, all of them stopped at the same module: for work layer by layer.

Every batch runs the model's own forward in a thread of its own; only one of them computes at a time. So masks, positions
and whatever else a family hands from layer to layer stay what they are in a plain pass.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moecover.errors import MoecoverError

if TYPE_CHECKING:
    import torch


class _Cancelled(BaseException):
    """Unwinds the pass of a batch that is not needed any further."""


@dataclass(frozen=True)
class Passing:
    """A call at a stop: the number of each, what the module was called with and, behind it, what it gave."""

    stop: int
    call: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass
class Here:
    """That the caller's thread runs the modules: libraries keep scratch memory for every thread that computes.

    Attributes:
        before: called when a call goes on into a stop's module.
        after: called when a stop's module is done with a call; what it gives, if anything, takes the output's place.
        results: takes what the calls give, in their order.
        waiting: at a stop, what its module is about to be called with, one a call.
    """

    before: Callable[[Passing], None] | None = None
    after: Callable[[Passing], Any] | None = None
    results: list[Any] = field(default_factory=list)
    waiting: list[Passing] = field(default_factory=list)


_local = threading.local()


def current_call() -> int:
    """The number of the call whose thread this is."""
    return int(_local.index)


def lockstep(
    calls: Sequence[Callable[[], Any]], stops: Sequence[torch.nn.Module], *, here: Here | None = None,
) -> Generator[list[Any]]:  # fmt: skip
    """At every stop in turn, the first argument of that module's call, one a call; the passes end at the last stop.

    What the caller changes in the model between two stops holds for all calls from there on.

    Args:
        calls: forward passes, each of which runs every stop once, in this order.
        stops: modules of the model; one may lie inside another.
        here: run the stops' modules in this thread, and go on behind the last stop.

    Raises:
        MoecoverError: a pass does not run every stop.
    """
    import torch

    turns = [threading.Semaphore(0) for _ in calls]
    done = threading.Semaphore(0)
    waiting: list[tuple[int, tuple[Any, ...], dict[str, Any]] | None] = [None] * len(calls)
    given: list[Any] = [None] * len(calls)  # what a stop's module gave, at last what the call gave
    errors: list[BaseException] = []
    cancelled = False
    forwards = [module.forward for module in stops]

    def stop(number: int, *args: Any, **kwargs: Any) -> Any:
        index = getattr(_local, "index", None)
        if index is None:  # a call of the caller's own
            return forwards[number](*args, **kwargs)
        waiting[index] = (number, args, kwargs)
        done.release()
        turns[index].acquire()
        if cancelled:
            raise _Cancelled
        waiting[index] = None
        if here is None:
            return forwards[number](*args, **kwargs)
        output, given[index] = given[index], None
        return output

    def run(index: int) -> None:
        _local.index = index
        turns[index].acquire()
        try:
            if not cancelled:
                with torch.inference_mode():
                    given[index] = calls[index]()
        except _Cancelled:
            pass
        except BaseException as error:
            errors.append(error)
        finally:
            done.release()

    def run_module(index: int, here: Here) -> Any:
        """The module that a call waits at."""
        asked = waiting[index]
        assert asked is not None
        at = Passing(asked[0], index, asked[1], asked[2], None)
        if here.before is not None:
            here.before(at)
        with torch.inference_mode():
            output = forwards[at.stop](*at.args, **at.kwargs)
        other = here.after(dataclasses.replace(at, output=output)) if here.after is not None else None
        return output if other is None else other

    def go() -> None:
        """One step of every call, up to its next stop or its end."""
        for index, (thread, turn) in enumerate(zip(threads, turns, strict=True)):
            if not thread.is_alive():
                raise MoecoverError("a forward pass ended before it had run every layer once: please report this")
            if here is not None and waiting[index] is not None:
                given[index] = run_module(index, here)
            turn.release()
            done.acquire()
            if errors:
                raise errors[0]

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    try:
        for number, module in enumerate(stops):
            module.forward = functools.partial(stop, number)
        for thread in threads:
            thread.start()
        for _ in stops:
            go()
            arrived = [_first(asked) for asked in waiting]
            if here is not None:
                here.waiting[:] = [Passing(a[0], index, a[1], a[2], None) for index, a in enumerate(waiting) if a is not None]  # fmt: skip
            yield arrived
        if here is not None:
            go()
            here.results += given
    finally:
        cancelled = True
        for turn in turns:
            turn.release()
        for thread in threads:
            thread.join()
        for module in stops:
            del module.forward


def _first(asked: tuple[int, tuple[Any, ...], dict[str, Any]] | None) -> Any:
    if asked is None:
        raise MoecoverError("a forward pass ended before it had run every layer once: please report this")
    return asked[1][0] if asked[1] else next(iter(asked[2].values()))
