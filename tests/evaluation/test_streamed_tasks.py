"""Tasks layer by layer: to the last bit what the harness finds in memory, with one read of the weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moecover.checkpoints.shipped import shipped_model
from moecover.checkpoints.structure import Structure, read_structure
from moecover.cli import main as cli
from moecover.corpora.tokenizer import load_tokenizer
from moecover.errors import InputError, MoecoverError
from moecover.evaluation.artifact import Evaluation
from moecover.evaluation.run import evaluate
from moecover.evaluation.task_loading import resolve
from moecover.evaluation.tasks import Tasks
from moecover.planning.masking import masked, masked_layers
from moecover.runtime import cost
from moecover.runtime.loading import load_model
from moecover.runtime.running import unmasked
from moecover.runtime.streaming import Streamed, streamed
from tests.support.tasks import own_task, random_plan


def found_tasks(
    structure: Structure, names: list[str], data: Path, *, batch_size: int = 1, include_path: Path | None = None
) -> Tasks:
    tokenizer = load_tokenizer(structure.checkpoint.path)
    return resolve(names, tokenizer=tokenizer, data_dir=data, include_path=include_path, batch_size=batch_size)


def counted(stream: Streamed, calls: list[str]) -> Streamed:
    """The model, which notes what it loads."""
    load = stream.weights.load

    def noted(prefix: str) -> None:
        calls.append(prefix)
        load(prefix)

    stream.weights.load = noted  # type: ignore[method-assign]
    return stream


@pytest.mark.parametrize(
    "family, batch_size, tied", [("qwen2_moe", 1, False), ("qwen2_moe", 3, True), ("mixtral", 2, False)]
)
def test_tasks_layer_by_layer(
    data: Path, checkpoints: Callable[..., Path], family: str, batch_size: int, tied: bool
) -> None:
    """To the last bit what the harness finds in memory, with one read of the weights for all plans and tasks."""
    structure = read_structure(checkpoints(family, tie_word_embeddings=True) if tied else checkpoints(family))
    plans = {"one": random_plan(structure, 4), "two": random_plan(structure, 5, 1)}
    names, own = ["arc_easy", "blimp", "letters"], own_task(data)
    tasks = found_tasks(structure, names, data, batch_size=batch_size, include_path=own)
    in_memory = evaluate(structure, plans, model=load_model(structure), tasks=tasks)
    tasks = found_tasks(structure, names, data, batch_size=batch_size, include_path=own)
    loads, answered = list[str](), list[int]()
    with streamed(structure) as stream:
        variants = [unmasked, *(masked_layers(stream.module, structure, plan) for plan in plans.values())]
        scored = tasks.score(counted(stream, loads), variants, advance=answered.append)
    assert len(loads) == len(set(loads)) >= structure.topology.num_layers
    assert len(answered) == 3 * tasks.num_requests == 3 * (7 * 3 + 6 * 2 + 7 * 3)
    assert tasks.record == {
        name: {k: v for k, v in one.items() if k != "overlap"} for name, one in in_memory.tasks.items()
    }
    for row, (scores, items) in zip(in_memory.rows, scored, strict=True):
        assert scores == row.tasks
        for name in names:
            assert items[name].keys() == in_memory.items[row.name][name].keys()
            for metric, values in items[name].items():
                np.testing.assert_array_equal(values, in_memory.items[row.name][name][metric])
    # A part after the other gives the same, with a read of the weights for each.
    with streamed(structure, room=400) as stream:
        parts = list[str]()
        again = evaluate(structure, plans, model=counted(stream, parts), tasks=tasks)
    assert len(parts) > 3 * len(loads)
    assert again.rows == in_memory.rows


def test_answers_are_to_the_last_bit(data: Path, checkpoints: Callable[..., Path]) -> None:
    """The log-likelihoods behind the scores: of texts longer than the model's positions, and of one context."""
    structure = read_structure(checkpoints("qwen2_moe", max_position_embeddings=32))
    from lm_eval.models.huggingface import HFLM

    from moecover.evaluation.replayed_tasks import Replay

    tasks = found_tasks(structure, ["arc_easy", "letters"], data, batch_size=2, include_path=own_task(data))
    assert tasks.longest > 32
    plan = random_plan(structure, 4)
    requests = [one for task in tasks.loaded["tasks"].values() for one in task.instances]
    model = load_model(structure)
    with masked(model, structure, plan):
        lm = HFLM(pretrained=model, tokenizer=tasks.tokenizer, batch_size=2, backend="causal")
        expected = lm.loglikelihood(requests)
    with streamed(structure) as stream:
        variants = [unmasked, masked_layers(stream.module, structure, plan)]
        replay = Replay(stream, variants, tokenizer=tasks.tokenizer, batch_size=2)
        replay.variant = 1
        assert replay.loglikelihood(requests) == expected
        replay.variant = 0
        assert replay.loglikelihood(requests) != expected
        with pytest.raises(MoecoverError, match="not deterministic"):
            replay.loglikelihood(requests[1:])


@pytest.mark.parametrize(
    "kind, metric", [("generate_until", "exact_match"), ("loglikelihood_rolling", "word_perplexity")]
)
def test_tasks_that_do_not_run_layer_by_layer(
    data: Path, checkpoints: Callable[..., Path], kind: str, metric: str
) -> None:
    structure = read_structure(checkpoints("mixtral"))
    tasks = found_tasks(structure, ["arc_easy", "letters"], data, include_path=own_task(data, kind, metric))
    loads: list[str] = []
    with (
        streamed(structure) as stream,
        pytest.raises(InputError, match="tasks=letters: .* needs the model in memory"),
    ):
        evaluate(structure, {}, model=counted(stream, loads), tasks=tasks)
    assert loads == []


def test_the_command_layer_by_layer(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = read_structure(shipped_model())
    random_plan(made, 30).save(tmp_path / "half.json")
    command = ["evaluate", str(shipped_model()), "--plan", str(tmp_path / "half.json"), "--tasks", "arc_easy,blimp"]
    command += ["--data-dir", str(data), "--perplexity", "web-heldout", "--windows", "2", "--length", "64"]
    assert cli.main([*command, "-o", str(tmp_path / "whole")]) == 0
    err = capsys.readouterr().err
    assert "scoring tasks: 66 requests in" in err
    assert not re.search(r"\d+%|it/s|Tokenizing", err)  # no bar but ours
    monkeypatch.setattr(cost, "OVERHEAD", 0)
    bare = cost.cost(made, tokens=256, batch_tokens=64, limit=0, head=True)
    limit = (bare.streamed + bare.whole) // 2
    assert cli.main([*command, "--memory-limit", str(limit), "-o", str(tmp_path / "parts")]) == 0
    err = capsys.readouterr().err
    assert "running layer by layer" in err
    assert "scoring tasks: 66 requests in" in err
    whole, parts = Evaluation.load(tmp_path / "whole"), Evaluation.load(tmp_path / "parts")
    assert (parts.rows, parts.tasks) == (whole.rows, whole.tasks)
