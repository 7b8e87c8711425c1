"""Bugs found in other pruning tools, each as a test that this one does not have it.

Bugs that other tests guard against are listed here for completeness: causal calibration and padding
(`test_calibration_is_causal`, `test_padding_is_in_no_statistic`), pruning below top-k and the plan by hand
(`test_plan`), super experts of the wrong layer or score (`test_super_experts_by_hand_behind_a_dense_layer`,
`test_every_method_keeps_the_super_experts`), the seed of the sample
(`test_the_sample_is_seeded_and_without_repeats`), code from a checkpoint (`test_code_of_a_tokenizer_is_never_run`),
stale inputs (`test_a_new_profile_does_not_keep_the_old_ones_inputs`).
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moecover.checkpoints.structure import read_structure
from moecover.cli.main import main
from moecover.corpora.packing import load_corpus, make_corpus
from moecover.errors import InputError
from moecover.planning.methods import METHODS
from moecover.planning.run import plan
from moecover.planning.saliency import SALIENCIES
from moecover.profiling.run import profile
from moecover.pruning.writer import prune
from moecover.runtime.loading import load_model, routers
from moecover.verification.verify import verify
from tests.conftest import random_corpus, write_rows


def cut(checkpoint: Path, keep: int, out: Path) -> Path:
    structure = read_structure(checkpoint)
    return prune(structure, plan(profile(structure, [random_corpus("a")]), keep=keep), out)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "gpt_oss", "mixtral", "olmoe"])
def test_only_routes_that_the_model_took_are_scored(checkpoints: Callable[..., Path], family: str) -> None:
    """REAP section 7: top-k of raw logits re-derived, wrong for sigmoid, bias-corrected, grouped and scaled routers."""
    structure = read_structure(checkpoints(family))
    model, corpus = load_model(structure), random_corpus("a")
    taken: list[dict[str, np.ndarray]] = []

    def note(module, args, output, layer: int) -> None:
        weights, index = output[1].double().numpy(), output[2].numpy()
        for e in range(structure.topology.num_experts):
            taken[layer]["count"][e] += (index == e).sum()
            taken[layer]["weight_sum"][e] += weights[index == e].sum()

    handles = []
    for layer, router in enumerate(routers(model, structure)):
        taken.append({n: np.zeros(structure.topology.num_experts) for n in ("count", "weight_sum")})
        handles.append(router.register_forward_hook(lambda m, a, o, layer=layer: note(m, a, o, layer)))
    with torch.inference_mode():
        model(torch.from_numpy(corpus.tokens), use_cache=False)
    for handle in handles:
        handle.remove()
    found = profile(structure, [corpus], model=model).statistics["a"]
    for layer, expected in enumerate(taken):
        np.testing.assert_array_equal(found["count"][layer], expected["count"])
        np.testing.assert_allclose(found["weight_sum"][layer], expected["weight_sum"], rtol=1e-6)


def test_a_correction_bias_changes_the_routes_in_the_test_model(checkpoints: Callable[..., Path]) -> None:
    """The test above has teeth: without the bias another set of experts would be counted."""
    structure = read_structure(checkpoints("deepseek_v3"))
    model, corpus = load_model(structure), random_corpus("a")
    with_bias = profile(structure, [corpus], model=model).statistics["a"]["count"]
    for router in routers(model, structure):
        router.e_score_correction_bias.zero_()
    without = profile(structure, [corpus], model=model).statistics["a"]["count"]
    assert np.abs(with_bias - without).sum() > 0.1 * with_bias.sum()


def test_the_largest_output_is_absolute(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """REAP bug 9: an output of [-1000, 0.5] is recorded as 0.5."""
    source = checkpoints("olmoe")
    folder = tmp_path / "m"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    structure = read_structure(folder)
    plain = profile(structure, [random_corpus("a")]).statistics["a"]["max_abs"]
    for name in [n for n in tensors if "layers.1" in n and ".experts." in n and "down_proj" in n]:
        tensors[name] = -tensors[name]  # the last layer's outputs change their sign, its inputs stay
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    negated = profile(read_structure(folder), [random_corpus("a")]).statistics["a"]["max_abs"]
    np.testing.assert_array_equal(negated, plain)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "deepseek_v2"])
def test_a_router_with_a_bias_is_pruned_and_proven(
    checkpoints: Callable[..., Path], family: str, tmp_path: Path
) -> None:
    """REAP bug 6 (truth value of a bias), llm-compressor B4 (bias left at its old length, after calibrating)."""
    out = cut(checkpoints(family), 6, tmp_path / "out")
    assert verify(checkpoints(family), out)["equal"]


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "gpt_oss", "mixtral", "qwen3_moe"])
def test_the_output_loads_with_every_weight_and_the_new_count(
    checkpoints: Callable[..., Path], family: str, tmp_path: Path
) -> None:
    """llm-compressor B2 (names that nothing reads, experts random) and B3 (the old count under n_routed_experts)."""
    out = cut(checkpoints(family), 6, tmp_path / "out")
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    raw = json.loads((out / "config.json").read_text())
    counts = [raw[k] for k in ("num_experts", "num_local_experts", "n_routed_experts") if k in raw]
    assert counts
    assert set(counts) == {6}


@pytest.mark.parametrize("saliency", list(SALIENCIES))
@pytest.mark.parametrize("method", ["tb-coverage", "pooled"])
def test_every_name_that_is_offered_works(
    checkpoints: Callable[..., Path], tmp_path: Path, saliency: str, method: str
) -> None:
    """REAP bug 10: names that are accepted, then fail after the whole calibration."""
    source, rows = checkpoints("mixtral"), write_rows(tmp_path / "r.jsonl", [{"input_ids": list(range(9))}] * 3)
    command = ["prune", str(source), "--corpus", f"r={rows}", "--method", method, "--saliency", saliency, "--keep", "4"]
    assert main([*command, "-o", str(tmp_path / "out")]) == 0


def test_a_count_can_be_asked_for(checkpoints: Callable[..., Path]) -> None:
    """REAP bug 2 (--n_experts_to_prune crashes), llm-compressor (40 of 60 cannot be said as a fraction)."""
    structure = read_structure(checkpoints("qwen2_moe"))
    made = profile(structure, [random_corpus("a")])
    for keep in range(structure.topology.top_k, structure.topology.num_experts + 1):
        assert plan(made, keep=keep).keep == keep
        assert plan(made, retain=keep / structure.topology.num_experts).keep == keep


@pytest.mark.parametrize("normalised", [False, True])
def test_reap_means_one_thing_whatever_the_model_normalises(checkpoints: Callable[..., Path], normalised: bool) -> None:
    """REAP bug 13: two commands disagree if norm_topk_prob is false. Here reap renormalises, reap-raw does not."""
    structure = read_structure(checkpoints("qwen2_moe", norm_topk_prob=normalised))
    s = profile(structure, [random_corpus("a")], dtype="float32").statistics["a"]
    reap, raw = SALIENCIES["reap"](s), SALIENCIES["reap-raw"](s)
    routed = s["count"] > 0
    np.testing.assert_allclose(reap[routed], s["renorm_weighted_norm_sum"][routed] / s["count"][routed])
    if normalised:
        np.testing.assert_allclose(reap, raw, rtol=1e-6)
    else:
        assert (reap[routed] > raw[routed]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_expert_that_is_not_finite_is_neither_kept_nor_scored_zero(
    checkpoints: Callable[..., Path], tmp_path: Path, bad: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """REAP bug 12 (scored 0 in silence), llm-compressor B6 (NaN ranks first and is kept)."""
    folder = tmp_path / "m"
    folder.mkdir()
    for file in checkpoints("mixtral").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if "layers.1" in n and ".experts.4." in n)
    tensors[name].fill_(bad)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rows = write_rows(tmp_path / "r.jsonl", [{"input_ids": list(range(40))}] * 3)
    command = ["prune", str(folder), "--corpus", f"r={rows}", "--keep", "4", "-o", str(tmp_path / "out")]
    assert main(command) == 2
    assert "decoder layer 1, expert 4: the output is not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_scores_of_other_settings_are_never_used_again(
    checkpoints: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """REAP bug 5: observations found by the names of model and data alone, under another length, count or seed."""
    rows = write_rows(tmp_path / "r.jsonl", [{"input_ids": [(7 * i + j) % 300 for j in range(24)]} for i in range(8)])
    folder, found = tmp_path / "p", []
    for seed in (0, 1):
        command = [
            "profile",
            str(checkpoints("olmoe")),
            "--corpus",
            f"r={rows}",
            "--sequences",
            "4",
            "--seed",
            str(seed),
        ]
        if seed:
            assert main([*command, "-o", str(folder)]) == 2  # what is there is not taken for the new one
            assert "exists" in capsys.readouterr().err
        assert main([*command, "-o", str(folder), "--overwrite", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["fingerprint"])
    assert found[0] != found[1]


def test_corpora_are_all_used_and_kept_apart(checkpoints: Callable[..., Path]) -> None:
    """REAP issue 6: of several categories only the last one's scores are loaded."""
    structure = read_structure(checkpoints("olmoe"))
    both = profile(structure, [random_corpus("a", seed=1), random_corpus("b", seed=2)], dtype="float32")
    for name, seed in (("a", 1), ("b", 2)):
        alone = profile(structure, [random_corpus(name, seed=seed)], dtype="float32")
        np.testing.assert_array_equal(both.statistics[name]["count"], alone.statistics[name]["count"])
    assert (both.statistics["a"]["count"] != both.statistics["b"]["count"]).any()


