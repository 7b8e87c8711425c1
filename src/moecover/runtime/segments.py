"""Sums of rows by segment, in a fixed order: reads values and the segment of each, gives one sum a segment.

`index_add_` adds in whatever order a GPU's threads arrive, so that the same pass gives other last bits. Here the rows
of a segment are added in their own order: on a CPU to the last bit what `index_add_` gives there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def segment_sums(
    values: torch.Tensor, segments: torch.Tensor, number: int, *, start: torch.Tensor | None = None
) -> torch.Tensor:
    """Add up the rows of every segment.

    Args:
        values: ``[row, ...]``, float.
        segments: of every row, int64 ``[row]``.
        number: of segments.
        start: what every sum begins with, ``[segment, ...]``; zero by default.

    Returns:
        ``[segment, ...]`` in the dtype of ``values``.
    """
    import torch

    order = torch.argsort(segments, stable=True)
    lengths = torch.bincount(segments, minlength=number)
    rows, sorted_segments = values[order], segments[order]
    if start is not None:  # the first row of its segment
        whole = rows.new_empty(len(rows) + number, *rows.shape[1:])
        first = torch.arange(number, device=segments.device)
        whole[torch.arange(len(rows), device=segments.device) + sorted_segments + 1] = rows
        whole[first + lengths.cumsum(0) - lengths] = start
        rows, lengths = whole, lengths + 1
    if not len(rows):
        return values.new_zeros(number, *values.shape[1:])
    return torch.segment_reduce(rows, "sum", lengths=lengths, axis=0, initial=0)
