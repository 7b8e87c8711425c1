"""Saliencies against naive loops and hand-checked integers; TB-Coverage's guarantee as properties; plans as files."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moecover.checkpoints.structure import Structure
from moecover.checkpoints.topology import Topology
from moecover.errors import InputError
from moecover.planning.artifact import Plan, keep_all
from moecover.planning.fitting import check_plan
from moecover.planning.keep import resolve_keep
from moecover.planning.methods import METHODS
from moecover.planning.run import plan, plan_budgets
from moecover.planning.saliency import SALIENCIES
from moecover.planning.selection import Room, cover, ranked
from moecover.planning.super_experts import super_experts
from moecover.profiling.artifact import Profile
from moecover.profiling.statistics import STATISTICS
from tests.conftest import hand_plan

# ------------------------------------------------------------------------------------------------------- saliencies
# One layer, two experts, k = 2. Outputs are 3-4-5 and 5-12-13 vectors, so that every norm is an integer.
ROUTED = [  # (expert, weight, sum of the token's weights, output)
    (0, 0.5, 1.0, (3.0, 4.0)),
    (0, 0.25, 0.5, (5.0, 12.0)),
    (1, 0.5, 1.0, (6.0, 8.0)),
]
TOKENS = 4


def statistics_of(
    routed: list[tuple[int, float, float, tuple[float, ...]]], tokens: int, experts: int
) -> dict[str, np.ndarray]:
    s = {name: np.zeros((1, experts)) for name in STATISTICS}
    s["num_tokens"][:] = tokens
    for e, g, total, y in routed:
        norm = math.hypot(*y)
        for name, value in {
            "count": 1,
            "weight_sum": g,
            "norm_sum": norm,
            "weighted_norm_sum": g * norm,
            "weighted_sq_sum": (g * norm) ** 2,
            "renorm_weighted_norm_sum": g / total * norm,
            "norm_sq_sum": norm**2,
            "change_norm_sum": g * norm * 0.5,
            "prob_sum": g,
        }.items():
            s[name][0, e] += value
        s["max_abs"][0, e] = max(s["max_abs"][0, e], max(map(abs, y)))
    return s


@pytest.mark.parametrize(
    "name, expected",
    [
        ("frequency", [2, 1, 0]),
        ("router-weight", [0.75, 0.5, 0]),
        ("ean", [5 + 13, 10, 0]),
        ("ean-mean", [9, 10, 0]),
        ("msan", [(25 + 169) / 2, 100, 0]),
        ("router-probability", [0.75 / 4, 0.5 / 4, 0]),
        ("easy-ep", [(0.5 * 5 + 0.25 * 13) / 2, 0.5 * 10 / 2, 0]),
        ("reap", [(0.5 * 5 + 0.5 * 13) / 2, 0.5 * 10, 0]),
        ("reap-raw", [(0.5 * 5 + 0.25 * 13) / 2, 0.5 * 10, 0]),
        ("contribution", [(0.5 * 5 + 0.25 * 13) / 4, 0.5 * 10 / 4, 0]),
    ],
)
def test_saliency_by_hand(name: str, expected: list[float]) -> None:
    assert SALIENCIES[name](statistics_of(ROUTED, TOKENS, 3))[0].tolist() == expected


def test_the_hand_cases_cover_every_saliency() -> None:
    cases = {mark.args[1][i][0] for mark in test_saliency_by_hand.pytestmark for i in range(len(mark.args[1]))}
    assert cases == set(SALIENCIES)


# ------------------------------------------------------------------------------------------------------ tb-coverage
utilities = st.integers(1, 5).flatmap(
    lambda corpora: st.integers(1, 16).flatmap(
        lambda experts: st.tuples(
            # Few distinct values, zeros among them: ties and never-routed experts are the rule.
            st.lists(
                st.lists(st.sampled_from([0.0, 0.0, 0.125, 0.5, 1.0, 3.0, 7.5]), min_size=experts, max_size=experts),
                min_size=corpora,
                max_size=corpora,
            ),
            st.integers(1, experts),
            st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
        )
    )
)


def naive_cover(utility, keep, protect, *, groups=1, required=(), weights=None):
    """The rule in plain Python, one decision at a time."""
    weights = weights or [1] * len(utility)
    shares = [[u / sum(row) if sum(row) > 0 else 0.0 for u in row] for row in utility]
    experts, protected, chosen = range(len(utility[0])), [[] for _ in utility], sorted(required)
    size = len(experts) // groups

    def fits(e: int) -> bool:
        return e not in chosen and sum(c // size == e // size for c in chosen) < keep // groups

    whose = [c for c, w in enumerate(weights) for _ in range(w)]
    turns = min(math.floor(protect * keep + 0.5), keep - len(chosen))
    for turn in range(turns):
        row = shares[whose[turn % len(whose)]]
        used = [e for e in experts if fits(e) and row[e] > 0]
        if used:  # else the corpus protects nothing more, and nobody takes its turn
            best = max(used, key=lambda e: (row[e], -e))
            protected[whose[turn % len(whose)]].append(best)
            chosen.append(best)
    filled = []
    while len(chosen) < keep:
        mean = np.average(np.array(shares), axis=0, weights=weights)
        best = max((e for e in experts if fits(e)), key=lambda e: (mean[e], -e))
        filled.append(best)
        chosen.append(best)
    return protected, filled


def best_used(utility, number: int) -> set[int]:
    """The best experts of a corpus, without those that it does not use."""
    return {e for e in ranked(np.array(utility))[:number].tolist() if utility[e] > 0}


def covered(utility, keep: int, protect: float, **room) -> tuple[list[list[int]], list[int]]:
    array, weights = np.array(utility), room.pop("weights", None)
    if "groups" in room:
        room["num_groups"] = room.pop("groups")
    return cover(array, Room(keep, array.shape[1], **room), math.floor(protect * keep + 0.5), weights)


@given(utilities)
@settings(max_examples=400, deadline=None)
def test_cover_equals_the_rule_in_plain_python(case) -> None:
    utility, keep, protect = case
    assert covered(utility, keep, protect) == naive_cover(utility, keep, protect)


@pytest.mark.parametrize(
    "utility, keep, protect, protected, filled",
    [
        ([[0, 0, 0, 2, 0, 1], [1, 2, 3, 4, 5, 6]], 4, 1.0, [[3], [5, 4]], [2]),  # 5 is protected by the other already
        ([[0, 0, 0, 2, 0, 1], [0, 0, 0, 1, 0, 2]], 4, 0.5, [[3], [5]], [0, 1]),
        ([[0, 0, 0, 2, 0, 1]], 4, 1.0, [[3, 5]], [0, 1]),
        ([[0, 0, 0, 0]], 2, 1.0, [[]], [0, 1]),
    ],
)
def test_no_corpus_protects_experts_that_it_does_not_use(utility, keep, protect, protected, filled) -> None:
    assert covered([[float(u) for u in row] for row in utility], keep, protect) == (protected, filled)


@given(utilities, st.data())
@settings(max_examples=300, deadline=None)
def test_cover_with_groups_required_experts_and_weights(case, data) -> None:
    utility, _, protect = case
    utility = [row + row[::-1] + row for row in utility]  # three groups
    size = len(utility[0]) // 3
    share = data.draw(st.integers(1, size))
    required = [g * size + e for g in range(3) for e in data.draw(st.sets(st.integers(0, size - 1), max_size=share))]
    weights = data.draw(st.lists(st.integers(0, 3), min_size=len(utility), max_size=len(utility)).filter(any))
    case = {"groups": 3, "required": required, "weights": weights}
    protected, filled = covered(utility, 3 * share, protect, **case)
    assert (protected, filled) == naive_cover(utility, 3 * share, protect, **case)
    kept = {*required, *(e for row in protected for e in row), *filled}
    assert [len([e for e in kept if e // size == g]) for g in range(3)] == [share] * 3


@given(utilities)
@settings(max_examples=400, deadline=None)
def test_cover_keeps_its_guarantee(case) -> None:
    utility, keep, protect = case
    array = np.array(utility)
    protected, filled = covered(array, keep, protect)
    kept = [*(e for row in protected for e in row), *filled]
    assert len(kept) == len(set(kept)) == keep
    assert all(0 <= e < array.shape[1] for e in kept)
    guaranteed = math.floor(protect * keep + 0.5) // len(utility)
    for row in array:
        assert best_used(row, guaranteed) <= set(kept)


@given(utilities, st.data())
@settings(max_examples=200, deadline=None)
def test_with_weights_a_corpus_keeps_as_many_as_it_had_turns(case, data) -> None:
    utility, keep, protect = case
    weights = data.draw(st.lists(st.integers(1, 3), min_size=len(utility), max_size=len(utility)))
    protected, filled = covered(utility, keep, protect, weights=weights)
    kept = {*(e for row in protected for e in row), *filled}
    for row, mine in zip(utility, protected, strict=True):
        assert set(ranked(np.array(row))[: len(mine)].tolist()) <= kept
    rounds = math.floor(protect * keep + 0.5) // sum(weights)
    for row, mine, weight in zip(utility, protected, weights, strict=True):
        assert best_used(row, rounds * weight) <= kept
        assert len(mine) <= (rounds + 1) * weight


@given(utilities, st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_permuting_corpora_keeps_the_guarantee(case, random) -> None:
    utility, keep, protect = case
    shuffled = random.sample(utility, len(utility))
    protected, filled = covered(shuffled, keep, protect)
    kept = {*(e for row in protected for e in row), *filled}
    guaranteed = math.floor(protect * keep + 0.5) // len(utility)
    for row in utility:
        assert best_used(row, guaranteed) <= kept


@given(st.integers(1, 5), st.integers(1, 12), st.data())
@settings(max_examples=200, deadline=None)
def test_permuting_experts_permutes_the_choice(corpora: int, experts: int, data) -> None:
    """Without ties; with ties the lower id wins, which is the one thing that ids decide."""
    values = data.draw(st.permutations([2.0**i for i in range(corpora * experts)]))
    utility = np.array(values).reshape(corpora, experts)
    assume(len(set((utility / utility.sum(1, keepdims=True)).mean(0))) == experts)  # rounding makes ties of its own
    keep = data.draw(st.integers(1, experts))
    permutation = np.array(data.draw(st.permutations(range(experts))))
    protected, filled = covered(utility, keep, 0.5)
    moved_protected, moved_filled = covered(utility[:, permutation], keep, 0.5)
    assert [[permutation[e] for e in row] for row in moved_protected] == protected
    assert sorted(permutation[e] for e in moved_filled) == sorted(filled)


def test_ties_go_to_the_lower_id() -> None:
    assert covered(np.ones((2, 6)), 4, 0.5) == ([[0], [1]], [2, 3])
    assert covered(np.zeros((1, 5)), 2, 1.0) == ([[]], [0, 1])
    assert ranked(np.array([1.0, 3.0, 3.0, 0.0, 1.0])).tolist() == [1, 2, 0, 4, 3]


def test_a_corpus_that_speaks_louder_gets_no_more() -> None:
    """Utilities are scaled per corpus: a hundredfold norm in one corpus changes nothing."""
    utility = np.array([[4.0, 3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0, 5.0]])
    assert covered(utility, 3, 0.5) == covered(utility * np.array([[100.0], [1.0]]), 3, 0.5)


def test_required_experts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="3 super experts do not fit into keep=2"):
        Room(2, 6, required=[0, 1, 2])
    with pytest.raises(InputError, match="do not fit"):
        Room(2, 6, num_groups=2, required=[0, 1])


# ------------------------------------------------------------------------------------------------------------ plans
@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].from_profile])  # those have files of their own
def test_every_method_is_deterministic_and_keeps_exactly_k(small_profile: Profile, method: str) -> None:
    topology = small_profile.topology
    for keep in range(topology.top_k, topology.num_experts + 1):
        made = plan(small_profile, method=method, keep=keep)
        counts = [len(layer.kept) for layer in made.layers]
        assert sum(counts) == keep * len(topology.decoder_layers)
        assert METHODS[method].unequal or set(counts) == {keep}
        assert tuple(layer.decoder_layer for layer in made.layers) == topology.decoder_layers
        assert made.to_json() == plan(small_profile, method=method, keep=keep).to_json()
    assert made.mask(topology.num_experts).all()


def test_plan_survives_the_file_and_its_bytes_are_the_same(small_profile: Profile, tmp_path: Path) -> None:
    small_profile.save(tmp_path)
    options = {"saliency": "reap", "protect": 0.75, "keep": small_profile.topology.num_experts - 1}
    one = plan(small_profile, **options).save(tmp_path / "1.json")
    two = plan(Profile.load(tmp_path), **options).save(tmp_path / "2.json")
    assert one.read_bytes() == two.read_bytes()
    assert Plan.load(one) == plan(small_profile, **options)
    raw = json.loads(one.read_text())
    assert raw["schema"] == 1
    assert raw["options"] == {"saliency": "reap", "protect": 0.75}
    assert set(raw["layers"][0]["protected"]) == set(raw["layers"][0]["saliency"]) == {"a", "b"}
    layer = raw["layers"][0]
    assert sorted([e for ids in layer["protected"].values() for e in ids] + layer["filled"]) == layer["kept"]


def test_coverage_uses_each_corpus_by_itself(small_profile: Profile) -> None:
    """The protected experts of a corpus are its own best, not those of the pool."""
    made = plan(small_profile, keep=small_profile.topology.top_k, protect=1.0)
    for i, layer in enumerate(made.layers):
        first = {c: SALIENCIES["contribution"](s)[i].argmax() for c, s in small_profile.statistics.items()}
        assert layer.protected["a"][0] == first["a"]
        assert first["b"] in layer.kept


def test_pooled_is_the_sum_of_the_corpora(small_profile: Profile) -> None:
    made = plan(small_profile, method="pooled", saliency="frequency", keep=small_profile.topology.top_k)
    total = sum(s["count"] for s in small_profile.statistics.values())
    for i, layer in enumerate(made.layers):
        assert set(layer.kept) == set(ranked(total[i])[: made.keep].tolist())


def test_random_seeds_differ_and_repeat(small_profile: Profile) -> None:
    keep = small_profile.topology.num_experts // 2
    masks = {
        plan(small_profile, method="random", keep=max(keep, small_profile.topology.top_k), seed=s).to_json()
        for s in (0, 1, 2, 0)
    }
    assert len(masks) == 3


@pytest.mark.parametrize("corpora", [1, 5])
def test_one_corpus_and_five(small_profile: Profile, corpora: int) -> None:
    first = small_profile.statistics["a"]
    statistics = {f"c{i}": {n: np.roll(v, i, axis=1) for n, v in first.items()} for i in range(corpora)}
    records = dict.fromkeys(statistics, small_profile.corpora["a"])
    profile = Profile(small_profile.topology, statistics, records, small_profile.model)
    made = plan(profile, keep=small_profile.topology.num_experts - 1, protect=1.0)
    assert all(len(layer.protected) == corpora for layer in made.layers)


def profile_of(statistics: dict[str, dict[str, np.ndarray]], topology: Topology) -> Profile:
    records, rng = {c: [{"sha256": c}] for c in statistics}, np.random.default_rng(0)
    pairs = topology.num_experts * (topology.num_experts + 1) // 2
    found = {c: rng.gamma(0.5, size=(2, len(topology.decoder_layers), pairs)) for c in statistics}
    return Profile(topology, statistics, records, {"name": "m", "fingerprint": "f"}, pairs=found)


def random_statistics(topology: Topology, seed: int) -> dict[str, np.ndarray]:
    shape = (len(topology.decoder_layers), topology.num_experts)
    rng = np.random.default_rng(seed)
    found = {name: rng.gamma(0.5, size=shape) for name in STATISTICS}
    return found | {"count": rng.integers(0, 9, shape), "num_tokens": np.full(shape, 99)}


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].from_profile])
@pytest.mark.parametrize("extreme", [False, True])
def test_group_limited_routers_keep_the_same_number_in_every_group(method: str, extreme: bool) -> None:
    topology = Topology("deepseek_v3", (3, 4, 5), 32, 4, 8, 6, num_groups=4, top_groups=2)
    profile = profile_of({"a": random_statistics(topology, 1), "b": random_statistics(topology, 2)}, topology)
    for keep in (8, 16, 24, 32):
        made = plan(profile, method=method, keep=keep, protect_super_experts=extreme)
        for layer in made.layers:
            of_layer = len(layer.kept) if METHODS[method].unequal else keep
            assert [sum(e // 8 == g for e in layer.kept) for g in range(4)] == [of_layer // 4] * 4


@pytest.mark.parametrize("keep", [4, 9, 30])
def test_keeps_that_no_group_can_hold_are_refused(keep: int) -> None:
    topology = Topology("deepseek_v3", (3,), 32, 4, 8, 6, num_groups=4, top_groups=2)
    with pytest.raises(
        InputError, match="4 groups of experts: every group must keep the same number, 2 or more. Near: keep="
    ):
        resolve_keep(topology, keep=keep, retain=None)
    narrow = Topology("deepseek_v3", (3,), 32, 4, 8, 6, num_groups=4, top_groups=1)
    with pytest.raises(InputError, match="Near: keep=16"):  # 8 / 4 groups leave 2 in the one group of a token: top-4
        resolve_keep(narrow, keep=8, retain=None)


def test_a_plan_by_hand_with_unequal_groups_is_refused(structure: Structure) -> None:
    import dataclasses

    half = structure.topology.num_experts // 2
    grouped = dataclasses.replace(
        structure, topology=dataclasses.replace(structure.topology, num_groups=2, top_groups=2)
    )
    lower = hand_plan(structure, [list(range(half))] * len(structure.topology.decoder_layers))
    with pytest.raises(InputError, match="experts of the router's groups. Every group must keep the same number"):
        check_plan(lower, grouped)


@pytest.mark.parametrize("method", ["pooled", "random"])
def test_budgets_in_one_call_are_nested_and_equal_to_single_ones(small_profile: Profile, method: str) -> None:
    topology = small_profile.topology
    keeps = list(range(topology.top_k, topology.num_experts + 1))
    made = plan_budgets(small_profile, method=method, keeps=keeps)
    assert [p.keep for p in made] == keeps
    for keep, one, more in zip(keeps, made, made[1:], strict=False):
        assert one.to_json() == plan(small_profile, method=method, keep=keep).to_json()
        assert all(set(a.kept) < set(b.kept) for a, b in zip(one.layers, more.layers, strict=True))


# Super experts (arXiv 2507.23279): 2 MoE layers behind a dense one, 200 experts each.
SPARSE = Topology("qwen2_moe", (1, 2), 200, 4, 32, 3)


def test_super_experts_by_hand_behind_a_dense_layer() -> None:
    """Above the 99.5 % quantile and a tenth of the maximum; rows are MoE layers (a rival protects the layer before)."""
    s = random_statistics(SPARSE, 0)
    s["max_abs"] = np.full((2, 200), 1.0)
    s["max_abs"][1, 7], s["max_abs"][1, 9] = 100.0, 9.0  # 9 is above the quantile, not above a tenth of 100
    profile = profile_of({"a": s}, SPARSE)
    assert super_experts(profile) == (frozenset(), frozenset({7}))
    made = plan(profile, method="random", keep=4, seed=1, protect_super_experts=True)
    assert 7 in made.layers[1].kept
    assert (made.layers[1].decoder_layer, made.layers[1].required, made.layers[0].required) == (2, [7], [])


def test_the_quantile_limits_super_experts_too() -> None:
    s = random_statistics(SPARSE, 0)
    s["max_abs"] = np.arange(400.0).reshape(2, 200)  # a tenth of the maximum alone would take 360 of them
    assert super_experts(profile_of({"a": s}, SPARSE)) == (frozenset(), frozenset({198, 199}))


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].from_profile])
@pytest.mark.parametrize("saliency", ["frequency", "reap"])
def test_every_method_keeps_the_super_experts(method: str, saliency: str) -> None:
    """Also with the score `frequency`, where a rival's protection has no effect."""
    first, second = random_statistics(SPARSE, 3), random_statistics(SPARSE, 4)
    second["max_abs"][0, 5] = 1e6  # seen by one corpus alone
    for s in (first, second):
        for name in ("count", "weighted_norm_sum", "renorm_weighted_norm_sum"):
            s[name][0, 5] = 0
    options = {"saliency": saliency} if METHODS[method].has("saliency") else {}
    profile = profile_of({"a": first, "b": second}, SPARSE)
    without, with_them = (
        plan(profile, method=method, keep=20, protect_super_experts=p, **options) for p in (False, True)
    )
    assert 5 not in without.layers[0].kept
    assert 5 in with_them.layers[0].kept
    assert METHODS[method].unequal or len(with_them.layers[0].kept) == 20