def test_no_token_is_thrown_away_or_added_in_batches(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """llm-compressor B7: two rows a batch lose 13 of 101 tokens, or count 114."""
    structure = read_structure(checkpoints("qwen3_moe"))
    rows = write_rows(tmp_path / "r.jsonl", [{"input_ids": list(range(n))} for n in (20, 31, 13, 37)])
    corpus = load_corpus("r", rows, structure=structure)
    for batch_size in (1, 2, 3, 4):
        s = profile(structure, [corpus], batch_size=batch_size).statistics["r"]
        assert (s["count"].sum(1) == 101 * structure.topology.top_k).all()


def test_more_sequences_than_there_are_is_said(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """llm-compressor: 600 samples given, 512 used, in silence."""
    rows = write_rows(tmp_path / "r.jsonl", [{"input_ids": list(range(9))}] * 6)
    structure = read_structure(checkpoints("mixtral"))
    assert load_corpus("r", rows, structure=structure).record["sequences"] == 6
    with pytest.raises(InputError, match="holds 6 rows, 7 are wanted"):
        load_corpus("r", rows, structure=structure, sequences=7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_any_dtype_of_the_files_and_of_the_run(checkpoints: Callable[..., Path], dtype: str) -> None:
    """llm-compressor B9: a model in another dtype than its config fails."""
    stored = read_structure(checkpoints("mixtral", dtype=torch.bfloat16))
    s = profile(stored, [random_corpus("a")], dtype=dtype).statistics["a"]
    assert s["norm_sum"].dtype == np.float64
    assert s["count"].sum() == random_corpus("a").num_tokens * 2 * 2


def test_dead_experts_go_first_and_are_reported(checkpoints: Callable[..., Path]) -> None:
    """llm-compressor B9: dead experts are kept in silence."""
    from moecover.planning.explaining.facts import explain
    from moecover.planning.explaining.text import text_of

    structure = read_structure(checkpoints("qwen2_moe"))
    tokens = np.full((1, 3), 7)
    made = profile(structure, [make_corpus("few", tokens, tokens > 0, {})])
    dead = made.statistics["few"]["count"] == 0
    assert dead.any()
    for method in ("tb-coverage", "pooled"):
        chosen = plan(made, method=method, keep=8)
        for row, lifeless in zip(chosen.layers, dead, strict=True):
            alive = set(np.flatnonzero(~lifeless).tolist())
            assert alive <= set(row.kept) or set(row.kept) <= alive
    facts = explain(plan(made, keep=4), profile=made)
    assert facts["overall"]["never_routed"] == dead.sum()
    assert f"Never routed by any corpus: {dead.sum()} experts" in text_of(facts)


def test_the_plan_keeps_scores_and_provenance(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """llm-compressor writes kept ids alone; another budget needs the whole run again."""
    structure = read_structure(checkpoints("olmoe"))
    made = profile(structure, [random_corpus("a")])
    raw = json.loads(plan(made, keep=4).save(tmp_path / "plan.json").read_text())
    assert raw["profile_fingerprint"] == made.fingerprint
    assert raw["model_fingerprint"] == structure.model_fingerprint
    for row, values in zip(raw["layers"], SALIENCIES["contribution"](made.statistics["a"]), strict=True):
        assert row["saliency"]["a"] == values.tolist()


def test_nothing_is_unpickled(
    checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """REAP bug 14: torch.load with weights_only=False of a predictable file. No error: nothing was unpickled."""

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, never)
    monkeypatch.setattr(torch, "load", never)
    cut(checkpoints("qwen2_moe"), 6, tmp_path / "out")


def test_code_of_a_known_type_is_not_run(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """REAP bug 14: trust_remote_code is always on."""
    folder = tmp_path / "m"
    folder.mkdir()
    for file in checkpoints("mixtral").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    raw = json.loads((folder / "config.json").read_text())
    raw["auto_map"] = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    out = cut(folder, 4, tmp_path / "out")
    assert verify(folder, out)["equal"]
    assert not (tmp_path / "ran").exists()
    assert (out / "code.py").read_bytes() == (folder / "code.py").read_bytes()


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].from_profile])
def test_no_method_depends_on_an_unseeded_choice(checkpoints: Callable[..., Path], method: str) -> None:
    """llm-compressor B8: keep-sets differ between runs."""
    structure = read_structure(checkpoints("qwen2_moe"))
    plans = set()
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        np.random.seed(seed)
        plans.add(plan(profile(structure, [random_corpus("a")]), method=method, keep=6).to_json())
    assert len(plans) == 1
