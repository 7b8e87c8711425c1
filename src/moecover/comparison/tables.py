"""The results of a comparison: reads the cells of a run folder, writes results.csv, results.json and results.md.

Reads nothing else, so that the tables of a run can be made again at any time. Numbers are written with all their digits,
wall times are in results.json alone: the same cells give the same results.csv.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moecover.comparison.config import FULL, Cell
from moecover.comparison.significance import comparisons, mean_of_tasks
from moecover.comparison.worker import CELL, DONE, SCHEMA
from moecover.corpora.sources import set_name
from moecover.evaluation.artifact import Evaluation, Row
from moecover.evaluation.task_usage import FILE as USAGE
from moecover.files.atomic import write_text

CSV, JSON, MARKDOWN = "results.csv", "results.json", "results.md"
COLUMNS = (
    "model", "method", "label", "saliency", "calibration", "sample", "seed", "repair", "retain", "keep", "kind", "name", "metric", "value",
    "stderr", "n",
)  # fmt: skip
Tidy = dict[str, Any]
Read = tuple[dict[str, Any], Evaluation | None]


def read_cells(run: Path, cells: Sequence[Cell]) -> list[Read]:
    """cell.json of every cell with its evaluation, None where the cell failed or is not there yet."""
    found: list[Read] = []
    for cell in cells:
        folder = run / "cells" / cell.id
        if (folder / CELL).is_file():
            about = json.loads((folder / CELL).read_text(encoding="utf-8"))
            found.append((about, Evaluation.load(folder) if about["status"] == DONE else None))
    return found


def mean_of(evaluation: Evaluation) -> tuple[float, float | None] | None:
    """Mean over the tasks of the metric that each is known by, and its standard error."""
    (row,) = evaluation.rows
    items = evaluation.items.get(row.name, {})
    return mean_of_tasks({t: items[t][about["metric"]] for t, about in evaluation.tasks.items()}) if items else None


def compared(about: dict[str, Any], evaluation: Evaluation) -> dict[str, Any]:
    """A cell as `significance.comparisons` takes it."""
    (row,) = evaluation.rows
    items = {t: metrics[evaluation.tasks[t]["metric"]] for t, metrics in evaluation.items.get(row.name, {}).items()}
    return {**about, "items": items, "windows": evaluation.windows.get(row.name, {})}


def tidy(cells: Iterable[Read]) -> Iterator[Tidy]:
    """One row a number, as results.csv has it."""
    for about, evaluation in cells:
        if evaluation is None:
            continue
        at = {k: about[k] for k in COLUMNS if k in about} | {"calibration": set_name(about["calibration"])}
        (row,) = evaluation.rows
        yield {**at, "kind": "size", "name": "checkpoint", "metric": "bytes", "value": row.num_bytes, "stderr": None, "n": None}  # fmt: skip
        for name, text in row.perplexity.items():
            numbers = {"perplexity": text.perplexity, "kl": text.kl, "top1": text.top1}
            for kind, value in numbers.items():
                if value is not None:
                    yield {**at, "kind": kind, "name": name, "metric": kind, "value": value, "stderr": None, "n": text.tokens}  # fmt: skip
        for task, metrics in row.tasks.items():
            for metric, score in metrics.items():
                yield {**at, "kind": "task", "name": task, "metric": metric, "value": score.value, "stderr": score.stderr, "n": evaluation.tasks[task]["items"]}  # fmt: skip
        if (mean := mean_of(evaluation)) is not None:
            items = sum(t["items"] for t in evaluation.tasks.values())
            yield {**at, "kind": "mean", "name": f"mean of {len(evaluation.tasks)} tasks", "metric": "mean", "value": mean[0], "stderr": mean[1], "n": items}  # fmt: skip


def csv_text(rows: Iterable[Tidy]) -> str:
    """The rows as CSV; an empty field where there is no value."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write_results(run: Path, cells: Sequence[Cell], *, command: str) -> dict[str, Any]:
    """Write the three files of results from the cells that are there.

    Returns:
        What results.json holds.
    """
    found = read_cells(run, cells)
    done = [evaluation for _, evaluation in found if evaluation is not None]
    results = {
        "schema": SCHEMA,
        "created_by": _versions(),
        "command": command,
        "models": json.loads((run / "models.json").read_text(encoding="utf-8")),
        "texts": _first(e.texts for e in done),
        "tasks": _first(e.tasks for e in done),
        "cells": [{**about, "row": asdict(evaluation.rows[0]) if evaluation else None} for about, evaluation in found],
        "comparisons": comparisons([compared(about, e) for about, e in found if e is not None]),
        "failed": [about["id"] for about, evaluation in found if evaluation is None],
    }
    write_text(run / CSV, csv_text(tidy(found)))
    usages = json.loads((run / USAGE).read_text(encoding="utf-8")) if (run / USAGE).is_file() else []
    write_text(run / MARKDOWN, markdown(results, found, usages))
    write_text(run / JSON, json.dumps(results, indent=1) + "\n")
    return results


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("moecover", "torch", "transformers")}


