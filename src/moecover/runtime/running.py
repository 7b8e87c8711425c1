"""One interface for a model that runs, in memory or layer by layer: no stage needs to know which.

`runtime.memory.opened` gives one, `running` wraps a live model; `runtime.streaming.Streamed` is the other kind.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from moecover.runtime.lockstep import Here, Passing, lockstep
from moecover.runtime.world import ALONE, World

if TYPE_CHECKING:
    import torch

    from moecover.checkpoints.structure import Structure

Result = TypeVar("Result")
Within = Callable[[int], contextlib.AbstractContextManager[None]]  # index of a decoder layer to the context it runs in


def unmasked(number: int) -> contextlib.AbstractContextManager[None]:
    """The context of a decoder layer that runs as it is."""
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
        """The device for the inputs."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first parameter."""
        ...

    @property
    def by_layer(self) -> bool:
        """Whether one decoder layer is in memory at a time."""
        ...

    @property
    def world(self) -> World:
        """The place of this process among others that have the same model open and share the work on it."""
        ...

    def run(
        self, calls: Sequence[Callable[[], Result]], *, head: bool = True, within: Sequence[Within] = ()
    ) -> list[Result]:
        """Results of forward passes in inference mode; layer by layer, all of them share one read of the weights.

        Args:
            calls: each runs the model once.
            head: whether they run the language-model head.
            within: for every call, a function that returns the context in which a decoder layer runs; none at all where
                the model runs as it is.
        """
        ...

    def at_layers(self, calls: Sequence[Callable[[], object]], here: Here) -> Generator[list[Passing]]:
        """Yield, at every decoder layer in turn, the pending call of the layer by every forward pass.

        The weights of the layer are loaded; it runs when the generator is resumed.
        """
        ...

    def arrivals(
        self, calls: Sequence[Callable[[], object]], modules: Sequence[torch.nn.Module]
    ) -> Generator[list[torch.Tensor]]:
        """Yield, at each module in turn (at most one per decoder layer), its first argument, one per forward pass."""
        ...

    def loaded(self, number: int) -> contextlib.AbstractContextManager[None]:
        """Hold the weights of a decoder layer in memory until the block ends."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A model that is in memory as a whole; see `Running`."""

    module: torch.nn.Module
    layers: tuple[str, ...]
    world: World = ALONE

    by_layer = False

    @property
    def device(self) -> torch.device:
        """See `Running.device`."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """See `Running.dtype`."""
        return next(self.module.parameters()).dtype

    def run(
        self, calls: Sequence[Callable[[], Result]], *, head: bool = True, within: Sequence[Within] = ()
    ) -> list[Result]:
        """See `Running.run`."""
        import torch

        with torch.inference_mode():
            if not within:
                return [call() for call in calls]
            return [self._run_within(call, around) for call, around in zip(calls, within, strict=True)]

    def _run_within(self, call: Callable[[], Result], within: Within) -> Result:
        """Run a call whose decoder layers run in contexts, one at a time (one may hold the weights of a layer)."""
        if within is unmasked:
            return call()
        contexts = contextlib.ExitStack()

        def enter(number: int, *args: object) -> None:
            contexts.enter_context(within(number))

        def leave(*args: object) -> None:
            contexts.close()

        with contextlib.ExitStack() as handles, contexts:
            for number, name in enumerate(self.layers):
                layer = self.module.get_submodule(name)
                handles.callback(layer.register_forward_pre_hook(functools.partial(enter, number)).remove)
                handles.callback(layer.register_forward_hook(leave).remove)
            return call()

    def at_layers(self, calls: Sequence[Callable[[], object]], here: Here) -> Generator[list[Passing]]:
        """See `Running.at_layers`."""
        stops = [self.module.get_submodule(name) for name in self.layers]
        with contextlib.closing(lockstep(calls, stops, here=here)) as steps:
            for _ in steps:
                yield here.waiting

    def arrivals(
        self, calls: Sequence[Callable[[], object]], modules: Sequence[torch.nn.Module]
    ) -> Generator[list[torch.Tensor]]:
        """See `Running.arrivals`."""
        return lockstep(calls, modules)

    @contextlib.contextmanager
    def loaded(self, number: int) -> Iterator[None]:
        """See `Running.loaded`."""
        yield


def layer_names(model: torch.nn.Module, structure: Structure) -> tuple[str, ...]:
    """Names of all decoder layers, dense ones included: the members of the list that holds the MoE layers."""
    parts = structure.experts_modules[0].split(".")
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    stack = ".".join(parts[:number])
    return tuple(f"{stack}.{name}" for name, _ in model.get_submodule(stack).named_children())


def running(model: torch.nn.Module | Running, structure: Structure, world: World = ALONE) -> Running:
    """The model behind the common interface: a live model is wrapped, one that runs already is returned as it is."""
    import torch

    if isinstance(model, torch.nn.Module):
        return InMemory(model, layer_names(model, structure), world)
    return model
