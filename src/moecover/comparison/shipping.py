"""Files of a run folder on their way between machines: which a job reads and writes, as messages of bounded size.

Reads files and folders of one run folder, writes them into another one; each appears there when it is complete.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moecover.comparison.cell_files import cell_path, plan_path, repair_path
from moecover.comparison.cells import Cell
from moecover.comparison.jobs import EvaluationJob, Job, PlanJob
from moecover.files.atomic import explained, put_in_place

PIECE = 64 << 20  # bytes of a message at most
ARRIVING = ".arriving"  # a folder within the run folder, of what has not arrived completely


@dataclass(frozen=True)
class Piece:
    """Consecutive bytes of a file.

    Attributes:
        item: the file, or the folder that it lies in, which appears as a whole; a path within the run folder.
        file: path of the file within the item; empty if the item is the file.
        content: the bytes.
        last: whether the item is complete with them.
    """

    item: str
    file: str
    content: bytes
    last: bool


def read_by(job: Job) -> list[str]:
    """Files and folders of the run folder that a job looks for; they need not be there."""
    match job:
        case PlanJob():
            return [job.folder, *map(plan_path, job.cells)]
        case EvaluationJob():
            repairs = [repair_path(cell) for cell in job.cells if cell.repaired]
            return [*(plan_path(cell) for cell in job.cells if cell.calibration), *repairs]
        case _:
            return [job.folder]


def written_by(job: Job) -> list[str]:
    """Files and folders that a job has written when it ends; those of its cells come with the cells."""
    match job:
        case PlanJob():
            return [job.folder, *map(plan_path, job.cells)]
        case EvaluationJob():
            return []
        case _:
            return [job.folder]


def of_cell(cell: Cell) -> list[str]:
    """Files and folders that the evaluation of a cell has written."""
    return [*([] if cell.calibration else [plan_path(cell)]), cell_path(cell)]


def pieces(run: Path, items: Iterable[str]) -> Iterator[Piece]:
    """The files and folders of a run folder that are there, one after the other.

    Raises:
        MoecoverError: a file cannot be read.
    """
    for item in items:
        whole = run / item
        files = sorted(f for f in whole.rglob("*") if f.is_file()) if whole.is_dir() else [whole]
        for file in files if whole.exists() else ():
            name = "" if file == whole else file.relative_to(whole).as_posix()
            with explained(f"reading {file}"), file.open("rb") as source:
                content = source.read(PIECE)
                while more := source.read(PIECE):
                    yield Piece(item, name, content, last=False)
                    content = more
                yield Piece(item, name, content, last=file == files[-1])


class Arrivals:
    """What arrives in a run folder from one sender.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path) -> None:
        self._run, self._folder = run, run / ARRIVING / uuid.uuid4().hex

    def take(self, piece: Piece) -> None:
        """Take a piece, the next one of its sender; an item that is complete takes its place.

        Raises:
            MoecoverError: the disk is full or the folder cannot be written.
        """
        whole, target = self._folder / piece.item, self._run / piece.item
        with explained(f"writing {target}"):
            file = whole / piece.file if piece.file else whole
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("ab") as sink:
                sink.write(piece.content)
            if not piece.last:
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            replaced = self._folder / "replaced"
            put_in_place(whole, target, replaced=replaced) if whole.is_dir() else whole.replace(target)
            shutil.rmtree(replaced, ignore_errors=True)

    def close(self) -> None:
        """Remove what has not arrived completely."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # others arrive
            self._folder.parent.rmdir()
