"""Rows of about equal bytes, of which one at least is a file: what is compared where budgets say nothing."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from moecover.comparison.cells import FILE
from moecover.comparison.measures import MeasuredCell

ALIKE = 0.85  # of the larger one's bytes, that the smaller one has at least
Runs = list[MeasuredCell]


def alike(cells: Sequence[MeasuredCell], label: str | None) -> Iterator[tuple[Runs, Runs]]:
    """Every file with those files after it, and those budgets of a method, that take about its bytes.

    Args:
        cells: of one model.
        label: of the method, without a shape; None for none.

    Yields:
        The runs of two rows, first those of the file.
    """
    files = [[c] for c in cells if c.method == FILE]
    groups: dict[tuple[object, ...], Runs] = {}
    for c in cells:
        if c.method != FILE and c.variant == label:
            groups.setdefault((c.retain, c.calibration, c.shape), []).append(c)
    for number, file in enumerate(files):
        for other in (*files[number + 1 :], *groups.values()):
            small, large = sorted(map(mean_bytes, (file, other)))
            if small >= ALIKE * large:
                yield file, other


def mean_bytes(runs: Sequence[MeasuredCell]) -> float:
    """Bytes of the weights of a row; experts of mixed precision differ, so its runs may too."""
    return statistics.fmean(c.num_bytes for c in runs)
