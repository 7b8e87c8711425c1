"""What remains of every tensor on disk when experts are removed: byte ranges of the source's shards, by output shard.

Reads names, shapes and offsets only; `pruning.writer` copies the ranges.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Never

from moecover.checkpoints.header import TensorEntry
from moecover.checkpoints.names import kind_of, mtp_number, suffix_of, twin_of
from moecover.checkpoints.structure import Structure
from moecover.checkpoints.topology import ChannelAxis, ExpertTensor, Width
from moecover.files.gathering import ZEROS, Gather, Range, num_bytes

NOTHING: Mapping[str, Never] = MappingProxyType({})
Channels = Sequence[Sequence[Sequence[int]]]  # [layer][kept expert] to the ids of its channels that stay


@dataclass(frozen=True)
class Thin:
    """Which channels of the kept experts stay.

    Attributes:
        width: the channels of the source.
        channels: by MoE layer and kept expert, in order, ids ascending; as many everywhere.
    """

    width: Width
    channels: Channels

    @property
    def padding(self) -> int:
        """Channels of zeros that the shared expert gets, for the configuration counts in experts' widths."""
        return self.width.padding(len(self.channels[0][0]))

    def axis_of(self, name: str, tensor: ExpertTensor | None) -> ChannelAxis | None:
        """The channel axis of a tensor on disk; None where it has none, or where none of it goes."""
        if tensor is not None:
            return self.width.tensors.get(kind_of(name)) if tensor.routed else None
        return self.width.shared_tensors.get(kind_of(name)) if self.padding else None


def thinning(structure: Structure, channels: Channels | None) -> Thin | None:
    """Which channels stay, for a checkpoint that has an axis of them; None where all do."""
    if channels is None or isinstance(structure.width, str):
        return None
    return Thin(structure.width, channels)


