"""Scores of tasks: reads the results of lm-evaluation-harness, gives scores of tasks and documents, and a record."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.evaluation.artifact import Score
from moecover.evaluation.harness import version_text
from moecover.evaluation.records import TaskRecord
from moecover.evaluation.task_files import GROUP_PREFIX

if TYPE_CHECKING:
    from numpy.typing import NDArray

Results = Mapping[str, Any]  # what the harness's evaluator gives
Sample = Mapping[str, Any]  # one document's entry in it


def document_samples(found: Results, parts: Sequence[str]) -> list[list[Sample]]:
    """The samples of every part of a task, in the order of its documents."""
    return [sorted(found["samples"][part], key=lambda one: one["doc_id"]) for part in parts]


def document_scores(samples: Sequence[Sequence[Sample]]) -> dict[str, NDArray[np.float64]]:
    """Scores of a task by metric, float64 ``[item]``; metrics without a number for every document are left out."""
    return {
        shown: np.array([float(one[metric]) for part in samples for one in part if one["filter"] == by])
        for shown, (metric, by) in metric_keys(samples[0]).items()
        if all(isinstance(one[metric], (int, float, np.floating, np.bool_)) for one in samples[0])
    }


def task_scores(
    found: Results, name: str, parts: Sequence[str], samples: Sequence[Sequence[Sample]]
) -> dict[str, Score]:
    """Scores of a task by metric.

    Args:
        found: the harness's results.
        name: of the task.
        parts: the harness's tasks that it stands for.
        samples: from `document_samples`.
    """
    group = next((g for g in (name, GROUP_PREFIX + name) if g in found.get("groups", {})), None)
    whole = found["results"].get(name if group is None and len(parts) == 1 else group) or {}
    of_parts = [found["results"][part] for part in parts]
    return {shown: _score(whole, of_parts, *key) for shown, key in metric_keys(samples[0]).items()}


def task_record(
    found: Results, parts: Sequence[str], samples: Sequence[Sequence[Sample]], *, data: str, cut: int, bos: list[int]
) -> TaskRecord:
    """The record of a task as it was run.

    Args:
        found: the harness's results.
        parts: the harness's tasks that it stands for.
        samples: from `document_samples`.
        data: where the documents come from.
        cut: documents of which the model saw only the end.
        bos: ids that the tokenizer puts before every request.
    """
    metrics = list(metric_keys(samples[0]))
    return {
        "version": sorted({found["versions"][part] for part in parts}, key=str),
        "num_fewshot": max(found["n-shot"][part] for part in parts),
        "items": sum(len({one["doc_id"] for one in part}) for part in samples),
        "metrics": metrics,
        "metric": "acc" if "acc" in metrics else metrics[0],
        "parts": len(parts),
        "data": data,
        "harness": version_text(),
        "cut": cut,
        "bos": bos,
    }


def cut_text(task: str, cut: int, items: int) -> str:
    """How many items of a task a model saw the end of only, as a sentence without its full stop."""
    return (
        f"task {task}: {cut:,} of {items:,} items are longer than the model's positions, the harness leaves out their "
        "beginning"
    )


def metric_keys(samples: Sequence[Sample]) -> dict[str, tuple[str, str]]:
    """Metric and filter (which extracts the answer from generated text), by the name that both have in results.

    Where there are several filters the name is the harness's, ``exact_match,strict-match``.
    """
    filters = list(dict.fromkeys(one["filter"] for one in samples))
    metrics = sorted({metric for one in samples for metric in one["metrics"]})
    return {m if len(filters) == 1 else f"{m},{by}": (m, by) for m in metrics for by in filters}


def _score(whole: Mapping[str, Any], parts: Sequence[Mapping[str, Any]], metric: str, by: str) -> Score:
    """A metric of a task; for a task with parts the harness's own aggregate, or the mean of the parts."""

    def value(row: Mapping[str, Any], name: str) -> float | None:
        found = row.get(f"{name},{by}")
        return float(found) if isinstance(found, (int, float)) else None

    aggregated = value(whole, metric)
    if aggregated is not None:
        return Score(aggregated, value(whole, f"{metric}_stderr"))
    values = [v for part in parts if (v := value(part, metric)) is not None]
    errors = [error for part in parts if (error := value(part, f"{metric}_stderr")) is not None]
    stderr = sum(e * e for e in errors) ** 0.5 / len(parts) if len(errors) == len(parts) else None
    return Score(statistics.fmean(values), stderr)
