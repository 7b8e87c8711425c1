"""Text that a model writes itself: its distribution, reproducible and resumable, and a corpus like others."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import GenerationConfig

from moecover.checkpoints.shipped import shipped_model
from moecover.checkpoints.structure import read_structure
from moecover.cli.main import main
from moecover.corpora import generation
from moecover.corpora.generation import cache_bytes, first_tokens, generate, write_generated
from moecover.corpora.packing import load_corpus
from moecover.errors import InputError
from moecover.runtime.loading import load_model
from tests.support.tiny import FAMILIES


@pytest.fixture
def model(checkpoints: Callable[..., Path]) -> Any:
    return load_model(read_structure(checkpoints("qwen2_moe")))


def written(checkpoint: Path, path: Path, model: Any, **changed: Any) -> bytes:
    sizes = {"sequences": 10, "length": 12, "seed": 0, "batch_size": 4, **changed}
    write_generated(read_structure(checkpoint), model, path, **sizes)
    return path.read_bytes()


def test_tokens_are_drawn_from_the_model_s_own_distribution(model: Any) -> None:
    """Whatever its generation settings say; their top_k alone would leave most tokens out."""
    theirs = GenerationConfig(
        do_sample=True, temperature=0.3, top_k=5, top_p=0.5, repetition_penalty=2.0, eos_token_id=[7, 9]
    )
    model.generation_config = theirs
    draws = 20_000
    with torch.inference_mode():
        wanted = model(torch.tensor([[3]])).logits[0, -1].double().softmax(-1).numpy()
    found = np.bincount(generate(model, np.array([3]), sequences=draws, length=2, seed=1)[:, 1], minlength=len(wanted))
    assert model.generation_config is theirs
    often = wanted * draws >= 5
    counts, expected = (np.append(v[often], v[~often].sum()) for v in (found, wanted * draws))
    assert often.sum() > 50
    assert chisquare(counts, expected / expected.sum() * draws).pvalue > 0.01


def test_documents_follow_one_another_and_begin_with_any_first_token(model: Any) -> None:
    """The draws of a step, made again from the whole sequence without a cache."""
    model.generation_config.eos_token_id = [250, 251, *range(252, 290)]  # documents are short
    first, ends = np.array([5, 6, 7]), torch.tensor(model.generation_config.eos_token_id)
    rows = generate(model, first, sequences=4, length=40, seed=4)
    evenly = torch.zeros(300)
    evenly[5:8] = 1 / 3
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(4)
        ids = torch.from_numpy(first)[torch.randint(3, (4,))][:, None]
        for _ in range(39):
            shares = model(ids).logits[:, -1].float().softmax(-1)
            shares[torch.isin(ids[:, -1], ends)] = evenly
            ids = torch.cat([ids, torch.multinomial(shares, 1)], 1)
    np.testing.assert_array_equal(rows, ids.numpy())
    ended = np.isin(rows[:, :-1], ends.numpy())
    assert ended.sum() > 10
    assert np.isin(rows[:, 1:][ended], first).all()


def test_the_end_is_the_configuration_s_where_generation_has_none(model: Any) -> None:
    assert generation.ends_of(model) == [0]
    model.generation_config.eos_token_id = None
    assert generation.ends_of(model) == [0]
    model.config.eos_token_id = None
    assert generation.ends_of(model) == []
    assert generate(model, np.arange(300), sequences=2, length=6, seed=0).shape == (2, 6)


def test_first_tokens_are_no_special_ones(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    shipped = read_structure(shipped_model("qwen2-moe-tiny"))
    found = first_tokens(shipped)
    assert 0 not in found  # the end of a document
    assert len(found) == shipped.checkpoint.config["vocab_size"] - 1
    bare = tmp_path / "bare"
    shutil.copytree(checkpoints("mixtral"), bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    np.testing.assert_array_equal(first_tokens(read_structure(bare)), np.arange(300))


def test_the_same_file_again_and_another_for_another_seed(
    checkpoints: Callable[..., Path], model: Any, tmp_path: Path
) -> None:
    checkpoint = checkpoints("qwen2_moe")
    one = written(checkpoint, tmp_path / "a.jsonl", model)
    state = torch.random.get_rng_state()
    assert written(checkpoint, tmp_path / "b.jsonl", model) == one
    assert torch.equal(torch.random.get_rng_state(), state)
    assert written(checkpoint, tmp_path / "c.jsonl", model, seed=1) != one
    rows = [json.loads(line)["input_ids"] for line in one.decode().splitlines()]
    assert [len(row) for row in rows] == [12] * 10
    assert len({tuple(row) for row in rows}) == 10


@pytest.mark.parametrize("damage", ["", '{"input_ids": [1, 2', "nonsense\n"])
def test_an_interrupted_run_goes_on(
    checkpoints: Callable[..., Path], model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    checkpoint, path = checkpoints("qwen2_moe"), tmp_path / "self.jsonl"
    whole = written(checkpoint, tmp_path / "whole.jsonl", model)
    real, calls = generation.generate, list[int]()

    def stopping(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["sequences"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(generation, "generate", stopping)
    with pytest.raises(KeyboardInterrupt) as stopped:
        written(checkpoint, path, model)
    assert not path.exists()
    (draft,) = tmp_path.glob(".self.jsonl.*.partial")
    assert stopped.value.__notes__ == [f"Progress saved in {draft}; rerun the same command to resume"]
    with draft.open("a") as file:
        file.write(damage)
    said, told = list[str](), list[int]()
    assert written(checkpoint, path, model, say=said.append, advance=told.append) == whole
    assert said == ["resuming: 8 of 10 sequences are done"]
    assert calls == [4, 4, 2, 2]
    assert sum(told) == 120
    assert not draft.exists()


def test_a_draft_of_other_inputs_is_not_used(
    checkpoints: Callable[..., Path], model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, path = checkpoints("qwen2_moe"), tmp_path / "self.jsonl"
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(generation, "generate", lambda *a, **k: 1 // 0)
        written(checkpoint, path, model, seed=3)
    (draft,) = tmp_path.glob(".self.jsonl.*.partial")
    said = list[str]()
    assert written(checkpoint, path, model, say=said.append) == written(checkpoint, tmp_path / "b.jsonl", model)
    assert not draft.exists()
    assert said == [f"removing {draft}, which was made from other inputs"]


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v2", "deepseek_v3"])
def test_the_estimate_holds_the_cache(checkpoints: Callable[..., Path], family: str) -> None:
    structure = read_structure(checkpoints(family))
    live: Any = load_model(structure)
    with torch.inference_mode():
        cache = live(torch.zeros(3, 20, dtype=torch.int64), use_cache=True).past_key_values
    real = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    estimate = cache_bytes(structure, tokens=60, itemsize=4)
    assert estimate == real


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_verb_writes_a_corpus_that_a_profile_takes(
    checkpoints: Callable[..., Path], tmp_path: Path, capsys
) -> None:
    path, model = tmp_path / "my text.jsonl", tmp_path / "a model"
    model.symlink_to(shipped_model("qwen2-moe-tiny"))
    status, out, _ = run(capsys, "generate", model, "-o", path, "--sequences", 5, "--length", 24)
    assert status == 0
    assert out.startswith(f"{path}: 5 sequences of 24 tokens")
    assert len(out.splitlines()) == 5  # the beginnings of three, and what comes next
    following = out.splitlines()[-1].removeprefix("next: moecover ")
    assert shlex.split(following) == ["split", str(model), "--corpus", f"self={path}", "-o", "kinds"]
    found = load_corpus("self", path, structure=read_structure(model))
    assert found.tokens.shape == (5, 24)
    status, out, _ = run(
        capsys, "generate", model, "-o", path, "--sequences", 5, "--length", 24, "--overwrite", "--json"
    )
    assert status == 0
    assert json.loads(out)["sha256"] == found.record["sha256"]
    assert run(capsys, "profile", model, "--corpus", f"self={path}", "-o", tmp_path / "profile", "-q")[0] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-o", "OUT/there.jsonl"], "exists. Choose another output, or give --overwrite"),
        (["-o", "OUT/new.txt"], "Give a name that ends in .jsonl"),
        (["-o", "OUT/new.jsonl", "--length", "65"], "--length 65 is above the 64 positions of the model"),
        (["-o", "OUT/new.jsonl", "--length", "1"], "--length 1 is out of range: 2 or more"),
        (["-o", "OUT/new.jsonl", "--sequences", "0"], "--sequences 0 is out of range: 1 or more"),
        (["-o", "OUT/new.jsonl", "--seed", "-1"], "--seed -1 is out of range: 0 or more"),
        (["-o", "OUT/new.jsonl", "--device", "abacus"], "--device abacus is not available"),
    ],
)
def test_what_cannot_be_done_is_said_first(
    checkpoints: Callable[..., Path], tmp_path: Path, capsys, options: list[str], words: str
) -> None:
    (tmp_path / "there.jsonl").write_text("")
    status, _, err = run(
        capsys, "generate", checkpoints("mixtral"), *(o.replace("OUT", str(tmp_path)) for o in options)
    )
    assert status == 2
    assert words in err
    assert [p.name for p in tmp_path.iterdir()] == ["there.jsonl"]


def test_a_model_bigger_than_memory_is_refused_with_a_way_out(
    checkpoints: Callable[..., Path], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moecover.runtime import cost as fitting

    monkeypatch.setattr(fitting, "OVERHEAD", 0)  # of libraries, which this process has loaded
    structure = read_structure(checkpoints("mixtral"))
    sizes = fitting.cost(structure, tokens=8 * 16, batch_tokens=8, limit=0, head=True)
    limit = (sizes.whole + sizes.streamed) // 2 + cache_bytes(structure, tokens=8 * 16, itemsize=4)
    command = ["generate", checkpoints("mixtral"), "-o", tmp_path / "self.jsonl", "--sequences", 8, "--length", 16]
    command += ["--memory-limit", f"{limit}B", "-q"]
    status, _, err = run(capsys, *command)
    assert run(capsys, *command, "--dry-run") == (status, "", err)
    assert status == 2
    assert "does not fit into memory, and layer by layer all of it would be read for every token" in err
    assert not list(tmp_path.iterdir())


def test_a_class_that_cannot_generate_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model), "can_generate", classmethod(lambda cls: False))
    with pytest.raises(InputError, match="Qwen2MoeForCausalLM cannot generate"):
        generate(model, np.array([1]), sequences=1, length=2, seed=0)