def uncut_mtp(structure: Structure) -> str | None:
    """A tensor of multi-token-prediction layers whose channels are not stored as in other layers; None if none is."""
    width = structure.width
    assert not isinstance(width, str)
    known = {suffix_of(kind_of(name)) for name, row in structure.tensors.items() if row.routed}
    for name, row in structure.mtp.items():
        kind, shape = kind_of(name), structure.checkpoint.tensors[name].shape
        if row is not None and row.routed and twin_of(name, known) is None:
            return name
        for axes, length in (width.tensors, width.channels), (width.shared_tensors, width.shared * width.channels):
            axis = axes.get(kind)
            if axis is not None and shape[axis.axis : axis.axis + 1] != (axis.parts * length // axis.group,):
                return name
    return None


@dataclass(frozen=True)
class Piece:
    """One tensor of the output.

    Attributes:
        name: its name in the output.
        dtype: its type.
        shape: its shape in the output.
        ranges: the byte ranges that it consists of, in order.
        file: the file of these ranges; None for the tensor's source shard.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    ranges: tuple[Range, ...]
    file: Path | None = None

    @property
    def num_bytes(self) -> int:
        """Its size in the output."""
        return sum(map(num_bytes, self.ranges))


def renamed(name: str, new_expert: int) -> str:
    """The name of an expert's tensor with another expert id."""
    return re.sub(r"(\.experts\.)\d+(\.)", rf"\g<1>{new_expert}\2", name, count=1)


def _slices(entry: TensorEntry, axis: int, kept: list[int]) -> tuple[tuple[int, int], ...]:
    """Byte ranges of the kept indices along one axis of a contiguous tensor."""
    outer = math.prod(entry.shape[:axis])
    stride = entry.num_bytes // (outer * entry.shape[axis])
    return tuple(
        (start := entry.start + (o * entry.shape[axis] + index) * stride, start + stride)
        for o in range(outer)
        for index in kept
    )


def channel_positions(ids: Sequence[int], axis: ChannelAxis, channels: int) -> tuple[int, ...]:
    """Positions of channels along their axis, those of all parts; of blocks of channels where these share an entry."""
    if axis.group > 1:
        ids, channels = [channel // axis.group for channel in ids[:: axis.group]], channels // axis.group
    if axis.parts == 1:
        return tuple(ids)
    if axis.interleaved:
        return tuple(channel * axis.parts + part for channel in ids for part in range(axis.parts))
    return tuple(part * channels + channel for part in range(axis.parts) for channel in ids)


def _thin(
    entry: TensorEntry, axis: int, blocks: Sequence[tuple[int, tuple[int, ...]]], count: int, together: int = 1
) -> list[Gather]:
    """Entries along an axis of a tensor that consists of equal blocks, one an expert, or of one.

    Args:
        entry: the tensor.
        axis: along which entries are taken.
        blocks: index of a block, and the entries that are taken of it.
        count: number of blocks in the tensor.
        together: places of the axis that are one entry.
    """
    size, places = entry.num_bytes // count, entry.shape[axis] // together
    unit = entry.num_bytes // (math.prod(entry.shape[:axis]) * places)
    return [Gather(entry.start + i * size, entry.start + (i + 1) * size, places, unit, ids) for i, ids in blocks]


def piece(
    entry: TensorEntry,
    tensor: ExpertTensor | None,
    kept: list[int],
    *,
    thin: Thin | None = None,
) -> Piece | None:
    """What remains of one tensor on disk; None if nothing does.

    Args:
        entry: the tensor.
        tensor: how it depends on the experts, None if it does not.
        kept: ids of its layer's kept experts, ascending.
        thin: which channels of these stay; None for all.
    """
    whole = ((entry.start, entry.end),)
    axis = thin.axis_of(entry.name, tensor) if thin is not None else None
    if tensor is None:
        if thin is None or axis is None:
            return Piece(entry.name, entry.dtype, entry.shape, whole)
        ids = (*range(entry.shape[axis.axis]), *[ZEROS] * (thin.padding // axis.group))
        return _thinned(entry, entry.name, axis.axis, _thin(entry, axis.axis, [(0, ids)], 1), len(ids))
    if tensor.axis is None:
        if tensor.expert not in kept:
            return None
        place = kept.index(tensor.expert)
        name = renamed(entry.name, place)
        if thin is None or axis is None:
            return Piece(name, entry.dtype, entry.shape, whole)
        ids = channel_positions(thin.channels[tensor.layer][place], axis, thin.width.channels)
        return _thinned(entry, name, axis.axis, _thin(entry, axis.axis, [(0, ids)], 1), len(ids))
    places = entry.shape[tensor.axis]
    remaining = [*kept, *range(places - tensor.tail, places)]
    shape = (*entry.shape[: tensor.axis], len(remaining), *entry.shape[tensor.axis + 1 :])
    if thin is None or axis is None:
        return Piece(entry.name, entry.dtype, shape, _slices(entry, tensor.axis, remaining))
    blocks = [
        (expert, channel_positions(ids, axis, thin.width.channels))
        for expert, ids in zip(kept, thin.channels[tensor.layer], strict=True)
    ]
    # GGUF gives shapes in numbers even where several are stored together, safetensors in what is stored.
    together = entry.shape[axis.axis] * axis.group // (axis.parts * thin.width.channels)
    gathers = _thin(entry, axis.axis, blocks, places, together)
    cut = _thinned(entry, entry.name, axis.axis, gathers, len(blocks[0][1]) * together)
    return replace(cut, shape=(len(kept), *cut.shape[1:]))


def _thinned(entry: TensorEntry, name: str, axis: int, gathers: Sequence[Gather], length: int) -> Piece:
    """A tensor of which some entries along an axis remain."""
    shape = (*entry.shape[:axis], length, *entry.shape[axis + 1 :])
    return Piece(name, entry.dtype, shape, tuple(gathers))


def _mtp_rows(structure: Structure, rows: int) -> Mapping[str, ExpertTensor | None]:
    """The rows of the tensors of multi-token-prediction layers, which point to a layer's own ids where it has some.

    Args:
        structure: the source.
        rows: of how many layers there are ids.
    """
    total, layers = structure.topology.num_layers, len(structure.topology.decoder_layers)
    if rows == layers:
        return structure.mtp
    place = {number: layers + i for i, number in enumerate(structure.mtp_layers)}
    return {
        name: row and replace(row, layer=place[total + mtp_number(name, total)]) for name, row in structure.mtp.items()
    }


def pieces_by_shard(
    structure: Structure,
    kept: Sequence[Sequence[int]],
    *,
    channels: Channels | None = None,
    mtp: str = "drop",
    others: Mapping[str, Piece] = NOTHING,
) -> dict[str, list[Piece]]:
    """The tensors of every output shard, in the order of the source's bytes; empty shards are left out.

    Args:
        structure: the source.
        kept: ids of the kept experts of every MoE layer, ascending; then of every multi-token-prediction layer, unless
            these share the last MoE layer's.
        channels: of these, in order, the ids of the kept channels, ascending; None for all.
        mtp: `drop` leaves out multi-token-prediction layers with experts of their own, `prune` cuts them.
        others: tensors of the output that are taken from elsewhere, by name.
    """
    shards: dict[str, list[Piece]] = {}
    thin, of_mtp = thinning(structure, channels), _mtp_rows(structure, len(kept))
    for name, entry in structure.checkpoint.tensors.items():
        if mtp == "drop" and name in structure.mtp:
            continue
        tensor = structure.tensors.get(name) or of_mtp.get(name)
        remaining = piece(entry, tensor, list(kept[tensor.layer]) if tensor else [], thin=thin)
        if remaining is not None:
            shards.setdefault(entry.shard, []).append(others.get(remaining.name, remaining))
    return shards


def coalesced(pieces: Iterable[Piece]) -> Iterator[Range]:
    """The byte ranges of consecutive pieces of one file; adjacent ranges are merged."""
    current: tuple[int, int] | None = None
    for part in (r for p in pieces for r in p.ranges):
        if isinstance(part, Gather):
            if current is not None:
                yield current
            current = None
            yield part
            continue
        start, end = part
        if current is not None and current[1] == start:
            current = (current[0], end)
            continue
        if current is not None:
            yield current
        current = (start, end)
    if current is not None:
        yield current
