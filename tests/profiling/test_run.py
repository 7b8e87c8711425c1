"""Every statistic against a naive reference: token by token, float64, from the tensors on disk."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moecover.checkpoints.structure import Structure, read_structure
from moecover.corpora.batches import batches
from moecover.corpora.packing import load_corpus, make_corpus
from moecover.errors import InputError
from moecover.planning.run import plan
from moecover.profiling.artifact import STATISTICS, Profile
from moecover.profiling.hooks import recording
from moecover.profiling.run import profile
from moecover.profiling.sums import SCORING, scoring_function
from moecover.runtime.loading import load_model, routers
from tests.conftest import random_corpus, write_rows
from tests.support.passes import hooks_of

NAMES = {
    # family: (router, gate, up, down) on disk
    "qwen2_moe": (
        "mlp.gate.weight",
        "mlp.experts.{}.gate_proj.weight",
        "mlp.experts.{}.up_proj.weight",
        "mlp.experts.{}.down_proj.weight",
    ),
    "mixtral": (
        "block_sparse_moe.gate.weight",
        "block_sparse_moe.experts.{}.w1.weight",
        "block_sparse_moe.experts.{}.w3.weight",
        "block_sparse_moe.experts.{}.w2.weight",
    ),
}
NAMES["qwen3_moe"] = NAMES["olmoe"] = NAMES["qwen2_moe"]


def naive_statistics(structure: Structure, corpus, block_inputs: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """The definitions, spelled out: one token and one expert at a time, in float64."""
    topology = structure.topology
    family, experts, k = topology.family, topology.num_experts, topology.top_k
    normalise = family == "mixtral" or structure.checkpoint.config.get("norm_topk_prob", False)
    tensors = {}
    for shard in structure.checkpoint.shard_metadata:
        tensors.update(load_file(structure.checkpoint.path / shard))
    out = {name: np.zeros((len(topology.decoder_layers), experts)) for name in STATISTICS}
    mask = corpus.mask.reshape(-1)
    for layer, decoder_layer in enumerate(topology.decoder_layers):
        prefix = f"model.layers.{decoder_layer}."
        router, *projections = NAMES[family]
        w = tensors[prefix + router].double()
        weights = [[tensors[prefix + name.format(e)].double() for name in projections] for e in range(experts)]
        for token, x in enumerate(block_inputs[layer].double()):
            if not mask[token]:
                continue
            p = torch.softmax(w @ x, -1)
            order = sorted(range(experts), key=lambda e: -p[e].item())[:k]
            g = {e: p[e].item() for e in order}
            if normalise:
                g = {e: v / sum(g.values()) for e, v in g.items()}
            out["num_tokens"][layer] += 1
            out["prob_sum"][layer] += p.numpy()
            for e in order:
                gate, up, down = weights[e]
                y = down @ (torch.nn.functional.silu(gate @ x) * (up @ x))
                norm = y.norm().item()
                out["count"][layer, e] += 1
                out["weight_sum"][layer, e] += g[e]
                out["norm_sum"][layer, e] += norm
                out["weighted_norm_sum"][layer, e] += g[e] * norm
                out["weighted_sq_sum"][layer, e] += (g[e] * norm) ** 2
                out["renorm_weighted_norm_sum"][layer, e] += g[e] / sum(g.values()) * norm
                out["max_abs"][layer, e] = max(out["max_abs"][layer, e], y.abs().max().item())
    return out


def block_inputs(model, structure: Structure, corpus) -> list[torch.Tensor]:
    """Hidden states that enter every MoE block in a plain forward pass, ``[token, hidden]``, row by row."""
    seen: list[list[torch.Tensor]] = [[] for _ in structure.experts_modules]
    handles = [
        model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(
            lambda module, args, i=i: seen[i].append(args[0].flatten(0, 1))
        )
        for i, name in enumerate(structure.experts_modules)
    ]
    with torch.inference_mode():
        for row, keep in zip(corpus.tokens, corpus.mask, strict=True):
            padded = torch.zeros(len(row), model.config.hidden_size, dtype=torch.float64)
            model(torch.from_numpy(row[keep])[None])
            for states in seen:  # put back at the places of the tokens, zeros where there is padding
                placed = padded.clone()
                placed[torch.from_numpy(keep)] = states[-1].double()
                states[-1] = placed
    for handle in handles:
        handle.remove()
    return [torch.cat(states) for states in seen]


def assert_equal_statistics(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], rtol: float = 1e-6) -> None:
    assert set(found) == set(STATISTICS)
    for name in ("count", "num_tokens"):
        assert found[name].dtype == np.int64
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    for name in set(STATISTICS) - {"count", "num_tokens"}:
        assert found[name].dtype == np.float64
        np.testing.assert_allclose(found[name], expected[name], rtol=rtol, atol=1e-9, err_msg=name)


def test_every_statistic_equals_the_naive_reference(structure: Structure) -> None:
    corpus = random_corpus(sequences=5, length=20)
    model = load_model(structure, dtype="float32")
    found = profile(structure, [corpus], model=model, batch_size=2).statistics["random"]
    expected = naive_statistics(structure, corpus, block_inputs(model, structure, corpus))
    assert expected["count"].sum() == corpus.num_tokens * structure.topology.top_k * len(
        structure.topology.decoder_layers
    )
    assert_equal_statistics(found, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_in_no_statistic(structure: Structure, side: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rows = []
    for n in (5, 17, 11, 17, 3):
        ids, pad = rng.integers(1, 300, size=n).tolist(), [0] * (17 - n)
        rows.append(
            {"input_ids": pad + ids, "attention_mask": pad + [1] * n}
            if side == "left"
            else {"input_ids": ids + pad, "attention_mask": [1] * n + pad}
        )
    path = write_rows(tmp_path / "rows.jsonl", rows)
    corpus = load_corpus("rows", path, vocab_size=300, max_length=64)
    assert corpus.num_tokens == 53
    model = load_model(structure, dtype="float32")
    found = profile(structure, [corpus], model=model, batch_size=3).statistics["rows"]
    assert (found["num_tokens"] == 53).all()
    # Padded batches and single rows round the hidden states of float32 differently, so the tolerance is wider here.
    assert_equal_statistics(
        found, naive_statistics(structure, corpus, block_inputs(model, structure, corpus)), rtol=1e-5
    )


def test_rows_without_mask_of_different_lengths_count_every_token_once(structure: Structure, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9, 10, 11, 12]}])
    corpus = load_corpus("rows", path)
    found = profile(structure, [corpus], dtype="float32").statistics["rows"]
    assert (found["count"].sum(1) == 8 * structure.topology.top_k).all()


def test_the_pass_is_the_plain_forward_pass(structure: Structure) -> None:
    """Logits while recording are bit-equal to those without, in bf16 too, and nothing is left on the model."""
    inputs = {"input_ids": torch.from_numpy(random_corpus().tokens)}
    for dtype in ("float32", "bfloat16"):
        model = load_model(structure, dtype=dtype)
        state = [sorted(vars(m)) for m in model.modules()]
        with torch.inference_mode():
            plain = model(**inputs).logits
            with recording(model, structure):
                recorded = model(**inputs).logits
        assert torch.equal(plain, recorded)
        assert [sorted(vars(m)) for m in model.modules()] == state
        assert hooks_of(model) == []


def test_an_error_in_the_pass_leaves_the_model_clean(structure: Structure) -> None:
    model = load_model(structure)
    with pytest.raises(RuntimeError, match="stop"), recording(model, structure):
        raise RuntimeError("stop")
    assert hooks_of(model) == []
    assert not any("post_expert_norm" in vars(m) for m in model.modules())


def test_profiles_of_two_shards_add_up(structure: Structure) -> None:
    corpus = random_corpus(sequences=7)
    whole = profile(structure, [corpus])
    parts = profile(structure, [corpus[:3]]) + profile(structure, [corpus[3:]])
    for name in STATISTICS:
        a, b = whole.statistics["random"][name], parts.statistics["random"][name]
        if name in ("count", "num_tokens", "max_abs"):
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=2e-6)  # another batch shape is another rounding of float32 kernels
    assert len(parts.corpora["random"]) == 2
    both = whole + profile(structure, [random_corpus("other", seed=9)])
    assert set(both.statistics) == {"random", "other"}


def test_equal_batches_add_up_to_the_last_bit(structure: Structure) -> None:
    """One sequence a batch: the same kernels see the same shapes, and only float64 additions remain."""
    corpus = random_corpus(sequences=6)
    whole = profile(structure, [corpus], batch_size=1)
    parts = profile(structure, [corpus[:3]], batch_size=1) + profile(structure, [corpus[3:]], batch_size=1)
    for name in STATISTICS:
        np.testing.assert_allclose(whole.statistics["random"][name], parts.statistics["random"][name], rtol=1e-14)


def test_profiles_of_different_models_do_not_add(checkpoints: Callable[..., Path]) -> None:
    one = profile(read_structure(checkpoints("mixtral")), [random_corpus()])
    two = profile(read_structure(checkpoints("mixtral", seed=1)), [random_corpus()])
    with pytest.raises(InputError, match="different models do not add up"):
        _ = one + two


def test_saved_file_has_the_documented_layout(small_profile: Profile, tmp_path: Path) -> None:
    path = small_profile.save(tmp_path / "p")
    shape = [len(small_profile.topology.decoder_layers), small_profile.topology.num_experts]
    with safe_open(path, framework="pt") as file:
        keys = set(file.keys())
        assert keys == {f"{c}/{s}{part}" for c in "ab" for s in STATISTICS for part in ("", "/parts")}
        for key in keys:
            tensor = file.get_tensor(key)
            assert list(tensor.shape) == ([1, *shape] if key.endswith("/parts") else shape)  # two batches, one part
            counts = {"count", "num_tokens"} & set(key.split("/"))
            assert tensor.dtype == (torch.int64 if counts else torch.float64)
    loaded = Profile.load(tmp_path / "p")
    assert loaded.fingerprint == small_profile.fingerprint
    assert loaded.topology == small_profile.topology
    assert loaded.corpora["a"][0]["sha256"] == random_corpus("a", seed=1).record["sha256"]
    assert {"torch", "transformers", "moecover", "python"} <= loaded.settings["versions"].keys()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda t: t["a/norm_sum"].__setitem__((0, 0), float("nan")), "negative or non-finite"),
        (lambda t: t["a/count"].__setitem__((0, 0), -1), "negative or non-finite"),
        (lambda t: t.pop("b/max_abs"), "b/max_abs is missing"),
        (lambda t: t["b/norm_sum/parts"].fill_(float("inf")), "b/norm_sum/parts holds negative"),
        (lambda t: t.pop("b/norm_sum/parts"), "b/norm_sum/parts is missing"),
    ],
)
def test_damaged_profile_is_refused(small_profile: Profile, tmp_path: Path, spoil, message: str) -> None:
    path = small_profile.save(tmp_path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(InputError, match=message):
        Profile.load(tmp_path)
    path.write_bytes(b"not a profile")
    with pytest.raises(InputError, match="damaged"):
        Profile.load(tmp_path)


def spoiled(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_nan_expert_is_an_error_that_names_layer_and_expert(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    name = "model.layers.2.mlp.experts.5.down_proj.weight"
    folder = spoiled(checkpoints("qwen2_moe"), tmp_path / "m", lambda t: t[name].fill_(float("nan")))
    with pytest.raises(InputError, match=r"decoder layer 2, expert 5: the output is not finite"):
        profile(read_structure(folder), [random_corpus(sequences=20)])


def test_nan_before_the_experts_is_not_blamed_on_an_expert(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    folder = spoiled(checkpoints("qwen2_moe"), tmp_path / "m", lambda t: t[name].fill_(float("nan")))
    with pytest.raises(InputError, match="decoder layer 1: the hidden states that enter the experts are not finite"):
        profile(read_structure(folder), [random_corpus()])


def test_calibration_is_causal(structure: Structure) -> None:
    """Guards against a pass without a causal mask: a change of the last token moves nothing before it."""
    tokens = random_corpus(sequences=1).tokens
    changed = tokens.copy()
    changed[0, -1] = (changed[0, -1] + 7) % 300
    model = load_model(structure, dtype="float32")
    shorter = [make_corpus("c", t[:, :-1], np.ones_like(t[:, :-1], bool), {}) for t in (tokens, changed)]
    whole = [make_corpus("c", t, np.ones_like(t, bool), {}) for t in (tokens, changed)]
    a, b = (block_inputs(model, structure, c) for c in whole)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x[:-1], y[:-1], rtol=0, atol=0)
    one, two = (profile(structure, [c], model=model).statistics["c"] for c in shorter)
    np.testing.assert_array_equal(one["norm_sum"], two["norm_sum"])


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalise", [False, True])
def test_scoring_function_is_recognised(name: str, normalise: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 16) * 2
    scores = torch.softmax(logits, -1) if name == "softmax" else torch.sigmoid(logits)
    weights, index = scores.topk(4)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True) * 2.5
    assert scoring_function(logits, weights, index) == name
    torch.testing.assert_close(SCORING[name](logits), scores)


def test_routers_are_found_and_a_family_that_does_not_fit_is_refused(structure: Structure) -> None:
    model = load_model(structure)
    assert len(routers(model, structure)) == len(structure.topology.decoder_layers)
    model.set_experts_implementation("eager")
    with (
        pytest.raises(InputError, match="do not run through the library's grouped kernel"),
        recording(model, structure),
    ):
        pass


def test_batches_are_trimmed_and_positions_start_at_the_first_token() -> None:
    tokens = np.array([[0, 0, 5, 6], [0, 7, 8, 9]])
    corpus = make_corpus("c", tokens, tokens > 0, {})
    (batch,) = batches(corpus, 2)
    assert batch["input_ids"].tolist() == [[0, 5, 6], [7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 0, 1], [0, 1, 2]]
    (row, _) = batches(corpus, 1)
    assert "attention_mask" not in row
    assert row["input_ids"].tolist() == [[5, 6]]


def test_missing_tensor_is_refused_not_filled_at_random(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    folder = spoiled(checkpoints("qwen2_moe"), tmp_path / "m", lambda t: t.pop("model.norm.weight"))
    with pytest.raises(InputError, match=r"1 tensors are missing in the files, the first is model\.norm\.weight"):
        load_model(read_structure(folder))


def test_unknown_dtype_and_device(structure: Structure) -> None:
    with pytest.raises(InputError, match="unknown dtype=float17"):
        load_model(structure, dtype="float17")
    with pytest.raises(InputError, match="device=nowhere is not available"):
        load_model(structure, device="nowhere")


def test_fingerprint_does_not_depend_on_versions(small_profile: Profile) -> None:
    other = dataclasses.replace(small_profile, settings={})
    assert other.fingerprint == small_profile.fingerprint


def test_nan_router_of_the_last_layer_is_an_error(
    checkpoints: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """Nothing comes after the last layer that could notice it."""
    structure = read_structure(checkpoints(family))
    last = structure.topology.decoder_layers[-1]
    router = next(n for n, t in structure.tensors.items() if not t.routed and f"layers.{last}." in n)
    folder = spoiled(checkpoints(family), tmp_path / "m", lambda t: t[router].fill_(float("nan")))
    with pytest.raises(
        InputError, match=rf"decoder layer {last}: the (router's weights are|hidden states|.*) not finite"
    ):
        profile(read_structure(folder), [random_corpus()])


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_another_kernel_is_refused_not_recorded_wrongly(structure: Structure, implementation: str) -> None:
    model = load_model(structure)
    model.set_experts_implementation(implementation)
    with pytest.raises(InputError, match=f"experts implementation {implementation}"):
        profile(structure, [random_corpus()], model=model)


def test_order_of_corpora_survives_the_file(structure: Structure, tmp_path: Path) -> None:
    """Turns are taken in this order, so a plan from the file must equal one from memory."""
    made = profile(structure, [random_corpus("wiki", seed=2), random_corpus("c4", seed=1)])
    made.save(tmp_path)
    loaded = Profile.load(tmp_path)
    assert list(loaded.statistics) == ["wiki", "c4"]
    top_k, experts = structure.topology.top_k, structure.topology.num_experts
    for keep in range(top_k, experts):
        assert plan(loaded, keep=keep).to_json() == plan(made, keep=keep).to_json()
    swapped = profile(structure, [random_corpus("c4", seed=1), random_corpus("wiki", seed=2)])
    assert swapped.fingerprint != made.fingerprint
    assert next(iter(plan(swapped, keep=top_k).layers[0].protected)) == "c4"
