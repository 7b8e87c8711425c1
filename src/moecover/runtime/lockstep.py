"""Forward passes of several batches side by side, all of them stopped at the same module: for work layer by layer.

Each batch runs the model's own forward in its own thread, and only one thread computes at a time. Masks, positions and
whatever else a family passes from layer to layer are therefore those of a plain forward pass.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moecover.errors import MoecoverError, arg
from moecover.runtime.forwards import give_back

if TYPE_CHECKING:
    import torch

ENDED_EARLY = "a forward pass ended before it had run every layer once: please report this"


class _Cancelled(BaseException):
    """Unwinds the forward pass of a batch that is no longer needed."""


@dataclass(frozen=True)
class Passing:
    """The call of a stop's module by one forward pass.

    Attributes:
        stop: index of the module among the stops.
        call: index of the forward pass.
        args: positional arguments of the module.
        kwargs: keyword arguments of the module.
        output: what the module returned; None before it has run.
    """

    stop: int
    call: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass
class Here:
    """Runs the modules in the caller's thread: libraries keep scratch memory for every thread that computes.

    Attributes:
        before: called before a stop's module runs for a call.
        after: called after it has run; what it returns, unless None, replaces the output.
        results: receives the results of the calls, in order.
        waiting: at a stop, the pending call of its module by every forward pass.
    """

    before: Callable[[Passing], None] | None = None
    after: Callable[[Passing], object] | None = None
    results: list[Any] = field(default_factory=list)
    waiting: list[Passing] = field(default_factory=list)


_local = threading.local()


def current_call() -> int:
    """Index of the call that runs in this thread."""
    return int(_local.index)


def lockstep(
    calls: Sequence[Callable[[], object]], stops: Sequence[torch.nn.Module], *, here: Here | None = None
) -> Generator[list[torch.Tensor]]:
    """Yield, at every stop in turn, the first argument of that module's call, one per forward pass.

    Changes that the caller makes to the model between two stops apply to all calls from there on. Without ``here`` the
    forward passes end at the last stop.

    Args:
        calls: forward passes, each of which runs every stop once, in this order.
        stops: modules of the model; one may lie inside another.
        here: run the modules in the caller's thread, and continue after the last stop to the end of the calls.

    Raises:
        MoecoverError: a forward pass does not run every stop.
    """
    steps = _Steps(calls, stops, here)
    try:
        steps.start()
        for _ in stops:
            steps.advance()
            yield steps.arrived()
        if here is not None:
            steps.advance()
            here.results += steps.given
    finally:
        steps.end()


class _Steps:
    """The threads of `lockstep` and what they exchange with the caller's thread."""

    def __init__(
        self, calls: Sequence[Callable[[], object]], stops: Sequence[torch.nn.Module], here: Here | None
    ) -> None:
        self.calls, self.stops, self.here = calls, stops, here
        self.forwards: list[Callable[..., Any]] = [module.forward for module in stops]
        self._own = [vars(module).get("forward") for module in stops]  # a module may have a forward of its own already
        self.given: list[Any] = [None] * len(calls)  # output of a stop's module, at the end the result of the call
        self._waiting: list[Passing | None] = [None] * len(calls)
        self._turns = [threading.Semaphore(0) for _ in calls]
        self._done = threading.Semaphore(0)
        self._errors: list[BaseException] = []
        self._cancelled = False
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(len(calls))]

    def start(self) -> None:
        """Replace the forward of every stop and start the threads, which wait for their first turn."""
        for number, module in enumerate(self.stops):
            module.forward = functools.partial(self._stop, number)
        for number, thread in enumerate(self._threads):
            try:
                thread.start()
            except RuntimeError as error:  # the system's limit on threads
                del self._threads[number:]
                raise MoecoverError(
                    f"{len(self.calls)} forward passes run side by side, each in a thread, and the system allows "
                    f"{number} here. Give a larger {arg('batch_size')}"
                ) from error

    def advance(self) -> None:
        """Run every call, one after the other, to its next stop or its end."""
        for index, (thread, turn) in enumerate(zip(self._threads, self._turns, strict=True)):
            if not thread.is_alive():
                raise MoecoverError(ENDED_EARLY)
            waiting = self._waiting[index]
            if self.here is not None and waiting is not None:
                self.given[index] = self._run_module(waiting, self.here)
            turn.release()
            self._done.acquire()
            if self._errors:
                raise self._errors[0]

    def arrived(self) -> list[torch.Tensor]:
        """The first argument with which every call waits at a stop."""
        first: list[torch.Tensor] = []
        for at in self._waiting:
            if at is None:
                raise MoecoverError(ENDED_EARLY)
            first.append(at.args[0] if at.args else next(iter(at.kwargs.values())))
        if self.here is not None:
            self.here.waiting[:] = [at for at in self._waiting if at is not None]
        return first

    def end(self) -> None:
        """Cancel the calls that have not ended and restore the modules."""
        self._cancelled = True
        for turn in self._turns:
            turn.release()
        for thread in self._threads:
            thread.join()
        for module, own in zip(self.stops, self._own, strict=True):
            give_back(module, own)

    def _run(self, index: int) -> None:
        """The body of a call's thread."""
        import torch

        _local.index = index
        self._turns[index].acquire()
        try:
            if not self._cancelled:
                with torch.inference_mode():
                    self.given[index] = self.calls[index]()
        except _Cancelled:
            pass
        except BaseException as error:
            self._errors.append(error)
        finally:
            self._done.release()

    def _stop(self, number: int, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the forward of a stop's module: waits for the call's next turn."""
        index: int | None = getattr(_local, "index", None)
        if index is None:  # called from the caller's own thread
            return self.forwards[number](*args, **kwargs)
        self._waiting[index] = Passing(number, index, args, kwargs, None)
        self._done.release()
        self._turns[index].acquire()
        if self._cancelled:
            raise _Cancelled
        self._waiting[index] = None
        if self.here is None:
            return self.forwards[number](*args, **kwargs)
        output, self.given[index] = self.given[index], None
        return output

    def _run_module(self, at: Passing, here: Here) -> Any:
        """Run the module at which a call waits, in the caller's thread."""
        import torch

        if here.before is not None:
            here.before(at)
        with torch.inference_mode():
            output = self.forwards[at.stop](*at.args, **at.kwargs)
        replaced = here.after(dataclasses.replace(at, output=output)) if here.after is not None else None
        return output if replaced is None else replaced
