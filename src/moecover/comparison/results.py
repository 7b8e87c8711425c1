"""The results of a comparison: writes results.csv, results.json and results.md from the cells of a run folder.

Reads nothing but the run folder, so the results can be written again at any time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from moecover import text
from moecover.comparison.cell_files import DONE, SCHEMA, StoredCell, read_records
from moecover.comparison.cells import Cell
from moecover.comparison.comparisons import ComparisonRecord, comparisons
from moecover.comparison.losses import LossRecord, losses
from moecover.comparison.markdown import markdown
from moecover.comparison.measures import MeasuredCell
from moecover.comparison.models import ModelRecord, read_models
from moecover.comparison.tables import ReadCell, csv_text, read_cells, tidy
from moecover.corpora.sources import set_name
from moecover.evaluation.artifact import Evaluation
from moecover.evaluation.records import TaskRecord, TextRecord
from moecover.evaluation.task_scores import cut_text
from moecover.evaluation.task_usage import FILE as USAGE
from moecover.files.atomic import write_text
from moecover.files.hashing import sealed
from moecover.planning.artifact import Plan
from moecover.planning.shapes import shape_name

CSV, JSON, MARKDOWN = "results.csv", "results.json", "results.md"
Record = dict[str, Any]  # a row, as evaluation.json has it
RecordType = TypeVar("RecordType", TextRecord, TaskRecord)


class ResultCell(StoredCell):
    """A cell as results.json has it: cell.json, and ``row``, its row of figures, None if it failed."""

    row: Record | None


class Cut(TypedDict):
    """How many items of a task are longer than a model's positions, see `TaskRecord`."""

    model: str
    task: str
    cut: int
    items: int


class Results(TypedDict):
    """The content of results.json.

    Versions, models, calibration corpora (the record of every sample, by name), texts and tasks, which items are longer
    than the positions of which model, cells, comparisons, losses against the full model, ids of failed cells.
    """

    schema: int
    created_by: dict[str, str]
    command: str
    models: list[ModelRecord]
    calibration: dict[str, list[Record]]
    texts: dict[str, TextRecord]
    tasks: dict[str, TaskRecord]
    cut: list[Cut]
    cells: list[ResultCell]
    comparisons: list[ComparisonRecord]
    losses: list[LossRecord]
    failed: list[str]


@dataclass(frozen=True, repr=False)
class Comparison(text.Shown):
    """What a comparison found; shows itself as a table with a row for every cell.

    Attributes:
        run: the run folder.
        results: the content of its results.json.
        made: cells that were computed, the others had been done before.
    """

    run: Path
    results: Results
    made: int

    @property
    def done(self) -> list[str]:
        """Ids of the cells that are done."""
        return [c["id"] for c in self.results["cells"] if c["status"] == DONE]

    @property
    def failures(self) -> dict[str, str]:
        """Why cells failed, by their id."""
        return {c["id"]: c["reason"] or "" for c in self.results["cells"] if c["status"] != DONE}

    def summary(self) -> str:
        failed = f", {len(self.failures)} failed" if self.failures else ""
        return f"{self.run}: {len(self.done)} cells, {self.made} of them new{failed}"

    def rows_shown(self) -> list[dict[str, text.Cell]]:
        """A row for every cell: coordinates, status, perplexity by text and main metric by task."""
        return [self._row(cell) for cell in self.results["cells"]]

    def _row(self, cell: ResultCell) -> dict[str, text.Cell]:
        row = cell["row"] or {"perplexity": {}, "tasks": {}}
        found: dict[str, text.Cell] = {
            "model": cell["model"],
            "method": cell["label"],
            "calibration": set_name(cell["calibration"]),
            "sample": cell["sample"],
            "seed": cell["seed"],
            "experts": cell["keep"],
            "channels": cell.get("width"),
            "status": cell["status"],
        }
        for name in self.results["texts"]:
            found[f"perplexity {name}"] = row["perplexity"].get(name, {}).get("perplexity")
        for task, about in self.results["tasks"].items():
            found[task] = row["tasks"].get(task, {}).get(about["metric"], {}).get("value")
        return found


