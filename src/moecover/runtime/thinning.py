"""A live MoE layer whose experts have fewer channels: its parameters are cut to the kept ones until a block ends.

What is computed is what the checkpoint of a plan with a width computes: the same products of the same shapes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from moecover.checkpoints.names import kind_of
from moecover.checkpoints.pieces import channel_positions
from moecover.checkpoints.structure import Structure
from moecover.errors import InputError, arg

if TYPE_CHECKING:
    import torch

    from moecover.checkpoints.topology import ChannelAxis


@contextlib.contextmanager
def thinned_layer(
    model: torch.nn.Module, structure: Structure, layer: int, kept: Sequence[int], channels: Sequence[Sequence[int]]
) -> Iterator[None]:
    """Cut the kept experts of one MoE layer to some of their channels, until the block ends.

    The other experts' parameters are zeros meanwhile: mask them. A shared expert whose width config.json gives in
    widths of an expert gets channels of zeros, as in the checkpoint.

    Args:
        model: the live model, with the weights of the layer in memory.
        structure: its checkpoint, which has a width.
        layer: index of the MoE layer.
        kept: ids of the kept experts, ascending.
        channels: of each of these, ids of the kept channels, ascending; as many of each.

    Raises:
        InputError: the weights are 8-bit in memory, with scales beside them.
    """
    width = structure.width
    assert not isinstance(width, str)
    module = structure.experts_modules[layer]
    block = module.rpartition(".")[0] + "."
    padding = width.padding(len(channels[0]))
    with contextlib.ExitStack() as undo:
        for name, parameter in model.get_submodule(module).named_parameters():
            axis = width.parameters.get(kind_of(f"{module}.{name}"))
            if axis is not None:
                if parameter.element_size() == 1:
                    raise InputError(
                        f"{structure.checkpoint.name} runs in 8 bits on this device, where its experts cannot be made "
                        f"thinner in memory. Give {arg('device', 'cpu')}"
                    )
                cut = _cut(parameter, axis, kept, channels, width.channels)
                undo.enter_context(_replaced(model, f"{module}.{name}", cut))
        for name, parameter in model.get_submodule(block[:-1]).named_parameters():
            axis = width.shared_parameters.get(kind_of(f"{block}{name}")) if padding else None
            if axis is not None:
                undo.enter_context(_replaced(model, f"{block}{name}", _padded(parameter, axis.axis, padding)))
        yield


def _cut(
    parameter: torch.Tensor,
    axis: ChannelAxis,
    kept: Sequence[int],
    channels: Sequence[Sequence[int]],
    total: int,
) -> torch.Tensor:
    """A parameter ``[expert, ...]`` with the kept channels of the kept experts, and zeros for the others."""
    import torch

    source = parameter.detach()
    places = [channel_positions(ids, axis, total) for ids in channels]
    shape = [*source.shape]
    shape[axis.axis] = len(places[0])
    found = source.new_zeros(shape)
    for expert, ids in zip(kept, places, strict=True):
        at = torch.tensor(ids, device=source.device)
        torch.index_select(source[expert], axis.axis - 1, at, out=found[expert])
    return found


def _padded(parameter: torch.Tensor, axis: int, padding: int) -> torch.Tensor:
    """A parameter with entries of zeros at the end of an axis."""
    import torch

    shape = [*parameter.shape]
    shape[axis] = padding
    return torch.cat([parameter.detach(), parameter.new_zeros(shape)], axis)


@contextlib.contextmanager
def _replaced(model: torch.nn.Module, name: str, value: torch.Tensor) -> Iterator[None]:
    """Put a tensor in the place of a parameter, until the block ends."""
    import torch

    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    whole = owner._parameters[leaf]
    owner._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    try:
        yield
    finally:
        owner._parameters[leaf] = whole
