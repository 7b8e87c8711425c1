"""Perplexity of GGUF files in llama.cpp: that of transformers on the same weights, for files and for emulated plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moecover.errors import InputError
from moecover.evaluation.artifact import Evaluation, TextResult
from moecover.evaluation.job import evaluate
from moecover.llama import model as llama_model
from moecover.pruning.job import prune
from tests.support.command_line import run
from tests.support.gguf_files import plan_for
from tests.support.gguf_models import convert, needs_llama
from tests.support.tiny import TEXT

pytestmark = needs_llama
KEPT = [[0, 1, 4, 5, 9, 11], [2, 3, 6, 7, 8, 10]]


def assert_close(found: TextResult, expected: TextResult) -> None:
    assert (found.tokens, found.windows) == (expected.tokens, expected.windows)
    assert found.nll == pytest.approx(expected.nll, abs=1e-5)
    assert (found.kl is None) == (expected.kl is None)
    assert found.kl == pytest.approx(expected.kl, abs=1e-5)
    assert found.top1 == expected.top1


def test_numbers_are_those_of_transformers_for_model_plan_and_pruned_file(
    converted: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Windows take several chunks; the last one is shorter."""
    monkeypatch.setattr(llama_model, "CHUNK", 20)
    model, text, plan = converted("deepseek_v3"), tmp_path / "text.txt", tmp_path / "half.json"
    text.write_text((TEXT + "größe, <end> and 専門家.\n") * 8)
    plan_for(KEPT).save(plan)
    file = prune(model, plan, tmp_path / "cut.gguf", progress=False).output
    near = convert(model.with_name("checkpoint"), tmp_path / "near.gguf", experts="F16")
    options = ["--perplexity", f"text={text}", "--length", "48", "--plan", plan]
    arguments = ("evaluate", model, *options, "--file", file, "--file", near, "-o", tmp_path / "out")
    assert run(capsys, *arguments)[0] == 0
    found = Evaluation.load(tmp_path / "out")
    checkpoint = model.with_name("checkpoint")
    expected = evaluate(checkpoint, [plan], texts=[f"text={text}"], length=48, dtype="float32", progress=False)
    assert found.texts["text"]["sha256"] == expected.texts["text"]["sha256"]
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["full", "half", "cut", "near"]
    for name, of_transformers in (("full", 0), ("half", 1), ("cut", 1)):
        assert_close(rows[name].perplexity["text"], expected.rows[of_transformers].perplexity["text"])
    assert (rows["cut"].keep, rows["cut"].experts) == (rows["half"].keep, rows["half"].experts) == (6, 12)
    assert rows["cut"].plan is not None
    assert rows["cut"].num_bytes == rows["half"].num_bytes < rows["full"].num_bytes
    assert rows["near"].perplexity["text"].kl == pytest.approx(0, abs=1e-3)
    assert rows["near"].num_bytes < rows["full"].num_bytes


def test_what_has_no_use_is_refused(converted: Callable[..., Path], tmp_path: Path) -> None:
    model, checkpoint, text = (
        converted("deepseek_v3"),
        converted("deepseek_v3").with_name("checkpoint"),
        tmp_path / "t.txt",
    )
    text.write_text(TEXT)
    for arguments, message in (
        ({"tasks": ["piqa"]}, "tasks has no use here: .* run on a server: llama-server"),
        ({"batch_size": 4}, "batch_size has no use here"),
        ({"files": [checkpoint]}, "rows from files are for GGUF"),
        ({"files": [converted("qwen3_moe"), converted("qwen3_moe")]}, "a row qwen3_moe already. Rename"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(model, texts=[f"t={text}"], progress=False, **arguments)
    with pytest.raises(InputError, match="rows from files are for GGUF"):
        evaluate(checkpoint, texts=[f"t={text}"], files=[model], progress=False)
