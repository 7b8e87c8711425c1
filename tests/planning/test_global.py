"""Unequal numbers of experts by one ranking over all layers: counts by hand and against all choices, and refusals."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import moecover
from moecover.checkpoints.structure import Structure, read_structure
from moecover.checkpoints.topology import Topology
from moecover.errors import InputError
from moecover.files.hashing import SEAL
from moecover.planning.artifact import Plan
from moecover.planning.run import plan
from moecover.planning.selection import Budget, shared_budget
from moecover.profiling.artifact import Profile
from moecover.profiling.run import profile
from moecover.runtime import masking
from moecover.runtime.loading import load_model
from tests.conftest import random_corpus
from tests.support.command_line import run
from tests.support.proofs import logits_of


def topology(layers: int, experts: int, *, top_k: int = 1, groups: int = 1) -> Topology:
    return Topology("qwen2_moe", tuple(range(layers)), experts, top_k, 8, layers, groups, min(2, groups))


def test_counts_by_hand() -> None:
    """Shares 1 0 0 0 and 1/4 each: the first layer needs one expert, top-k, the second takes what is left.

    The sizes 8 and 80 of the layers' sums do not matter. With top-k 2 the first layer has a second.
    """
    utility = np.array([[8.0, 0, 0, 0], [20, 20, 20, 20]])
    assert shared_budget(utility, Budget(2, 4), topology(2, 4)) == [1, 3]
    assert shared_budget(utility, Budget(2, 4), topology(2, 4, top_k=2)) == [2, 2]
    assert shared_budget(utility, Budget(3, 4), topology(2, 4, top_k=2)) == [2, 4]
    required = (frozenset({1, 2, 3}), frozenset())
    assert shared_budget(utility, Budget(2, 4, required=required), topology(2, 4)) == [3, 1]
    with pytest.raises(InputError, match="keep=1 is below what routers and super experts need in every layer"):
        shared_budget(utility, Budget(1, 4, required=required), topology(2, 4))


@pytest.mark.parametrize("groups", [1, 2])
def test_counts_against_all_choices(groups: int) -> None:
    """The kept shares sum to the most of all choices with as many experts, the same number in each group of a layer."""
    rng, shape = np.random.default_rng(groups), topology(3, 6, top_k=2, groups=groups)
    utility = rng.integers(1, 50, size=(3, 6)).astype(float) ** np.array([[1], [2], [6]])  # from even to steep
    shares = np.sort((utility / utility.sum(1, keepdims=True)).reshape(3, groups, -1), axis=-1)[..., ::-1]

    def kept(counts: tuple[int, ...]) -> float:
        return sum(float(shares[layer, :, : count // groups].sum()) for layer, count in enumerate(counts))

    found = shared_budget(utility, Budget(4, 6, groups), shape)
    least = 2 if groups == 1 else 4
    choices = itertools.product(range(least, 7, groups), repeat=3)
    assert kept(tuple(found)) == pytest.approx(max(kept(c) for c in choices if sum(c) == 12))


@pytest.fixture
def profiled(checkpoints: Callable[..., Path]) -> tuple[Structure, Profile]:
    structure = read_structure(checkpoints("qwen2_moe"))
    return structure, profile(structure, [random_corpus("a", seed=1)], dtype="float32")


def test_it_is_evaluated_as_masked_and_never_written(
    profiled: tuple[Structure, Profile], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    structure, found = profiled
    chosen = plan(found, method="global", saliency="reap", keep=6)
    counts = [len(ids) for ids in chosen.kept]
    assert sum(counts) == 12
    assert counts[0] != counts[1]
    assert chosen.unequal
    assert Plan.from_json(chosen.to_json()) == chosen
    result = moecover.evaluate(structure, {"p": chosen}, texts=[random_corpus("t", seed=5)], progress=False)
    assert result.rows[1].num_bytes == structure.num_bytes(chosen.kept)
    model = load_model(structure)
    with moecover.masked(model, structure, chosen):
        emulated = logits_of(model)
    with masking.masked(model, structure, chosen.kept):
        assert torch.equal(logits_of(model), emulated)
    message = "experts by layer. config.json has one number, and vLLM, SGLang and llama.cpp read one"
    with pytest.raises(InputError, match=message):
        moecover.prune(structure, chosen, tmp_path / "out", progress=False)
    with pytest.raises(InputError, match=message):
        moecover.repair(structure, chosen, [random_corpus()], kind="scale", progress=False)
    with pytest.raises(InputError, match="method=global keeps different numbers of experts by layer"):
        moecover.prune(
            structure, None, tmp_path / "out", corpora=[random_corpus()], keep=6, method="global", progress=False
        )
    found.save(tmp_path / "profile")
    status, out, _ = run(
        capsys, "plan", tmp_path / "profile", "--method", "global", "--keep", 6, "-o", tmp_path / "p.json"
    )
    assert status == 0
    assert "global keeps 6 of 12 experts on average (" in out
    assert run(capsys, "explain", tmp_path / "p.json", "--profile", tmp_path / "profile")[0] == 0


def test_a_count_that_is_not_the_mean_is_refused(profiled: tuple[Structure, Profile]) -> None:
    value = json.loads(plan(profiled[1], method="global", keep=6).to_json())
    value["keep"] = 7
    with pytest.raises(InputError, match="`keep` is not the mean"):
        Plan.from_json(json.dumps({k: v for k, v in value.items() if k != SEAL}))
