"""A model whose decoder layers are in memory one at a time: reads a checkpoint, runs every batch through layer after layer.

The pass is the model's own, every batch in a thread that stops before each layer (`lockstep`); there the next layer's
weights are read and the last one's are freed. So the weights are read once, whatever the number of batches, and masks,
positions and what else a family hands from layer to layer stay what they are in a plain pass.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.deepseek.registration import register_deepseek
from moecover.checkpoints.model_class import auto_class
from moecover.checkpoints.structure import Structure
from moecover.errors import InputError
from moecover.runtime.loading import check_device
from moecover.runtime.lockstep import Here, Passing, current_call, lockstep
from moecover.runtime.running import Result, Within, layer_names
from moecover.runtime.weights import Weights, lean

if TYPE_CHECKING:
    import torch


PASSES = 2048  # side by side, where they can be made in parts: each takes a thread, of which a system gives so many


@dataclass(frozen=True)
class Streamed:
    """A model on ``meta`` whose parts are filled when their turn comes.

    Attributes:
        model: the model; what lies outside the parts below is in memory.
        layers: names of the decoder layers, in order.
        ends: names of the token embedding, which is there until all passes have entered the first layer, and of the
            head, which is there from the last layer on; None where they are one and stay in memory.
        weights: fills and empties them.
        device: where they run.
        spill: keep the hidden states between layers in files, where a state is kept, instead of memory.
        room: tokens whose hidden states may be held between two layers, where passes can be made in parts.
    """

    model: torch.nn.Module
    layers: tuple[str, ...]
    ends: tuple[str, str] | None
    weights: Weights
    device: torch.device
    spill: bool = False
    room: float = math.inf

    by_layer = True

    @property
    def module(self) -> torch.nn.Module:
        """See `Running`."""
        return self.model

    @property
    def dtype(self) -> torch.dtype:
        """See `Running`."""
        return next(self.model.parameters()).dtype

    def run(
        self, calls: Sequence[Callable[[], Result]], *, head: bool = True, within: Sequence[Within] = ()
    ) -> list[Result]:
        """See `Running.run`."""
        return run(self, calls, head=head, within=within)

    def at_layers(self, calls: Sequence[Callable[[], Any]], here: Here) -> Generator[list[Passing]]:
        """See `Running.at_layers`."""
        return at_layers(self, calls, here)

    def arrivals(self, calls: Sequence[Callable[[], Any]], modules: Sequence[torch.nn.Module]) -> Generator[list[Any]]:
        """See `Running.arrivals`."""
        return arrivals(self, calls, modules)

    @contextlib.contextmanager
    def loaded(self, number: int) -> Iterator[None]:
        """One decoder layer in memory until the block ends."""
        self.weights.load(f"{self.layers[number]}.")
        try:
            yield
        finally:
            self.weights.free(f"{self.layers[number]}.", again=True)


def skeleton(structure: Structure, *, dtype: str = "auto") -> torch.nn.Module:
    """The model of a checkpoint with its buffers but no memory for its parameters, in evaluation mode.

    Raises:
        InputError: its weights are quantised.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    if structure.quantised:
        raise InputError(f"{structure.checkpoint.name} is quantised ({structure.quantised}), which does not run layer by layer. Use the original that it was made from")  # fmt: skip
    register_deepseek()
    config = AutoConfig.from_pretrained(structure.checkpoint.path, trust_remote_code=False, local_files_only=True)
    if dtype == "auto":
        kind = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None) or torch.float32
    else:
        kind = getattr(torch, dtype)
    auto = auto_class(type(config))
    with init_empty_weights(include_buffers=False):
        model: torch.nn.Module = auto.from_config(config, dtype=kind)
    return model.eval()


@contextlib.contextmanager
def streamed(
    structure: Structure, *, dtype: str = "auto", device: str = "auto", spill: bool = False, room: float = math.inf
) -> Iterator[Streamed]:
    """A model that runs layer by layer; the block's end frees it.

    Args:
        structure: the checkpoint.
        dtype: torch dtype by name, ``auto`` for the checkpoint's.
        device: torch device by name.
        spill: see `Streamed`.
        room: see `Streamed`.

    Raises:
        InputError: unknown dtype or device, or tensors that are missing in the files.
    """
    import torch

    device = check_device(dtype, device)
    lean()
    model = skeleton(structure, dtype=dtype)
    layers, ends = layer_names(model, structure), _ends(model)
    weights = Weights(structure, model, (*layers, *(ends or ())), device, ahead=torch.device(device).type != "cpu")
    with contextlib.closing(weights):
        if missing := weights.missing():
            raise InputError(f"{structure.checkpoint.name}: {len(missing)} tensors are missing in the files, the first is {missing[0]}. Fetch it again")  # fmt: skip
        weights.load("")
        for owner in model.modules():  # buffers that are no weights
            owner._buffers = {k: v if v is None or v.is_meta else v.to(device) for k, v in owner._buffers.items()}
        if ends is None:
            empty = {name for name, value in model.state_dict().items() if value.is_meta}
            model.tie_weights(missing_keys=empty, recompute_mapping=False)  # type: ignore[operator]
        yield Streamed(model, layers, ends, weights, torch.device(device), spill, room)


def _ends(model: Any) -> tuple[str, str] | None:
    """Names of the token embedding and of the head; None where they are one."""
    if getattr(model, "all_tied_weights_keys", None):
        return None
    names = {id(module): name for name, module in model.named_modules()}
    return names[id(model.get_input_embeddings())], names[id(model.get_output_embeddings())]


