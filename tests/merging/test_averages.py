"""Averages of experts and the matching of their channels, on integers and against experts that run."""

from __future__ import annotations

import torch

from moecover.checkpoints.topology import ChannelAxis
from moecover.merging.averages import Average, channel_rows, matched, reordered
from moecover.merging.method import Pair
from moecover.merging.methods import MERGES

AXES = {"gate_up_proj": ChannelAxis(1, parts=2), "down_proj": ChannelAxis(2)}
CHANNELS = 5


def expert(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "gate_up_proj": torch.randn(2 * CHANNELS, 3, generator=generator),
        "down_proj": torch.randn(3, CHANNELS, generator=generator),
    }


def activated(one: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    gate, up = (hidden @ one["gate_up_proj"].T).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def test_a_channel_is_its_gate_its_up_and_its_down_weights() -> None:
    one = {"gate_up_proj": torch.arange(8.0).view(4, 2), "down_proj": torch.tensor([[10.0, 11.0], [20.0, 21.0]])}
    assert channel_rows(one, AXES, 2).tolist() == [[0, 1, 4, 5, 10, 20], [2, 3, 6, 7, 11, 21]]
    alternating = {"gate_up_proj": ChannelAxis(1, parts=2, interleaved=True), "down_proj": ChannelAxis(2)}
    assert channel_rows(one, alternating, 2).tolist() == [[0, 1, 2, 3, 10, 20], [4, 5, 6, 7, 11, 21]]


def test_every_merge_that_matches_finds_a_shuffled_copy() -> None:
    one, hidden, order = expert(1), torch.randn(50, 3, generator=torch.Generator().manual_seed(9)), [3, 0, 4, 1, 2]
    other = reordered(one, order, AXES, CHANNELS)
    assert torch.allclose(activated(other, hidden) @ other["down_proj"].T, activated(one, hidden) @ one["down_proj"].T)
    units = [torch.nn.functional.normalize(activated(x, hidden), dim=0) for x in (one, other)]
    pair = Pair(channel_rows(one, AXES, CHANNELS), channel_rows(other, AXES, CHANNELS), units[0].T @ units[1])
    matching = [merge for merge in MERGES.values() if merge.cost is not None]
    assert {merge.name for merge in matching} == {"m-smoe", "ream"}
    for merge in matching:
        assert merge.cost is not None
        back = reordered(other, matched(merge.cost(pair)), AXES, CHANNELS)
        average = Average(one, 2.0)
        average.add(back, 3.0)
        for name, value in average.values().items():
            torch.testing.assert_close(value.float(), one[name])


def test_averages_are_weighted_and_a_group_without_weight_keeps_its_centre() -> None:
    a, b = {"w": torch.tensor([4.0, 8.0])}, {"w": torch.tensor([0.0, 4.0])}
    average = Average(a, 3.0)
    average.add(b, 1.0)
    assert average.values()["w"].tolist() == [3.0, 7.0]
    idle = Average(a, 0.0)
    idle.add(b, 0.0)
    assert idle.values()["w"].tolist() == [4.0, 8.0]
