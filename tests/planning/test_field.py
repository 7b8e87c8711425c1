"""Methods of the field: each against its authors' formula spelled out, and against cases that are checked by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moecover.checkpoints.structure import Structure, read_structure
from moecover.corpora.sources import ALL_CORPORA
from moecover.errors import InputError
from moecover.planning.artifact import Plan
from moecover.planning.methods.c_prune import votes
from moecover.planning.methods.hc_smoe import order
from moecover.planning.methods.hope import hope, mean_products
from moecover.planning.run import plan, plan_budgets
from moecover.planning.selection import Budget
from moecover.profiling.artifact import Profile
from moecover.profiling.run import profile
from moecover.runtime.loading import load_model, routers
from tests.conftest import random_corpus
from tests.profiling.test_run import block_inputs
from tests.support.command_line import run
from tests.support.passes import spoiled
from tests.support.profiles import profile_with_channels


def with_pairs(products: np.ndarray) -> Profile:
    """A profile of one layer in which every pair of experts met in one token, with these products."""
    experts = len(products)
    made = profile_with_channels({"a": np.ones((1, experts, 4))})
    packed = np.stack([np.ones(experts * (experts + 1) // 2), products[np.triu_indices(experts)]])[:, None]
    return dataclasses.replace(made, pairs={"a": packed})


def test_hope_by_hand() -> None:
    """One goes: that of the lowest square. Of two, 0 and 1 are the smallest, but together they cost 2 x 9 more."""
    products = np.array([[1, 9, 0, 0], [9, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 40]], dtype=float)
    np.testing.assert_array_equal(mean_products(*with_pairs(products).pairs["a"][:, 0], 4), products)
    one, two = plan_budgets(with_pairs(products), method="hope", keeps=[3, 2])
    assert one.kept == [[1, 2, 3]]
    assert two.kept == [[1, 3]]
    (all_four,) = plan_budgets(with_pairs(products), method="hope", keeps=[4])
    assert all_four.kept == [[0, 1, 2, 3]]


def test_hope_takes_the_mean_over_the_tokens_that_a_pair_shares() -> None:
    counts, sums = np.array([4.0, 2.0, 0.0, 1.0, 0.0, 0.0]), np.array([8.0, 6.0, 0.0, 5.0, 0.0, 0.0])
    np.testing.assert_array_equal(mean_products(counts, sums, 3), [[2, 3, 0], [3, 5, 0], [0, 0, 0]])


def test_hope_is_the_authors_programme(small_profile: Profile) -> None:
    from scipy.optimize import minimize

    experts, keep = small_profile.topology.num_experts, small_profile.topology.num_experts // 2
    made = plan(small_profile, method="hope", keep=keep)
    counts, sums = np.sum(list(small_profile.pairs.values()), axis=0)
    for layer, row in enumerate(made.layers):
        f = mean_products(counts[layer], sums[layer], experts)
        go = experts - keep
        found = minimize(
            lambda b, f=f: b @ f @ b,
            np.full(experts, go / experts),
            jac=lambda b, f=f: 2 * f @ b,
            method="SLSQP",
            bounds=[(0, 1)] * experts,
            constraints={"type": "eq", "fun": lambda b, go=go: np.sum(b) - go},
            options={"maxiter": 1000, "ftol": 1e-12},
        )
        pruned = np.argsort(-found.x, kind="stable")[:go]
        assert row.kept == sorted(set(range(experts)) - set(pruned.tolist()))


def test_hope_needs_pairs(small_profile: Profile) -> None:
    with pytest.raises(InputError, match="hope needs the statistics of pairs, which the profile of a does not have"):
        plan(dataclasses.replace(small_profile, pairs={}), method="hope", keep=6)


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_aimer_is_the_authors_formula(checkpoints: Callable[..., Path], family: str) -> None:
    structure = read_structure(checkpoints(family))
    experts, keep = structure.topology.num_experts, structure.topology.num_experts // 2
    weights: dict[tuple[int, int], list[torch.Tensor]] = {}
    for shard in structure.checkpoint.shard_metadata:
        for name, tensor in load_file(structure.checkpoint.path / shard).items():
            row = structure.tensors.get(name)
            if row is None or not row.routed or name.endswith("bias"):
                continue
            for at, one in enumerate(tensor if row.expert is None else [tensor]):
                weights.setdefault((row.layer, at if row.expert is None else row.expert), []).append(one.double())
    made = plan(profile(structure, [random_corpus("a")]), method="aimer", keep=keep, structure=structure)
    for layer, row in enumerate(made.layers):
        scores = []
        for expert in range(experts):
            flat = torch.cat([one.flatten() for one in weights[layer, expert]])
            scores.append(float(flat.abs().mean() / flat.square().mean().sqrt()))
        assert row.kept == sorted(np.argsort(scores, kind="stable")[:keep].tolist())
        np.testing.assert_allclose(row.saliency[ALL_CORPORA], 1 - np.array(scores), atol=1e-9)
    assert made.calibration == {}


def test_mone_is_routing_weight_times_fluctuation(structure: Structure) -> None:
    corpus, model = random_corpus("a", sequences=6, length=20), load_model(structure, dtype="float32")
    made = plan_budgets(
        profile(structure, [corpus], model=model, batch_size=2),
        method="mone",
        keeps=[4],
        model=model,
        structure=structure,
        sample=[corpus],
    )[0]
    for layer, hidden in enumerate(block_inputs(model, structure, corpus)):
        experts, router = model.get_submodule(structure.experts_modules[layer]), routers(model, structure)[layer]
        hidden = hidden.float()
        with torch.inference_mode():
            _, weights, index = router(hidden)
            for expert in range(structure.topology.num_experts):
                rows = (index == expert).any(-1)
                used = float(weights[index == expert].double().sum())
                alone = torch.full((int(rows.sum()), 1), expert)
                outputs = experts(hidden[rows], alone, torch.ones(alone.shape)).double()
                variance = float((outputs - outputs.mean(0)).square().sum(-1).mean()) if len(outputs) else 0.0
                assert made.layers[layer].saliency[ALL_CORPORA][expert] == pytest.approx(used * variance**0.5, rel=1e-4)


def test_votes_of_c_prune_by_hand() -> None:
    """Experts 0 to 2 are alike, 3 and 4 are alone: two clusters of one have a vote each, of the three the nearest."""
    outputs = np.array([[0.0], [1.0], [2.2], [100.0], [200.0]])[:, :, None]
    # The cluster has .6 of the experts: .5 + .6 (e^-.1 - e^.1 / (e^.1 + e^-.1)) = .713. Budget .4: .713 x .4 x 3 = .86
    assert votes(outputs, 2, 3).tolist() == [0, 0, 0, 1, 1]
    assert votes(outputs, 4, 3).tolist() == [0, 1, 0, 1, 1]  # .713 x .8 x 3 = 1.7: one vote, for that nearest to 1.07
    assert votes(np.repeat(outputs, 40, axis=1), 4, 3).tolist() == [0, 2, 0, 2, 2]  # 32 sentences, then 8


def test_c_prune_keeps_what_has_most_votes(structure: Structure) -> None:
    corpus, model = random_corpus("a", sequences=6, length=20), load_model(structure, dtype="float32")
    keeps = [structure.topology.top_k, structure.topology.num_experts - 1]
    made = plan_budgets(
        profile(structure, [corpus], model=model, batch_size=2),
        method="c-prune",
        keeps=keeps,
        clusters=3,
        model=model,
        structure=structure,
        sample=[corpus],
    )
    for keep, one in zip(keeps, made, strict=True):
        for layer, hidden in enumerate(block_inputs(model, structure, corpus)):
            means = torch.stack([batch.mean(0) for batch in hidden.float().split(40)])  # batches of two rows
            experts, outputs = model.get_submodule(structure.experts_modules[layer]), []
            with torch.inference_mode():
                for expert in range(structure.topology.num_experts):
                    index = torch.full((len(means), 1), expert)
                    outputs.append(experts(means, index, torch.ones(len(means), 1)).double().numpy())
            counted = votes(np.stack(outputs), keep, 3)
            best = np.argsort(counted, kind="stable")[::-1][:keep]
            assert one.kept[layer] == sorted(best.tolist())


def test_hc_smoe_keeps_the_middle_of_every_cluster() -> None:
    means = np.array([[0.0], [1.0], [2.2], [50.0], [53.0], [90.0]])
    assert order(means, 3) == [1, 3, 5, 0, 2, 4]  # 0 to 2 around 1.07, then 3 and 4 as near to 51.5, and 5 alone
    assert order(means, 1)[0] == 3  # the mean is 32.7
    assert order(means, 6) == [0, 1, 2, 3, 4, 5]


def test_hc_smoe_clusters_mean_outputs_of_all_tokens(structure: Structure) -> None:
    corpus, model = random_corpus("a", sequences=4, length=20), load_model(structure, dtype="float32")
    keep = structure.topology.num_experts // 2
    keep = max(keep, structure.topology.top_k)
    given = {"model": model, "structure": structure, "sample": [corpus]}
    small = profile(structure, [corpus], model=model, batch_size=2)
    (made,) = plan_budgets(small, method="hc-smoe", keeps=[keep], **given)
    for layer, hidden in enumerate(block_inputs(model, structure, corpus)):
        experts, means = model.get_submodule(structure.experts_modules[layer]), []
        with torch.inference_mode():
            for expert in range(structure.topology.num_experts):
                index = torch.full((len(hidden), 1), expert)
                means.append(experts(hidden.float(), index, torch.ones(len(hidden), 1)).double().mean(0).numpy())
        assert made.kept[layer] == sorted(order(np.stack(means), keep)[:keep])


def test_aimer_drops_what_is_all_zero_first(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    names = [f"model.layers.1.mlp.experts.5.{part}_proj.weight" for part in ("gate", "up", "down")]
    folder = checkpoints("qwen2_moe")
    for name in names:
        folder = spoiled(folder, tmp_path / name, lambda tensors, name=name: tensors[name].zero_())
    structure = read_structure(folder)
    layer = structure.topology.decoder_layers.index(1)
    made = plan(profile(structure, [random_corpus("a")]), method="aimer", keep=11, structure=structure)
    assert sorted(set(range(12)) - set(made.kept[layer])) == [5]


def test_aimer_plans_for_a_size_from_the_command_line(
    checkpoints: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoints("mixtral")
    profile(read_structure(model), [random_corpus("a")]).save(tmp_path / "profile")
    asked = ["plan", tmp_path / "profile", "--method", "aimer", "--budget", "50%", "--model", model]
    assert run(capsys, *asked, "-o", tmp_path / "plan.json")[0] == 0
    assert Plan.load(tmp_path / "plan.json").method == "aimer"


def test_hope_keeps_what_is_required_out_of_its_programme() -> None:
    """Of 1 to 3 the pair 1, 3 goes (2 + 4); with 0 in the programme it would be 0 and 1, and then 2 or 3 by its id."""
    products = np.diag([1.0, 2.0, 3.0, 4.0])
    products[1, 2] = products[2, 1] = 20
    (row,) = hope(with_pairs(products), Budget(2, 4, required=(frozenset([0]),)))
    assert (row.kept, row.required) == ([0, 2], [0])


def test_a_method_that_reads_weights_says_what_it_needs(small_profile: Profile) -> None:
    with pytest.raises(InputError, match="aimer reads the weights: give .*structure"):
        plan(small_profile, method="aimer", keep=6)
