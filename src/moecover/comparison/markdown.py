"""results.md: the tables of every model, a line for each method and budget, and all comparisons in words.

Several seeds and calibration samples are summarised as mean and standard deviation. Numbers stand in the tables as text
("13.20 ± 0.41") that is aligned to the right, which `text.markdown_table` does for plain numbers only.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moecover.comparison.cell_files import StoredCell
from moecover.comparison.cells import FULL
from moecover.comparison.models import ModelRecord
from moecover.comparison.tables import ReadCell, mean_of
from moecover.corpora.sources import set_name
from moecover.evaluation.artifact import Evaluation
from moecover.planning.shapes import shape_name
from moecover.text import markdown_cell, markdown_code, markdown_text

LEGEND = (
    "± is the standard deviation over seeds and calibration samples, in brackets the standard error over the items of "
    "the tasks.\n"
)
SHAPES = "30x32 is 30 experts of 32 channels each; other experts keep all channels.\n"
NOTHING = "–"
Done = tuple[StoredCell, Evaluation]
Number = tuple[float, float | None]  # a value and its standard error
Usage = Mapping[str, Any]  # of a model, see `evaluation.task_usage.usage`


@dataclass(frozen=True)
class Measure:
    """A column of a table: its heading, the number of a cell (None if it has none), and the format of numbers."""

    heading: str
    number: Callable[[Evaluation], Number | None]
    spec: str


def markdown(
    found: Sequence[ReadCell],
    *,
    command: str,
    models: Sequence[ModelRecord],
    texts: Sequence[str],
    tasks: Mapping[str, Mapping[str, Any]],
    notes: Mapping[str, Sequence[str]],
    usages: Sequence[Usage] = (),
    sentences: Mapping[str, Sequence[str]],
) -> str:
    """The text of results.md.

    Args:
        found: all cells.
        command: the command line; empty if there was none.
        models: in the order of their chapters.
        texts: names of the texts for perplexity.
        tasks: records by name.
        notes: on the measurements, by model.
        usages: which experts the tasks use, by model; see `evaluation.task_usage.usage`.
        sentences: the comparisons in words, by model.
    """
    parts = ["# Results\n"]
    if command:
        parts.append(f"{markdown_code(command)}\n")
    parts.append(LEGEND)
    if any("width" in record for record, _ in found):
        parts.append(SHAPES)
    measures = _measures(texts, tasks)
    for model in models:
        name = model["name"]
        mine = [(record, e) for record, e in found if record["model"] == name and e is not None]
        if mine:
            parts.append(_chapter(model, mine, measures))
            parts += [f"Note: {markdown_text(note)}.\n" for note in notes.get(name, ())]
            ids = {record["id"] for record, _ in mine}
            parts += [_usage(name, usage, mine) for usage in usages if usage["plans"].keys() & ids]
            lines = [f"- {markdown_text(sentence)}\n" for sentence in sentences.get(name, ())]
            parts += [f"### Comparisons, {markdown_text(name)}\n\n{''.join(lines)}"] if lines else []
    if failed := [record for record, e in found if e is None]:
        parts.append("## Failed\n\n" + "".join(_failure(record) for record in failed))
    return "\n".join(parts)


def _shape(record: StoredCell) -> str:
    """What a cell keeps: experts, or experts x channels of each."""
    return shape_name(record["keep"], record.get("width"))


def _failure(record: StoredCell) -> str:
    return f"- {markdown_text(str(record['id']))}: {markdown_text(str(record['reason']))}\n"


def _table(heads: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table whose first column is aligned to the left, all others to the right."""
    heads, *rows = [[markdown_cell(markdown_text(cell)) for cell in cells] for cells in (heads, *body)]
    lines = ["| " + " | ".join(heads) + " |", "|---|---:|" + "---:|" * (len(heads) - 2)]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join(lines) + "\n"


def _estimate(numbers: Sequence[Number], spec: str) -> str:
    """Mean and standard deviation of several cells; of a single cell its own standard error, if it has one."""
    values = [value for value, _ in numbers]
    if len(values) > 1:
        return f"{statistics.fmean(values):{spec}} ± {statistics.stdev(values):{spec}}"
    stderr = numbers[0][1]
    return f"{values[0]:{spec}}" + (f" ({stderr:{spec}})" if stderr is not None else "")


def _on_text(name: str, quantity: str, spec: str) -> Measure:
    """A quantity of a text: perplexity, kl or top1."""

    def number(evaluation: Evaluation) -> Number | None:
        found = evaluation.rows[0].perplexity.get(name)
        value: float | None = getattr(found, quantity) if found is not None else None
        return None if value is None else (value, None)

    return Measure(name, number, spec)


