"""The tables of a model's measurements, and of the cells that failed. None where there is nothing to show.

The tables of comparisons are in `comparison_tables`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from moecover.corpora.sources import set_name
from moecover.reporting.blocks import MISSING, Column, Table, Value, text_column
from moecover.reporting.data import Run, Usage
from moecover.reporting.figures.overlap import expected_overlap
from moecover.reporting.figures.style import Facts
from moecover.reporting.findings import Estimate, ModelFindings, failed
from moecover.reporting.losses import loss_of, worst_of
from moecover.reporting.numbers import percentage, points, size
from moecover.reporting.values import (
    OF_FULL,
    best_rows,
    coordinate_columns,
    coordinates,
    kept_in,
    kl_value,
    loss_value,
    method_rows,
    perplexity_value,
    share_value,
)


def accuracy_table(model: ModelFindings) -> Table | None:
    """Accuracy by task, and its mean if there are several tasks: a row per method and budget."""
    if not model.tasks:
        return None
    rows = method_rows(model)
    several = len(model.tasks) > 1
    columns: list[list[Estimate | None]] = [[p.tasks.get(task) for _, p in rows] for task in model.tasks]
    if several:
        columns.append([p.mean for _, p in rows])
    best = [best_rows(rows, values) for values in columns]
    full = model.full.mean.value if model.full and model.full.mean else None
    body = []
    for i, (series, p) in enumerate(rows):
        values = [share_value(c[i], "best" if i in b else "") for c, b in zip(columns, best, strict=True)]
        share = p.mean.value / full if p.mean and full else None
        of_full = MISSING if share is None else Value(f"{100 * share:.1f}%", share)
        body.append((*coordinates(model, series, p), *values, of_full))
    heads = [Column(task) for task in model.tasks] + ([Column("mean")] if several else [])
    return Table(
        "tasks",
        f"Accuracy by task on {model.name}, %",
        (*coordinate_columns(model), *heads, Column(OF_FULL)),
        tuple(body),
        "± one standard error, over the questions and over runs that differ in seed or calibration sample. "
        "Bold: highest at its budget, which does not imply significance.",
    )


def perplexity_table(model: ModelFindings) -> Table | None:
    """Perplexity by text: a row per method and budget."""
    if not model.texts:
        return None
    rows = method_rows(model)
    values: list[list[Value]] = []
    for text in model.texts:
        found = [p.perplexity.get(text) for _, p in rows]
        best = best_rows(rows, found, largest=False)
        values.append([perplexity_value(e, "best" if i in best else "") for i, e in enumerate(found)])
    several = len(model.texts) > 1 and model.full is not None
    heads = [Column(head, first="ascending") for head in ("mean loss", "worst text")] if several else []
    body = []
    for i, (series, p) in enumerate(rows):
        worst = worst_of(model, p, model.texts)
        losses = [loss_value(loss_of(model, p, model.texts)), loss_value(worst, worst.names[0] if worst else "")]
        bytes_kept = Value(size(p.num_bytes), p.num_bytes)
        body.append((*coordinates(model, series, p), bytes_kept, *(v[i] for v in values), *(losses if several else ())))
    return Table(
        "perplexity",
        f"Perplexity on {model.name}, lower is better",
        (*coordinate_columns(model), Column("size"), *(Column(t, first="ascending") for t in model.texts), *heads),
        tuple(body),
        "± one standard error over the runs, where there are several. Perplexities are averaged geometrically. "
        "Bold: lowest at its budget, which does not imply significance."
        + (" Loss: perplexity as a multiple of the full model's, with its 95% interval." if several else ""),
    )


def distance_table(model: ModelFindings) -> Table | None:
    """KL divergence from the full model and agreement with it on the next token, by text."""
    rows = [(series, p) for series, p in method_rows(model) if p.kl or p.top1]
    if not rows:
        return None
    texts = [t for t in model.texts if any(t in p.kl or t in p.top1 for _, p in rows)]
    columns = [c for t in texts for c in (Column(f"{t}: KL", first="ascending"), Column(f"{t}: same next token, %"))]
    body = tuple(
        (
            *coordinates(model, series, p),
            *(v for t in texts for v in (kl_value(p.kl.get(t)), share_value(p.top1.get(t)))),
        )
        for series, p in rows
    )
    return Table(
        "distance",
        f"Distance of {model.name} from the full model after pruning",
        (*coordinate_columns(model), *columns),
        body,
        "KL: mean Kullback-Leibler divergence of the pruned model's next-token probabilities from the full model's, "
        "in nats per token.",
    )


def others_table(model: ModelFindings) -> Table | None:
    """The metrics that do not enter the mean."""
    rows = method_rows(model)
    keys = sorted({key for _, p in rows for key in p.others})
    if not keys:
        return None
    body = tuple(
        (*coordinates(model, series, p), *(share_value(p.others.get(key)) for key in keys)) for series, p in rows
    )
    columns = tuple(Column(f"{task}: {metric}") for task, metric in keys)
    return Table("others", f"Other metrics on {model.name}, %", (*coordinate_columns(model), *columns), body)


def usage_table(model: ModelFindings, usage: Usage) -> Table | None:
    """Proportion of each task's routing weight that goes to kept experts: a row per method and budget."""
    rows = []
    tasks = list(dict.fromkeys(t for plan in usage.plans.values() for t in plan))
    for series, p in method_rows(model):
        mine = [usage.plans[cell] for cell in p.cells if cell in usage.plans]
        if mine:
            shares = [[statistics.fmean(plan[t].kept_weight) for plan in mine if t in plan] for t in tasks]
            values = [Value(points(statistics.fmean(v)), statistics.fmean(v)) if v else MISSING for v in shares]
            rows.append((*coordinates(model, series, p), *values))
    if not rows:
        return None
    return Table(
        "usage",
        f"The tasks' routing weight that goes to kept experts of {model.name}, %",
        (*coordinate_columns(model), *(Column(t) for t in tasks)),
        tuple(rows),
        "Mean over the MoE layers, measured with the full model's routing.",
    )


