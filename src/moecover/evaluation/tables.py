"""The tables of an evaluation: items.parquet, a row for every item of a task, windows.parquet, one for every window."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Items = dict[str, dict[str, dict[str, NDArray[np.float64]]]]  # by row, task and metric
    Windows = dict[str, dict[str, NDArray[np.float64]]]  # by row and text

_ITEM_COLUMNS = {"row": "string", "task": "string", "metric": "string", "item": "int64", "value": "float64"}
_WINDOW_COLUMNS = {"row": "string", "text": "string", "window": "int64", "nll": "float64", "tokens": "int64"}


def write_items(path: Path, items: Items) -> None:
    """Write items.parquet."""
    _write(path, _item_rows(items), _ITEM_COLUMNS)


def write_windows(path: Path, windows: Windows) -> None:
    """Write windows.parquet."""
    _write(path, _window_rows(windows), _WINDOW_COLUMNS)


def read_items(path: Path) -> Items:
    """Read items.parquet.

    Raises:
        pyarrow.ArrowException: it is no parquet file.
        KeyError: a column is missing.
    """
    return _items_of(_read(path))


def read_windows(path: Path) -> Windows:
    """Read windows.parquet; raises what `read_items` raises."""
    return _windows_of(_read(path))


def _write(path: Path, rows: Iterable[dict[str, object]], columns: Mapping[str, str]) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    types = pyarrow.schema([(column, getattr(pyarrow, kind)()) for column, kind in columns.items()])
    parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=types), path)


def _read(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as parquet

    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows


def _item_rows(items: Items) -> Iterator[dict[str, object]]:
    """Rows of items.parquet."""
    for row, tasks in items.items():
        for task, metrics in tasks.items():
            for metric, values in metrics.items():
                for item, value in enumerate(values):
                    yield {"row": row, "task": task, "metric": metric, "item": item, "value": float(value)}


def _items_of(rows: Iterable[dict[str, Any]]) -> Items:
    """The inverse of `_item_rows`."""
    items: dict[str, dict[str, dict[str, list[float]]]] = {}
    for one in rows:
        by_metric = items.setdefault(one["row"], {}).setdefault(one["task"], {})
        by_metric.setdefault(one["metric"], []).append(one["value"])
    return {r: {t: {m: np.asarray(v) for m, v in ms.items()} for t, ms in ts.items()} for r, ts in items.items()}


def _window_rows(windows: Windows) -> Iterator[dict[str, object]]:
    """Rows of windows.parquet."""
    for row, texts in windows.items():
        for text, values in texts.items():
            for i, (nll, tokens) in enumerate(values):
                yield {"row": row, "text": text, "window": i, "nll": float(nll), "tokens": int(tokens)}


def _windows_of(rows: Iterable[dict[str, Any]]) -> Windows:
    """The inverse of `_window_rows`."""
    windows: dict[str, dict[str, list[tuple[float, int]]]] = {}
    for one in rows:
        windows.setdefault(one["row"], {}).setdefault(one["text"], []).append((one["nll"], one["tokens"]))
    return {r: {t: np.asarray(v, dtype=np.float64) for t, v in ts.items()} for r, ts in windows.items()}
