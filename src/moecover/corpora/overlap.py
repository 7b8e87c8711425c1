"""Whether one text holds another: reads sequences of token ids, gives a sketch of a few kilobytes, and shares of overlap.

A sketch holds the `SIZE` smallest hashes of the different runs of `RUN` tokens of a text: a sample of them that falls the same
way in every text (bottom-k; Broder 1997, "On the resemblance and containment of documents"). So a text can be held against
calibration text that is long gone.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moecover.corpora.packing import Corpus

RUN = 13  # tokens in a row that are the same: the length at which the field speaks of contamination (GPT-3, appendix C)
SIZE = 256
WORTH_SAYING = 0.01  # common phrases are in any two texts
FACTOR = np.uint64(0x9E3779B97F4A7C15)


def _hashes(tokens: NDArray[np.int64], mask: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Of all different runs within a row: uint64, sorted."""
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
        tokens: ``[sequence, position]``.
        mask: the same, True where there is a token.
    """
    return base64.b64encode(_hashes(tokens, mask)[:SIZE].astype("<u8").tobytes()).decode()


def overlap(text: Corpus, records: Iterable[dict[str, Any]]) -> float:
    """Share of a text's different runs of `RUN` tokens that calibration text holds too, an estimate from its sketches.

    Args:
        text: what is measured on.
        records: of the calibration corpora, see `Corpus.record`; those without a sketch say nothing.

    Returns:
        From 0 to 1; of several corpora the largest. Runs that fall into the sample are counted, at most all of the text's: a
        text far shorter than the calibration text has few, and an overlap of few runs may be missed.
    """
    mine = _hashes(text.tokens, text.mask)
    shares = [0.0]
    for record in records:
        theirs = np.frombuffer(base64.b64decode(record.get("sketch", "")), dtype="<u8")
        sampled = mine if len(theirs) < SIZE else mine[mine <= theirs[-1]]
        shares.append(float(np.isin(sampled, theirs).mean()) if len(sampled) and len(theirs) else 0.0)
    return max(shares)
