"""What fits into memory: sizes, limits, spilled hidden states, passes in parts, and the command with a memory limit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moecover.checkpoints.structure import Structure, read_structure
from moecover.cli import main as cli
from moecover.errors import InputError
from moecover.evaluation.run import evaluate
from moecover.profiling.artifact import Profile
from moecover.runtime import cost as fitting_module
from moecover.runtime import layerwise
from moecover.runtime.cost import cost
from moecover.runtime.layerwise import run_in_parts
from moecover.runtime.memory import opened, parse_size
from moecover.runtime.running import unmasked
from moecover.runtime.streaming import Streamed, streamed
from tests.conftest import random_corpus
from tests.support.passes import Stop, limit_between, same, stop_after
from tests.support.tasks import random_plan


@pytest.mark.parametrize("text, expected", [("4GB", 4 * 10**9), ("1.5 GiB", 3 * 2**29), ("100", 100), ("7kb", 7000)])
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "4 apples", "-1GB", "1e9"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(InputError, match="is no size"):
        parse_size(text)


def test_a_limit_that_is_too_small(structure: Structure) -> None:
    given = {"tokens": 64, "batch_tokens": 64, "memory_limit": 1000}
    with pytest.raises(InputError, match="one layer at a time still needs"), opened(structure, **given):
        pass


def test_hidden_states_that_do_not_fit_lie_in_files(
    structure: Structure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting_module, "OVERHEAD", 0)
    bare = cost(structure, tokens=0, batch_tokens=64, limit=0)
    given = {"tokens": (bare.whole - bare.streamed) // (4 * 32 * 4), "batch_tokens": 64}
    made = cost(structure, **given, limit=0)
    limit = made.streamed - made.hidden
    assert made.hidden > 0
    with opened(structure, **given, memory_limit=limit, scratch=tmp_path / "s") as stream:
        assert stream.spill
    with (
        pytest.raises(InputError, match="one layer at a time still needs"),
        opened(structure, **given, memory_limit=limit),
    ):
        pass  # without a folder
    monkeypatch.setattr("moecover.runtime.memory.shutil.disk_usage", lambda path: SimpleNamespace(free=made.hidden))
    with (
        pytest.raises(InputError, match="of scratch disk, 0.0 GB are free"),
        opened(structure, **given, memory_limit=limit, scratch=tmp_path / "s"),
    ):
        pass


@pytest.mark.parametrize("passes", [1, 7, 50])
def test_passes_in_parts(structure: Structure, monkeypatch: pytest.MonkeyPatch, passes: int) -> None:
    """As many at a time as the limit leaves room for, with as many reads of the weights as the estimate says."""
    monkeypatch.setattr(fitting_module, "OVERHEAD", 0)
    monkeypatch.setattr(fitting_module, "THREAD", 1000)
    given = {"tokens": 0, "batch_tokens": 8, "in_parts": (8 * passes, passes)}
    limit = cost(structure, tokens=160, batch_tokens=8, limit=0).streamed
    made = cost(structure, **given, limit=limit)
    assert made.by_layer
    assert made.streamed <= limit
    ids = torch.arange(8).reshape(1, 8)
    loads: list[str] = []
    with opened(structure, **given, memory_limit=limit) as stream:
        assert isinstance(stream, Streamed)
        load = stream.weights.load

        def counted(prefix: str) -> None:
            loads.append(prefix)
            load(prefix)

        monkeypatch.setattr(stream.weights, "load", counted)
        calls = [lambda: stream.module(ids, use_cache=False).logits] * passes
        found = run_in_parts(stream, calls, [8] * passes, within=[unmasked] * passes)
    assert len(found) == passes
    assert all(torch.equal(found[0], other) for other in found[1:])
    reads = loads.count(f"{stream.layers[0]}.")
    assert (reads == 1) == (passes <= 7)
    assert made.read == reads * structure.checkpoint.num_bytes


def test_what_fits_runs_in_memory(structure: Structure, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with opened(structure, tokens=64, batch_tokens=64, say=said.append) as model:
        assert not isinstance(model, Streamed)
    monkeypatch.setattr(fitting_module, "OVERHEAD", 0)
    with opened(
        structure,
        tokens=8,
        batch_tokens=8,
        memory_limit=limit_between(structure, tokens=8, batch_tokens=8),
        say=said.append,
    ) as model:
        assert isinstance(model, Streamed)
    assert said[0].startswith("loading ")
    assert "running layer by layer (the whole model needs" in said[1]


def test_the_command(
    checkpoints: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": list(range(i, i + 30))}) + "\n" for i in range(9)))
    folder = checkpoints("qwen2_moe")
    command = ["profile", str(folder), "--corpus", f"r={rows}", "--batch-size", "2"]
    assert cli.main([*command, "-o", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(fitting_module, "OVERHEAD", 0)
    limited = [
        *command,
        "--memory-limit",
        str(limit_between(read_structure(folder), tokens=270, batch_tokens=60, head=False)),
        "-o",
        str(tmp_path / "p"),
    ]
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(Stop):
            cli.main(limited)
    assert not (tmp_path / "p").exists()
    assert cli.main(limited) == 0
    log = capsys.readouterr().err
    assert "running layer by layer" in log
    assert "resuming: 2 of 3 layers are done" in log
    same(Profile.load(tmp_path / "p"), Profile.load(tmp_path / "whole"))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_libraries_that_are_loaded_do_not_count_again(structure: Structure) -> None:
    """And what libraries prepare for a model is no larger than the model."""
    given = {"tokens": 64, "batch_tokens": 64, "limit": 0}
    fresh, resident = cost(structure, **given), cost(structure, **given, resident=500_000_000)
    full = cost(structure, **given, resident=10**12)
    assert fresh.whole - resident.whole == 500_000_000
    assert full.whole < 10 * structure.checkpoint.num_bytes
    assert fresh.whole - full.whole == 600_000_000


def test_the_advice_on_a_limit_that_is_too_small_does(structure: Structure) -> None:
    given = {"tokens": 64, "batch_tokens": 64}
    with pytest.raises(InputError) as caught, opened(structure, **given, memory_limit=1000):
        pass
    found = re.search(r"0.00 GB may be used. Give memory_limit=(\S+) or more", str(caught.value))
    assert found is not None
    with opened(structure, **given, memory_limit=parse_size(found[1])):
        pass


def test_passes_that_belong_together_are_in_one_part(structure: Structure, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no part has more passes than threads are allowed; the numbers stay the same."""
    texts = [
        random_corpus("a", sequences=7, length=16, vocab=128),
        random_corpus("b", sequences=2, length=9, vocab=128),
    ]
    plans = {f"p{seed}": random_plan(structure, 4, seed) for seed in range(3)}
    running: list[int] = []
    run = layerwise.run

    def counted(stream: Streamed, calls: list[object], **more: object) -> list[object]:
        running.append(len(calls))
        return run(stream, calls, **more)

    monkeypatch.setattr(layerwise, "run", counted)
    with streamed(structure) as stream:
        once = evaluate(structure, plans, model=stream, texts=texts)
    assert running == [28, 8]
    running.clear()
    monkeypatch.setattr(layerwise, "PASSES", 10)
    with streamed(structure) as stream:
        parts = evaluate(structure, plans, model=stream, texts=texts)
    assert running == [8, 8, 8, 4, 8]
    assert parts.rows == once.rows
    running.clear()
    with streamed(structure, room=16 * 4) as stream:
        assert evaluate(structure, plans, model=stream, texts=texts).rows == once.rows
    assert running == [4] * 7 + [4, 4]
