"""A model whose decoder layers are in memory one at a time: reads a checkpoint, runs every batch through layer after layer.

The pass is the model's own, every batch in a thread that stops before each layer (`lockstep`); there the next layer's
weights are read and the last one's are freed. So the weights are read once, whatever the number of batches, and masks,
positions and what else a family hands from layer to layer stay what they are in a plain pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moecover.errors import InputError
from moecover.lockstep import lockstep
from moecover.model import check_device
from moecover.topology import Structure, auto_class
from moecover.weights import Weights, one_arena

if TYPE_CHECKING:
    import torch


Within = Callable[[int], contextlib.AbstractContextManager[None]]


def unmasked(number: int) -> contextlib.AbstractContextManager[None]:
    """Nothing around a decoder layer."""
    return contextlib.nullcontext()


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
    """

    model: torch.nn.Module
    layers: tuple[str, ...]
    ends: tuple[str, str] | None
    weights: Weights
    device: torch.device


def layer_names(model: torch.nn.Module, structure: Structure) -> tuple[str, ...]:
    """Names of all decoder layers, dense ones included: the list that holds the layers with experts."""
    parts = structure.experts_modules[0].split(".")
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    stack = ".".join(parts[:number])
    return tuple(f"{stack}.{name}" for name, _ in model.get_submodule(stack).named_children())


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
def streamed(structure: Structure, *, dtype: str = "auto", device: str = "auto") -> Iterator[Streamed]:
    """A model that runs layer by layer; the block's end frees it.

    Args:
        structure: the checkpoint.
        dtype: torch dtype by name, ``auto`` for the checkpoint's.
        device: torch device by name.

    Raises:
        InputError: unknown dtype or device, or tensors that are missing in the files.
    """
    import torch

    device = check_device(dtype, device)
    one_arena()
    model = skeleton(structure, dtype=dtype)
    layers, ends = layer_names(model, structure), _ends(model)
    weights = Weights(structure, model, (*layers, *(ends or ())), device)
    with contextlib.closing(weights):
        if missing := weights.missing():
            raise InputError(f"{structure.checkpoint.name}: {len(missing)} tensors are missing in the files, the first is {missing[0]}. Fetch it again")  # fmt: skip
        weights.load("")
        for owner in model.modules():  # buffers that are no weights
            owner._buffers = {k: v if v is None or v.is_meta else v.to(device) for k, v in owner._buffers.items()}
        if ends is None:
            empty = {name for name, value in model.state_dict().items() if value.is_meta}
            model.tie_weights(missing_keys=empty, recompute_mapping=False)  # type: ignore[operator]
        yield Streamed(model, layers, ends, weights, torch.device(device))


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
    before: Callable[[int, int], None] | None = None,
    after: Callable[[int, int], None] | None = None,
    within: Within = unmasked,
) -> list[Any]:
    """Run passes side by side, one read of the weights for all of them.

    Args:
        stream: the model.
        calls: each runs the model once (or a part that begins with its decoder layers) and gives a result.
        head: whether the calls run the language-model head.
        before: called with layer and call when a call is about to enter a decoder layer.
        after: called with layer and call when a decoder layer is done with a call.
        within: a context for a decoder layer, entered when its weights are there and left before they go.

    Returns:
        The results.
    """
    stops, weights = [stream.model.get_submodule(name) for name in stream.layers], stream.weights
    results: list[Any] = []
    first, last = stream.ends or (None, None)
    try:
        if first:
            weights.load(f"{first}.")
        steps = lockstep(calls, stops, results=results, before=before, after=after)
        with contextlib.ExitStack() as around, contextlib.closing(steps):
            for number, _ in enumerate(steps):
                around.close()
                if number:
                    weights.free(f"{stream.layers[number - 1]}.", again=True)
                else:
                    weights.free(f"{first}.")
                weights.load(f"{stream.layers[number]}.")
                around.enter_context(within(number))
                if number + 1 < len(stops):
                    weights.will_need(f"{stream.layers[number + 1]}.")
                elif last and head:
                    weights.load(f"{last}.")
    finally:
        weights.free(f"{stream.layers[-1]}.")
        weights.free(f"{last}.")
    return results


def run_all(model: Any, calls: Sequence[Callable[[], Any]], *, within: Within = unmasked) -> list[Any]:
    """The results of passes, one after the other through a model in memory, side by side through a `Streamed` one.

    Args:
        model: a model or a `Streamed`.
        calls: each runs that model once.
        within: of a streamed model, see `run`.
    """
    import torch

    if isinstance(model, Streamed):
        return run(model, calls, within=within)
    with torch.inference_mode():
        return [call() for call in calls]
