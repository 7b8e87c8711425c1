"""ExpertSparsity against a naive implementation: routing, losses of all subsets, greedy, progressive; stored inputs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moecover.checkpoints.structure import read_structure
from moecover.corpora.packing import make_corpus
from moecover.errors import InputError
from moecover.planning.run import plan_budgets
from moecover.planning.search.eliminate import eliminate
from moecover.planning.search.exhaust import count_subsets, exhaust, kind_of_search, subsets
from moecover.planning.search.products import Products
from moecover.planning.search.routing import recognise
from moecover.planning.selection import Budget
from moecover.profiling.artifact import Profile
from moecover.profiling.layer_inputs import FILE, open_inputs, sample_of
from moecover.profiling.run import profile
from moecover.runtime.loading import load_model, routers
from moecover.runtime.streaming import streamed
from tests.conftest import random_corpus
from tests.support.naive_search import FAMILIES, SMALL, Case, hidden_of, naive_layer, naive_route


@pytest.fixture(scope="module")
def cases(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    made: dict[str, Case] = {}

    def get(family: str, dtype: str = "float32") -> Case:
        key = family + dtype
        if key not in made:
            structure = read_structure(checkpoints(family, **SMALL.get(family, {})))
            model, folder = load_model(structure, dtype=dtype), tmp_path_factory.mktemp("sparse") / key
            corpora = [random_corpus("a", seed=1), random_corpus("b", seed=2, sequences=4)]
            profile(structure, corpora, model=model, batch_size=2, keep_inputs=(200, folder)).save(folder)
            made[key] = Case(family, structure, model, Profile.load(folder))
        return made[key]

    return get


def naive_outputs(case: Case, layer: int, batch: torch.Tensor, kept: list[int]) -> np.ndarray:
    """Routed output of every token among the kept experts, ``[token, hidden]``."""
    logits, outputs, bias = naive_layer(case, layer, batch)
    found = np.zeros((len(batch), outputs.shape[-1]))
    for token in range(len(batch)):
        for e, w in naive_route(case.family, logits[token], kept, bias, case.structure.topology.top_k).items():
            found[token] += w * outputs[token, e]
    return found


def naive_loss(
    case: Case, layer: int, batches: list[torch.Tensor], kept: list[int], full: list[torch.Tensor] | None = None
) -> float:
    """Of re-routing what enters the layer; the target is the layer's output on what enters it in the full model."""
    every = list(range(case.structure.topology.num_experts))
    return sum(
        float(np.linalg.norm(naive_outputs(case, layer, whole, every) - naive_outputs(case, layer, batch, kept)))
        for batch, whole in zip(batches, full or batches, strict=True)
    )