def write_results(run: Path, cells: Sequence[Cell], *, command: str) -> Results:
    """Write the three files from the cells that the run folder holds.

    Args:
        run: the run folder.
        cells: of the grid.
        command: the command line, empty if there was none.

    Returns:
        The content of results.json.

    Raises:
        MoecoverError: the disk is full or the folder cannot be written.
    """
    found = read_cells(run, cells)
    done = [evaluation for _, evaluation in found if evaluation is not None]
    scores = [measured(record, e) for record, e in found if e is not None]
    results: Results = {
        "schema": SCHEMA,
        "created_by": _versions(),
        "command": command,
        "models": read_models(run),
        "calibration": _calibration(run, found),
        "texts": _merged(e.texts for e in done),
        "tasks": _merged({n: _of_any_model(t) for n, t in e.tasks.items()} for e in done),
        "cut": _cut(found),
        "cells": [{**record, "row": asdict(e.rows[0]) if e else None} for record, e in found],
        "comparisons": comparisons(scores),
        "losses": losses(scores),
        "failed": [record["id"] for record, e in found if e is None],
    }
    write_text(run / CSV, csv_text(tidy(found)))
    write_text(run / MARKDOWN, _markdown(run, results, found))
    write_text(run / JSON, json.dumps(sealed(results), indent=1) + "\n")
    return results


def measured(record: StoredCell, evaluation: Evaluation) -> MeasuredCell:
    """A cell as `comparisons` takes it."""
    (row,) = evaluation.rows
    return MeasuredCell(
        model=record["model"],
        method=record["method"],
        label=record["label"],
        retain=record["retain"],
        calibration=tuple(record["calibration"]),
        sample=record["sample"],
        seed=record["seed"],
        num_bytes=row.num_bytes,
        shape=shape_name(record["keep"], record["width"]) if "width" in record else "",
        items={
            task: metrics[evaluation.tasks[task]["metric"]]
            for task, metrics in evaluation.items.get(row.name, {}).items()
        },
        windows=evaluation.windows.get(row.name, {}),
    )


def cut_texts(cut: Iterable[Cut]) -> dict[str, list[str]]:
    """Sentences on items that are longer than a model's positions, by model."""
    found: dict[str, list[str]] = {}
    for one in cut:
        found.setdefault(one["model"], []).append(cut_text(one["task"], one["cut"], one["items"]))
    return found


def _markdown(run: Path, results: Results, found: Sequence[ReadCell]) -> str:
    usages = read_records(run / USAGE) if (run / USAGE).is_file() else []
    sentences: dict[str, list[str]] = {}
    for comparison in results["comparisons"]:
        sentences.setdefault(comparison["model"], []).append(comparison["words"])
    return markdown(
        found,
        command=results["command"],
        models=results["models"],
        texts=list(results["texts"]),
        tasks=results["tasks"],
        notes=cut_texts(results["cut"]),
        usages=usages,
        sentences=sentences,
    )


def _calibration(run: Path, found: Iterable[ReadCell]) -> dict[str, list[Record]]:
    """The records of the calibration text by corpus, from a plan of every model and sample."""
    plans: dict[tuple[object, ...], Path] = {}
    for record, evaluation in found:
        if evaluation is not None and record["plan"] is not None and record["calibration"]:
            plans.setdefault((record["model"], *record["calibration"], record["sample"]), run / record["plan"])
    records: dict[str, list[Record]] = {}
    for path in plans.values():
        for name, samples in Plan.load(path).calibration.items():
            known = records.setdefault(name, [])
            known += [sample for sample in samples if sample not in known]
    return records


def _of_any_model(task: TaskRecord) -> TaskRecord:
    """A task's record without what depends on the model."""
    record = task.copy()
    record.pop("cut", None)
    record.pop("overlap", None)
    return record


def _cut(found: Iterable[ReadCell]) -> list[Cut]:
    """Tasks with items that are longer than a model's positions."""
    by_place: dict[tuple[str, str], Cut] = {}
    for record, evaluation in found:
        for name, task in evaluation.tasks.items() if evaluation else ():
            if cut := task.get("cut"):
                by_place[record["model"], name] = {
                    "model": record["model"],
                    "task": name,
                    "cut": cut,
                    "items": task["items"],
                }
    return list(by_place.values())


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("moecover", "torch", "transformers")}


def _merged(found: Iterable[Mapping[str, RecordType]]) -> dict[str, RecordType]:
    """The records of all evaluations by name; of one name, that of the first evaluation that has it."""
    merged: dict[str, RecordType] = {}
    for one in found:
        merged = {**one, **merged}
    return merged
