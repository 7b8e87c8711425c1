"""Tasks in memory: against the harness's own command on the written checkpoint; tasks with parts or generated text."""

from __future__ import annotations

from pathlib import Path

import pytest

from moecover.checkpoints.shipped import shipped_model
from moecover.checkpoints.structure import read_structure
from moecover.cli import main as cli
from moecover.corpora.tokenizer import load_tokenizer
from moecover.evaluation.artifact import Evaluation
from moecover.evaluation.harness import all_tasks
from moecover.evaluation.task_loading import resolve
from moecover.pruning.writer import prune
from moecover.runtime.loading import load_model
from moecover.runtime.running import InMemory, unmasked
from tests.support.tasks import random_plan, write_rows


def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tasks of an emulated plan are what the harness finds on the written checkpoint, document by document."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    made = read_structure(shipped_model())
    plan = random_plan(made, 30)
    plan.save(tmp_path / "half.json")
    command = ["evaluate", str(shipped_model()), "--plan", str(tmp_path / "half.json"), "--tasks", "arc_easy,blimp"]
    given = ["--data-dir", str(data), "--batch-size", "2", "-o", str(tmp_path / "e"), "-q"]
    assert cli.main([*command, *given]) == 0
    assert "arc_easy acc" in capsys.readouterr().out
    found = Evaluation.load(tmp_path / "e")
    assert found.tasks["arc_easy"]["items"] == 7
    assert found.tasks["blimp"]["parts"] == 2
    written = prune(made, plan, tmp_path / "half")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "local.yaml").write_text(f"""include: {all_tasks().task_index["arc_easy"].yaml_path}
task: local_arc
dataset_path: json
dataset_name: null
training_split: null
dataset_kwargs: {{data_files: {{validation: {data}/arc_easy/validation.jsonl, test: {data}/arc_easy/test.jsonl}}}}
""")
    theirs = simple_evaluate(
        model="hf",
        model_args=f"pretrained={written},dtype=auto",
        tasks=["local_arc"],
        batch_size=2,
        device="cpu",
        task_manager=TaskManager(include_path=str(tmp_path / "own"), include_defaults=False),
    )
    assert theirs is not None
    for metric in ("acc", "acc_norm"):
        ours = found.rows[1].tasks["arc_easy"][metric]
        assert ours.value == theirs["results"]["local_arc"][f"{metric},none"]
        assert ours.stderr == theirs["results"]["local_arc"][f"{metric}_stderr,none"]
        items = [float(one[metric]) for one in sorted(theirs["samples"]["local_arc"], key=lambda one: one["doc_id"])]
        assert found.items["half"]["arc_easy"][metric].tolist() == items


def test_tasks_with_parts_of_their_own_weights(data: Path) -> None:
    """mmlu: the harness weighs its parts by their sizes, which is the mean of all items."""
    rows = [
        {"subject": s, "question": f"Which is {i}?", "choices": ["one", "two", "red", f"{i}"], "answer": i % 4}
        for s, n in (("anatomy", 2), ("astronomy", 7))
        for i in range(n)
    ]
    write_rows(data / "mmlu", test=rows, dev=rows[:1])
    made = read_structure(shipped_model())
    tasks = resolve(["mmlu"], tokenizer=load_tokenizer(made.checkpoint.path), data_dir=data, batch_size=4)
    assert tasks.parts["mmlu"] == ["mmlu_anatomy", "mmlu_astronomy"]
    ((scores, items),) = tasks.score(InMemory(load_model(made), ()), [unmasked])
    assert len(items["mmlu"]["acc"]) == 9
    assert scores["mmlu"]["acc"].value == pytest.approx(items["mmlu"]["acc"].mean())
    assert scores["mmlu"]["acc"].stderr is not None
    assert tasks.record["mmlu"]["items"] == 9
    assert tasks.record["mmlu"]["bos"] == []
    assert len(tasks.texts["mmlu"].tokens) == 9 * 4  # every context with every answer that is scored
    assert tasks.documents()["mmlu"][3].endswith("Which is 1?\nA. one\nB. two\nC. red\nD. 1\nAnswer: B")


def test_tasks_that_generate(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gsm8k: five examples before every question, and two ways to find the answer in what was generated."""
    from lm_eval.models.huggingface import HFLM

    rows = [{"question": f"What is {i} and 2?", "answer": f"It is easy.\n#### {i + 2}"} for i in range(8)]
    write_rows(data / "gsm8k", train=rows[:6], test=rows[6:])
    made = read_structure(shipped_model())
    tasks = resolve(["gsm8k"], tokenizer=load_tokenizer(made.checkpoint.path), data_dir=data, limit=1)
    ((scores, items),) = tasks.score(InMemory(load_model(made), ()), [unmasked])
    metrics = {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert scores["gsm8k"].keys() == items["gsm8k"].keys() == metrics
    expected = {"items": 1, "num_fewshot": 5, "metric": "exact_match,strict-match"}
    assert tasks.record["gsm8k"] | expected == tasks.record["gsm8k"]
    (text,) = tasks.documents()["gsm8k"]
    assert text.count("Question: ") == 6
    assert text.endswith("Question: What is 6 and 2?\nAnswer: It is easy.\n#### 8")
    said = ["I think so.\n#### 8", "It may be 9"]  # the second one has no mark before its answer
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, **kwargs: said[: len(requests)])
    tasks = resolve(["gsm8k"], tokenizer=load_tokenizer(made.checkpoint.path), data_dir=data)
    ((scores, items),) = tasks.score(InMemory(load_model(made), ()), [unmasked])
    assert items["gsm8k"]["exact_match,strict-match"].tolist() == [1, 0]
    assert items["gsm8k"]["exact_match,flexible-extract"].tolist() == [1, 1]
    assert scores["gsm8k"]["exact_match,strict-match"].value == 0.5
