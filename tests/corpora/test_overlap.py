"""The sketch of a text: what it says of the overlap of two texts, held against sets of all runs."""

from __future__ import annotations

import numpy as np
import pytest

from moecover.corpora import overlap as overlapping
from moecover.corpora.overlap import RUN, SIZE
from moecover.corpora.packing import Corpus, make_corpus


def corpus(rows: np.ndarray, mask: np.ndarray | None = None) -> Corpus:
    return make_corpus("any", rows, np.ones(rows.shape, dtype=bool) if mask is None else mask, {})


def overlap(text: Corpus, records: list[dict[str, object]]) -> float:
    return overlapping.overlap(text.tokens, text.mask, records)


def runs(text: Corpus) -> set[tuple[int, ...]]:
    """Every run of tokens, the naive way."""
    rows = [row[keep].tolist() for row, keep in zip(text.tokens, text.mask, strict=True)]
    return {tuple(row[i : i + RUN]) for row in rows for i in range(len(row) - RUN + 1)}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_estimates_the_share_of_runs(share: float) -> None:
    random = np.random.default_rng(0)
    calibration = random.integers(0, 5000, (64, 256))
    text = random.integers(0, 5000, (40, 256))
    text[: round(share * 40)] = calibration[: round(share * 40)]
    one, two = corpus(calibration), corpus(text)
    naive = len(runs(one) & runs(two)) / len(runs(two))
    assert naive == pytest.approx(share, abs=0.01)
    error = 4 * np.sqrt(naive * (1 - naive) / SIZE)  # four standard errors of a sample of that size, nearly
    assert abs(overlap(two, [one.record]) - naive) <= 1.5 * error


def test_is_exact_for_little_calibration_text() -> None:
    random = np.random.default_rng(1)
    calibration = random.integers(0, 50, (4, 60))  # 192 runs: the sketch holds all of them
    text = random.integers(0, 50, (6, 60))
    text[2, 10:40] = calibration[1, 5:35]
    one, two = corpus(calibration), corpus(text)
    assert overlap(two, [one.record]) == pytest.approx(len(runs(one) & runs(two)) / len(runs(two)))
    assert len(runs(one) & runs(two)) == 30 - RUN + 1


def test_no_runs_across_padding_or_rows() -> None:
    ids = np.arange(2 * RUN - 2).reshape(2, RUN - 1)  # rows are one token too short to hold a run
    padded = np.pad(ids, ((0, 0), (0, 5)))
    mask = np.pad(np.ones(ids.shape, dtype=bool), ((0, 0), (0, 5)))
    assert overlap(corpus(ids), [corpus(ids).record]) == 0
    assert overlap(corpus(padded, mask), [corpus(padded).record]) == 0


def test_the_largest_of_several_and_records_without_a_sketch() -> None:
    random = np.random.default_rng(2)
    a, b = (corpus(random.integers(0, 5000, (8, 64))) for _ in range(2))
    assert overlap(a, [b.record, a.record]) == 1
    assert overlap(a, [{"source": "of an older version"}]) == 0
    assert overlap(a, []) == 0