def _on_task(name: str, metric: str, heading: str) -> Measure:
    """A metric of a task."""

    def number(evaluation: Evaluation) -> Number | None:
        score = evaluation.rows[0].tasks.get(name, {}).get(metric)
        return None if score is None else (score.value, score.stderr)

    return Measure(heading, number, ".4f")


def _measures(texts: Sequence[str], tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Measure]]:
    """The columns of every table, by its title."""
    found: dict[str, list[Measure]] = {}
    if tasks:
        mean = Measure(f"mean of {len(tasks)}", mean_of, ".4f")
        found["Tasks"] = [mean, *(_on_task(name, about["metric"], name) for name, about in tasks.items())]
        others = [
            _on_task(name, metric, f"{name} {metric}")
            for name, about in tasks.items()
            for metric in about["metrics"]
            if metric != about["metric"]
        ]
        if others:
            found["Tasks, other metrics"] = others
    if texts:
        found["Perplexity"] = [_on_text(name, "perplexity", ".2f") for name in texts]
        found["KL divergence from the full model, nats per token"] = [_on_text(name, "kl", ".4f") for name in texts]
        found["Share of tokens with the full model's first choice"] = [_on_text(n, "top1", ".3f") for n in texts]
    return found


def _chapter(model: ModelRecord, mine: Sequence[Done], measures: Mapping[str, Sequence[Measure]]) -> str:
    """The tables of a model."""
    groups: dict[tuple[str, ...], list[Done]] = {}
    for record, evaluation in mine:
        key = record["method"], _shape(record), record["label"], set_name(record["calibration"], " + ")
        groups.setdefault(key, []).append((record, evaluation))
    several = len({calibration for *_, calibration in groups if calibration}) > 1
    parts = [
        f"## {markdown_text(model['name'])}\n\n{model['experts']} experts a layer, top-{model['top_k']}, "
        f"{model['layers']} layers, {model['num_bytes'] / 1e6:,.1f} MB.\n"
    ]
    for title, columns in measures.items():
        body = []
        for (method, _, label, calibration), group in groups.items():
            numbers = [_column(column, group) for column in columns]
            if all(number == NOTHING for number in numbers):
                continue
            row = group[0][1].rows[0]
            size = f"{row.num_bytes / 1e6:,.1f}"
            experts = "all" if method == FULL else row.shape
            calibrated = [calibration or NOTHING] if several else []
            body.append([label, *calibrated, experts, size, str(len(group)), *numbers])
        if body:
            calibrated = ["calibrated on"] if several else []
            heads = ["method", *calibrated, "experts", "MB", "cells", *(column.heading for column in columns)]
            parts.append(f"### {title}, {markdown_text(model['name'])}\n\n{_table(heads, body)}")
    return "\n".join(parts)


def _column(measure: Measure, group: Sequence[Done]) -> str:
    numbers = [number for _, evaluation in group if (number := measure.number(evaluation)) is not None]
    return _estimate(numbers, measure.spec) if numbers else NOTHING


def _usage(name: str, facts: Usage, mine: Sequence[Done]) -> str:
    """Which experts the tasks use, and what every plan kept of them; means over the layers."""
    tasks, keep, experts = facts["tasks"], facts["keep"], facts["experts"]
    body = []
    for corpus, by_task in facts["corpora"].items():
        for quantity, heading in (("jaccard", "overlap"), ("spearman", "rank correlation")):
            values = [[v for v in by_task[task][quantity] if v is not None] for task in tasks]
            body.append([corpus, heading, *(f"{statistics.fmean(v):.3f}" if v else NOTHING for v in values)])
    parts = [
        f"### Which experts the tasks use, {markdown_text(name)}\n\n"
        f"Overlap (Jaccard) of the {keep} of {experts} experts with the most {facts['saliency']} on a corpus and the "
        f"{keep} that a task routes to most, and rank correlation over all; random choice overlaps by about "
        f"{keep / (2 * experts - keep):.2f}. Task texts are for analysis only, no plan is made from them.\n",
        _table(["corpus", "", *tasks], body),
    ]
    groups: dict[tuple[str, str], list[str]] = {}
    for record, _ in mine:
        if record["id"] in facts["plans"]:
            groups.setdefault((_shape(record), record["label"]), []).append(record["id"])
    body = []
    for (kept, label), ids in groups.items():
        shares = [[statistics.fmean(facts["plans"][i][task]["kept_weight"]) for i in ids] for task in tasks]
        body.append([label, kept, *(_estimate([(100 * v, None) for v in one], ".1f") for one in shares)])
    if body:
        heading = f"### Routing weight of the tasks on kept experts, {markdown_text(name)}, %\n"
        parts += [heading, _table(["method", "experts", *tasks], body)]
    return "\n".join(parts)
