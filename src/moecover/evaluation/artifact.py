"""The artefact of stage 5: what an evaluation holds, and its folder (evaluation.json, items.parquet, windows.parquet).

A row is one variant of one model: the model itself, or a plan of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.errors import InputError
from moecover.files.atomic import new_folder, write_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

FILE, ITEMS, WINDOWS = "evaluation.json", "items.parquet", "windows.parquet"
FULL = "full"  # name of the row of the model itself


@dataclass(frozen=True)
class Score:
    """A metric of a task and its standard error, None where the harness gives none."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TextResult:
    """What a row gives on one text.

    Attributes:
        perplexity: exp of ``nll``.
        nll: mean negative log-likelihood of a scored token, in nats.
        tokens: scored tokens.
        windows: windows of text.
        kl: mean over the scored tokens of KL(model itself || row), in nats; None for the model itself.
        top1: share of the scored tokens where row and model itself find the same token the most likely; None likewise.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    kl: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class Row:
    """One variant of a model.

    Attributes:
        name: ``full`` or the plan's name.
        plan: method, options, keep, path and fingerprint of the plan; None for the model itself.
        keep: experts per layer that remain.
        experts: experts per layer of the model.
        num_bytes: size of the checkpoint that it stands for.
        perplexity: by text.
        tasks: by task and metric.
    """

    name: str
    plan: dict[str, Any] | None
    keep: int
    experts: int
    num_bytes: int
    perplexity: dict[str, TextResult] = field(default_factory=dict)
    tasks: dict[str, dict[str, Score]] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """What one run of `evaluate` found.

    Attributes:
        model: name, revision, fingerprint, family, dtype, device, num_bytes, experts, top_k, layers.
        texts: by text: its record, windows, tokeniser, and what of the calibration text is in it.
        tasks: by task: version, num_fewshot, items, metrics, metric (the one of the mean), data, harness.
        rows: one a variant.
        items: by row, task and metric: float64 [item], in the order of the task's documents.
        windows: by row and text: float64 [window, 2], summed negative log-likelihood and scored tokens.
    """

    model: dict[str, Any]
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    items: dict[str, dict[str, dict[str, NDArray[np.float64]]]] = field(default_factory=dict)
    windows: dict[str, dict[str, NDArray[np.float64]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything but items and windows, JSON-ready."""
        return {"schema": 1, "model": self.model, "texts": self.texts, "tasks": self.tasks, "rows": [asdict(row) for row in self.rows]}  # fmt: skip

    def save(self, folder: Path) -> None:
        """Write the folder, which appears when it is complete; one that is there is replaced.

        Raises:
            MoecoverError: the disk is full or the folder cannot be written.
        """
        import pyarrow
        import pyarrow.parquet as parquet

        items = list(_item_rows(self.items))
        windows = [
            {"row": row, "text": text, "window": i, "nll": float(nll), "tokens": int(tokens)}
            for row, texts in self.windows.items()
            for text, values in texts.items()
            for i, (nll, tokens) in enumerate(values)
        ]
        with new_folder(folder) as draft:
            for name, rows, schema in ((ITEMS, items, _ITEM_COLUMNS), (WINDOWS, windows, _WINDOW_COLUMNS)):
                types = pyarrow.schema([(column, getattr(pyarrow, kind)()) for column, kind in schema.items()])
                parquet.write_table(pyarrow.Table.from_pylist(rows, schema=types), draft / name)
            write_text(draft / FILE, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Evaluation:
        """Read a folder that `save` wrote.

        Raises:
            InputError: there is none, or it is damaged.
        """
        import pyarrow
        import pyarrow.parquet as parquet

        path = folder / FILE
        if not path.is_file():
            raise InputError(f"{folder} holds no {FILE}: it was not written by `moecover evaluate`")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != 1:
                raise ValueError(f"schema {content['schema']}, 1 is known")
            rows = [
                Row(
                    **{
                        **row,
                        "perplexity": {name: TextResult(**one) for name, one in row["perplexity"].items()},
                        "tasks": {
                            task: {metric: Score(**score) for metric, score in scores.items()}
                            for task, scores in row["tasks"].items()
                        },
                    }
                )
                for row in content["rows"]
            ]
            items: dict[str, dict[str, dict[str, list[float]]]] = {}
            for one in parquet.read_table(folder / ITEMS).to_pylist():
                by_metric = items.setdefault(one["row"], {}).setdefault(one["task"], {})
                by_metric.setdefault(one["metric"], []).append(one["value"])
            windows: dict[str, dict[str, list[tuple[float, int]]]] = {}
            for one in parquet.read_table(folder / WINDOWS).to_pylist():
                windows.setdefault(one["row"], {}).setdefault(one["text"], []).append((one["nll"], one["tokens"]))
            return cls(
                content["model"],
                content["texts"],
                content["tasks"],
                rows,
                {r: {t: {m: np.asarray(v) for m, v in ms.items()} for t, ms in ts.items()} for r, ts in items.items()},
                {r: {t: np.asarray(v, dtype=np.float64) for t, v in ts.items()} for r, ts in windows.items()},
            )
        except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
            raise InputError(f"{folder} is damaged: {error!r}. Evaluate again") from error


_ITEM_COLUMNS = {"row": "string", "task": "string", "metric": "string", "item": "int64", "value": "float64"}
_WINDOW_COLUMNS = {"row": "string", "text": "string", "window": "int64", "nll": "float64", "tokens": "int64"}


def _item_rows(items: dict[str, dict[str, dict[str, NDArray[np.float64]]]]) -> Iterator[dict[str, Any]]:
    for row, tasks in items.items():
        for task, metrics in tasks.items():
            for metric, values in metrics.items():
                for item, value in enumerate(values):
                    yield {"row": row, "task": task, "metric": metric, "item": item, "value": float(value)}
