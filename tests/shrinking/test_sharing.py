"""One command that two processes share: stopped, and continued by both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moecover import shrink
from moecover.checkpoints.structure import read_structure
from moecover.corpora.own_text import generate
from moecover.errors import InputError
from moecover.planning.artifact import Plan
from moecover.runtime import cost
from moecover.runtime.world import World
from moecover.shrinking import job, quality
from moecover.shrinking.quality import Quality
from tests.conftest import random_corpus
from tests.support.passes import limit_between
from tests.support.ranks import in_ranks

CORPORA = [random_corpus("a", seed=1, sequences=12), random_corpus("b", seed=2, sequences=12)]


def test_both_go_on_where_they_stopped(
    checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the model's own text cannot be divided, which only the first of them tries."""
    monkeypatch.setitem(quality.QUALITIES, "fast", Quality(6, 6, "ridge", 200, 2, "little"))
    source, repair_of, said = checkpoints("qwen2_moe", moe_intermediate_size=32), job.repair_of, []
    how: dict[str, Any] = {"budget": "50%", "quality": "fast", "dtype": "float32", "batch_size": 2, "progress": False}

    def refused(*arguments: Any, **options: Any) -> None:
        said.append(arguments)
        raise InputError("too little text")

    monkeypatch.setattr("moecover.shrinking.texts.split", refused)
    monkeypatch.setattr("moecover.shrinking.texts.generate", lambda structure, file, **options: file.touch())

    def work(here: World) -> Any:
        return shrink(source, tmp_path / "out", corpora=CORPORA, here=here, **how)

    def stopped(*arguments: Any) -> Any:
        raise InputError("stopped")

    monkeypatch.setattr(job, "repair_of", stopped)
    assert all(str(error).startswith("stopped. Progress saved") for error in in_ranks(monkeypatch, work))
    assert len(said) == 1
    plan = Plan.load(tmp_path / "out-work" / "50pct-auto" / "plan.json")
    monkeypatch.setattr(job, "repair_of", repair_of)
    first, second = in_ranks(monkeypatch, work)
    assert first.pruned.plan == second.pruned.plan == plan
    assert first.verification.equal
    assert second.verification.equal


def test_a_model_that_does_not_fit_in_one_process_writes_no_text_in_any(
    checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "OVERHEAD", 0)
    source = checkpoints("qwen2_moe")
    limit = limit_between(read_structure(source), tokens=16, batch_tokens=8)

    def work(here: World) -> None:
        how: dict[str, Any] = {"batch_size": 1, "memory_limit": (None, limit)[here.rank], "progress": False}
        generate(source, tmp_path / "own.jsonl", sequences=2, length=8, here=here, **how)

    errors = in_ranks(monkeypatch, work)
    assert [type(error) for error in errors] == [InputError, InputError]
    assert all("does not fit into memory, and layer by layer" in str(error) for error in errors), errors
