"""Layer by layer: the same numbers as in memory, to the last bit."""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path

import pytest
import torch

from moecover.checkpoints.families import PROVEN_FAMILIES
from moecover.checkpoints.header import TensorEntry
from moecover.checkpoints.structure import Structure, read_structure
from moecover.errors import MoecoverError
from moecover.evaluation.perplexity import perplexity
from moecover.evaluation.run import evaluate
from moecover.planning.masking import masked
from moecover.planning.run import plan, plan_budgets
from moecover.profiling.layer_inputs import sample_of
from moecover.profiling.run import profile
from moecover.pruning.writer import prune
from moecover.runtime import cost as fitting_module
from moecover.runtime.layerwise import run
from moecover.runtime.loading import load_model
from moecover.runtime.shards import Files
from moecover.runtime.streaming import streamed
from moecover.runtime.weights import Weights
from moecover.verification.verify import verify
from tests.conftest import random_corpus
from tests.support import zoo
from tests.support.passes import Stop, corpora, limit_between, same, stop_after

# Types that differ in what they pass from layer to layer, in their attention or in how their experts are stored.
IN_THE_GATE = {
    *("qwen2_moe", "mixtral", "gpt_oss", "deepseek", "deepseek_v3", "gemma4", "llama4_text", "kimi_linear", "jamba"),
    *("bailing_hybrid", "nemotron_h", "granitemoehybrid", "lfm2_moe", "minimax", "qwen3_next", "glm_moe_dsa", "hy_v4"),
    *("dots3_note", "phimoe", "inkling_text", "muse_spark", "step3p7"),
    *("deepseek_v4", "nemotron_h_omni"),
}


@pytest.mark.parametrize(
    "family", [f if f in IN_THE_GATE else pytest.param(f, marks=pytest.mark.slow) for f in PROVEN_FAMILIES]
)
def test_every_family_layer_by_layer(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.make_model(family).save_pretrained(tmp_path / "m", save_original_format=True)
    structure, texts = read_structure(tmp_path / "m"), corpora()
    model = load_model(structure)
    expected = profile(structure, texts, model=model, batch_size=2)
    tokens = [torch.from_numpy(text.tokens) for text in texts]
    with torch.inference_mode():
        logits = [model(input_ids=one, use_cache=False).logits for one in tokens]
    with streamed(structure) as stream:
        calls = [functools.partial(stream.module, input_ids=one, use_cache=False) for one in tokens]
        for one, two in zip(logits, run(stream, calls), strict=True):
            assert torch.equal(one, two.logits)
        same(profile(structure, texts, model=stream, batch_size=2), expected)
        with monkeypatch.context() as patched, pytest.raises(Stop):
            stop_after(patched, 2)
            profile(structure, texts, model=stream, batch_size=2, state=tmp_path / "state")
        said: list[str] = []
        again = profile(structure, texts, model=stream, batch_size=2, state=tmp_path / "state", say=said.append)
        assert said == [f"resuming: 2 of {len(stream.layers)} layers are done"]
        same(again, expected)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "gpt_oss", "deepseek_v3", "granitemoe", "afmoe"])
def test_reading_the_next_layer_in_a_thread(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the next layer's tensors are read while this one computes, and none twice."""
    zoo.make_model(family).save_pretrained(tmp_path / "m", save_original_format=True)
    structure, texts = read_structure(tmp_path / "m"), corpora()
    expected = profile(structure, texts, model=load_model(structure), batch_size=2)
    read_into = Files.read_into
    monkeypatch.setattr("moecover.runtime.streaming.Weights", lambda *args, ahead: Weights(*args, ahead=True))
    threads: dict[str, list[str]] = {}

    def counted(self: Files, entry: TensorEntry, target: torch.Tensor) -> None:
        threads.setdefault(entry.name, []).append(threading.current_thread().name)
        read_into(self, entry, target)

    monkeypatch.setattr(Files, "read_into", counted)
    with streamed(structure) as stream:
        same(profile(structure, texts, model=stream, batch_size=2), expected)
    ahead = [name for name, by in threads.items() if by == ["next layer"]]
    assert ahead
    assert all(len(by) == 1 for by in threads.values())

    def broken(self: Files, entry: TensorEntry, target: torch.Tensor) -> None:
        if entry.name == ahead[-1]:
            raise MoecoverError("cannot be read")
        read_into(self, entry, target)

    monkeypatch.setattr(Files, "read_into", broken)
    with streamed(structure) as stream, pytest.raises(MoecoverError, match="cannot be read"):
        profile(structure, texts, model=stream, batch_size=2)


def test_a_system_that_cannot_be_told_what_will_be_read(structure: Structure, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no `posix_fadvise`."""
    expected = profile(structure, corpora(), batch_size=2)
    monkeypatch.delattr(os, "posix_fadvise")
    with streamed(structure) as stream:
        same(profile(structure, corpora(), model=stream, batch_size=2), expected)


def test_masked_perplexity_layer_by_layer(structure: Structure) -> None:
    text, model = random_corpus("t", sequences=3, length=20, vocab=128), load_model(structure)
    chosen = plan(profile(structure, corpora(), model=model), keep=4)
    with masked(model, structure, chosen):
        expected = perplexity(model, text, batch_size=2)
    with streamed(structure) as stream:
        found = evaluate(structure, {"plan": chosen}, model=stream, texts=[text], batch_size=2)
        assert found.rows[1].perplexity[text.name].perplexity == expected
        assert perplexity(stream, text, batch_size=2) == perplexity(model, text, batch_size=2) != expected


def test_verify_layer_by_layer(structure: Structure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = prune(structure, plan(profile(structure, corpora()), keep=4), tmp_path / "out")
    whole = verify(structure.checkpoint.path, out)
    monkeypatch.setattr(fitting_module, "OVERHEAD", 0)
    monkeypatch.setattr(fitting_module, "COPIES", 2)  # a layer of this model is no larger than its hidden states
    said: list[str] = []
    by_layer = verify(structure.checkpoint.path, out, memory_limit=limit_between(structure), advance=said.append)
    assert any("running layer by layer" in line for line in said)
    assert by_layer == whole


@pytest.mark.parametrize("mode", ["layerwise", "progressive"])
@pytest.mark.parametrize("from_text", [True, False])
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "minimax_m2", "afmoe"])
def test_expert_sparsity_layer_by_layer(family: str, mode: str, from_text: bool, tmp_path: Path) -> None:
    """With a bias that the block hands its router, and a dense layer, among them."""
    zoo.make_model(family).save_pretrained(tmp_path / "m", save_original_format=True)
    structure, texts = read_structure(tmp_path / "m"), corpora()
    model = load_model(structure)
    made = profile(structure, texts, model=model, batch_size=2, keep_inputs=(100, tmp_path / "p"))
    given = {"method": "expert-sparsity", "mode": mode, "keeps": [4, 6], "structure": structure}
    given |= {"sample": sample_of(texts, 100)} if from_text else {}
    expected = plan_budgets(made, model=model, **given)
    with streamed(structure) as stream:
        assert plan_budgets(made, model=stream, **given) == expected
