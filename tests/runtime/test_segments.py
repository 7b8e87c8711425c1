"""Sums by segment: those of a loop, to the last bit, whatever the order of the segments."""

from __future__ import annotations

import pytest
import torch

from moecover.runtime.segments import segment_sums


@pytest.mark.parametrize("columns", [(), (1,), (5,)])
@pytest.mark.parametrize("rows", [0, 1, 500])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_sums_are_those_of_a_loop(columns: tuple[int, ...], rows: int, started: bool, ordered: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    values = torch.randn(rows, *columns, generator=generator, dtype=torch.float64) * 1e3
    segments = torch.randint(0, 7, (rows,), generator=generator)
    segments = segments.sort().values if ordered else segments
    start = torch.randn(9, *columns, generator=generator, dtype=torch.float64) if started else None
    expected = torch.zeros(9, *columns, dtype=torch.float64) if start is None else start.clone()
    for row, segment in zip(values, segments.tolist(), strict=True):
        expected[segment] += row
    assert torch.equal(segment_sums(values, segments, 9, start=start), expected)
    assert torch.equal((start if started else torch.zeros_like(expected)).index_add(0, segments, values), expected)
