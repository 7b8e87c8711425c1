"""The shapes of equal bytes: which there are, and what is refused."""

from __future__ import annotations

import itertools

import pytest

from moecover.checkpoints.topology import Topology
from moecover.errors import InputError
from moecover.planning.curve import curve, parse_shape, parse_share, spread, within_share
from moecover.planning.shapes import Shape

QWEN = Topology("qwen2_moe", tuple(range(24)), 60, 4, 2048, 24)
GROUPED = Topology("deepseek_v3", (0, 1), 16, 4, 64, 2, num_groups=4, top_groups=2)


def test_every_width_has_the_most_experts_that_fit() -> None:
    found = curve(QWEN, 64, within_share(QWEN, 64, 0.25))
    assert found == [
        Shape(15),
        Shape(17, 56),
        Shape(20, 48),
        Shape(24, 40),
        Shape(30, 32),
        Shape(40, 24),
        Shape(60, 16),
    ]
    assert [str(one) for one in found[-1:]] == ["60 experts x 16 channels"]
    for shape in found:
        width = shape.width or 64
        assert shape.keep * width <= 0.25 * 60 * 64 < (shape.keep + 1) * width or shape.keep == 60


def test_groups_and_multiples_hold() -> None:
    for shape in curve(GROUPED, 64, within_share(GROUPED, 64, 0.5)):
        assert shape.keep % 4 == 0
    found = curve(QWEN, 1408, within_share(QWEN, 1408, 0.5), multiple_of=8, width_multiple_of=128)
    assert found[0] == Shape(24), "1408 channels are 11 x 128"
    assert all(shape.keep % 8 == 0 and (shape.width or 1408) % 128 == 0 for shape in found)


def test_a_budget_that_leaves_too_few_whole_experts_leaves_thin_ones() -> None:
    found = curve(QWEN, 64, within_share(QWEN, 64, 0.05))
    assert found[0] == Shape(4, 48)
    with pytest.raises(InputError, match="the budget leaves no shape"):
        curve(QWEN, 64, within_share(QWEN, 64, 0.001))


@pytest.mark.parametrize("text, share", [("50%", 0.5), ("0.5", 0.5), (".25", 0.25), (" 12.5 % ", 0.125)])
def test_shares(text: str, share: float) -> None:
    assert parse_share(text, "budget") == share


@pytest.mark.parametrize("text", ["100%", "0", "50", "half", "-1", "1", "50%%", "nan"])
def test_no_shares(text: str) -> None:
    with pytest.raises(InputError, match="give a share of the routed bytes"):
        parse_share(text, "budget")


def test_shapes_by_name() -> None:
    assert parse_shape("auto", QWEN, 64) == "auto"
    assert parse_shape("30x32", QWEN, 64) == Shape(30, 32)
    assert parse_shape("15x64", QWEN, 64) == Shape(15)
    for text, channels, says in (
        ("30x30", 64, "no multiple of 8"),
        ("61x32", 64, "above the 60 experts"),
        ("30", 64, "give auto, experts"),
        ("30x32", None, "cannot be changed"),
    ):
        with pytest.raises(InputError, match=says):
            parse_shape(text, QWEN, channels)


def test_the_first_shapes_are_spread_over_the_curve() -> None:
    shapes = curve(QWEN, 1408, within_share(QWEN, 1408, 0.25))
    at = spread(shapes, 1408, 5)
    assert at[0] == 0
    assert at[-1] == len(shapes) - 1
    widths = [shapes[i].width or 1408 for i in at]
    ratios = [a / b for a, b in itertools.pairwise(widths)]
    assert max(ratios) / min(ratios) < 1.1
    assert spread(shapes[:2], 1408, 5) == [0, 1]
