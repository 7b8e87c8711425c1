"""Sets of channel ids in plan.json: a string of hexadecimal digits for each kept expert, one bit a channel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def packed(ids: Sequence[int]) -> str:
    """A set of ids as hexadecimal digits: the highest bit of the first digit is id 0."""
    bits = np.zeros(-(-(max(ids, default=-1) + 1) // 8) * 8, dtype=np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits).tobytes().hex()


def as_ids(text: str) -> list[int]:
    """The ids, ascending, that `packed` wrote.

    Raises:
        ValueError: it is something else.
        TypeError: it is no text.
    """
    bits = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    return [int(i) for i in np.flatnonzero(np.unpackbits(bits))]


def unpacked(value: object) -> object:
    """The ids, ascending, that `packed` wrote; a list, as a plan by hand has it, is returned as it is.

    Raises:
        ValueError: a string of something else.
    """
    return as_ids(value) if isinstance(value, str) else value
