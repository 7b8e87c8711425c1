"""Reductions of many rows through a buffer: reads float rows, gives norms, peaks, and weighted sums of squares.

The rows go through a buffer that stays in the cache and is allocated once: on a CPU this halves the cost of recording.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


Buffers = dict[tuple[int, str], "torch.Tensor"]  # scratch memory by width and device


def scratch(buffers: Buffers, width: int, device: torch.device) -> torch.Tensor:
    """The buffer for rows of a width, float32 ``[chunk, width]``; made when it is first asked for."""
    import torch

    if (key := (width, str(device))) not in buffers:
        rows = 512 if device.type == "cpu" else 16384
        buffers[key] = torch.empty(rows, width, dtype=torch.float32, device=device)
    return buffers[key]


def norms_and_peaks(outputs: torch.Tensor, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Euclidean norm and largest absolute component of every row; NaN and infinity show in the peaks.

    Args:
        outputs: ``[row, hidden]``.
        buffer: float32 ``[chunk, hidden]``.

    Returns:
        Norms and peaks, float32 ``[row]`` each.
    """
    import torch

    norms, peaks = torch.empty(2, len(outputs), dtype=torch.float32, device=outputs.device)
    for start in range(0, len(outputs), len(buffer)):
        chunk = outputs[start : start + len(buffer)]
        values = buffer[: len(chunk)].copy_(chunk).abs_()
        torch.linalg.vector_norm(values, dim=-1, out=norms[start : start + len(chunk)])
        torch.amax(values, -1, out=peaks[start : start + len(chunk)])
    return norms, peaks


def weighted_squares(
    values: torch.Tensor,
    factors: torch.Tensor,
    segments: torch.Tensor,
    number: int,
    buffer: torch.Tensor,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of factor^2 value^2 over the rows of every segment, column by column, in the dtype of the buffer.

    Args:
        values: ``[row, column]``.
        factors: of the rows, ``[row]``.
        segments: of the rows, ascending int64 ``[row]``.
        number: of segments.
        buffer: float32 or float64 ``[chunk, column]``.
        keep: bool ``[row]``, False for rows that do not count, whatever they hold; None where all count.

    Returns:
        ``[segment, column]``. An overflow may make other segments infinite or NaN too.
    """
    add = _one_by_one if values.device.type == "cpu" else _at_once
    squared = factors.to(buffer.dtype).square()
    sums = buffer.new_zeros(number, values.shape[1])
    for start in range(0, len(values), len(buffer)):
        rows = slice(start, start + len(buffer))
        squares = buffer[: len(values[rows])].copy_(values[rows]).square_()
        if keep is not None:
            squares.masked_fill_(~keep[rows, None], 0)
        add(sums, squares, squared[rows], segments[rows])
    return sums


def _one_by_one(sums: torch.Tensor, squares: torch.Tensor, weights: torch.Tensor, segments: torch.Tensor) -> None:
    """Add weighted rows to the sums of their segments: a product of matrix and vector each, as a CPU is quickest."""
    import torch

    found, lengths = torch.unique_consecutive(segments, return_counts=True)
    start = 0
    for segment, length in zip(found.tolist(), lengths.tolist(), strict=True):
        rows = slice(start, start + length)
        sums[segment].addmv_(squares[rows].T, weights[rows])
        start += length


def _at_once(sums: torch.Tensor, squares: torch.Tensor, weights: torch.Tensor, segments: torch.Tensor) -> None:
    """The same in one matrix product, as a GPU is quickest."""
    placed = weights.new_zeros(len(sums), len(weights)).scatter_(0, segments[None], weights[None])
    sums.addmm_(placed, squares)
