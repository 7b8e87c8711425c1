"""Forward passes side by side through decoder layers that are loaded one at a time: one read of the weights for all.

The passes are the model's own, stopped before every layer (`lockstep`); there the layer's weights are read and those of
the one before are freed. `streaming.Streamed` is the model that runs this way.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from moecover.runtime.forwards import with_forward
from moecover.runtime.lockstep import Here, Passing, current_call, lockstep
from moecover.runtime.running import Result, Within
from moecover.runtime.weights import Weights

if TYPE_CHECKING:
    import torch

PASSES = 1024  # side by side, where they can run in parts: each takes a thread, and the system limits their number


class Layered(Protocol):
    """A model whose decoder layers are loaded one at a time; `streaming.Streamed` says what the attributes are."""

    @property
    def module(self) -> torch.nn.Module: ...

    @property
    def layers(self) -> tuple[str, ...]: ...

    @property
    def ends(self) -> tuple[str, str] | None: ...

    @property
    def weights(self) -> Weights: ...

    @property
    def room(self) -> float: ...


class _Contexts:
    """The contexts in which a decoder layer runs; consecutive calls with the same one share it."""

    def __init__(self, within: Sequence[Within], first: int) -> None:
        self.stack = contextlib.ExitStack()
        self._within, self._first, self._entered = within, first, list[Within]()

    def enter(self, at: Passing) -> None:
        """Enter the context of a call, unless it is entered already."""
        if self._within and self._entered != [self._within[at.call]]:
            self.stack.close()
            self._entered[:] = [self._within[at.call]]
            self.stack.enter_context(self._entered[0](self._first + at.stop))

    def leave(self) -> None:
        """Leave the context of the layer that has run."""
        self.stack.close()
        self._entered.clear()


def run(
    stream: Layered,
    calls: Sequence[Callable[[], Result]],
    *,
    head: bool = True,
    start: int = 0,
    skipped: Callable[[int, torch.Tensor], object] = lambda layer, hidden: hidden,
    embedded: Callable[[int, torch.Tensor], object] | None = None,
    before: Callable[[Passing], None] | None = None,
    after: Callable[[Passing], object] | None = None,
    within: Sequence[Within] = (),
) -> list[Result]:
    """Run forward passes side by side with one read of the weights.

    Args:
        stream: the model.
        calls: each runs the model once (or a part that begins with its decoder layers) and returns a result.
        head: whether the calls run the language-model head.
        start: index of the first layer that runs; the stops of ``before`` and ``after`` are counted from there.
        skipped: returns the output of a layer before ``start``, given its index and its hidden states.
        embedded: called with the index of a call and the output of the token embedding; what it returns, unless None,
            replaces the output.
        before: see `Here`.
        after: see `Here`.
        within: for every call, a function that returns the context in which a decoder layer runs; consecutive calls
            with the same function share the context.

    Returns:
        The results, one per call.
    """
    weights, layers = stream.weights, stream.layers
    modules = [stream.module.get_submodule(name) for name in layers]
    contexts = _Contexts(within, start)

    def prepared(at: Passing) -> None:
        contexts.enter(at)
        if before is not None:
            before(at)

    here = Here(prepared, after)
    first, last = stream.ends or (None, None)
    with _hook(stream.module, embedded), _skipping(modules[:start], skipped), contextlib.ExitStack() as loaded:
        loaded.callback(weights.free, f"{last}.")
        loaded.callback(weights.free, f"{layers[-1]}.")
        if first:
            weights.load(f"{first}.")
        with contexts.stack, contextlib.closing(lockstep(calls, modules[start:], here=here)) as steps:
            for number, _ in enumerate(steps, start):
                contexts.leave()
                weights.free(f"{layers[number - 1] if number > start else first}.", again=number > start)
                weights.load(f"{layers[number]}.")
                if number + 1 < len(layers):
                    weights.will_need(f"{layers[number + 1]}.")
                elif last and head:
                    weights.load(f"{last}.")
    return here.results


def run_in_parts(
    stream: Layered,
    calls: Sequence[Callable[[], Result]],
    tokens: Sequence[int],
    *,
    within: Sequence[Within],
    together: int = 1,
) -> list[Result]:
    """Like `run`, in parts of as many passes as fit (`Layered.room`, `PASSES`), with one read of the weights each.

    Args:
        stream: the model.
        calls: see `run`.
        tokens: number of tokens of every call.
        within: see `run`.
        together: so many consecutive calls are never in different parts.
    """
    results: list[Result] = []
    while (start := len(results)) < len(calls):
        end, held = start, 0
        while end < len(calls):
            more = sum(tokens[end : end + together])
            if end > start and (end + together - start > PASSES or held + more > stream.room):
                break
            held += more
            end += together
        results += run(stream, calls[start:end], within=within[start:end])
    return results


def arrivals(
    stream: Layered, calls: Sequence[Callable[[], object]], modules: Sequence[torch.nn.Module]
) -> Generator[list[torch.Tensor]]:
    """Like `lockstep`, at modules inside the decoder layers, with the layer's weights loaded; ends at the last of them.

    Args:
        stream: the model.
        calls: see `run`.
        modules: at most one per layer, in the order of the layers.
    """
    layers, weights = [stream.module.get_submodule(name) for name in stream.layers], stream.weights
    inside = {layer: next((m for m in modules if any(m is part for part in layer.modules())), None) for layer in layers}
    stops = [stop for layer in layers for stop in (layer, inside[layer]) if stop is not None]
    first, number = stream.ends[0] if stream.ends else None, -1
    try:
        if first:
            weights.load(f"{first}.")
        with contextlib.closing(lockstep(calls, stops)) as steps:
            for stop, arrived in zip(stops, steps, strict=True):
                if stop in inside:
                    weights.free(f"{stream.layers[number] if number >= 0 else first}.", again=number >= 0)
                    number += 1
                    weights.load(f"{stream.layers[number]}.")
                else:
                    yield arrived
                    if stop is modules[-1]:
                        break
    finally:
        weights.free(f"{stream.layers[number]}.")


def at_layers(stream: Layered, calls: Sequence[Callable[[], object]], here: Here) -> Generator[list[Passing]]:
    """Yield, at every decoder layer in turn, its pending calls, with its weights loaded; it runs when resumed.

    Args:
        stream: the model.
        calls: see `run`.
        here: see `lockstep`; the layers run in the caller's thread.
    """
    weights, first, reached = stream.weights, stream.ends[0] if stream.ends else "", ""
    stops = [stream.module.get_submodule(name) for name in stream.layers]
    try:
        if first:
            weights.load(f"{first}.")
        with contextlib.closing(lockstep(calls, stops, here=here)) as steps:
            for name, _ in zip(stream.layers, steps, strict=True):
                weights.free(f"{reached or first}.", again=bool(reached))
                weights.load(f"{name}.")
                reached = name
                yield here.waiting
    finally:
        weights.free(f"{reached or first}.")


@contextlib.contextmanager
def _skipping(modules: Sequence[torch.nn.Module], skipped: Callable[[int, torch.Tensor], object]) -> Iterator[None]:
    """Layers that return what ``skipped`` gives instead of running."""
    with contextlib.ExitStack() as stack:
        for number, module in enumerate(modules):
            stack.enter_context(with_forward(module, functools.partial(_skip, skipped, number)))
        yield


def _skip(skipped: Callable[[int, torch.Tensor], object], number: int, *args: Any, **kwargs: Any) -> object:
    return skipped(number, args[0] if args else kwargs["hidden_states"])


@contextlib.contextmanager
def _hook(model: torch.nn.Module, embedded: Callable[[int, torch.Tensor], object] | None) -> Iterator[None]:
    """A hook after the token embedding, where there is something to call."""
    if embedded is None:
        yield
        return
    embedding: torch.nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_hook(lambda module, args, output: embedded(current_call(), output))
    try:
        yield
    finally:
        handle.remove()
