"""What remains of every tensor on disk when experts are removed: byte ranges of the source's shards, by output shard.

Reads names, shapes and offsets only; `pruning.writer` copies the ranges.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Never

from moecover.checkpoints.header import TensorEntry
from moecover.checkpoints.structure import Structure
from moecover.checkpoints.topology import ExpertTensor

NOTHING: Mapping[str, Never] = MappingProxyType({})


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
    ranges: tuple[tuple[int, int], ...]
    file: Path | None = None

    @property
    def num_bytes(self) -> int:
        """Its size in the output."""
        return sum(end - start for start, end in self.ranges)


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


def piece(entry: TensorEntry, tensor: ExpertTensor | None, kept: list[int]) -> Piece | None:
    """What remains of one tensor on disk; None if nothing does.

    Args:
        entry: the tensor.
        tensor: how it depends on the experts, None if it does not.
        kept: ids of its layer's kept experts, ascending.
    """
    whole = ((entry.start, entry.end),)
    if tensor is None:
        return Piece(entry.name, entry.dtype, entry.shape, whole)
    if tensor.axis is None:
        if tensor.expert not in kept:
            return None
        return Piece(renamed(entry.name, kept.index(tensor.expert)), entry.dtype, entry.shape, whole)
    places = entry.shape[tensor.axis]
    remaining = [*kept, *range(places - tensor.tail, places)]
    shape = (*entry.shape[: tensor.axis], len(remaining), *entry.shape[tensor.axis + 1 :])
    return Piece(entry.name, entry.dtype, shape, _slices(entry, tensor.axis, remaining))


def pieces_by_shard(
    structure: Structure, kept: Sequence[Sequence[int]], *, mtp: str = "drop", others: Mapping[str, Piece] = NOTHING
) -> dict[str, list[Piece]]:
    """The tensors of every output shard, in the order of the source's bytes; empty shards are left out.

    Args:
        structure: the source.
        kept: ids of the kept experts of every MoE layer, ascending.
        mtp: `drop` leaves out multi-token-prediction layers with experts of their own, `prune` cuts them.
        others: tensors of the output that are taken from elsewhere, by name.
    """
    shards: dict[str, list[Piece]] = {}
    for name, entry in structure.checkpoint.tensors.items():
        if mtp == "drop" and name in structure.mtp:
            continue
        tensor = structure.tensors.get(name) or structure.mtp.get(name)
        remaining = piece(entry, tensor, list(kept[tensor.layer]) if tensor else [])
        if remaining is not None:
            shards.setdefault(entry.shard, []).append(others.get(remaining.name, remaining))
    return shards


def coalesced(pieces: Iterable[Piece]) -> Iterator[tuple[int, int]]:
    """The byte ranges of consecutive pieces of one file; adjacent ranges are merged."""
    current: tuple[int, int] | None = None
    for start, end in (r for p in pieces for r in p.ranges):
        if current is not None and current[1] == start:
            current = (current[0], end)
            continue
        if current is not None:
            yield current
        current = (start, end)
    if current is not None:
        yield current
