"""What `explain` says of thinner experts, against plain loops over energies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moecover.errors import InputError
from moecover.planning.artifact import LayerPlan, Plan
from moecover.planning.explaining.facts import explain
from moecover.planning.explaining.text import text_of
from moecover.planning.run import plan
from moecover.profiling.artifact import Profile
from moecover.reporting.figures.plan_figures import draw
from tests.support.profiles import profile_with_channels

WIDTH = 24


@pytest.fixture
def profile() -> Profile:
    """Two corpora, 2 layers, 6 experts, 24 channels; b uses neither expert 4 nor any of the second layer."""
    rng = np.random.default_rng(0)
    energies = {name: rng.random((2, 6, WIDTH)) ** 4 for name in ("a", "b")}
    energies["b"][0, 4] = energies["b"][1] = 0
    return profile_with_channels(energies)


def test_shares_of_energy_by_plain_loops(profile: Profile) -> None:
    made = plan(profile, keep=4, width=8)
    thin = explain(made, profile=profile)["channels"]
    assert (thin["width"], thin["channels"], thin["turns"]) == (8, WIDTH, {})
    shares: dict[str, list[float]] = {"a": [], "b": []}
    for corpus, energies in profile.channels.items():
        for layer, row in enumerate(made.layers):
            stays = sum(energies[layer, e, j] for e, ids in zip(row.kept, row.channels, strict=True) for j in ids)
            before = sum(energies[layer, e, j] for e in row.kept for j in range(WIDTH))
            total = sum(energies[layer, e, j] for e in range(6) for j in range(WIDTH))
            shares[corpus].append(stays / before if before else 1.0)
            assert thin["layers"][layer]["of_experts"][corpus] == pytest.approx(shares[corpus][-1])
            assert thin["layers"][layer]["of_layer"][corpus] == pytest.approx(stays / total if total else 1.0)
    assert thin["of_experts"] == pytest.approx({corpus: np.mean(values) for corpus, values in shares.items()})
    assert thin["least"] == pytest.approx({corpus: min(values) for corpus, values in shares.items()})
    assert thin["least_layer"] == {corpus: int(np.argmin(values)) for corpus, values in shares.items()}


def test_the_best_channels_that_all_stay_are_at_least_the_turns(profile: Profile) -> None:
    made = plan(profile, keep=6, width=16, protect_channels=0.5)
    facts = explain(made, profile=profile)
    thin = facts["channels"]
    assert thin["turns"] == {"a": 4, "b": 4}
    for corpus, energies in profile.channels.items():
        ranks = []
        for layer, row in enumerate(made.layers):
            for expert, ids in zip(row.kept, row.channels, strict=True):
                energy = energies[layer, expert]
                best = sorted((j for j in range(WIDTH) if energy[j] > 0), key=lambda j, energy=energy: -energy[j])
                gaps = [rank for rank, j in enumerate(best) if j not in ids]
                ranks.append(gaps[0] if gaps else WIDTH)
        assert thin["best"][corpus] == min(ranks) >= 4
    text = text_of(facts, layers=True)
    assert "keeps 6 of 6 experts and 16 of 24 channels of each in 2 layers" in text
    assert "the best 4 of a, the best 4 of b stay." in text
    assert "Channel energy kept of the kept experts':" in text
    assert json.loads(json.dumps(facts)) == facts


def test_what_is_said_without_energies(profile: Profile) -> None:
    whole, thin = plan(profile, keep=3), plan(profile, keep=3, width=8)
    assert "channels" not in explain(whole, profile=profile)
    assert "channel" not in text_of(explain(whole, profile=profile), layers=True)
    facts = explain(thin)
    assert facts["channels"] == {"width": 8, "channels": None, "turns": {}, "layers": []}
    assert "is in the profile" in text_of(facts, layers=True)
    narrow = profile_with_channels({name: values[..., :8] for name, values in profile.channels.items()})
    with pytest.raises(InputError, match="channels above the 7 of the profile"):
        explain(thin, profile=narrow)


def test_channels_of_experts_that_two_plans_keep() -> None:
    def by_hand(*channels: list[int], kept: list[int]) -> Plan:
        rows = [LayerPlan(decoder_layer=0, kept=kept, channels=list(channels), saliency={"a": [1.0] * 4})]
        return Plan(schema=1, keep=2, width=2, layers=rows)

    one = by_hand([0, 1], [2, 3], kept=[0, 1])
    facts = explain(one, against=by_hand([0, 1], [3, 4], kept=[0, 1]))["changes"]
    assert facts["channels"] == {"jaccard": pytest.approx((1 + 1 / 3) / 2), "layers": [pytest.approx(2 / 3)]}
    assert facts["jaccard"] == 1
    assert not facts["same"]
    text = text_of(explain(one, against=by_hand([0, 1], [3, 4], kept=[0, 1])))
    assert "Channels of the experts that both keep: overlap 0.67, least in decoder layer 0 (0.67)." in text
    assert explain(one, against=by_hand([5, 6], [3, 4], kept=[2, 3]))["changes"]["channels"]["jaccard"] is None
    assert "keep 2x2: the same experts and channels." in text_of(explain(one, against=one))


def test_the_figure_is_drawn_for_thinner_experts_alone(profile: Profile, tmp_path: Path) -> None:
    for name, options in (("whole", {}), ("thin", {"width": 8})):
        facts = explain(plan(profile, keep=3, **options), profile=profile)
        drawn = {path.name for path in draw(facts, tmp_path / name)}
        assert ("channels.png" in drawn) == (name == "thin")