def run(
    stream: Streamed,
    calls: Sequence[Callable[[], Any]],
    *,
    head: bool = True,
    start: int = 0,
    skipped: Callable[[int, Any], Any] = lambda layer, hidden: hidden,
    embedded: Callable[[int, Any], Any] | None = None,
    before: Callable[[Passing], None] | None = None,
    after: Callable[[Passing], Any] | None = None,
    within: Sequence[Within] = (),
) -> list[Any]:
    """Run passes side by side, one read of the weights for all of them.

    Args:
        stream: the model.
        calls: each runs the model once (or a part that begins with its decoder layers) and gives a result.
        head: whether the calls run the language-model head.
        start: the first layer that runs; the stops of ``before`` and ``after`` are counted from there on.
        skipped: gives the output of a layer before it, from its number and the hidden states that it is called with.
        embedded: called with call and output of the token embedding; what it gives takes the output's place.
        before: see `Here`.
        after: see `Here`.
        within: of every call, a context for a decoder layer, in which that layer runs; calls in a row that have the same
            one share it.

    Returns:
        The results.
    """
    modules, weights = [stream.model.get_submodule(name) for name in stream.layers], stream.weights
    around, entered = contextlib.ExitStack(), list[Within]()

    def prepared(passing: Passing) -> None:
        if within and entered != [within[passing.call]]:
            around.close()
            entered[:] = [within[passing.call]]
            around.enter_context(entered[0](start + passing.stop))
        if before is not None:
            before(passing)

    here = Here(prepared, after)
    first, last = stream.ends or (None, None)
    hooks = []
    if embedded is not None:
        inputs: Any = stream.model.get_input_embeddings()  # type: ignore[operator]
        hooks.append(inputs.register_forward_hook(lambda module, args, output: embedded(current_call(), output)))
    try:
        for number, module in enumerate(modules[:start]):
            module.forward = functools.partial(_skip, skipped, number)
        if first:
            weights.load(f"{first}.")
        steps = lockstep(calls, modules[start:], here=here)
        with around, contextlib.closing(steps):
            for number, _ in enumerate(steps, start):
                around.close()
                entered.clear()
                if number > start:
                    weights.free(f"{stream.layers[number - 1]}.", again=True)
                else:
                    weights.free(f"{first}.")
                weights.load(f"{stream.layers[number]}.")
                if number + 1 < len(modules):
                    weights.will_need(f"{stream.layers[number + 1]}.")
                elif last and head:
                    weights.load(f"{last}.")
    finally:
        for hook in hooks:
            hook.remove()
        for module in modules[:start]:
            del module.forward
        weights.free(f"{stream.layers[-1]}.")
        weights.free(f"{last}.")
    return here.results


def run_in_parts(
    stream: Streamed, calls: Sequence[Callable[[], Any]], tokens: Sequence[int], *, within: Sequence[Within]
) -> list[Any]:
    """As `run`, as many passes at a time as may be held (`Streamed.room`, `PASSES`), with one read of the weights each time.

    Args:
        stream: the model.
        calls: see `run`.
        tokens: of every call.
        within: see `run`.
    """
    results: list[Any] = []
    while (start := len(results)) < len(calls):
        end, held = start, 0
        while end < min(len(calls), start + PASSES) and (end == start or held + tokens[end] <= stream.room):
            held += tokens[end]
            end += 1
        results += run(stream, calls[start:end], within=within[start:end])
    return results


def arrivals(
    stream: Streamed, calls: Sequence[Callable[[], Any]], modules: Sequence[torch.nn.Module]
) -> Generator[list[Any]]:
    """As `lockstep` at modules inside the decoder layers, whose weights are there when the calls arrive; ends at the last.

    Args:
        stream: the model.
        calls: see `run`.
        modules: at most one a layer, in the order of the layers.
    """
    layers, weights = [stream.model.get_submodule(name) for name in stream.layers], stream.weights
    inside = {layer: next((m for m in modules if any(m is part for part in layer.modules())), None) for layer in layers}
    stops = [stop for layer in layers for stop in (layer, inside[layer]) if stop is not None]
    first, number = stream.ends[0] if stream.ends else None, -1
    try:
        weights.load(f"{first}.") if first else None
        with contextlib.closing(lockstep(calls, stops)) as steps:
            for stop, arrived in zip(stops, steps, strict=True):
                if stop in inside:
                    weights.free(f"{stream.layers[number]}." if number >= 0 else f"{first}.", again=number >= 0)
                    number += 1
                    weights.load(f"{stream.layers[number]}.")
                else:
                    yield arrived
                    if stop is modules[-1]:
                        break
    finally:
        weights.free(f"{stream.layers[number]}.")


def at_layers(stream: Streamed, calls: Sequence[Callable[[], Any]], here: Here) -> Generator[list[Passing]]:
    """At every decoder layer in turn, whose weights are there, what it is called with; it runs when the next is asked for.

    Args:
        stream: the model.
        calls: see `run`.
        here: see `lockstep`; the layers run in the caller's thread.
    """
    weights, first, reached = stream.weights, stream.ends[0] if stream.ends else "", ""
    stops = [stream.model.get_submodule(name) for name in stream.layers]
    try:
        weights.load(f"{first}.")
        with contextlib.closing(lockstep(calls, stops, here=here)) as steps:
            for name, _ in zip(stream.layers, steps, strict=True):
                weights.free(f"{reached or first}.", again=bool(reached))
                weights.load(f"{name}.")
                reached = name
                yield here.waiting
    finally:
        weights.free(f"{reached or first}.")


def _skip(skipped: Callable[[int, Any], Any], number: int, *args: Any, **kwargs: Any) -> Any:
    return skipped(number, args[0] if args else kwargs["hidden_states"])
