"""Every statistic against a naive reference: token by token, float64, from the tensors on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moecover.checkpoints.structure import Structure, read_structure
from moecover.corpora.batches import batches
from moecover.corpora.packing import load_corpus, make_corpus
from moecover.errors import InputError
from moecover.profiling.artifact import Profile
from moecover.profiling.run import profile
from moecover.profiling.statistics import STATISTICS
from moecover.profiling.wide import CHANNELS, PAIRS, square
from moecover.runtime.loading import load_model
from tests.conftest import random_corpus, write_rows
from tests.support.passes import spoiled

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


def naive_statistics(model, structure: Structure, corpus) -> dict[str, np.ndarray]:
    """The definitions, spelled out: one token and one expert at a time, in float64, on a plain pass's hidden states."""
    entering, residuals = block_inputs(model, structure, corpus), residual_streams(model, structure, corpus)
    topology = structure.topology
    family, experts, k = topology.family, topology.num_experts, topology.top_k
    normalise = family == "mixtral" or structure.checkpoint.config.get("norm_topk_prob", False)
    tensors = {}
    for shard in structure.checkpoint.shard_metadata:
        tensors.update(load_file(structure.checkpoint.path / shard))
    out = {name: np.zeros((len(topology.decoder_layers), experts)) for name in STATISTICS}
    energy: dict[tuple[int, int], np.ndarray] = {}
    pairs = np.zeros((2, len(topology.decoder_layers), experts, experts))
    mask = corpus.mask.reshape(-1)
    for layer, decoder_layer in enumerate(topology.decoder_layers):
        prefix = f"model.layers.{decoder_layer}."
        router, *projections = NAMES[family]
        w = tensors[prefix + router].double()
        weights = [[tensors[prefix + name.format(e)].double() for name in projections] for e in range(experts)]
        for token, (x, stream) in enumerate(zip(entering[layer].double(), residuals[layer].double(), strict=True)):
            if not mask[token]:
                continue
            p = torch.softmax(w @ x, -1)
            order = sorted(range(experts), key=lambda e: -p[e].item())[:k]
            g = {e: p[e].item() for e in order}
            if normalise:
                g = {e: v / sum(g.values()) for e, v in g.items()}
            out["num_tokens"][layer] += 1
            out["prob_sum"][layer] += p.numpy()
            norms, routed = {}, torch.zeros_like(x)
            for e in order:
                gate, up, down = weights[e]
                h = torch.nn.functional.silu(gate @ x) * (up @ x)
                y = down @ h
                adds = [((g[e] * h[j] * down[:, j]) ** 2).sum().item() for j in range(len(h))]
                energy[layer, e] = energy.get((layer, e), 0) + np.array(adds)
                norm = y.norm().item()
                out["count"][layer, e] += 1
                out["weight_sum"][layer, e] += g[e]
                out["norm_sum"][layer, e] += norm
                out["weighted_norm_sum"][layer, e] += g[e] * norm
                out["weighted_sq_sum"][layer, e] += (g[e] * norm) ** 2
                out["renorm_weighted_norm_sum"][layer, e] += g[e] / sum(g.values()) * norm
                out["norm_sq_sum"][layer, e] += norm**2
                out["max_abs"][layer, e] = max(out["max_abs"][layer, e], y.abs().max().item())
                norms[e], routed = norm, routed + g[e] * y
            turned = stream + routed
            change = max(1 - (stream @ turned / (stream.norm() * turned.norm())).item(), 0)
            for e in order:
                out["change_norm_sum"][layer, e] += g[e] * norms[e] * change
                for other in order:
                    pairs[:, layer, e, other] += 1, g[e] * norms[e] * g[other] * norms[other]
    out[CHANNELS] = np.zeros((len(topology.decoder_layers), experts, len(h)))
    for place, values in energy.items():
        out[CHANNELS][place] = values
    out[PAIRS] = pairs
    return out