def test_weights_change_the_turns_and_zero_leaves_a_corpus_out() -> None:
    topology = Topology("m", (0,), 12, 2, 8, 1)
    profile = profile_of({"a": random_statistics(topology, 1), "b": random_statistics(topology, 2)}, topology)
    turns = {c: len(ids) for c, ids in plan(profile, keep=6, protect=1.0, weights={"b": 2}).layers[0].protected.items()}
    assert turns == {"a": 2, "b": 4}
    alone = profile_of({"b": profile.statistics["b"]}, topology)
    assert plan(profile, keep=5, weights={"a": 0}).layers[0].kept == plan(alone, keep=5).layers[0].kept


@pytest.mark.parametrize("keep, protect, turns", [(5, 0.5, 3), (6, 0.5, 3), (7, 0.25, 2), (5, 0.0, 0), (5, 1.0, 5)])
def test_the_protected_share_is_rounded_halves_up(keep: int, protect: float, turns: int) -> None:
    topology = Topology("m", (0,), 12, 2, 8, 1)
    profile = profile_of({"a": random_statistics(topology, 1), "b": random_statistics(topology, 2)}, topology)
    (layer,) = plan(profile, keep=keep, protect=protect).layers
    assert sum(map(len, layer.protected.values())) == turns
    assert len(layer.filled) == keep - turns


