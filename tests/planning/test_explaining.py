"""The facts of `explain` against hand-checked cases and plain loops; stability against plans made from less text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from moecover.checkpoints.structure import Structure, read_structure
from moecover.checkpoints.topology import Topology
from moecover.cli.main import main
from moecover.errors import InputError
from moecover.planning.artifact import LayerPlan, Plan
from moecover.planning.explaining.facts import covered_rank, explain
from moecover.planning.explaining.stability import settled_text
from moecover.planning.explaining.text import text_of
from moecover.planning.methods import METHODS
from moecover.planning.run import plan
from moecover.profiling.artifact import Profile
from moecover.profiling.run import profile
from moecover.profiling.statistics import MAXIMA, STATISTICS
from tests.conftest import hand_plan, random_corpus

TOPOLOGY = Topology("qwen2_moe", (1, 2), 6, 2, 8, 3)


def made_of(utilities: dict[str, list[list[float]]]) -> Profile:
    """A profile whose `contribution` is the given utility, every expert routed where it is above 0."""
    statistics = {}
    for corpus, rows in utilities.items():
        values = np.array(rows)
        s = {name: np.zeros(values.shape) for name in STATISTICS}
        s["count"] = (values > 0).astype(np.int64)
        s["num_tokens"] = np.ones(values.shape, dtype=np.int64)
        s["weighted_norm_sum"], s["max_abs"] = values, np.ones(values.shape)
        statistics[corpus] = s
    records = {c: [{"sha256": c}] for c in statistics}
    return Profile(TOPOLOGY, statistics, records, {"name": "m", "fingerprint": "f"})


# Layer 1: a likes 0 1 2, b likes 5 4 3 0. Layer 2: both like 0 1 2.
PROFILE = made_of(
    {
        "a": [[5, 4, 1, 0, 0, 0], [4, 3, 2, 1, 0, 0]],
        "b": [[1, 0, 0, 2, 3, 4], [8, 6, 4, 2, 0, 0]],
    }
)


def test_facts_by_hand() -> None:
    made = plan(PROFILE, keep=3, protect=1.0)  # layer 1: a 0, b 5, a 1; layer 2: a 0, b 1, a 2
    assert [row.kept for row in made.layers] == [[0, 1, 5], [0, 1, 2]]
    facts = explain(made, profile=PROFILE)
    first, second = facts["layers"]
    assert (first["decoder_layer"], second["decoder_layer"]) == (1, 2)
    assert first["kept_utility"] == pytest.approx({"a": 0.9, "b": 0.5})
    assert first["worst_corpus"] == "b"
    assert first["covered_rank"] == {"a": 2, "b": 1}  # of a: 0, 1 kept, 2 not; of b: 5 kept, 4 not
    assert first["guarantee"] == 1
    assert first["wanted_by_one"] == {"a": [0, 1, 2], "b": [3, 4, 5]}
    assert first["agreement"]["a | b"]["jaccard"] == 0
    assert second["agreement"]["a | b"] == pytest.approx({"jaccard": 1, "spearman": 1, "kendall": 1})
    assert first["protected"] == {"a": [0, 1], "b": [5]}
    assert (first["never_routed"], second["never_routed"]) == ([], [4, 5])
    overall = facts["overall"]
    assert overall["kept_utility"] == pytest.approx({"a": (0.9 + 0.9) / 2, "b": (0.5 + 0.9) / 2})
    assert overall["least_kept_utility"] == pytest.approx({"a": 0.9, "b": 0.5})
    assert (overall["worst_corpus"], overall["guarantee"], overall["never_routed"]) == ("b", 1, 2)
    assert overall["wanted_by_one"] == {"a": 3, "b": 3}
    assert overall["wanted_by_one_kept"] == {"a": 2, "b": 1}
    assert json.loads(json.dumps(facts)) == facts
    text = text_of(facts, layers=True)
    for part in (
        "keeps 3 of 6 experts in 2 layers of m",
        "Worst served: b, 70.0%",
        "every corpus keeps its best expert.",
        "2 of 3",
        "Never routed by any corpus: 2 experts, 0 of them kept",
        "decoder layer",
    ):
        assert part in text


def test_rank_correlations_by_hand() -> None:
    """Spearman 1 - 6 sum d^2 / n (n^2 - 1), Kendall (concordant - discordant) / pairs."""
    one, two = [1.0, 2, 3, 4, 5, 6], [2.0, 1, 4, 3, 6, 5]
    profile = made_of({"a": [one, one], "b": [two, one]})
    found = explain(plan(profile, keep=3), profile=profile)["layers"][0]["agreement"]["a | b"]
    assert found["spearman"] == pytest.approx(1 - 6 * 6 / (6 * 35))
    signs = [np.sign(one[i] - one[j]) * np.sign(two[i] - two[j]) for i, j in combinations(range(6), 2)]
    assert found["kendall"] == pytest.approx(sum(signs) / 15)


def test_a_constant_utility_has_no_rank_correlation() -> None:
    profile = made_of({"a": [[1, 1, 1, 1, 1, 1]] * 2, "b": [[1, 2, 3, 4, 5, 6]] * 2})
    facts = explain(plan(profile, keep=3), profile=profile)
    assert facts["layers"][0]["agreement"]["a | b"]["spearman"] is None
    assert facts["overall"]["agreement"]["a | b"]["kendall"] is None
    assert " - " in text_of(facts)


def test_covered_rank_breaks_ties_like_the_selection() -> None:
    assert covered_rank(np.array([1.0, 1.0, 1.0]), [0, 2]) == 1
    assert covered_rank(np.array([1.0, 2.0, 3.0]), [0, 1]) == 0
    assert covered_rank(np.array([1.0, 2.0, 3.0]), [0, 1, 2]) == 3


def test_one_corpus_has_no_pairs() -> None:
    profile = made_of({"a": [[1, 2, 3, 4, 5, 6]] * 2})
    facts = explain(plan(profile, keep=3), profile=profile)
    assert (facts["overall"]["agreement"], facts["layers"][0]["wanted_by_one"]) == ({}, {})
    assert "Spearman" not in text_of(facts)


def test_the_plan_alone_is_enough_for_what_it_holds() -> None:
    made = plan(PROFILE, keep=3)
    facts, whole = explain(made), explain(made, profile=PROFILE)
    assert facts["overall"]["kept_utility"] == pytest.approx(whole["overall"]["kept_utility"])
    assert "never_routed" not in facts["overall"]
    assert "stability" not in facts
    for method in ("pooled", "random"):
        other = plan(PROFILE, keep=3, method=method)
        with pytest.raises(InputError, match="holds no utilities by corpus, so profile is needed"):
            explain(other)
        assert explain(other, profile=PROFILE)["own_profile"]
    with pytest.raises(InputError, match="the plan holds utilities by contribution. For reap, profile is needed"):
        explain(made, saliency="reap")


def test_two_plans_compared() -> None:
    one, two = plan(PROFILE, keep=3, protect=1.0), plan(PROFILE, keep=4, protect=1.0)
    change = explain(one, against=two)["changes"]
    for a, b, row in zip(one.layers, two.layers, change["layers"], strict=True):
        assert row["only_here"] == sorted(set(a.kept) - set(b.kept))
        assert row["only_there"] == sorted(set(b.kept) - set(a.kept))
        assert row["jaccard"] == len(set(a.kept) & set(b.kept)) / len(set(a.kept) | set(b.kept))
    assert (change["only_here"], change["only_there"]) == (0, 2)
    assert "0 of 6 kept experts are only here, 2 only there" in text_of(explain(one, against=two))
    assert "the same experts" in text_of(explain(one, against=one))


def test_what_does_not_belong_together_is_refused(checkpoints: Callable[..., Path]) -> None:
    made = plan(PROFILE, keep=3)
    structure = read_structure(checkpoints("mixtral"))
    foreign = profile(structure, [random_corpus("a")])
    with pytest.raises(InputError, match="the profile is of another model"):
        explain(made, profile=foreign)
    with pytest.raises(InputError, match="the plans are of different models"):
        explain(made, against=plan(foreign, keep=3))
    layers = [LayerPlan(decoder_layer=d, kept=[0, 9]) for d in (1, 2)]
    with pytest.raises(InputError, match="keeps experts above the 5 of the profile"):
        explain(Plan(schema=1, keep=2, layers=layers), profile=PROFILE)


# ------------------------------------------------------------------------------------------------- parts and stability
def test_parts_are_the_profile_of_less_text(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """Every part equals the profile of the first batches alone: counts exactly, sums to rounding."""
    structure = read_structure(checkpoints("qwen2_moe"))
    corpora = [random_corpus("a", seed=1, sequences=11), random_corpus("b", seed=2, sequences=16)]
    whole = profile(structure, corpora, dtype="float32", batch_size=2)
    whole.save(tmp_path)
    stages = Profile.load(tmp_path).stages()
    assert len(stages) == 6  # as many as the shorter corpus has batches
    for stage in stages:
        rows = {c: int(s["num_tokens"][0, 0]) // 24 for c, s in stage.statistics.items()}
        shorter = profile(structure, [c[: rows[c.name]] for c in corpora], dtype="float32", batch_size=2)
        for corpus in rows:
            for name in STATISTICS:
                np.testing.assert_allclose(
                    stage.statistics[corpus][name], shorter.statistics[corpus][name], rtol=1e-6, atol=1e-12
                )
            np.testing.assert_array_equal(stage.statistics[corpus]["count"], shorter.statistics[corpus]["count"])
    tokens = [int(s.statistics["a"]["num_tokens"][0, 0]) for s in stages]
    assert tokens == sorted(set(tokens))
    assert tokens[-1] == 11 * 24


@pytest.mark.parametrize("sequences, rows", [(32, [4, 8, 12, 16, 20, 24, 28, 32]), (20, [2, 4, 8, 10, 12, 16, 18, 20])])
def test_parts_are_eighths_in_whole_batches(checkpoints: Callable[..., Path], sequences: int, rows: list[int]) -> None:
    structure = read_structure(checkpoints("mixtral"))
    made = profile(structure, [random_corpus("a", sequences=sequences)], batch_size=2)
    assert [int(s.statistics["a"]["num_tokens"][0, 0]) // 24 for s in made.stages()] == rows


def test_merged_profiles_keep_their_parts(checkpoints: Callable[..., Path]) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    corpus = random_corpus("a", seed=1, sequences=16)
    one, two = (profile(structure, [c], dtype="float32", batch_size=2) for c in (corpus[:8], corpus[8:]))
    joined = one + two
    tokens = joined.parts["a"]["num_tokens"][:, 0, 0].tolist()
    assert tokens == [48, 96, 144, 192, 240, 288, 336]
    expected = {
        n: np.maximum(one.statistics["a"][n], v[0]) if n in MAXIMA else one.statistics["a"][n] + v[0]
        for n, v in two.parts["a"].items()
    }
    for name in STATISTICS:
        np.testing.assert_array_equal(joined.parts["a"][name][4], expected[name])
    many = joined
    for _ in range(5):
        many = many + joined
    kept = many.parts["a"]["num_tokens"][:, 0, 0]
    assert len(kept) < 16
    assert (np.diff(kept) > 0).all()
    assert kept[-1] < many.statistics["a"]["num_tokens"][0, 0]


def test_stability_equals_plans_from_less_text(checkpoints: Callable[..., Path]) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    corpora = [random_corpus("a", seed=1, sequences=16), random_corpus("b", seed=2, sequences=16)]
    whole = profile(structure, corpora, dtype="float32", batch_size=2)
    made = plan(whole, keep=6)
    stable = explain(made, profile=whole, change=0.2)["stability"]
    assert [point["tokens"] for point in stable["curve"]] == [96 * i for i in range(1, 9)]
    changed = []
    for rows in range(2, 17, 2):
        less = plan(profile(structure, [c[:rows] for c in corpora], dtype="float32", batch_size=2), keep=6)
        pairs = zip(made.layers, less.layers, strict=True)
        changed.append(np.mean([len(set(a.kept) - set(b.kept)) / 6 for a, b in pairs]))
    assert [point["changed"] for point in stable["curve"]] == pytest.approx(changed)
    assert changed[-1] == 0
    assert max(changed) > 0  # the case has something to tell
    settled = 8
    while settled > 1 and changed[settled - 2] <= 0.2:
        settled -= 1
    assert stable["enough_tokens"] == (96 * settled if settled < 8 else None)
    halves = [
        plan(profile(structure, [c[i : i + 8] for c in corpora], dtype="float32", batch_size=2), keep=6) for i in (0, 8)
    ]
    pairs = zip(halves[0].layers, halves[1].layers, strict=True)
    assert stable["halves"] == pytest.approx(np.mean([len(set(a.kept) - set(b.kept)) / 6 for a, b in pairs]))
    assert stable["half_tokens"] == 384


def test_the_recommendation_does_not_trust_the_last_part_alone(checkpoints: Callable[..., Path]) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    whole = profile(structure, [random_corpus("a", seed=1, sequences=16)], dtype="float32", batch_size=2)
    made = plan(whole, keep=6)
    loose, strict = (explain(made, profile=whole, change=x) for x in (0.99, 1e-9))
    assert loose["stability"]["enough_tokens"] == 48
    assert "at most 48 tokens were needed, the first that were looked at: at most 99% of the kept" in text_of(loose)
    later = {**loose["stability"], "enough_tokens": 96}
    assert settled_text(later).startswith("96 tokens are enough: at most 99% of the kept experts still change up to ")
    if strict["stability"]["curve"][-2]["changed"] > 0:
        assert strict["stability"]["enough_tokens"] is None
        assert "may not be enough" in text_of(strict)


@pytest.mark.parametrize("sequences", [1, 2, 3])
def test_little_text_has_few_parts(checkpoints: Callable[..., Path], sequences: int) -> None:
    structure = read_structure(checkpoints("mixtral"))
    whole = profile(structure, [random_corpus("a", sequences=sequences)], batch_size=2)
    assert len(whole.stages()) == math.ceil(sequences / 2)
    facts = explain(plan(whole, keep=3), profile=whole)
    assert (facts["stability"] is None) == (sequences < 3)
    text_of(facts)


def test_another_profile_tells_shares_but_no_stability(checkpoints: Callable[..., Path]) -> None:
    structure = read_structure(checkpoints("mixtral"))
    one, two = (profile(structure, [random_corpus("a", seed=s, sequences=8)], batch_size=2) for s in (1, 2))
    facts = explain(plan(one, keep=3), profile=two)
    assert not facts["own_profile"]
    assert "stability" not in facts


def test_a_method_of_pairs_is_explained_without_its_stability(small_profile: Profile) -> None:
    made = plan(small_profile, method="hope", keep=small_profile.topology.num_experts - 1)
    facts = explain(made, profile=small_profile)
    assert "hope" in text_of(facts)
    assert facts["stability"] is None


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].from_profile and not METHODS[m].pairs])
def test_every_method_can_be_explained(small_profile: Profile, method: str) -> None:
    keep = small_profile.topology.num_experts - 1
    facts = explain(plan(small_profile, method=method, keep=keep, protect_super_experts=True), profile=small_profile)
    assert method in text_of(facts, layers=True)
    assert facts["stability"]["curve"][-1]["changed"] == 0


def test_a_plan_by_hand_can_be_explained(structure: Structure, small_profile: Profile) -> None:
    keep = structure.topology.top_k
    made = hand_plan(structure, [list(range(keep))] * len(structure.topology.decoder_layers))
    facts = explain(made, profile=small_profile)
    assert "by hand keeps" in text_of(facts)
    shares = facts["layers"][0]["kept_utility"]
    for corpus, s in small_profile.statistics.items():
        contribution = s["weighted_norm_sum"][0]
        assert shares[corpus] == pytest.approx(contribution[:keep].sum() / contribution.sum())


def test_the_verb(small_profile: Profile, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_profile.save(tmp_path / "p")
    plan(small_profile, keep=small_profile.topology.num_experts - 1).save(tmp_path / "plan.json")
    assert main(["explain", str(tmp_path / "plan.json"), "--profile", str(tmp_path / "p"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["overall"]["worst_corpus"] in ("a", "b")
    bad = {
        ("--change", "0"): "--change 0.0 is out of range",
        ("--saliency", "reep"): "unknown saliency 'reep'. Did you mean reap",
        ("--against", str(tmp_path / "none.json")): "no plan",
        ("--profile", str(tmp_path / "none")): "holds no profile.safetensors",
    }
    for extra, message in bad.items():
        profile = [] if extra[0] == "--profile" else ["--profile", str(tmp_path / "p")]
        command = ["explain", str(tmp_path / "plan.json"), *profile, *extra]
        assert main(command) == 2
        assert message in capsys.readouterr().err


def test_many_corpora_are_a_matrix() -> None:
    """Above the diagonal what is below it, and the same numbers that few corpora have a line each for."""
    rng = np.random.default_rng(0)
    profile = made_of({f"c{i}": rng.gamma(0.5, size=(2, 6)).tolist() for i in range(6)})
    facts = explain(plan(profile, keep=3), profile=profile)
    text = text_of(facts)
    assert "Kendall" not in text
    lines = [line.split() for line in text.split("mean over layers:\n")[1].split("\n\n")[0].splitlines()[2:]]
    table = np.array([[float(v) for v in (*line[1 : 1 + i], "nan", *line[1 + i :])] for i, line in enumerate(lines)])
    np.testing.assert_array_equal(table, table.T)
    for (i, one), (j, two) in combinations(enumerate(facts["corpora"]), 2):
        assert table[i, j] == round(facts["overall"]["agreement"][f"{one} | {two}"]["jaccard"], 2)
