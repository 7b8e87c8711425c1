"""Some of the entries of a block of a file, in order: reads byte offsets, yields bytes.

Rows and columns that are scattered over a tensor are taken in memory, from stretches of the file that are read as a
whole: one system call for each of them would take longer than reading what lies between. Long runs of neighbours, as in
blocks of quantised weights, are ranges instead (`as_ranges`), which the kernel copies.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moecover.errors import MoecoverError

if TYPE_CHECKING:
    import io

    from numpy.typing import NDArray

BLOCK_BYTES = 8 << 20  # of the file in memory at a time
LONG_BYTES = 64 << 10  # of a run of neighbours whose copying is worth a system call
ZEROS = -1  # an index that stands for an entry of zeros


@dataclass(frozen=True)
class Gather:
    """Some of the entries of every row of a block of a file.

    Attributes:
        start: where the block begins.
        end: where it ends.
        places: entries in a row.
        unit: bytes of an entry.
        indices: entries that are taken of every row, in order; `ZEROS` for one of zeros.
    """

    start: int
    end: int
    places: int
    unit: int
    indices: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows in the block."""
        return (self.end - self.start) // (self.places * self.unit)

    @property
    def num_bytes(self) -> int:
        """Bytes that are taken."""
        return self.rows * len(self.indices) * self.unit


Range = tuple[int, int] | Gather  # start and end of bytes that are taken as a whole, or entries of a block


def num_bytes(part: Range) -> int:
    """Bytes that a range stands for."""
    return part.num_bytes if isinstance(part, Gather) else part[1] - part[0]


def as_ranges(part: Range) -> Sequence[Range]:
    """The same bytes as ranges that are taken as a whole, where entries lie in long runs; else the range itself."""
    if not isinstance(part, Gather) or part.rows != 1 or ZEROS in part.indices:
        return [part]
    indices = np.asarray(part.indices, dtype=np.int64)
    ends = [*(np.flatnonzero(indices[1:] - indices[:-1] != 1) + 1).tolist(), len(indices)]
    if part.num_bytes < LONG_BYTES * len(ends):
        return [part]
    firsts = indices[[0, *ends[:-1]]].tolist()
    starts = [part.start + first * part.unit for first in firsts]
    return [
        (start, start + (end - before) * part.unit)
        for start, before, end in zip(starts, [0, *ends], ends, strict=False)
    ]


class Scratch:
    """Memory that one block after another is read and taken in: new memory for each would have to be cleared first."""

    def __init__(self) -> None:
        self._read = self._taken = np.empty(0, np.uint8)

    def to_read(self, size: int) -> NDArray[np.uint8]:
        """Room for so many bytes of a file."""
        if len(self._read) < size:
            self._read = np.empty(size, np.uint8)
        return self._read[:size]

    def to_take(self, size: int) -> NDArray[np.uint8]:
        """Room for so many bytes of what is taken of them."""
        if len(self._taken) < size:
            self._taken = np.empty(size, np.uint8)
        return self._taken[:size]


def contents(file: io.FileIO, part: Range, scratch: Scratch | None = None) -> Iterator[memoryview]:
    """The bytes that a range stands for, a block at a time.

    Args:
        file: open for reading, without a buffer.
        part: the range.
        scratch: memory for a `Gather`; the bytes of a block are then valid until the next one. None for new memory.

    Raises:
        MoecoverError: the file ends before the range does.
    """
    if not isinstance(part, Gather):
        for at in range(part[0], part[1], BLOCK_BYTES):
            end = min(at + BLOCK_BYTES, part[1])
            yield _read(file, at, np.empty(end - at, np.uint8)).data
        return
    indices = np.asarray(part.indices, dtype=np.int64)
    row = part.places * part.unit
    if row <= BLOCK_BYTES:
        step = BLOCK_BYTES // row * row
        for at in range(part.start, part.end, step):
            room, size = scratch or Scratch(), min(step, part.end - at)
            yield _taken(_read(file, at, room.to_read(size)), part.places, part.unit, indices, room)
        return
    for start in range(part.start, part.end, row):
        for some in _stretches(indices, max(1, BLOCK_BYTES // part.unit)):
            real = some[some >= 0]
            if not len(real):
                yield memoryview(bytes(len(some) * part.unit))
                continue
            low, high = int(real.min()), int(real.max()) + 1
            room = scratch or Scratch()
            content = _read(file, start + low * part.unit, room.to_read((high - low) * part.unit))
            yield _taken(content, high - low, part.unit, np.where(some >= 0, some - low, ZEROS), room)


def _stretches(indices: NDArray[np.int64], most: int) -> Iterable[NDArray[np.int64]]:
    """Consecutive indices, as many as lie in a stretch of so many entries."""
    at = 0
    while at < len(indices):
        stop, low, high = at, (1 << 62), -1
        while stop < len(indices):
            index = int(indices[stop])
            if index >= 0:
                low, high = min(low, index), max(high, index)
            if high - low >= most:
                break
            stop += 1
        yield indices[at : max(stop, at + 1)]
        at = max(stop, at + 1)


def _read(file: io.FileIO, start: int, room: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The bytes of a file from some position on, in the memory that is given for them."""
    view, at, end = room.data, 0, len(room)
    while at < end:
        count = os.preadv(file.fileno(), [view[at:]], start + at)
        if count == 0:
            raise MoecoverError(
                f"{file.name} ended at byte {start + at}, {start + end} is needed: it changed while it was read"
            )
        at += count
    return room


def _taken(content: NDArray[np.uint8], places: int, unit: int, indices: NDArray[np.int64], room: Scratch) -> memoryview:
    """The indexed entries of every row of some bytes."""
    entries = content.view(f"V{unit}").reshape(-1, places)
    bytes_taken = room.to_take(len(entries) * len(indices) * unit)
    found = bytes_taken.view(entries.dtype).reshape(len(entries), len(indices))
    entries.take(indices, axis=1, out=found, mode="clip")  # with checks of the indices, `take` copies once more
    if (zeros := indices == ZEROS).any():
        found[:, zeros] = np.zeros((), entries.dtype)
    return bytes_taken.data
