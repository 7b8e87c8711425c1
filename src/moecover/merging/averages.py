"""Experts as rows of channels: matched one to one, reordered, averaged. Tensors in, tensors out.

An expert is its tensors by parameter; an axis of channels (`ChannelAxis`) counts the axis of experts, which a single
expert's tensor does not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moecover.checkpoints.pieces import channel_positions

if TYPE_CHECKING:
    import torch

    from moecover.checkpoints.topology import ChannelAxis

Expert = Mapping[str, "torch.Tensor"]


def channel_rows(expert: Expert, axes: Mapping[str, ChannelAxis], channels: int) -> torch.Tensor:
    """All weights of every channel, float32 ``[channel, number]``.

    Args:
        expert: its tensors by parameter.
        axes: of the channels, by parameter; parameters without one are left out.
        channels: their number.
    """
    import torch

    found = []
    for name, axis in axes.items():
        rows = expert[name].movedim(axis.axis - 1, 0).flatten(1).float()
        parts = rows.view(channels, axis.parts, -1) if axis.interleaved else rows.view(axis.parts, channels, -1)
        found.append((parts if axis.interleaved else parts.movedim(0, 1)).flatten(1))
    return torch.cat(found, dim=1)


def matched(cost: torch.Tensor) -> list[int]:
    """The second expert's channel for every channel of the first, at the least cost in all."""
    from scipy.optimize import linear_sum_assignment

    found: list[int] = linear_sum_assignment(cost.double().cpu().numpy())[1].tolist()
    return found


def reordered(
    expert: Expert, order: Sequence[int], axes: Mapping[str, ChannelAxis], channels: int
) -> dict[str, torch.Tensor]:
    """The same expert with its channels in another order: it computes the same.

    Args:
        expert: its tensors by parameter.
        order: channel by its new place.
        axes: of the channels, by parameter; the others stay.
        channels: their number.
    """
    import torch

    found = dict(expert)
    for name, axis in axes.items():
        at = torch.tensor(channel_positions(order, axis, channels), device=expert[name].device)
        found[name] = expert[name].index_select(axis.axis - 1, at)
    return found


class Average:
    """The weighted average of experts, added up in float64, one at a time.

    Args:
        first: whose values are the average where all weights are 0.
    """

    def __init__(self, first: Expert, weight: float) -> None:
        self._first, self._weight = first, weight
        self._sums = {name: value.double() * weight for name, value in first.items()}

    def add(self, expert: Expert, weight: float) -> None:
        """Add an expert."""
        self._weight += weight
        for name, value in expert.items():
            self._sums[name].add_(value.double(), alpha=weight)

    def values(self) -> dict[str, torch.Tensor]:
        """The average, float64 by parameter."""
        if not self._weight > 0:
            return {name: value.double() for name, value in self._first.items()}
        return {name: value / self._weight for name, value in self._sums.items()}
