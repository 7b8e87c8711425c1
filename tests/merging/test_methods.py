"""Groups and weights of the merges against cases by hand and naive references."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moecover.merging.facts import LayerFacts
from moecover.merging.methods import MERGES, merge_of
from moecover.merging.methods.hc_smoe import clusters
from moecover.registry import UnknownNameError


def facts(kept: tuple[int, ...], **arrays: object) -> LayerFacts:
    given = {name: np.array(arrays.get(name, []), dtype=float) for name in LayerFacts.__annotations__ if name != "kept"}
    return LayerFacts(kept, **given)


def test_m_smoe_joins_the_kept_expert_that_the_router_scores_most_alike() -> None:
    logits = np.array([[3, 0, 3, 0, 1], [0, 2, 1, 4, 1]], dtype=float)  # [token, expert]
    norms = np.linalg.norm(logits, axis=0)
    cosines = logits.T @ logits / np.outer(norms, norms)
    found = MERGES["m-smoe"].function(facts((0, 1), counts=[7, 2, 5, 0, 1], router=cosines))
    assert found.centre_of.tolist() == [0, 1, 0, 1, 0]  # expert 4 is as near to both: the lowest id
    assert found.weights.tolist() == [7, 2, 5, 0, 1]
    assert found.members() == {0: [2, 4]}  # no token came to expert 3: nothing of it is in expert 1


def test_hc_smoe_clusters_by_hand() -> None:
    places = np.array([[0.0], [1.0], [10.0], [12.0], [4.0], [5.0]])
    # {0 1}, {4 5}, {2 3}; then the mean distance of {0 1} to {4 5} is 4, of {4 5} to {2 3} 6.5.
    assert clusters(places, (1, 3)).tolist() == [1, 1, 3, 3, 1, 1]
    assert clusters(places, (0, 2, 4)).tolist() == [0, 0, 2, 2, 4, 4]
    assert clusters(places, (0, 1, 4)).tolist() == [0, 1, 4, 4, 4, 4]  # 0 and 1 are nearest, but both stay
    assert clusters(places, range(6)).tolist() == [0, 1, 2, 3, 4, 5]
    assert clusters(np.zeros((4, 1)), (3,)).tolist() == [3, 3, 3, 3]


def naive_clusters(features: np.ndarray, number: int) -> list[list[int]]:
    """Average linkage as the authors write it: mean distance of all pairs, anew for every step."""
    found = [[expert] for expert in range(len(features))]
    while len(found) > number:
        means = {
            (i, j): np.mean([np.linalg.norm(features[a] - features[b]) for a in found[i] for b in found[j]])
            for i, j in itertools.combinations(range(len(found)), 2)
        }
        i, j = min(means, key=means.__getitem__)
        found[i] += found.pop(j)
    return sorted(sorted(group) for group in found)


def test_hc_smoe_finds_the_authors_clusters_from_one_expert_of_each() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        features = rng.normal(size=(12, 3))
        groups = naive_clusters(features, 4)
        kept = sorted(int(rng.choice(group)) for group in groups)
        found = clusters(features, kept)
        assert sorted(np.flatnonzero(found == one).tolist() for one in kept) == groups


def test_ream_fills_the_groups_of_the_most_salient_experts_first() -> None:
    count = 40
    kept = (0, 1, 2, 39)
    gated = np.array([[np.cos(angle), np.sin(angle)] for angle in np.linspace(0, np.pi / 2, count)])
    saliency = np.ones(count)
    saliency[[39, 1, 5]] = 9, 4, 0
    found = MERGES["ream"].function(
        facts(kept, counts=saliency, saliency=saliency, router=gated @ gated.T, gated=gated)
    )
    groups = {centre: [centre, *others] for centre, others in found.members().items()}
    assert sorted(groups[39]) == [*range(24, 40)]  # its 15 nearest
    assert sorted(groups[1]) == [1, *range(3, 18)]
    assert groups[0] == [0, *range(18, 24)]  # what is left, although 2 is nearer: 0 comes first among equals
    assert 2 not in groups
    assert found.weights[5] == 0.5  # without tokens: the least of the others, at most a half
    assert found.weights[39] == 9


def naive_ream(saliency: np.ndarray, gated: np.ndarray, logits: np.ndarray, kept: list[int], most: int) -> list[int]:
    """The grouping as the authors write it, expert by expert."""
    count = len(saliency)
    unit = logits.T / np.linalg.norm(logits.T, axis=1, keepdims=True)
    apart = np.array([[np.linalg.norm(a - b) for b in unit] for a in unit])
    distance = np.zeros((count, count))
    for i, j in itertools.permutations(range(count), 2):
        cosine = gated[i] @ gated[j] / (np.linalg.norm(gated[i]) * np.linalg.norm(gated[j]))
        distance[i, j] = 1 - ((cosine + 1) / 2 + (1 - apart[i, j] / apart.max())) / 2
    found = [expert if expert in kept else -1 for expert in range(count)]
    for centre in sorted(kept, key=lambda expert: -saliency[expert]):
        size = 1
        for other in np.argsort(distance[centre]):
            if size < most and found[other] == -1:
                found[other], size = centre, size + 1
    return found


def test_ream_groups_as_the_authors_do() -> None:
    rng = np.random.default_rng(3)
    for kept in ([0, 5, 11, 17, 30], [2, 3, 8]):
        saliency, gated, logits = rng.random(40), rng.normal(size=(40, 4)), rng.normal(size=(9, 40))
        norms = np.linalg.norm(logits, axis=0)
        given = facts(
            tuple(kept),
            counts=saliency,
            saliency=saliency,
            router=logits.T @ logits / np.outer(norms, norms),
            gated=gated,
        )
        assert MERGES["ream"].function(given).centre_of.tolist() == naive_ream(saliency, gated, logits, kept, 16)


def test_ream_groups_grow_where_few_experts_are_kept() -> None:
    ones = np.ones((40, 40))
    given = facts((7,), counts=np.ones(40), saliency=np.ones(40), router=ones, gated=ones)
    assert MERGES["ream"].function(given).members() == {7: [e for e in range(40) if e != 7]}


def test_an_unknown_merge_is_named() -> None:
    assert merge_of("none") is None
    with pytest.raises(UnknownNameError, match=r"unknown merge 'reem'. Did you mean ream\?.* hc-smoe, m-smoe, none"):
        merge_of("reem")
