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
from moecover.weights import Weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Streamed:
    """A model on ``meta`` whose decoder layers are filled when their turn comes.

    Attributes:
        model: the model; everything outside its decoder layers is in memory.
        layers: names of the decoder layers, in order.
        weights: fills and empties them.
        device: where they run.
    """

    model: torch.nn.Module
    layers: tuple[str, ...]
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
    model = skeleton(structure, dtype=dtype)
    layers = layer_names(model, structure)
    weights = Weights(structure, model, layers, device)
    with contextlib.closing(weights):
        weights.load("")
        for buffer_owner in model.modules():  # buffers that are no weights
            for name, buffer in buffer_owner._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    buffer_owner._buffers[name] = buffer.to(device)
        model.tie_weights()  # type: ignore[operator]
        inside = tuple(f"{layer}." for layer in layers)
        missing = sorted(k for k, v in model.state_dict().items() if v.is_meta and not k.startswith(inside))
        if missing:
            raise InputError(f"{structure.checkpoint.name}: {len(missing)} tensors are missing in the files, the first is {missing[0]}. Fetch it again")  # fmt: skip
        yield Streamed(model, layers, weights, torch.device(device))


def run(
    stream: Streamed,
    calls: Sequence[Callable[[], Any]],
    *,
    before: Callable[[int, int], None] | None = None,
    after: Callable[[int, int], None] | None = None,
) -> list[Any]:
    """Run passes side by side, one read of the weights for all of them.

    Args:
        stream: the model.
        calls: each runs the model once (or a part that begins with its decoder layers) and gives a result.
        before: called with layer and call when a call is about to enter a decoder layer.
        after: called with layer and call when a decoder layer is done with a call.

    Returns:
        The results.
    """
    stops = [stream.model.get_submodule(name) for name in stream.layers]
    results: list[Any] = []
    with contextlib.closing(lockstep(calls, stops, results=results, before=before, after=after)) as steps:
        for number, _ in enumerate(steps):
            if number:
                stream.weights.free(f"{stream.layers[number - 1]}.")
            stream.weights.load(f"{stream.layers[number]}.")
            if number + 1 < len(stops):
                stream.weights.will_need(f"{stream.layers[number + 1]}.")
    stream.weights.free(f"{stream.layers[-1]}.")
    return results
