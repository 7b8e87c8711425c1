"""The files of a cell in the run folder: writes and reads cell.json, names the files of its plan and its repair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from moecover.comparison.cells import Cell, CellRecord
from moecover.errors import InputError
from moecover.evaluation.artifact import Evaluation
from moecover.files.atomic import new_folder, write_text
from moecover.files.hashing import sealed, unsealed
from moecover.files.reading import read_json

SCHEMA = 1
CONFIG = "config.yaml"  # of the run folder
CELL = "cell.json"
Status = Literal["done", "failed"]
DONE: Status = "done"
FAILED: Status = "failed"


class RepairRecord(TypedDict):
    """A cell's merge and repair.

    The kind of repair, the merge where there is one, the calibration tokens that they ran on, and the mean relative
    error before and after.
    """

    kind: str
    merge: NotRequired[str]
    tokens: int
    error_before: float
    error_after: float


class StoredCell(CellRecord):
    """The content of cell.json.

    ``reason`` is why a cell failed, ``wall_s`` the seconds it took, ``plan`` the plan's file within the run folder.
    """

    schema: int
    fingerprint: str
    status: Status
    reason: str | None
    wall_s: float | None
    plan: str | None
    repaired: RepairRecord | None


def plan_path(cell: Cell) -> str:
    """The file of a cell's plan, within the run folder."""
    return f"plans/{cell.id}.json"


def repair_path(cell: Cell) -> str:
    """The folder of the finished layers of a cell's repair, within the run folder; removed when the cell is done."""
    return f"repairs/{cell.id}"


def cell_path(cell: Cell) -> str:
    """The cell's own folder, within the run folder."""
    return f"cells/{cell.id}"


def write_cell(
    run: Path,
    cell: Cell,
    fingerprint: str,
    *,
    evaluation: Evaluation | None = None,
    reason: str | None = None,
    wall_s: float | None = None,
    repair: RepairRecord | None = None,
) -> None:
    """Write a cell's folder, which appears only when complete.

    Args:
        run: the run folder.
        cell: the cell.
        fingerprint: of everything it depends on.
        evaluation: its figures; None for a cell that failed.
        reason: why it failed.
        wall_s: seconds that it took.
        repair: facts on its repair.

    Raises:
        MoecoverError: the disk is full or the folder cannot be written.
    """
    planned = cell.variant is not None and (run / plan_path(cell)).is_file()
    coordinates = cell.to_json()
    record: StoredCell = {
        "schema": SCHEMA,
        **coordinates,
        "fingerprint": fingerprint,
        "status": DONE if evaluation is not None else FAILED,
        "reason": reason,
        "wall_s": None if wall_s is None else round(wall_s, 2),
        "plan": plan_path(cell) if planned else None,
        "repaired": repair,
    }
    with new_folder(run / cell_path(cell)) as folder:
        if evaluation is not None:
            evaluation.save(folder)
        write_text(folder / CELL, json.dumps(sealed(record), indent=1) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The sealed entries of a list that the run folder holds as JSON.

    Raises:
        InputError: it cannot be read, or an entry was changed since it was written.
    """
    try:
        return [unsealed(record) for record in read_json(path)]
    except TypeError as error:
        raise InputError(f"{path} is damaged: it is no list. Remove it and run `moecover compare` again") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}. Remove it and run `moecover compare` again") from error


def finished_cell(run: Path, cell: Cell, fingerprint: str) -> StoredCell | None:
    """cell.json of a cell that is done and has a fingerprint, else None."""
    found = stored_cell(run, cell)
    return found if found is not None and (found["status"], found["fingerprint"]) == (DONE, fingerprint) else None


def stored_cell(run: Path, cell: Cell) -> StoredCell | None:
    """cell.json of a cell, None if there is none or it is damaged."""
    try:
        found = unsealed(read_json(run / cell_path(cell) / CELL))
    except (OSError, ValueError):
        return None
    return cast("StoredCell", found) if {"fingerprint", "status"} <= found.keys() else None
