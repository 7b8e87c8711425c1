"""The harness's requests: those longer than the model's positions are counted, answers that are not finite refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moecover.checkpoints.structure import read_structure
from moecover.corpora.tokenizer import load_tokenizer
from moecover.errors import InputError
from moecover.evaluation.artifact import Evaluation
from moecover.evaluation.run import evaluate
from moecover.evaluation.task_loading import resolve
from moecover.runtime.loading import load_model
from moecover.runtime.streaming import streamed
from tests.support.command_line import run
from tests.support.passes import spoiled
from tests.support.tasks import ARC, own_task, write_rows

POSITIONS, LONGER = 40, 2  # positions of the model, questions that do not fit


@pytest.fixture
def questions(data: Path) -> Path:
    """The task files, with questions of about 35 tokens and some that are longer."""
    rows = [{**row, "question": f"{row['question']} {'The mill. ' * 9 * (i < LONGER)}"} for i, row in enumerate(ARC)]
    write_rows(data / "arc_easy", test=rows, validation=rows[:2])
    return data


@pytest.mark.parametrize("by_layer", [False, True])
def test_items_that_are_longer_than_the_positions_are_counted(
    checkpoints: Callable[..., Path], questions: Path, by_layer: bool
) -> None:
    structure = read_structure(checkpoints("qwen2_moe", max_position_embeddings=POSITIONS))
    folder = structure.checkpoint.path
    tasks = resolve(["arc_easy", "blimp"], tokenizer=load_tokenizer(folder), data_dir=questions, batch_size=2)
    if by_layer:
        with streamed(structure) as stream:
            found = evaluate(structure, {}, model=stream, tasks=tasks)
    else:
        found = evaluate(structure, {}, model=load_model(structure), tasks=tasks)
    assert found.tasks["arc_easy"]["cut"] == LONGER
    assert found.tasks["blimp"]["cut"] == 0


def test_items_that_are_cut_before_text_is_generated(checkpoints: Callable[..., Path], data: Path) -> None:
    structure = read_structure(checkpoints("qwen2_moe", max_position_embeddings=300))
    include = own_task(data, "generate_until", "exact_match")
    tokenizer = load_tokenizer(structure.checkpoint.path)
    tasks = resolve(["letters"], tokenizer=tokenizer, include_path=include, limit=3, batch_size=2)
    found = evaluate(structure, {}, model=load_model(structure), tasks=tasks)
    longest = [len(tokenizer(one.args[0])["input_ids"]) for one in tasks.loaded["tasks"]["letters"].instances]
    assert found.tasks["letters"]["cut"] == sum(n > 300 - 256 for n in longest) > 0  # room for 256 new tokens


def test_the_command_says_it(
    checkpoints: Callable[..., Path], questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoints("qwen2_moe", max_position_embeddings=POSITIONS)
    command = ["evaluate", folder, "--tasks", "arc_easy", "--data-dir", questions, "-o", tmp_path / "e"]
    status, _, err = run(capsys, *command)
    assert status == 0
    assert f"note: task arc_easy: {LONGER} of 7 items are longer than the model's positions" in err
    assert json.loads((tmp_path / "e" / "evaluation.json").read_text())["tasks"]["arc_easy"]["cut"] == LONGER
    assert Evaluation.load(tmp_path / "e").tasks["arc_easy"]["cut"] == LONGER


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize(
    "name, kind", [("arc_easy", ""), ("letters", "generate_until"), ("letters", "loglikelihood_rolling")]
)
def test_an_answer_that_is_not_finite_names_task_item_and_place(
    checkpoints: Callable[..., Path], data: Path, tmp_path: Path, name: str, kind: str, by_layer: bool
) -> None:
    if kind and by_layer:
        pytest.skip("needs the model in memory")
    metric = "word_perplexity" if kind == "loglikelihood_rolling" else "exact_match"
    include = own_task(data, kind, metric) if kind else None
    if include and kind == "loglikelihood_rolling":  # scores whole texts
        path = include / "letters.yaml"
        path.write_text(path.read_text().replace("choices.label.index(answerKey)", "question"))
    source = checkpoints("qwen2_moe", max_position_embeddings=300)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][0] = math.nan

    structure = read_structure(spoiled(source, tmp_path / "broken", change))
    tokenizer = load_tokenizer(structure.checkpoint.path)
    given = {"include_path": include} if kind else {"data_dir": data}
    tasks = resolve([name], tokenizer=tokenizer, batch_size=2, **given)
    said = rf"task {name}, item \d: the log.* not finite. the last hidden states .* model.norm.weight holds NaN"
    if by_layer:
        with streamed(structure) as stream, pytest.raises(InputError, match=said):
            evaluate(structure, {}, model=stream, tasks=tasks)
    else:
        with pytest.raises(InputError, match=said):
            evaluate(structure, {}, model=load_model(structure), tasks=tasks)


def test_calibration_on_the_texts_of_a_task_is_said(
    checkpoints: Callable[..., Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoints("qwen2_moe")
    passages = [f"Question: {row['question']}\nAnswer: {row['choices']['text'][0]}" for row in ARC]
    for name, texts in (("same", passages), ("other", ["The river rises in the hills, turns south. " * 9] * 9)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        made = tmp_path / f"p-{name}"
        assert run(capsys, "profile", folder, "--corpus", f"x={path}", "--length", 37, "-o", made)[0] == 0
        assert run(capsys, "plan", made, "--keep", 6, "-o", tmp_path / f"{name}.json")[0] == 0
    command = ["evaluate", folder, "--plan", tmp_path / "same.json", "--plan", tmp_path / "other.json"]
    command += ["--tasks", "arc_easy,blimp", "--data-dir", data, "-o", tmp_path / "e"]
    status, _, err = run(capsys, *command)
    assert status == 0
    assert "of the task arc_easy is also in the calibration text of same: its score says little about" in err
    assert "calibration text of other" not in err
    assert "task blimp is also" not in err
    found = Evaluation.load(tmp_path / "e").tasks
    assert list(found["arc_easy"]["overlap"]) == ["same"]
    assert found["arc_easy"]["overlap"]["same"] > 0.1
    assert found["blimp"]["overlap"] == {}
    about = Evaluation.load(tmp_path / "e").model
    assert about["batch_size"] == 1
    assert about["threads"] == torch.get_num_threads()
    assert about["versions"]["torch"] == torch.__version__
