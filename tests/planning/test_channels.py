"""Which channels stay: by the mean energy a token, by turns with their guarantee, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecover.errors import InputError
from moecover.planning.artifact import Plan, kept_hash, kept_sets
from moecover.planning.channel_sets import packed, unpacked
from moecover.planning.channels import choose_channels
from moecover.planning.run import plan, plan_budgets
from moecover.planning.shapes import resolve_shape
from tests.support.profiles import profile_with_channels

RNG = np.random.default_rng(0)
WIDTH = 24


def made(**options):
    """Two corpora of unequal length, 2 layers, 6 experts, 24 channels."""
    energies = {name: RNG.random((2, 6, WIDTH)) ** 4 for name in ("a", "b")}
    return profile_with_channels(energies, **options)


def test_the_highest_mean_energy_a_token_stays() -> None:
    profile = made(tokens={"a": 100, "b": 900})
    found = plan(profile, keep=3, width=8)
    for layer, row in enumerate(found.layers):
        for expert, ids in zip(row.kept, row.channels, strict=True):
            mean = profile.channels["a"][layer, expert] / 100 + profile.channels["b"][layer, expert] / 900
            assert ids == sorted(sorted(range(WIDTH), key=lambda c: -mean[c])[:8])
    assert found.width == 8


@given(protect=st.floats(0, 1), width=st.sampled_from([8, 16]), seed=st.integers(0, 5))
def test_a_corpus_keeps_as_many_of_its_best_as_it_had_turns(protect: float, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    energies = {name: rng.random((1, 3, WIDTH)) for name in ("a", "b", "c")}
    found = choose_channels(profile_with_channels(energies), 0, [0, 2], width, protect=protect)
    turns = int(protect * width + 0.5)
    for expert, ids in zip([0, 2], found, strict=True):
        assert len(set(ids)) == width
        for number, name in enumerate(energies):
            own = len(range(number, turns, 3))
            best = np.argsort(-energies[name][0, expert], kind="stable")[:own]
            assert set(best.tolist()) <= set(ids)


def test_a_corpus_without_weight_has_no_say() -> None:
    profile = made()
    alone = profile_with_channels({"a": profile.channels["a"]})
    one = choose_channels(profile, 1, [4], 8, protect=0.5, weights={"b": 0})
    assert one == choose_channels(alone, 1, [4], 8)


def test_experts_that_nothing_used_keep_their_first_channels() -> None:
    profile = profile_with_channels({"a": np.zeros((1, 4, WIDTH))})
    assert choose_channels(profile, 0, [1], 8, protect=1.0) == [[*range(8)]]


def test_the_file_holds_them_compactly_and_a_plan_by_hand_may_list_them(tmp_path: Path) -> None:
    found = plan(made(), keep=3, width=16)
    assert Plan.load(found.save(tmp_path / "plan.json")) == found
    written = json.loads((tmp_path / "plan.json").read_text())
    assert all(len(text) == WIDTH // 4 for row in written["layers"] for text in row["channels"])
    layers = [{"decoder_layer": 0, "kept": [0, 3], "channels": [[1, 2], [0, 5]]}]
    by_hand = Plan.from_json(json.dumps({"keep": 2, "width": 2, "layers": layers}))
    assert by_hand.channels == [[[1, 2], [0, 5]]]
    for wrong in ([[2, 1], [0, 5]], [[-1, 2], [0, 5]], ["zz", [0, 5]], [[1, 1], [0, 5]]):
        layers[0]["channels"] = wrong
        with pytest.raises(InputError, match="no valid plan"):
            Plan.from_json(json.dumps({"keep": 2, "width": 2, "layers": layers}))


@given(st.sets(st.integers(0, 200), min_size=1))
def test_sets_survive_as_text(ids: set[int]) -> None:
    assert unpacked(packed(sorted(ids))) == sorted(ids)


@pytest.mark.parametrize(
    "asked, says",
    [
        ({"keep": 3, "width": 12}, "no multiple of 8.*Near: width=8 or 16"),
        ({"keep": 3, "width": 32}, "out of range: 1 to the 24 channels"),
        ({"keep": 3, "width": 8, "retain_width": 0.5}, "exactly one of width"),
        ({"keep": 3, "retain_width": 1.5}, "out of range"),
        ({"width_multiple_of": 8, "keep": 3}, "no use here"),
        ({"keep": 3, "width": 8, "width_multiple_of": 64}, "no width up to 24"),
    ],
)
def test_widths_that_cannot_be(asked: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        resolve_shape(made().topology, WIDTH, **asked)


def test_shapes_from_either_axis_alone() -> None:
    topology = made().topology
    assert resolve_shape(topology, WIDTH, width=8) == resolve_shape(topology, WIDTH, keep=6, width=8)
    assert resolve_shape(topology, WIDTH, keep=3).width is None
    assert resolve_shape(topology, WIDTH, keep=3, retain_width=1.0).width is None
    assert resolve_shape(topology, WIDTH, keep=3, retain_width=0.6).width == 16
    assert resolve_shape(topology, 20, keep=3, retain_width=0.99).width is None, "all channels, though no multiple of 8"


def test_a_profile_without_energies_plans_whole_experts_and_says_so_otherwise() -> None:
    profile = made()
    profile.channels.clear()
    assert plan(profile, keep=3).width is None
    with pytest.raises(InputError, match="needs the energies of channels"):
        plan_budgets(profile, keeps=[3], widths=[8])
    with pytest.raises(InputError, match="protect_channels=0.5 has no use here"):
        plan(profile, keep=3, protect_channels=0.5)


def test_plans_that_differ_in_channels_alone_are_different_checkpoints() -> None:
    """What an interrupted `prune` resumes by, and what ties a measurement to a plan, know the channels."""
    one = plan(made(), keep=3, width=8)
    other, whole = one.model_copy(deep=True), one.model_copy(deep=True)
    spare = next(c for c in range(WIDTH) if c not in one.layers[1].channels[2])
    other.layers[1].channels[2] = sorted([spare, *one.layers[1].channels[2][1:]])
    whole.width = None
    for row in whole.layers:
        row.channels = []
    assert one.kept == other.kept == whole.kept
    assert len({kept_hash(one), kept_hash(other), kept_hash(whole)}) == 3
    assert kept_sets(one) != kept_sets(other)


def test_groups_stay_or_go_by_the_sum_of_their_energies() -> None:
    profile = made(tokens={"a": 100, "b": 900})
    found = plan(profile, keep=3, width=16, channel_groups=8)
    for layer, row in enumerate(found.layers):
        for expert, ids in zip(row.kept, row.channels, strict=True):
            mean = profile.channels["a"][layer, expert] / 100 + profile.channels["b"][layer, expert] / 900
            first, second = sorted(sorted(range(3), key=lambda g: -mean[8 * g : 8 * g + 8].sum())[:2])
            assert ids == [*range(8 * first, 8 * first + 8), *range(8 * second, 8 * second + 8)]
    assert found.options["channel_groups"] == 8
    turns = choose_channels(profile, 0, [0], 16, protect=1.0, group=8)[0]
    assert {profile.channels[c][0, 0].reshape(3, 8).sum(1).argmax() for c in "ab"} <= {i // 8 for i in turns}


@pytest.mark.parametrize(
    "asked, says",
    [
        ({"width": 8, "channel_groups": 16}, "width=8 of 24 channels are no whole groups of 16"),
        ({"width": 16, "channel_groups": 0}, "out of range: 1 or more"),
        ({"channel_groups": 8}, "no use here: all channels are kept"),
    ],
)
def test_groups_that_cannot_be(asked: dict[str, int], says: str) -> None:
    width = asked.get("width")
    with pytest.raises(InputError, match=says):
        plan_budgets(made(), keeps=[3], widths=[width], channel_groups=asked["channel_groups"])


def test_widths_are_rounded_to_whole_groups() -> None:
    topology = made().topology
    assert resolve_shape(topology, 96, keep=3, width=40, channel_groups=32).width == 32
    assert resolve_shape(topology, 96, keep=3, retain_width=0.6, channel_groups=32).width == 64