def _first(found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for one in found:
        merged = {**one, **merged}
    return merged


# -------------------------------------------------------------------------------------------------------------- markdown
def _table(heads: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---|---:|" + "---:|" * (len(heads) - 2)]
    lines += ["| " + " | ".join(cells) + " |" for cells in body]
    return "\n".join(lines) + "\n"


def _estimate(values: Sequence[float], errors: Sequence[float | None], shown: str) -> str:
    """Mean of several cells with their spread; of one cell with its own standard error, where it has one."""
    if len(values) > 1:
        return f"{statistics.fmean(values):{shown}} ± {statistics.stdev(values):{shown}}"
    return f"{values[0]:{shown}}" + (f" ({errors[0]:{shown}})" if errors and errors[0] is not None else "")


Measure = tuple[str, Callable[[Evaluation], tuple[float, float | None] | None], str]


def _measures(texts: Iterable[str], tasks: dict[str, Any]) -> dict[str, list[Measure]]:
    """The columns of every table: heading, the number in a cell, and how it is written."""

    def text(name: str, what: str) -> Callable[[Evaluation], tuple[float, float | None] | None]:
        def get(evaluation: Evaluation) -> tuple[float, float | None] | None:
            found = evaluation.rows[0].perplexity.get(name)
            value = getattr(found, what) if found is not None else None
            return None if value is None else (value, None)

        return get

    def task(name: str, metric: str) -> Callable[[Evaluation], tuple[float, float | None] | None]:
        def get(evaluation: Evaluation) -> tuple[float, float | None] | None:
            score = evaluation.rows[0].tasks.get(name, {}).get(metric)
            return None if score is None else (score.value, score.stderr)

        return get

    names = list(texts)
    found: dict[str, list[Measure]] = {}
    if tasks:
        mean: Measure = (f"mean of {len(tasks)}", mean_of, ".4f")
        found["Tasks"] = [mean, *((name, task(name, about["metric"]), ".4f") for name, about in tasks.items())]
        others = [(f"{name} {m}", task(name, m), ".4f") for name, about in tasks.items() for m in about["metrics"] if m != about["metric"]]  # fmt: skip
        if others:
            found["Tasks, other metrics"] = others
    if names:
        found["Perplexity"] = [(name, text(name, "perplexity"), ".2f") for name in names]
        found["KL divergence from the full model, nats per token"] = [(name, text(name, "kl"), ".4f") for name in names]
        found["Share of tokens with the full model's first choice"] = [(name, text(name, "top1"), ".3f") for name in names]  # fmt: skip
    return found


def markdown(results: dict[str, Any], found: Sequence[Read], usages: Sequence[dict[str, Any]] = ()) -> str:
    """The tables of every model: a line a method and budget, cells of several seeds and samples taken together."""
    parts = ["# Results\n"]
    if results["command"]:
        parts.append(f"`{results['command']}`\n")
    parts.append("± is the standard deviation over seeds and calibration samples, in brackets the standard error over the items of the tasks.\n")  # fmt: skip
    for model in results["models"]:
        mine = [(about, e) for about, e in found if about["model"] == model["name"] and e is not None]
        if mine:
            parts.append(_chapter(model, mine, results))
            parts += [
                _mechanism(model["name"], u, mine) for u in usages if u["plans"].keys() & {a["id"] for a, _ in mine}
            ]
            sentences = [f"- {c['words']}\n" for c in results["comparisons"] if c["model"] == model["name"]]
            parts += [f"### Comparisons, {model['name']}\n\n{''.join(sentences)}"] if sentences else []
    if failed := [(a["id"], a["reason"]) for a, e in found if e is None]:
        parts.append("## Failed\n\n" + "".join(f"- {name}: {reason}\n" for name, reason in failed))
    return "\n".join(parts)


def _chapter(model: dict[str, Any], mine: Sequence[tuple[dict[str, Any], Evaluation]], results: dict[str, Any]) -> str:
    groups: dict[tuple[int, str, str], list[tuple[dict[str, Any], Evaluation]]] = {}
    for about, evaluation in mine:
        groups.setdefault((about["keep"], about["label"], set_name(about["calibration"], " + ")), []).append((about, evaluation))  # fmt: skip
    several = len({calibration for _, _, calibration in groups if calibration}) > 1
    parts = [f"## {model['name']}\n\n{model['experts']} experts a layer, top-{model['top_k']}, {model['layers']} layers, {model['num_bytes'] / 1e6:,.1f} MB.\n"]  # fmt: skip
    for title, measures in _measures(results["texts"], results["tasks"]).items():
        heads = ["method", *(["calibrated on"] if several else []), "experts", "MB", "cells", *(m[0] for m in measures)]
        body = []
        for (keep, label, calibration), group in groups.items():
            columns = []
            for _, get, shown in measures:
                numbers = [value for _, evaluation in group if (value := get(evaluation)) is not None]
                columns.append(_estimate([v for v, _ in numbers], [e for _, e in numbers], shown) if numbers else "–")
            if all(column == "–" for column in columns):
                continue
            row: Row = group[0][1].rows[0]
            size = f"{row.num_bytes / 1e6:,.1f}"
            share = "all" if group[0][0]["method"] == FULL else f"{keep}"
            body.append([label, *([calibration or "–"] if several else []), share, size, str(len(group)), *columns])
        if body:
            parts.append(f"### {title}, {model['name']}\n\n{_table(heads, body)}")
    return "\n".join(parts)


def _mechanism(name: str, facts: dict[str, Any], mine: Sequence[tuple[dict[str, Any], Evaluation]]) -> str:
    """Which experts the tasks use, and what every plan left of them; means over the layers."""
    tasks, chance = facts["tasks"], facts["keep"] / (2 * facts["experts"] - facts["keep"])
    body = []
    for corpus, by_task in facts["corpora"].items():
        for what, heading in (("jaccard", "overlap"), ("spearman", "rank correlation")):
            values = [[v for v in by_task[task][what] if v is not None] for task in tasks]
            body.append([corpus, heading, *(f"{statistics.fmean(v):.3f}" if v else "–" for v in values)])
    said = f"Overlap (Jaccard) of the {facts['keep']} of {facts['experts']} experts with the most {facts['saliency']} on a corpus and the {facts['keep']} that a task routes to most, and rank correlation over all; random choice overlaps by about {chance:.2f}."  # fmt: skip
    parts = [f"### Which experts the tasks use, {name}\n\n{said} Task texts are for analysis only, no plan is made from them.\n", _table(["corpus", "", *tasks], body)]  # fmt: skip
    groups: dict[tuple[int, str], list[str]] = {}
    for about, _ in mine:
        if about["id"] in facts["plans"]:
            groups.setdefault((about["keep"], about["label"]), []).append(about["id"])
    body = []
    for (keep, label), ids in groups.items():
        shares = [[statistics.fmean(facts["plans"][i][task]["kept_weight"]) for i in ids] for task in tasks]
        body.append([label, f"{keep}", *(_estimate([100 * v for v in one], [], ".1f") for one in shares)])
    parts += [f"### Routing weight of the tasks on kept experts, {name}, %\n", _table(["method", "experts", *tasks], body)] if body else []  # fmt: skip
    return "\n".join(parts)