def naive_greedy(case: Case, layer: int, batches: list[torch.Tensor], keep: int) -> list[int]:
    topology = case.structure.topology
    size, alive = topology.num_experts // topology.num_groups, list(range(topology.num_experts))
    while len(alive) > keep:
        counts = [sum(e // size == g for e in alive) for g in range(topology.num_groups)]
        losses = {
            e: naive_loss(case, layer, batches, [a for a in alive if a != e])
            for e in alive
            if counts[e // size] == max(counts)
        }
        alive.remove(min(losses, key=lambda e: (losses[e], -e)))
    return alive


def products_of(case: Case, layer: int, batches: list[torch.Tensor], target: torch.Tensor | None = None) -> Products:
    router = routers(case.model, case.structure)[layer]
    with torch.inference_mode():
        routing = recognise(case.model, case.structure, router, router, layer, torch.cat(batches))
        logits = torch.cat([router(batch)[0] for batch in batches])
        return Products(
            case.model.get_submodule(case.structure.experts_modules[layer]), routing, batches, logits, target
        )


# ---------------------------------------------------------------------------------------------------- losses and search
@pytest.mark.parametrize(
    ("mode", "keep"),
    [
        *itertools.product(("layerwise", "progressive", "progressive-local"), (6, 2)),
        ("layerwise", 4),
        *(pytest.param(mode, 4, marks=pytest.mark.slow) for mode in ("progressive", "progressive-local")),
    ],
)
def test_tiny_mixtral_all_losses_and_the_choice(cases: Callable[..., Case], keep: int, mode: str) -> None:
    """8 experts, top-2: the losses of all C(8, r) subsets and the best one, every layer, all modes."""
    case = cases("mixtral")
    options = {"model": case.model, "structure": case.structure, "mode": mode}
    (made,) = plan_budgets(case.profile, method="expert-sparsity", keeps=[keep], **options)
    assert [row.search for row in made.layers] == ["exhaustive"] * 2
    before: dict[int, list[int]] = {}
    for layer, row in enumerate(made.layers):
        batches = hidden_of(case, layer, before if mode != "layerwise" else None)
        full = hidden_of(case, layer) if mode == "progressive" else batches
        assert [len(b) for b in batches] == [48, 48, 48, 48]
        every = list(itertools.combinations(range(8), keep))
        alive = torch.zeros(len(every), 8, dtype=torch.bool).scatter_(1, torch.tensor(every), True)
        expected = np.array([naive_loss(case, layer, batches, list(subset), full) for subset in every])
        with torch.inference_mode():
            target = case.model.get_submodule(case.structure.experts_modules[layer].rpartition(".")[0])
            outputs = (
                torch.cat([target(batch[None]).flatten(0, 1) for batch in full]) if mode == "progressive" else None
            )
            found = products_of(case, layer, batches, outputs).losses(alive).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert tuple(row.kept) == every[int(expected.argmin())]
        assert row.loss == pytest.approx(expected.min(), rel=1e-5)
        assert row.tokens == 192
        before[layer] = row.kept
    if mode != "layerwise":  # the second layer saw other inputs than in the full model
        assert not torch.allclose(hidden_of(case, 1)[0], hidden_of(case, 1, before)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_naive_greedy(cases: Callable[..., Case], family: str) -> None:
    case = cases(family)
    topology = case.structure.topology
    step = topology.num_groups
    keeps = [k for k in range(topology.num_experts - step, topology.top_k, -step) if k // step >= 2]
    options = {"model": case.model, "structure": case.structure, "search": "greedy"}
    made = plan_budgets(case.profile, method="expert-sparsity", keeps=keeps, **options)
    for layer in range(len(topology.decoder_layers)):
        batches = case.profile.inputs.layer(layer)[:2]
        small = products_of(case, layer, batches)
        with torch.inference_mode():
            budgets = [Budget(k, topology.num_experts, topology.num_groups) for k in keeps]
            found = eliminate(small, budgets, frozenset())
        assert found == [naive_greedy(case, layer, batches, k) for k in keeps]
        for one, two in itertools.pairwise(made):  # nested
            assert set(two.layers[layer].kept) < set(one.layers[layer].kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_full_models_output_as_the_target(cases: Callable[..., Case], family: str) -> None:
    """Mode progressive, greedily: the losses of dropping one expert, and those of the sets, from scratch."""
    case = cases(family)
    topology = case.structure.topology
    first = list(range(topology.num_experts))
    size = topology.num_experts // topology.num_groups
    cut = {0: [e for e in first if e % size]}
    batches, full = hidden_of(case, 1, cut)[:2], hidden_of(case, 1)[:2]
    with torch.inference_mode():
        target = torch.cat([torch.from_numpy(naive_outputs(case, 1, batch, first)) for batch in full]).float()
        products = products_of(case, 1, batches, target)
        alive = torch.tensor([e % size != 1 for e in first])
        found = products.losses_without(alive)
        for e in alive.nonzero().flatten().tolist():
            kept = [a for a in first if alive[a] and a != e]
            if len(kept) < topology.top_k:
                continue
            without = torch.tensor([[a in kept for a in first]])
            assert found[e].item() == pytest.approx(products.losses(without).item(), rel=1e-8)
            assert found[e].item() == pytest.approx(naive_loss(case, 1, batches, kept, full), rel=1e-5)


def test_progressive_layer_by_layer(cases: Callable[..., Case]) -> None:
    """The same plans where one decoder layer is in memory at a time."""
    case = cases("qwen2_moe")
    for mode in ("progressive", "progressive-local"):
        options = {"method": "expert-sparsity", "keeps": [6, 5], "structure": case.structure, "mode": mode}
        whole = plan_budgets(case.profile, model=case.model, **options)
        with streamed(case.structure) as stream:
            parts = plan_budgets(case.profile, model=stream, **options)
        assert [one.to_json() for one in parts] == [one.to_json() for one in whole]


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_of_dropping_one_equal_those_of_the_sets(cases: Callable[..., Case], family: str) -> None:
    """The incremental update against re-routing from scratch, after several experts have gone."""
    case = cases(family)
    topology = case.structure.topology
    products = products_of(case, 0, case.profile.inputs.layer(0))
    size = topology.num_experts // topology.num_groups
    alive = torch.tensor([e % size not in (1,) for e in range(topology.num_experts)])
    if alive.sum() <= topology.top_k:
        pytest.skip("too few experts left")
    with torch.inference_mode():
        found = products.losses_without(alive)
        for e in alive.nonzero().flatten().tolist():
            without = alive.clone()
            without[e] = False
            kept = without.nonzero().flatten().tolist()
            assert found[e].item() == pytest.approx(products.losses(without[None]).item(), rel=1e-9)
            assert found[e].item() == pytest.approx(naive_loss(case, 0, case.profile.inputs.layer(0), kept), rel=1e-5)


def test_exhaustive_and_greedy_agree_where_greedy_is_optimal(cases: Callable[..., Case]) -> None:
    """Dropping one expert: both try everything."""
    for family in FAMILIES[:4]:
        case = cases(family)
        keep = case.structure.topology.num_experts - 1
        found = [
            plan_budgets(
                case.profile,
                method="expert-sparsity",
                keeps=[keep],
                model=case.model,
                structure=case.structure,
                search=s,
            )
            for s in ("exhaustive", "greedy")
        ]
        assert [row.kept for row in found[0][0].layers] == [row.kept for row in found[1][0].layers]
        assert [row.search for row in found[1][0].layers] == ["greedy"] * len(found[1][0].layers)


def test_the_loss_is_a_sum_over_batches_of_norms(cases: Callable[..., Case]) -> None:
    """Not the norm over all tokens: the same tokens in one batch give another number."""
    case = cases("mixtral")
    batches = case.profile.inputs.layer(0)
    alive = torch.tensor([[True] * 6 + [False] * 2])
    with torch.inference_mode():
        four, one = (products_of(case, 0, b).losses(alive).item() for b in (batches, [torch.cat(batches)]))
    parts = [naive_loss(case, 0, [b], list(range(6))) for b in batches]
    assert four == pytest.approx(sum(parts), rel=1e-5)
    assert one == pytest.approx(sum(p * p for p in parts) ** 0.5, rel=1e-5)


def test_ties_keep_the_lowest_ids(cases: Callable[..., Case]) -> None:
    """Experts that no token is routed to cost nothing: exact ties, decided by the id in both searches."""
    case = cases("mixtral")
    hidden = case.profile.inputs.layer(0)
    router = routers(case.model, case.structure)[0]
    with torch.inference_mode():
        routing = recognise(case.model, case.structure, router, router, 0, torch.cat(hidden))
        logits = torch.cat([router(b)[0] for b in hidden]).clone()
        logits[:, [2, 5, 6]] = -80.0  # never chosen
        products = Products(case.model.get_submodule(case.structure.experts_modules[0]), routing, hidden, logits)
        assert eliminate(products, [Budget(7, 8), Budget(6, 8)], frozenset())[0] == [0, 1, 2, 3, 4, 5, 7]
        assert eliminate(products, [Budget(6, 8)], frozenset()) == [[0, 1, 2, 3, 4, 7]]

        assert exhaust(products, Budget(7, 8), frozenset()) == [0, 1, 2, 3, 4, 5, 7]


def test_the_stated_loss_is_measured_in_the_models_dtype(cases: Callable[..., Case]) -> None:
    """bfloat16 forwards through the model's own block, -inf before softmax, difference in float64."""
    case = cases("mixtral", "bfloat16")
    options = {"model": case.model, "structure": case.structure}
    (made,) = plan_budgets(case.profile, method="expert-sparsity", keeps=[5], **options)
    for layer, row in enumerate(made.layers):
        router: Any = routers(case.model, case.structure)[layer]
        experts = case.model.get_submodule(case.structure.experts_modules[layer])
        total = 0.0
        with torch.inference_mode():
            for batch in case.profile.inputs.layer(layer):
                assert batch.dtype == torch.bfloat16
                outputs = []
                for kept in (range(8), row.kept):
                    logits = torch.nn.functional.linear(batch, router.weight)
                    logits[:, [e for e in range(8) if e not in kept]] = -torch.inf
                    weights, index = torch.softmax(logits.float(), -1).topk(2, -1)
                    outputs.append(experts(batch, index, weights / weights.sum(-1, keepdim=True)).double())
                total += float((outputs[0] - outputs[1]).norm())
        assert row.loss == pytest.approx(total, rel=1e-6)


def test_groups_and_super_experts_in_the_search(cases: Callable[..., Case]) -> None:
    case = cases("deepseek_v3")
    statistics = {c: {n: v.copy() for n, v in s.items()} for c, s in case.profile.statistics.items()}
    options = {"model": case.model, "structure": case.structure}
    (free,) = plan_budgets(case.profile, method="expert-sparsity", keeps=[6], **options)
    dropped = next(e for e in range(9) if e not in free.layers[1].kept)
    statistics["a"]["max_abs"][1, dropped] = 1e9
    extreme = dataclasses.replace(case.profile, statistics=statistics)
    for search in ("exhaustive", "greedy"):
        (made,) = plan_budgets(
            extreme, method="expert-sparsity", keeps=[6], protect_super_experts=True, search=search, **options
        )
        assert dropped in made.layers[1].kept
        assert made.layers[1].required == [dropped]
        assert made.layers[0].kept == free.layers[0].kept or search == "greedy"
        for row in made.layers:
            assert [sum(e // 3 == g for e in row.kept) for g in range(3)] == [2, 2, 2]
    everything = list(subsets(Budget(6, 9, 3), frozenset({dropped})))
    assert len(everything) == 3**2 * 2
    assert count_subsets(Budget(6, 9, 3)) == 27


def test_auto_is_exhaustive_up_to_100_000_subsets() -> None:

    assert count_subsets(Budget(10, 19)) == 92378
    assert kind_of_search(Budget(10, 19), "auto") == "exhaustive"
    assert kind_of_search(Budget(10, 20), "auto") == "greedy"
    with pytest.raises(InputError, match="search=exhaustive would try 1.18e.17 subsets of 60 experts"):
        kind_of_search(Budget(30, 60), "exhaustive")


def test_search_on_text_equals_search_on_the_kept_inputs(cases: Callable[..., Case]) -> None:
    """Directly, layer after layer in lockstep, or from disk: the same numbers."""
    for family in ("qwen2_moe", "deepseek_v3"):
        case = cases(family)
        options = {"model": case.model, "structure": case.structure, "method": "expert-sparsity", "keeps": [6]}
        (disk,) = plan_budgets(case.profile, **options)
        bare = dataclasses.replace(case.profile, inputs=None)
        (direct,) = plan_budgets(bare, sample=case.profile.inputs.sequences(), **options)
        assert direct.to_json() == disk.to_json()


def test_padding_is_in_no_search(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """From disk and from text, padded rows give the plan of the same tokens without padding, in the same batches."""
    structure = read_structure(checkpoints("qwen2_moe"))
    model = load_model(structure, dtype="float32")
    tokens = random_corpus("a", sequences=4).tokens
    mask = np.ones(tokens.shape, dtype=bool)
    mask[:2, :7], mask[2:, 15:] = False, False
    padded = make_corpus("a", tokens, mask, {})
    options = {"method": "expert-sparsity", "keeps": [6], "model": model, "structure": structure}
    profile(structure, [padded], model=model, batch_size=2, keep_inputs=(96, tmp_path / "p")).save(tmp_path / "p")
    made = Profile.load(tmp_path / "p")
    assert made.inputs.batch_tokens == {"a": [34, 30]}
    (disk,), (direct,) = plan_budgets(made, **options), plan_budgets(made, sample=[padded], **options)
    assert disk.to_json() == direct.to_json()
    (progressive,) = plan_budgets(made, mode="progressive", **options)
    assert progressive.layers[0].kept == disk.layers[0].kept
    assert [row.tokens for row in progressive.layers] == [64, 64]
    losses = []
    for rows, start, end in ((slice(0, 2), 7, 24), (slice(2, 4), 0, 15)):
        cut = tokens[rows, start:end]
        alone = make_corpus("a", cut, np.ones(cut.shape, dtype=bool), {})
        profile(structure, [alone], model=model, batch_size=2, keep_inputs=(96, tmp_path / f"{start}"))
        losses.append(open_inputs(tmp_path / f"{start}").layer(1)[0])
    for found, expected in zip(made.inputs.layer(1), losses, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_model_is_as_before(cases: Callable[..., Case]) -> None:
    case = cases("qwen2_moe")
    tokens = torch.from_numpy(random_corpus("x").tokens)
    with torch.inference_mode():
        before = case.model(tokens, use_cache=False).logits
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in case.model.modules()]
        plan_budgets(
            case.profile,
            method="expert-sparsity",
            keeps=[6],
            model=case.model,
            structure=case.structure,
            mode="progressive",
        )
        assert torch.equal(case.model(tokens, use_cache=False).logits, before)
        assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in case.model.modules()] == hooks


def test_an_error_in_a_pass_ends_all_passes(cases: Callable[..., Case], monkeypatch) -> None:
    import threading

    case = cases("mixtral")
    calls, threads = [], set(threading.enumerate())  # other libraries' threads may be there

    def lost(*args, **kwargs):
        calls.append(1)
        raise RuntimeError("lost")

    monkeypatch.setattr(case.model.model.layers[1], "forward", lost)
    monkeypatch.setattr(
        "moecover.planning.search.driver.observe_calls", lambda model, structure, modules, forward: (modules, modules)
    )
    with pytest.raises(RuntimeError, match="lost"):
        plan_budgets(
            case.profile,
            method="expert-sparsity",
            keeps=[6],
            model=case.model,
            structure=case.structure,
            mode="progressive",
        )
    assert len(calls) == 1  # the other batches did not go on
    assert set(threading.enumerate()) <= threads
    assert not any(m._forward_pre_hooks for m in case.model.modules())


# ------------------------------------------------------------------------------------------------------------- refusals
def test_what_a_search_cannot_run_on_is_refused(
    cases: Callable[..., Case], checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    case = cases("mixtral")
    options = {"method": "expert-sparsity", "keeps": [6], "model": case.model, "structure": case.structure}
    with pytest.raises(InputError, match="does not hold. Make it with `moecover profile ... --keep-inputs 8192`"):
        plan_budgets(dataclasses.replace(case.profile, inputs=None), **options)
    other = read_structure(checkpoints("mixtral", num_local_experts=8, seed=5))
    with pytest.raises(InputError, match="the profile is of another model"):
        plan_budgets(case.profile, **{**options, "structure": other})
    sparse = read_structure(checkpoints("phimoe"))
    model = load_model(sparse)
    made = profile(sparse, [random_corpus()], model=model, keep_inputs=(48, tmp_path))
    with pytest.raises(InputError, match="the router of decoder layer 0 of phimoe is of a kind that a search cannot"):
        plan_budgets(made, method="expert-sparsity", keeps=[4], model=model, structure=sparse)


# --------------------------------------------------------------------------------------------------- the sample on disk
def test_inputs_are_what_enters_the_experts_in_order_and_in_batches(cases: Callable[..., Case]) -> None:
    for family in ("mixtral", "deepseek_v3"):
        case = cases(family)
        inputs = case.profile.inputs
        assert inputs.batch_tokens == {"a": [48, 48], "b": [48, 48]}
        assert inputs.num_tokens == 192
        for layer in range(2):
            for found, expected in zip(inputs.layer(layer), hidden_of(case, layer), strict=True):
                assert torch.equal(found, expected)


def test_inputs_leave_padding_out(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    tokens = random_corpus("a", sequences=5).tokens
    mask = np.ones(tokens.shape, dtype=bool)
    mask[0, 20:], mask[1, :7], mask[3, 10:] = False, False, False
    corpus = make_corpus("a", tokens, mask, {})
    made = profile(structure, [corpus], dtype="float32", batch_size=2, keep_inputs=(70, tmp_path))
    made.save(tmp_path)
    inputs = Profile.load(tmp_path).inputs
    assert inputs.batch_tokens == {"a": [37, 24]}  # 20 + 17, then 24; the fourth sequence would make it 71
    rows = [inputs.layer(layer) for layer in range(2)]
    alone = [make_corpus("a", tokens[i : i + 1][:, mask[i]], mask[i : i + 1][:, mask[i]], {}) for i in range(3)]
    model = load_model(structure, dtype="float32")
    for layer in range(2):
        got = torch.cat(rows[layer])
        want = []
        for one in alone:
            folder = tmp_path / f"{layer}-{len(want)}"
            profile(structure, [one], model=model, keep_inputs=(24, folder))
            want += open_inputs(folder).layer(layer)
        torch.testing.assert_close(got, torch.cat(want), rtol=1e-4, atol=1e-5)


def test_the_sample_is_bounded_shared_and_whole_sequences() -> None:
    corpora = [random_corpus("a", sequences=6), random_corpus("b", sequences=2)]
    assert [c.num_tokens for c in sample_of(corpora, 200)] == [96, 48]
    assert [c.num_tokens for c in sample_of(corpora, 48)] == [24, 24]
    with pytest.raises(
        InputError,
        match="keep.inputs.40: 20 tokens a corpus are less than the first sequence of a .24 tokens.. Give 48 or more",
    ):
        sample_of(corpora, 40)


def test_a_new_profile_does_not_keep_the_old_ones_inputs(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """Stale scores reused: a rival's cache does."""
    structure = read_structure(checkpoints("mixtral"))
    first = profile(structure, [random_corpus("a")], keep_inputs=(48, tmp_path))
    first.save(tmp_path)
    assert Profile.load(tmp_path).inputs.num_tokens == 48
    profile(structure, [random_corpus("a", seed=9)]).save(tmp_path)
    assert not (tmp_path / FILE).exists()
    assert Profile.load(tmp_path).inputs is None


def test_inputs_of_something_else_are_refused(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    structure = read_structure(checkpoints("mixtral"))
    for name, seed in (("one", 1), ("two", 2)):
        made = profile(structure, [random_corpus("a", seed=seed)], keep_inputs=(48, tmp_path / name))
        made.save(tmp_path / name)
    shutil.copy(tmp_path / "two" / FILE, tmp_path / "one" / FILE)
    with pytest.raises(InputError, match="does not belong to profile.safetensors"):
        Profile.load(tmp_path / "one")
    (tmp_path / "two" / FILE).write_bytes(b"\x00" * 40)
    with pytest.raises(InputError, match="is damaged"):
        Profile.load(tmp_path / "two")


def test_an_interrupted_pass_leaves_no_inputs(checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch) -> None:
    structure = read_structure(checkpoints("mixtral"))

    def stop(tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(structure, [random_corpus("a")], keep_inputs=(48, tmp_path / "p"), advance=stop)
    assert not (tmp_path / "p").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(total=10, used=9, free=1))
    with pytest.raises(InputError, match="keep.inputs needs 0.00 GB at .* 0.00 GB are free. Keep fewer tokens"):
        profile(structure, [random_corpus("a")], keep_inputs=(48, tmp_path / "p"))


def test_keeping_inputs_changes_no_statistic(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    structure = read_structure(checkpoints("qwen2_moe"))
    corpora = [random_corpus("a", seed=1)]
    one, two = profile(structure, corpora), profile(structure, corpora, keep_inputs=(48, tmp_path))
    assert one.fingerprint == two.fingerprint


def test_plan_json_holds_search_loss_and_tokens(cases: Callable[..., Case], tmp_path: Path) -> None:
    case = cases("mixtral")
    (made,) = plan_budgets(
        case.profile, method="expert-sparsity", keeps=[6], model=case.model, structure=case.structure
    )
    raw = json.loads(made.save(tmp_path / "plan.json").read_text())
    assert raw["options"] == {"mode": "layerwise", "search": "auto"}
    assert all(row["loss"] > 0 and row["search"] == "exhaustive" and row["tokens"] == 192 for row in raw["layers"])
