"""Forward passes of several batches side by side, all of them stopped at the same module: for work layer by layer.

Every batch runs the model's own forward in a thread of its own; only one of them computes at a time. So masks, positions
and whatever else a family hands from layer to layer stay what they are in a plain pass.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
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


_local = threading.local()


def current_call() -> int:
    """The number of the call whose thread this is."""
    return int(_local.index)


def lockstep(
    calls: Sequence[Callable[[], Any]], stops: Sequence[torch.nn.Module], *, results: list[Any] | None = None,
    before: Callable[[Passing], None] | None = None, after: Callable[[Passing], Any] | None = None,
) -> Generator[list[Any]]:  # fmt: skip
    """At every stop in turn, the first argument of that module's call, one a call.

    What the caller changes in the model between two stops holds for all calls from there on.

    Args:
        calls: forward passes, each of which runs every stop once, in this order.
        stops: modules of the model.
        results: takes what the calls give, in their order; without it the passes end at the last stop.
        before: called when a call goes on into a stop's module.
        after: called when a stop's module is done with a call; what it gives, if anything, takes the output's place.

    Raises:
        MoecoverError: a pass does not run every stop.
    """
    import torch

    turns = [threading.Semaphore(0) for _ in calls]
    done = threading.Semaphore(0)
    arrived: list[Any] = [None] * len(calls)
    given: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []
    cancelled = False

    def stop(number: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = getattr(_local, "index", None)
        if index is None:  # a call of the caller's own
            return
        arrived[index] = args[0] if args else next(iter(kwargs.values()))
        done.release()
        turns[index].acquire()
        if cancelled:
            raise _Cancelled
        arrived[index] = None
        if before is not None:
            before(Passing(number, index, args, kwargs, None))

    def passed(number: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        index = getattr(_local, "index", None)
        if index is not None and after is not None:
            return after(Passing(number, index, args, kwargs, output))
        return None

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

    def go() -> None:
        """One step of every call."""
        for thread, turn in zip(threads, turns, strict=True):
            if not thread.is_alive():
                raise MoecoverError("a forward pass ended before it had run every layer once: please report this")
            turn.release()
            done.acquire()
            if errors:
                raise errors[0]

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    hooks = [m.register_forward_pre_hook(functools.partial(stop, n), with_kwargs=True) for n, m in enumerate(stops)]
    if after is not None:
        hooks += [m.register_forward_hook(functools.partial(passed, n), with_kwargs=True) for n, m in enumerate(stops)]
    try:
        for thread in threads:
            thread.start()
        for _ in stops:
            go()
            yield list(arrived)
        if results is not None:
            go()
            results += given
    finally:
        cancelled = True
        for turn in turns:
            turn.release()
        for thread in threads:
            thread.join()
        for hook in hooks:
            hook.remove()
