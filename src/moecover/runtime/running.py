"""One interface for a model that runs, in memory or layer by layer: stages never ask which it is.

`runtime.memory.opened` gives one, `running` makes one of a live model; `runtime.streaming.Streamed` is the other kind.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from moecover.runtime.lockstep import Here, Passing, lockstep

if TYPE_CHECKING:
    import torch

    from moecover.checkpoints.structure import Structure

Result = TypeVar("Result")
Within = Callable[[int], contextlib.AbstractContextManager[None]]


def unmasked(number: int) -> contextlib.AbstractContextManager[None]:
    """Nothing around a decoder layer."""
    return contextlib.nullcontext()


class Running(Protocol):
    """A model that runs."""

    @property
    def module(self) -> torch.nn.Module:
        """The model itself; layer by layer, most of its parameters are on ``meta`` most of the time."""
        ...

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all decoder layers, in order, dense ones included."""
        ...

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters, of the first where they differ."""
        ...

    @property
    def by_layer(self) -> bool:
        """Whether one decoder layer is in memory at a time."""
        ...

    def run(
        self, calls: Sequence[Callable[[], Result]], *, head: bool = True, within: Sequence[Within] = ()
    ) -> list[Result]:
        """Results of forward passes, in inference mode; all of them share one read of the weights.

        Args:
            calls: each runs the model once.
            head: whether they run the language-model head.
            within: of every call, a context for each decoder layer, in which that layer runs.
        """
        ...

    def at_layers(self, calls: Sequence[Callable[[], Any]], here: Here) -> Generator[list[Passing]]:
        """At every decoder layer in turn, whose weights are there, what it is called with by every call.

        The layer runs when the next one is asked for.
        """
        ...

    def arrivals(self, calls: Sequence[Callable[[], Any]], modules: Sequence[torch.nn.Module]) -> Generator[list[Any]]:
        """At each of some modules in turn (at most one a decoder layer), its first argument, one a call."""
        ...

    def loaded(self, number: int) -> contextlib.AbstractContextManager[None]:
        """The weights of one decoder layer in memory until the block ends."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A model that is in memory as a whole; see `Running`."""

    module: torch.nn.Module
    layers: tuple[str, ...]

    by_layer = False

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def run(
        self, calls: Sequence[Callable[[], Result]], *, head: bool = True, within: Sequence[Within] = ()
    ) -> list[Result]:
        """See `Running.run`."""
        import torch

        with torch.inference_mode():
            if not within:
                return [call() for call in calls]
            return [self._inside(call, around) for call, around in zip(calls, within, strict=True)]

    def _inside(self, call: Callable[[], Result], within: Within) -> Result:
        """A call whose decoder layers run in contexts, one layer's at a time (a context may hold a layer's weights)."""
        around, handles = contextlib.ExitStack(), []
        for number, name in enumerate(self.layers):
            layer = self.module.get_submodule(name)
            enter = functools.partial(lambda number, *_: around.enter_context(within(number)), number)
            handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(lambda *_: around.close())]
        try:
            with around:
                return call()
        finally:
            for handle in handles:
                handle.remove()

    def at_layers(self, calls: Sequence[Callable[[], Any]], here: Here) -> Generator[list[Passing]]:
        """See `Running.at_layers`."""
        stops = [self.module.get_submodule(name) for name in self.layers]
        with contextlib.closing(lockstep(calls, stops, here=here)) as steps:
            for _ in steps:
                yield here.waiting

    def arrivals(self, calls: Sequence[Callable[[], Any]], modules: Sequence[torch.nn.Module]) -> Generator[list[Any]]:
        """See `Running.arrivals`."""
        return lockstep(calls, modules)

    @contextlib.contextmanager
    def loaded(self, number: int) -> Iterator[None]:
        """See `Running.loaded`."""
        yield


def layer_names(model: torch.nn.Module, structure: Structure) -> tuple[str, ...]:
    """Names of all decoder layers, dense ones included: the list that holds the layers with experts."""
    parts = structure.experts_modules[0].split(".")
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    stack = ".".join(parts[:number])
    return tuple(f"{stack}.{name}" for name, _ in model.get_submodule(stack).named_children())


def running(model: torch.nn.Module | Running, structure: Structure) -> Running:
    """A live model, or one that runs already, behind the one interface."""
    import torch

    if isinstance(model, torch.nn.Module):
        return InMemory(model, layer_names(model, structure))
    return model
