"""Where the channels of quantised experts lie on disk: reads names, types and shapes, gives axes with their blocks.

A weight ``[out, in]`` and its scales have one entry for every block of rows and columns. Rows of gate and up projection
and columns of the down projection are channels, so channels stay or go by the block. That holds where every entry
belongs to consecutive rows or columns; what packs them in another order is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from moecover.checkpoints.config_edit import quantisation_settings
from moecover.checkpoints.header import DTYPE_BITS, TensorEntry
from moecover.checkpoints.names import Destination, kind_of
from moecover.checkpoints.source import Checkpoint
from moecover.checkpoints.topology import ChannelAxis, ExpertTensor

if TYPE_CHECKING:
    import torch

ONE_SCALE = "fp8"  # a scale may serve any number of rows or columns
CONSECUTIVE = (ONE_SCALE, "mxfp4", "modelopt")  # methods whose entries belong to consecutive rows and columns
SCALES = ("_scale_inv", "_scale", "_scale_2", "_scales")  # behind the name of a weight, or of its parameter
DATA = ("", "_blocks")
WAY_OUT = "cut the original that it was made from, then quantise"
Destinations = Mapping[str, Destination]
State = Mapping[str, "torch.Tensor"]


class NoWidthError(Exception):
    """The experts' width cannot be changed; the message says why."""


class Blocks:
    """How a quantised checkpoint stores weights in blocks.

    Args:
        checkpoint: the files.

    Raises:
        NoWidthError: its method packs channels in an order of its own, or config.json declares none.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._method = checkpoint.declared_quantisation
        if self._method not in CONSECUTIVE:
            how = self._method or "a type that config.json does not declare"
            raise NoWidthError(
                f"its experts are quantised ({how}), which keeps channels in an order of its own: {WAY_OUT}"
            )
        size = (quantisation_settings(checkpoint.config) or {}).get("weight_block_size")
        self._size: int | None = None  # rows and columns of a block, where the settings name them
        if isinstance(size, list) and size:
            if size != [size[0]] * len(size) or type(size[0]) is not int or size[0] < 1:
                raise NoWidthError(f"its blocks of {size} are not square: {WAY_OUT}")
            self._size = size[0]

    def axis(
        self, entry: TensorEntry, axis: int, channels: int, live: ChannelAxis, *, data: bool
    ) -> ChannelAxis | None:
        """The channel axis of a tensor; None where its entries serve all channels.

        Args:
            entry: the tensor.
            axis: of the channels, that of the experts counted.
            channels: along the axis, in each part.
            live: parts of the axis, and whether they alternate.
            data: whether it is the weight itself, not its scales.

        Raises:
            NoWidthError: its entries do not stand for equal blocks of channels.
        """
        if len(entry.shape) <= axis:
            return None
        if entry.dtype[0] == "I" or DTYPE_BITS[entry.dtype] < 8:
            raise NoWidthError(f"{entry.name} packs channels in {entry.dtype}: {WAY_OUT}")
        count, length = entry.shape[axis], live.parts * channels
        if count == 1 and not data and self._method == ONE_SCALE and channels <= (self._size or channels):
            return None
        group = length // count if count else 0
        expected = 1 if data or count == length else self._size  # rows of fp8 blocks may not fill the last one
        fits = group and count * group == length and channels % group == 0
        if not fits or (group != expected and self._method == ONE_SCALE) or (group > 1 and live.interleaved):
            raise NoWidthError(
                f"{entry.name} of shape {list(entry.shape)} holds {channels} channels in unequal blocks: {WAY_OUT}"
            )
        return ChannelAxis(axis, live.parts, live.interleaved, group)

    def serves(self, length: int) -> bool:
        """Whether one scale still serves so many channels."""
        return self._size is None or length <= self._size


def _weight_of(name: str, destinations: Destinations, state: State) -> tuple[str, bool] | None:
    """The parameter that a tensor fills or scales, and whether it fills it; None for none."""
    target = destinations[name].parameter
    for end in (*DATA, *SCALES):
        if name.endswith(end):
            stem = name.removesuffix(end)
            found = destinations[stem].parameter if stem in destinations else target.removesuffix(end)
            if found in state:
                return found, end in DATA
    return None


def packed_tensors(
    checkpoint: Checkpoint,
    rows: Mapping[str, ExpertTensor],
    destinations: Destinations,
    state: State,
    parameters: Mapping[str, ChannelAxis],
    channels: int,
) -> dict[str, ChannelAxis]:
    """The channel axis of quantised experts' tensors on disk, by kind.

    Args:
        checkpoint: the files.
        rows: the expert-dependent tensors.
        destinations: of all tensors.
        state: the model's parameters, by name.
        parameters: the channel axis of the experts' parameters.
        channels: of an expert.

    Raises:
        NoWidthError: a tensor in another form.
    """
    blocks, found = Blocks(checkpoint), dict[str, ChannelAxis]()
    routed = {name: row for name, row in rows.items() if row.routed}
    owners = {name: _weight_of(name, destinations, state) for name in routed}
    stems: dict[str, set[str]] = {}  # by parameter: the weights on disk that fill it, experts aside
    for name, owner in owners.items():
        if owner is not None and owner[1]:
            stems.setdefault(owner[0], set()).add(kind_of(name))
    for name, row in routed.items():
        entry, owner = checkpoint.tensors[name], owners[name]
        if owner is None and math.prod(entry.shape[0 if row.axis is None else 1 :]) == 1:
            continue  # one number for the whole projection
        if owner is None or row.axis not in (None, 0):
            raise NoWidthError(f"the channels of {name} cannot be told from its name: {WAY_OUT}")
        target, data = owner
        if target not in parameters or math.prod(entry.shape) <= 1:
            continue
        live, first = parameters[target], 0 if row.axis is None else 1
        parts = live.parts // len(stems[target])
        place = first + (1 if target.rpartition(".")[2] == "down_proj" else 0)
        along = ChannelAxis(place, parts, live.interleaved and parts == 2)
        axis = blocks.axis(entry, place, channels, along, data=data)
        if axis is not None and found.setdefault(kind_of(name), axis) != axis:
            raise NoWidthError(f"{name} is stored in another way than in other layers")
    if not found:
        raise NoWidthError("nothing in the files holds its experts' channels")
    return found


def packed_shared(
    checkpoint: Checkpoint,
    destinations: Destinations,
    state: State,
    around: Mapping[str, ChannelAxis],
    length: int,
) -> dict[str, ChannelAxis]:
    """The channel axis of a shared expert's tensors on disk, by kind, some of which may be quantised.

    Args:
        checkpoint: the files.
        destinations: of all tensors.
        state: the model's parameters, by name.
        around: the channel axis of the shared expert's parameters.
        length: channels of all shared experts.

    Raises:
        NoWidthError: a tensor in another form, or a scale that would have to become two.
    """
    blocks, found = Blocks(checkpoint), dict[str, ChannelAxis]()
    for name in destinations:
        owner = _weight_of(name, destinations, state)
        if owner is None or owner[0] not in around:
            continue
        entry = checkpoint.tensors[name]
        axis = blocks.axis(entry, around[owner[0]].axis, length, ChannelAxis(0), data=owner[1])
        if axis is not None:
            found[kind_of(name)] = axis
        elif len(entry.shape) > 1 and not blocks.serves(2 * length):  # padding adds less than as many again
            raise NoWidthError(f"{name} is one scale, padding of the shared expert may need two: {WAY_OUT}")
    return found