def test_random_plans_choose_other_experts_in_every_layer() -> None:
    topology = Topology("m", tuple(range(8)), 60, 4, 8, 8)
    made = plan(profile_of({"a": random_statistics(topology, 1)}, topology), method="random", keep=30)
    assert len({tuple(layer.kept) for layer in made.layers}) == 8


TOPOLOGY = Topology("qwen2_moe", (0, 1), 60, 4, 32, 2)


@pytest.mark.parametrize(
    "keep, retain, message",
    [
        (None, None, "exactly one of keep"),
        (30, 0.5, "exactly one of keep"),
        (3, None, r"keep=3 leaves fewer experts than the router's top-k of 4. Allowed: keep=4 to 60"),
        (61, None, "keep=61 is above the 60 experts"),
        (0, None, "fewer experts"),
        (None, 0.0, r"retain=0.0 is out of range"),
        (None, 1.5, r"retain=1.5 is out of range"),
        (None, float("nan"), "out of range"),
        (None, 0.01, "retain=0.01 keeps 1 of 60 experts, which leaves fewer"),
    ],
)
def test_budgets_out_of_range(keep: int | None, retain: float | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_keep(TOPOLOGY, keep=keep, retain=retain)


@pytest.mark.parametrize(
    "keep, multiple_of, groups, expected",
    [
        (30, 8, 1, 32),
        (28, 8, 1, 32),
        (27, 8, 1, 24),
        (60, 8, 1, 56),
        (4, 8, 1, 8),
        (33, 1, 1, 33),
        (30, 8, 3, 24),
        (37, 8, 3, 48),
    ],
)
def test_counts_are_rounded_to_a_multiple(keep: int, multiple_of: int, groups: int, expected: int) -> None:
    topology = dataclasses.replace(TOPOLOGY, num_experts=60, num_groups=groups, top_groups=groups)
    assert resolve_keep(topology, keep=keep, retain=None, multiple_of=multiple_of) == expected
    assert resolve_keep(topology, keep=None, retain=keep / 60, multiple_of=multiple_of) == expected


@pytest.mark.parametrize(
    "multiple_of, message", [(0, "out of range"), (61, "no count from 4 to 60 experts is a multiple of 61")]
)
def test_multiples_that_there_are_not(multiple_of: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_keep(TOPOLOGY, keep=30, retain=None, multiple_of=multiple_of)


@pytest.mark.parametrize("retain, keep", [(0.25, 15), (0.5, 30), (0.75, 45), (1.0, 60), (0.66, 40), (0.075, 5)])
def test_retain_rounds_to_the_nearest(retain: float, keep: int) -> None:
    assert resolve_keep(TOPOLOGY, keep=None, retain=retain) == keep


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "tb-covrage"}, "unknown method 'tb-covrage'. Did you mean tb-coverage"),
        ({"saliency": "reep"}, "unknown saliency 'reep'. Did you mean reap"),
        ({"protect": 1.2}, "protect=1.2 is out of range"),
        ({"method": "random", "saliency": "reap"}, "saliency is no option of method random. It has: seed"),
        ({"method": "pooled", "weights": {"a": 2}}, "weights is no option of method pooled. It has: saliency"),
        ({"method": "pooled", "mode": "layerwise"}, "mode is no option of method pooled"),
        ({"weights": {"c": 2}}, "unknown corpus in weights 'c'. Known: a, b"),
        ({"weights": {"a": 1.5}}, "weights=a=1.5 is out of range: a whole number"),
        ({"weights": {"a": True}}, "weights=a=True is out of range: a whole number"),
        ({"weights": {"a": 0, "b": 0}}, "every corpus has weight 0"),
        ({"method": "expert-sparsity"}, "expert-sparsity runs the experts: give model and structure"),
        (
            {"method": "expert-sparsity", "mode": "sideways"},
            "mode=sideways is unknown. Allowed: layerwise, progressive, progressive-local",
        ),
        ({"method": "expert-sparsity", "search": "all"}, "search=all is unknown. Allowed: auto, exhaustive, greedy"),
    ],
)
def test_bad_options(small_profile: Profile, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(small_profile, retain=0.75, **options)


# ------------------------------------------------------------------------------------------- plans edited by hand
def test_minimal_plan_by_hand_is_accepted(structure: Structure, tmp_path: Path) -> None:
    keep = structure.topology.top_k
    layers = [{"decoder_layer": d, "kept": list(range(keep))[::-1]} for d in structure.topology.decoder_layers]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"schema": 1, "keep": keep, "layers": layers}))
    loaded = Plan.load(path)
    check_plan(loaded, structure)
    assert loaded.layers[0].kept == list(range(keep))


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda p: p.pop("layers"), "layers: Field required"),
        (lambda p: p["layers"][0]["kept"].append(p["layers"][0]["kept"][0]), "must hold different ids"),
        (lambda p: p["layers"][0]["kept"].__setitem__(0, "3"), "kept.0"),
        (lambda p: p.__setitem__("schema", 7), "schema"),
        (lambda p: p.__setitem__("keeep", 7), "keeep"),
        (lambda p: p["layers"][0]["kept"].pop(), "Every layer must keep the same number"),
        (lambda p: p["layers"][0]["kept"].__setitem__(-1, 60), "keeps expert 60. Allowed: 0 to"),
        (lambda p: p["layers"].pop(), "the plan has decoder layers"),
        (lambda p: p["layers"][0].__setitem__("decoder_layer", 9), "the plan has decoder layers 9"),
        (lambda p: p["layers"][0].__setitem__("filled", [0, 7]), "expert 7 is not in `kept`"),
        (lambda p: p["layers"][0].__setitem__("protected", {"a": [9]}), "expert 9 is not in `kept`"),
        (lambda p: p["layers"][0].__setitem__("saliency", {"a": [1.0]}), "one number for each expert"),
        (lambda p: p["layers"][0].__setitem__("saliency", {"a": [1.0] * 60}), "of other corpora than before"),
        (
            lambda p: [r.__setitem__("saliency", {"a": [1.0] * 60}) for r in p["layers"]],
            "has 60 values of a, the model",
        ),
        (
            lambda p: [r.__setitem__("saliency", {"a": [1.0] * (60 + i)}) for i, r in enumerate(p["layers"])],
            "has another length than before",
        ),
    ],
)
def test_bad_edits_are_refused(structure: Structure, tmp_path: Path, edit, message: str) -> None:
    keep = structure.topology.top_k
    raw = json.loads(hand_plan(structure, [list(range(keep))] * len(structure.topology.decoder_layers)).to_json())
    edit(raw)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError, match="changed since it was written. Make it again; one changed on purpose"):
        Plan.load(path)
    del raw["sha256"]
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError, match=message):
        check_plan(Plan.load(path), structure)


def test_too_few_in_every_layer(structure: Structure) -> None:
    few = hand_plan(structure, [[0]] * len(structure.topology.decoder_layers))
    with pytest.raises(InputError, match="leaves fewer experts than the router's top-k"):
        check_plan(few, structure)


def test_keep_all_fits(structure: Structure) -> None:
    plan = keep_all(structure.topology)
    check_plan(plan, structure)
    assert plan.kept == [list(range(structure.topology.num_experts))] * len(structure.topology.decoder_layers)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"loss": NaN}', "not a finite number"),
        ('{"method": "\\ud800"}', "lone surrogate"),
        ("[" * 1500, "nested deeper"),
        ('{"keep": 6, "keep": 7}', "it has the key 'keep' twice"),
        ("[]", "it holds list"),
        ("null", "it holds NoneType"),
    ],
)
def test_what_no_plan_holds_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Plan.from_json(text)


def test_no_plan_no_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no plan"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(InputError, match="cannot be used: Expecting property name"):
        Plan.load(tmp_path / "plan.json")
