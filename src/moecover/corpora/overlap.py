"""Overlap of two texts: reads sequences of token ids, returns a sketch of a few kilobytes and shares of common n-grams.

A sketch holds the `SIZE` smallest hashes of the distinct `RUN`-grams of a text, a sample that is consistent across
texts (bottom-k; Broder 1997, "On the resemblance and containment of documents"). So a text can be compared with
calibration text that is no longer there.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

RUN = 13  # equal tokens in a row that count as contamination (GPT-3, appendix C)
SIZE = 256
WORTH_SAYING = 0.01  # common phrases are in any two texts
FACTOR = np.uint64(0x9E3779B97F4A7C15)


def _hashes(tokens: NDArray[np.int64], mask: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Hashes of all distinct runs within rows: uint64, sorted."""
    found = []
    for row, keep in zip(tokens, mask, strict=True):
        ids = row[keep].astype(np.uint64)
        if len(ids) < RUN:
            continue
        value = np.zeros(len(ids) - RUN + 1, dtype=np.uint64)
        for i in range(RUN):
            value = (value + ids[i : len(ids) - RUN + 1 + i] + np.uint64(1)) * FACTOR
            value ^= value >> np.uint64(29)
        found.append(value)
    return np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.uint64)


def sketch(tokens: NDArray[np.int64], mask: NDArray[np.bool_]) -> str:
    """The sketch of a text, base64 of little-endian uint64.

    Args:
        tokens: int64 ``[sequence, position]``.
        mask: bool of the same shape, True where there is a token.
    """
    return base64.b64encode(_hashes(tokens, mask)[:SIZE].astype("<u8").tobytes()).decode()


def overlap(tokens: NDArray[np.int64], mask: NDArray[np.bool_], records: Iterable[Mapping[str, object]]) -> float:
    """Estimate the share of a text's distinct runs of `RUN` tokens that calibration text holds too, from its sketches.

    Args:
        tokens: of the text, int64 ``[sequence, position]``.
        mask: bool of the same shape, True where there is a token.
        records: of the calibration corpora, see `Corpus.record`; those without a sketch are skipped.

    Returns:
        From 0 to 1; of several corpora the largest. The estimate rests on the text's runs that fall into a sketch's
        sample: a text far shorter than the calibration text has few of them, and a small overlap may be missed.
    """
    mine = _hashes(tokens, mask)
    shares = [0.0]
    for record in records:
        theirs = np.frombuffer(base64.b64decode(str(record.get("sketch", ""))), dtype="<u8")
        sampled = mine if len(theirs) < SIZE else mine[mine <= theirs[-1]]
        shares.append(float(np.isin(sampled, theirs).mean()) if len(sampled) and len(theirs) else 0.0)
    return max(shares)
