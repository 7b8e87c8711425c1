"""Documents of tasks in a folder, for machines that do not reach the hub: `LOCAL` names the files of every task.

Only the place that the documents are read from differs: definitions, versions and scoring stay the harness's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moecover.errors import InputError, arg
from moecover.files.reading import parse_json

Rows = Any  # a `datasets.Dataset`, which has no types
GROUP_PREFIX = "files of "  # before a task's name: the harness's group of its parts


def _answer_as_label(rows: Rows) -> Rows:
    return rows.map(lambda row: {"label": int(row["answer"])})


def _gold_as_label(rows: Rows) -> Rows:
    return rows.rename_column("gold", "label")


def _pairs_as_sentences(rows: Rows) -> Rows:
    return rows.rename_columns({"good": "sentence_good", "bad": "sentence_bad"})


@dataclass(frozen=True)
class Local:
    """A task's documents in a folder.

    Attributes:
        files: by split of the harness.
        process: renames the columns of the rows to those that the harness expects.
        part: for a task with parts, the column that names a row's part; the harness's names are task, underscore, part.
        metrics: how the parts are aggregated where that is not their plain mean, in the harness's terms.
    """

    files: Mapping[str, str]
    process: Callable[[Rows], Rows] | None = None
    part: str | None = None
    metrics: Sequence[Mapping[str, Any]] = ()


_BY_SIZE = ({"metric": "acc", "weight_by_size": True},)
LOCAL: dict[str, Local] = {
    "arc_easy": Local({"validation": "arc_easy/validation.jsonl", "test": "arc_easy/test.jsonl"}),
    "arc_challenge": Local({"validation": "arc_challenge/validation.jsonl", "test": "arc_challenge/test.jsonl"}),
    "boolq": Local({"validation": "boolq/validation.jsonl"}, _answer_as_label),
    "hellaswag": Local({"validation": "hellaswag/validation.jsonl"}, _gold_as_label),
    "piqa": Local({"validation": "piqa/validation.jsonl"}),
    "winogrande": Local({"validation": "winogrande/validation.jsonl"}),
    "gsm8k": Local({"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"}),
    "mmlu": Local({"dev": "mmlu/dev.jsonl", "test": "mmlu/test.jsonl"}, part="subject", metrics=_BY_SIZE),
    "blimp": Local({"train": "blimp/blimp.jsonl"}, _pairs_as_sentences, part="uid"),
}


def from_files(name: str, folder: Path, known: Collection[str]) -> dict[str, Any]:
    """The harness's own definition of a task, with documents from files.

    Args:
        name: a key of `LOCAL`.
        folder: holds the files.
        known: names of all tasks of the harness.

    Returns:
        A group as the harness's task manager takes it.

    Raises:
        InputError: a file is missing.
    """
    local = LOCAL[name]
    for relative in local.files.values():
        if not (folder / relative).is_file():
            raise InputError(
                f"{arg('tasks', name)}: {folder / relative} is missing. "
                f"docs/evaluation.md says what {arg('data_dir')} holds"
            )
    files = {split: str(folder / relative) for split, relative in local.files.items()}
    common: dict[str, Any] = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    if "test" not in files or "train" not in files:
        common["training_split"] = None  # the harness's definition names one, which is not scored
    if local.part is None:
        return {"group": GROUP_PREFIX + name, "task": [{"task": name, **common, **_processing(local.process)}]}
    named = {row[local.part] for path in files.values() for row in _rows(Path(path))}
    parts = [
        {"task": f"{name}_{part}", **common, **_processing(local.process, local.part, part)}
        for part in sorted(named)
        if f"{name}_{part}" in known
    ]
    return {"group": GROUP_PREFIX + name, "task": parts}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(parse_json, file)


def _processing(
    process: Callable[[Rows], Rows] | None, column: str = "", value: str = ""
) -> dict[str, Callable[[Rows], Rows]]:
    """The harness's entry for processing documents: rows whose column has a value, with the columns that it expects."""

    def processed(rows: Rows) -> Rows:
        if column:
            rows = rows.select(np.flatnonzero(rows.data.column(column).to_pandas().to_numpy() == value))
        return rows if process is None else process(rows)

    return {} if process is None and not column else {"process_docs": processed}
