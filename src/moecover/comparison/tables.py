"""Figures of cells as rows: reads the cells of a run folder, gives the tidy rows of results.csv and means over tasks.

Numbers keep all their digits and there are no times among them: the same cells give the same results.csv.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict, cast

from moecover.comparison.bootstrap import mean_of_tasks
from moecover.comparison.cell_files import CELL, DONE, StoredCell, cell_path, stored_cell
from moecover.comparison.cells import Cell
from moecover.comparison.config import UNMERGED
from moecover.corpora.sources import set_name
from moecover.errors import InputError
from moecover.evaluation.artifact import Evaluation


class TidyRow(TypedDict):
    """One number of one cell, as results.csv has it."""

    model: str
    method: str
    label: str
    saliency: str | None
    calibration: str
    sample: int
    seed: int | None
    merge: str
    repair: str
    retain: float
    keep: int
    width: int | None
    top_k: int | None
    skip: bool | None
    kind: str
    name: str
    metric: str
    value: float
    stderr: float | None
    n: int | None


COLUMNS = tuple(TidyRow.__annotations__)


class ReadCell(NamedTuple):
    """A cell of a run folder: cell.json, and its evaluation unless it failed."""

    record: StoredCell
    evaluation: Evaluation | None


def read_cells(run: Path, cells: Sequence[Cell]) -> list[ReadCell]:
    """The cells that a run folder holds, failed ones included."""
    found: list[ReadCell] = []
    for cell in cells:
        folder = run / cell_path(cell)
        if (folder / CELL).is_file():
            if (record := stored_cell(run, cell)) is None:
                raise InputError(f"{folder / CELL} is damaged. Remove {folder} and run `moecover compare` again")
            found.append(ReadCell(record, Evaluation.load(folder) if record["status"] == DONE else None))
    return found


def mean_of(evaluation: Evaluation) -> tuple[float, float | None] | None:
    """Mean of the main metrics of the tasks and its standard error; None without tasks."""
    (row,) = evaluation.rows
    items = evaluation.items.get(row.name, {})
    return mean_of_tasks({t: items[t][about["metric"]] for t, about in evaluation.tasks.items()}) if items else None


def tidy(cells: Iterable[ReadCell]) -> Iterator[TidyRow]:
    """One row for every number."""
    for record, evaluation in cells:
        if evaluation is None:
            continue
        coordinates: dict[str, object] = {
            "width": None,
            "top_k": None,
            "skip": None,
            "merge": UNMERGED,
            **record,
            "calibration": set_name(record["calibration"]),
        }
        at = {column: coordinates[column] for column in COLUMNS if column in coordinates}
        for kind, name, metric, value, stderr, n in _numbers(evaluation):
            found = {**at, "kind": kind, "name": name, "metric": metric, "value": value, "stderr": stderr, "n": n}
            yield cast("TidyRow", found)


def _numbers(evaluation: Evaluation) -> Iterator[tuple[str, str, str, float, float | None, int | None]]:
    """Kind, name, metric, value, standard error and number of units of every number of a cell."""
    (row,) = evaluation.rows
    yield "size", "checkpoint", "bytes", row.num_bytes, None, None
    for name, text in row.perplexity.items():
        for kind, value in (("perplexity", text.perplexity), ("kl", text.kl), ("top1", text.top1)):
            if value is not None:
                yield kind, name, kind, value, None, text.tokens
    for task, metrics in row.tasks.items():
        for metric, score in metrics.items():
            yield "task", task, metric, score.value, score.stderr, evaluation.tasks[task]["items"]
    if (mean := mean_of(evaluation)) is not None:
        items = sum(t["items"] for t in evaluation.tasks.values())
        yield "mean", f"mean of {len(evaluation.tasks)} tasks", "mean", mean[0], mean[1], items


def csv_text(rows: Iterable[TidyRow]) -> str:
    """The rows as CSV; an empty field for None."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
