"""The artefact of stage 5: what an evaluation holds, and its folder (evaluation.json, items.parquet, windows.parquet).

A row is one variant of one model: the model itself, or a plan of it.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecover.errors import InputError
from moecover.evaluation.records import ModelRecord, PlanRecord, TaskRecord, TextRecord
from moecover.evaluation.tables import read_items, read_windows, write_items, write_windows
from moecover.files.atomic import new_folder, write_text
from moecover.files.hashing import HASH, file_hash, sealed, unsealed
from moecover.files.reading import read_json
from moecover.planning.shapes import shape_name
from moecover.text import Cell, Shown

if TYPE_CHECKING:
    from moecover.evaluation.tables import Items, Windows

FILE, ITEMS, WINDOWS = FILES = ("evaluation.json", "items.parquet", "windows.parquet")
FULL = "full"  # name of the row of the model itself
SCHEMA = 1


@dataclass(frozen=True)
class Score:
    """A metric of a task and its standard error, None where the harness gives none."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TextResult:
    """The result of a row on one text.

    Attributes:
        perplexity: exp of ``nll``.
        nll: mean negative log-likelihood of a scored token, in nats.
        tokens: scored tokens.
        windows: windows of text.
        kl: mean over the scored tokens of KL(model itself || row), in nats; None for the model itself.
        top1: share of the scored tokens where row and model itself have the same most likely token; None likewise.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    kl: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class Lost:
    """What a row loses against the model itself: nats a token ``by_text``."""

    by_text: dict[str, float]

    @property
    def mean(self) -> float:
        """The mean over the texts, in nats: of perplexities the geometric one."""
        return statistics.fmean(self.by_text.values())

    @property
    def worst(self) -> str:
        """The text that loses most."""
        return max(self.by_text, key=self.by_text.__getitem__)


@dataclass(frozen=True)
class Row:
    """One variant of a model.

    Attributes:
        name: ``full`` or the plan's name.
        plan: None for the model itself.
        keep: experts per layer that remain.
        experts: experts per layer of the model.
        num_bytes: size of the checkpoint that it stands for.
        perplexity: by text.
        tasks: by task and metric.
    """

    name: str
    plan: PlanRecord | None
    keep: int
    experts: int
    num_bytes: int
    perplexity: dict[str, TextResult] = field(default_factory=dict)
    tasks: dict[str, dict[str, Score]] = field(default_factory=dict)

    @property
    def shape(self) -> str:
        """The experts that remain, of thinner ones with their channels: ``30x32``."""
        return shape_name(self.keep, self.plan.get("width") if self.plan else None)

    def lost(self, full: Row) -> Lost:
        """What it loses on every text against ``full``, the row of the model itself."""
        return Lost({text: one.nll - full.perplexity[text].nll for text, one in self.perplexity.items()})


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """The results of one run of `evaluate`.

    Attributes:
        model: the model that was evaluated.
        texts: record of every held-out text, by name.
        tasks: record of every task, by name.
        rows: one a variant.
        items: by row, task and metric: float64 ``[item]``, in the order of the task's documents.
        windows: by row and text: float64 ``[window, 2]``, summed negative log-likelihood and scored tokens.
    """

    model: ModelRecord
    texts: dict[str, TextRecord] = field(default_factory=dict)
    tasks: dict[str, TaskRecord] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    items: Items = field(default_factory=dict)
    windows: Windows = field(default_factory=dict)

    def summary(self) -> str:
        """Model, number of variants, texts and tasks in one line."""
        number = len(self.rows)
        parts = [self.model["name"], f"{number} variant{'' if number == 1 else 's'}"]
        parts += [
            f"{what}: {', '.join(names)}" for what, names in (("texts", self.texts), ("tasks", self.tasks)) if names
        ]
        return "; ".join(parts)

    def rows_shown(self) -> list[dict[str, Cell]]:
        """One row a variant: experts kept, size in bytes, perplexity and closeness by text, score by task."""
        found = []
        for row in self.rows:
            cells: dict[str, Cell] = {
                "row": row.name,
                "keep": row.keep if row.shape.isdecimal() else row.shape,
                "bytes": row.num_bytes,
            }
            for text in self.texts:
                result = row.perplexity[text]
                cells |= {
                    f"perplexity {text}": result.perplexity,
                    f"KL {text}": result.kl,
                    f"top-1 {text}": result.top1,
                }
            for task, record in self.tasks.items():
                cells[f"{task} {record['metric']}"] = row.tasks[task][record["metric"]].value
            found.append(cells)
        return found

    def to_dict(self) -> dict[str, object]:
        """Everything but items and windows, JSON-ready."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "texts": self.texts,
            "tasks": self.tasks,
            "rows": [asdict(row) for row in self.rows],
        }

    def save(self, folder: Path) -> None:
        """Write the folder, which appears only when it is complete; an existing one is replaced.

        Raises:
            MoecoverError: the disk is full or the folder cannot be written.
        """
        with new_folder(folder) as draft:
            write_items(draft / ITEMS, self.items)
            write_windows(draft / WINDOWS, self.windows)
            content = {**self.to_dict(), "hash": HASH, "files": {f: file_hash(draft / f) for f in (ITEMS, WINDOWS)}}
            write_text(draft / FILE, json.dumps(sealed(content), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Evaluation:
        """Read a folder that `save` wrote.

        Raises:
            InputError: there is none, or it is damaged.
        """
        import pyarrow

        path = folder / FILE
        if not path.is_file():
            raise InputError(f"{folder} holds no {FILE}: it was not written by `moecover evaluate`")
        try:
            content = unsealed(read_json(path, finite=True))
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']}, {SCHEMA} is known")
            for name in (ITEMS, WINDOWS):
                if file_hash(folder / name) != content["files"][name]:
                    raise ValueError(f"{name} was changed since it was written")
            return cls(
                content["model"],
                content["texts"],
                content["tasks"],
                [_row(record) for record in content["rows"]],
                read_items(folder / ITEMS),
                read_windows(folder / WINDOWS),
            )
        except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
            raise InputError(f"{folder} is damaged: {error!r}. Evaluate again") from error


def _row(record: dict[str, Any]) -> Row:
    """A row from its entry in evaluation.json."""
    perplexity = {name: TextResult(**one) for name, one in record["perplexity"].items()}
    tasks = {
        task: {metric: Score(**score) for metric, score in scores.items()} for task, scores in record["tasks"].items()
    }
    return Row(**{**record, "perplexity": perplexity, "tasks": tasks})