def overlap_table(model: ModelFindings, explained: Sequence[tuple[float, Facts]]) -> Table | None:
    """How far the calibration corpora favour the same experts: a row per pair of corpora and budget.

    Args:
        model: named in the caption.
        explained: budget (proportion kept) and facts of `explain`.
    """
    rows = []
    for retain, facts in explained:
        chance = expected_overlap(facts["keep"], facts["experts"])
        for pair, found in facts["overall"]["agreement"].items():
            name = pair.replace(" | ", " and ")
            numbers = (found["jaccard"], chance, found["spearman"], found["kendall"])
            values = [Value("–" if v is None else f"{v:.2f}", v) for v in numbers]
            rows.append((Value(name, name.casefold()), Value(percentage(retain), retain, kept_in(facts)), *values))
    if not rows:
        return None
    return Table(
        "overlap",
        f"How far the corpora agree on {model.name}",
        (
            text_column("corpora"),
            Column(f"{model.kept_of} kept"),
            Column("overlap of the best"),
            Column("overlap by chance"),
            Column("Spearman, all experts"),
            Column("Kendall, all experts"),
        ),
        tuple(rows),
        "Means over the MoE layers; overlap is the Jaccard index.",
    )


def failed_table(run: Run) -> Table | None:
    """The cells that did not finish, with their reasons."""
    models = list(dict.fromkeys(c.model for c in run.cells))
    cells = sorted(failed(run), key=lambda c: (models.index(c.model), -c.retain))
    if not cells:
        return None
    body = tuple(
        (
            Value(c.model, c.model.casefold()),
            Value(c.label, c.label.casefold()),
            Value(percentage(c.retain), c.retain),
            Value(set_name(c.calibration, " + ") or "–"),
            Value(c.reason or "no reason was recorded"),
            Value(c.id, c.id),
        )
        for c in cells
    )
    columns = (
        text_column("model"),
        text_column("method"),
        Column("kept"),
        text_column("calibration"),
        text_column("reason"),
        text_column("cell"),
    )
    return Table("failed", "Cells that failed; they are not in any figure", columns, body)
