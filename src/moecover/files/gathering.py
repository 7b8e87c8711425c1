"""Some of the entries of a block of a file, in order: reads byte offsets, yields bytes.

Rows and columns that are scattered over a tensor are taken in memory, from stretches of the file that are read as a
whole: one system call for each of them would take longer than reading what lies between.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moecover.errors import MoecoverError

if TYPE_CHECKING:
    import io

    from numpy.typing import NDArray

BLOCK_BYTES = 8 << 20  # of the file in memory at a time
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


def contents(file: io.FileIO, part: Range) -> Iterator[memoryview]:
    """The bytes that a range stands for, a block at a time.

    Args:
        file: open for reading, without a buffer.
        part: the range.

    Raises:
        MoecoverError: the file ends before the range does.
    """
    if not isinstance(part, Gather):
        for at in range(part[0], part[1], BLOCK_BYTES):
            yield memoryview(_read(file, at, min(at + BLOCK_BYTES, part[1])))
        return
    indices = np.asarray(part.indices, dtype=np.int64)
    row = part.places * part.unit
    if row <= BLOCK_BYTES:
        step = BLOCK_BYTES // row * row
        for at in range(part.start, part.end, step):
            yield _taken(_read(file, at, min(at + step, part.end)), part.places, part.unit, indices)
        return
    for start in range(part.start, part.end, row):
        for some in _stretches(indices, max(1, BLOCK_BYTES // part.unit)):
            real = some[some >= 0]
            if not len(real):
                yield memoryview(bytes(len(some) * part.unit))
                continue
            low, high = int(real.min()), int(real.max()) + 1
            content = _read(file, start + low * part.unit, start + high * part.unit)
            yield _taken(content, high - low, part.unit, np.where(some >= 0, some - low, ZEROS))


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


def _read(file: io.FileIO, start: int, end: int) -> bytearray:
    """The bytes of a file from one position to another."""
    content = bytearray(end - start)
    view, at = memoryview(content), start
    while at < end:
        count = os.preadv(file.fileno(), [view[at - start :]], at)
        if count == 0:
            raise MoecoverError(f"{file.name} ended at byte {at}, {end} is needed: it changed while it was read")
        at += count
    return content


def _taken(content: bytearray, places: int, unit: int, indices: NDArray[np.int64]) -> memoryview:
    """The indexed entries of every row of some bytes."""
    word = next(size for size in (8, 4, 2, 1) if unit % size == 0)
    entries = np.frombuffer(content, dtype=f"u{word}").reshape(-1, places, unit // word)
    if unit == word:
        found = entries[:, :, 0].take(np.maximum(indices, 0), axis=1)
    else:
        found = entries.take(np.maximum(indices, 0), axis=1)
    found[:, indices == ZEROS] = 0
    return memoryview(found.tobytes())