def residual_streams(model, structure: Structure, corpus) -> list[torch.Tensor]:
    """Hidden states that the norm before every MoE block is given in a plain forward pass, ``[token, hidden]``."""
    names = [f"model.layers.{number}.post_attention_layernorm" for number in structure.topology.decoder_layers]
    return entering_modules(model, names, corpus)


def block_inputs(model, structure: Structure, corpus) -> list[torch.Tensor]:
    """Hidden states that enter every MoE block in a plain forward pass, ``[token, hidden]``."""
    return entering_modules(model, [name.rpartition(".")[0] for name in structure.experts_modules], corpus)


def entering_modules(model, names: Sequence[str], corpus) -> list[torch.Tensor]:
    """What enters some modules in a plain forward pass, ``[token, hidden]``, row by row."""
    seen: list[list[torch.Tensor]] = [[] for _ in names]
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, i=i: seen[i].append(args[0].flatten(0, 1))
        )
        for i, name in enumerate(names)
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


def recorded(made: Profile, corpus: str) -> dict[str, np.ndarray]:
    """All statistics of a corpus, those of channels and pairs among them."""
    pairs = square(made.pairs[corpus], made.topology.num_experts)
    return {**made.statistics[corpus], CHANNELS: made.channels[corpus], PAIRS: pairs}


def assert_equal_statistics(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], rtol: float = 3e-6) -> None:
    """Equal but for the rounding of float32 kernels, which differs between batch shapes and processors."""
    assert set(found) == {*STATISTICS, CHANNELS, PAIRS}
    for name in ("count", "num_tokens"):
        assert found[name].dtype == np.int64
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    for name in set(found) - {"count", "num_tokens"}:
        assert found[name].dtype == np.float64
        # A channel of few tokens is squared from the rounding of a single h, which may be near 0, a cosine near 1.
        near = 1e-6 * expected[name].max() if name in (CHANNELS, "change_norm_sum") else 1e-9
        np.testing.assert_allclose(found[name], expected[name], rtol=rtol, atol=near, err_msg=name)


def test_every_statistic_equals_the_naive_reference(structure: Structure) -> None:
    corpus = random_corpus(sequences=5, length=20)
    model = load_model(structure, dtype="float32")
    found = recorded(profile(structure, [corpus], model=model, batch_size=2), "random")
    expected = naive_statistics(model, structure, corpus)
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
    found = recorded(profile(structure, [corpus], model=model, batch_size=3), "rows")
    assert (found["num_tokens"] == 53).all()
    # Padded batches and single rows round the hidden states of float32 differently, so the tolerance is wider here.
    assert_equal_statistics(found, naive_statistics(model, structure, corpus), rtol=1e-5)


def test_rows_without_mask_of_different_lengths_count_every_token_once(structure: Structure, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9, 10, 11, 12]}])
    corpus = load_corpus("rows", path)
    found = profile(structure, [corpus], dtype="float32").statistics["rows"]
    assert (found["count"].sum(1) == 8 * structure.topology.top_k).all()


def test_equal_batches_add_up_to_the_last_bit(structure: Structure) -> None:
    """One sequence a batch: the same kernels see the same shapes, and only float64 additions remain."""
    corpus = random_corpus(sequences=6)
    whole = profile(structure, [corpus], batch_size=1)
    parts = profile(structure, [corpus[:3]], batch_size=1) + profile(structure, [corpus[3:]], batch_size=1)
    for name, values in recorded(whole, "random").items():
        np.testing.assert_allclose(values, recorded(parts, "random")[name], rtol=1e-14)


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


def test_batches_are_trimmed_and_positions_start_at_the_first_token() -> None:
    tokens = np.array([[0, 0, 5, 6], [0, 7, 8, 9]])
    corpus = make_corpus("c", tokens, tokens > 0, {})
    (batch,) = batches(corpus, 2)
    assert batch["input_ids"].tolist() == [[0, 5, 6], [7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 0, 1], [0, 1, 2]]
    (row, _) = batches(corpus, 1)
    assert "attention_mask" not in row
    assert row["input_ids"].tolist() == [[5, 6]]


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
