"""Measured numbers for a model card: reads evaluations of a plan and of the model that it cuts, gives markdown.

A plan evaluated in memory computes bit for bit what its checkpoint does, so the plan's numbers are the checkpoint's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NotRequired, Protocol, TypedDict

from moecover.checkpoints.structure import Structure
from moecover.errors import InputError, arg
from moecover.planning.artifact import Plan, kept_hash
from moecover.text import change_text, markdown_table, markdown_text


class ModelFacts(TypedDict):
    """What the card says of the model that was measured."""

    name: str
    fingerprint: str
    dtype: str
    device: str


class TextFacts(TypedDict):
    """What the card says of a held-out text."""

    sha256: str
    tokens: int
    length: NotRequired[int]
    split: NotRequired[str]


class TaskFacts(TypedDict):
    """What the card says of a task."""

    num_fewshot: int
    items: int
    metrics: list[str]
    metric: str
    harness: str


class PlanFacts(TypedDict):
    """What identifies the plan of a row."""

    fingerprint: str
    repair: NotRequired[str]
    merge: NotRequired[str]


class Score(Protocol):
    """A metric of a task, as a share, and its standard error."""

    @property
    def value(self) -> float: ...
    @property
    def stderr(self) -> float | None: ...


class TextResult(Protocol):
    """Perplexity on a text, and closeness to the model itself."""

    @property
    def perplexity(self) -> float: ...
    @property
    def kl(self) -> float | None: ...
    @property
    def top1(self) -> float | None: ...


class Row(Protocol):
    """One variant of a model; see `evaluation.artifact.Row`."""

    @property
    def plan(self) -> PlanFacts | None: ...
    @property
    def perplexity(self) -> Mapping[str, TextResult]: ...
    @property
    def tasks(self) -> Mapping[str, Mapping[str, Score]]: ...


class Measurement(Protocol):
    """The results of an evaluation of a model and its variants; see `evaluation.artifact.Evaluation`."""

    @property
    def model(self) -> ModelFacts: ...
    @property
    def texts(self) -> Mapping[str, TextFacts]: ...
    @property
    def tasks(self) -> Mapping[str, TaskFacts]: ...
    @property
    def rows(self) -> Sequence[Row]: ...


def measured(
    structure: Structure,
    plan: Plan,
    evaluations: Mapping[str, Measurement],
    repair: str | None = None,
    merge: str | None = None,
) -> str:
    """A markdown section with the numbers of a plan, beside those of the model itself where it was evaluated too.

    Args:
        structure: the model that is cut.
        plan: which experts stay.
        evaluations: results of `evaluate`, or cells of a comparison, by the name used in messages.
        repair: kind of the repair that the rows must have; None for none.
        merge: the merge that they must have; None for none.

    Raises:
        InputError: one is of another model, none has the plan, or the measurements of plan and model
            differ in texts or tasks.
    """
    original: Row | None = None
    found: Row | None = None
    about: Measurement | None = None
    for name, one in evaluations.items():
        _check_comparable(structure, name, one, next(iter(evaluations)), about)
        about = one
        original = next((row for row in one.rows if row.plan is None), original)
        found = next((row for row in one.rows if _is_of(row, plan, (repair, merge))), found)
    if found is None or about is None:
        raise InputError(
            f"{arg('evaluations', ', '.join(evaluations))} holds no row of this plan. "
            f"Make one with `moecover evaluate {structure.checkpoint.name} --plan ...`"
        )
    columns = {"original": original, "pruned": found} if original is not None else {"pruned": found}
    worst = [_worst(original, found), ""] if original is not None and found.perplexity else []
    return "\n".join(["## Measured", "", *worst, _table(about, columns), "", _settings(about), ""])


def _worst(original: Row, pruned: Row) -> str:
    """The text that lost most, and the mean: what a reader asks first."""
    lost = {
        name: math.log(one.perplexity / original.perplexity[name].perplexity) for name, one in pruned.perplexity.items()
    }
    worst = max(lost, key=lambda name: lost[name])
    texts = f"geometric mean over {len(lost)} texts {change_text(statistics.fmean(lost.values()))}; " * (len(lost) > 1)
    return f"Perplexity: {texts}worst text {markdown_text(worst)}, {change_text(lost[worst])}."


def _check_comparable(
    structure: Structure, name: str, one: Measurement, first: str, others: Measurement | None
) -> None:
    """Refuse an evaluation of another model, or one of other texts or tasks than those before it."""
    if one.model["fingerprint"] != structure.model_fingerprint:
        raise InputError(
            f"{arg('evaluations', name)} is of {one.model['name']}, the checkpoint to cut is "
            f"{structure.checkpoint.name}. Give an evaluation of that model"
        )
    if others is not None and (_hashes(one), _tasks(one)) != (_hashes(others), _tasks(others)):
        raise InputError(
            f"{arg('evaluations', name)} was measured on other texts or tasks than {first}, so they cannot be compared"
        )


def _is_of(row: Row, plan: Plan, changed: tuple[str | None, str | None]) -> bool:
    """Whether a row is of this plan, with this kind of repair and this merge; not of one whose tokens skip experts."""
    if row.plan is None or (row.plan.get("repair"), row.plan.get("merge")) != changed or "skip" in row.plan:
        return False
    return row.plan["fingerprint"] == kept_hash(plan)


def _hashes(evaluation: Measurement) -> list[tuple[str, str]]:
    return [(name, record["sha256"]) for name, record in evaluation.texts.items()]


def _tasks(evaluation: Measurement) -> dict[str, dict[str, object]]:
    """The records of the tasks without what depends on the model and its calibration text."""
    return {
        name: {key: value for key, value in record.items() if key not in ("cut", "overlap")}
        for name, record in evaluation.tasks.items()
    }


def _table(about: Measurement, columns: Mapping[str, Row]) -> str:
    """All measurements as a table, one column a row of the evaluation."""
    lines = [*_text_lines(about, columns), *_task_lines(about, list(columns.values()))]
    rows = [{"": markdown_text(label), **dict(zip(columns, cells, strict=True))} for label, cells in lines]
    return markdown_table(rows, columns=["", *columns], right=columns)


def _text_lines(about: Measurement, columns: Mapping[str, Row]) -> Iterator[tuple[str, list[str]]]:
    """Labels and cells for perplexity and closeness."""
    for name, record in about.texts.items():
        shown = f"{name}{' ' + record['split'] if record.get('split') else ''}"
        windows = f" in windows of {record['length']}" if "length" in record else ""
        label = f"perplexity, {shown}, {record['tokens']:,} tokens{windows}"
        yield label, [f"{row.perplexity[name].perplexity:.3f}" for row in columns.values()]
        close = columns["pruned"].perplexity[name]
        if close.kl is not None:
            kl, top1 = ["0", f"{close.kl:.4f}"], ["100 %", f"{100 * (close.top1 or 0):.1f} %"]
            yield f"KL divergence from the original, {shown}, nats per token", kl[-len(columns) :]
            yield f"same most likely token, {shown}", top1[-len(columns) :]


def _task_lines(about: Measurement, rows: Sequence[Row]) -> Iterator[tuple[str, list[str]]]:
    """Labels and cells for tasks, and their mean."""
    for task, record in about.tasks.items():
        for metric in record["metrics"]:
            label = f"{task}, {metric}, {record['num_fewshot']}-shot, {record['items']:,} items"
            yield label, [_percent(row.tasks[task][metric]) for row in rows]
    if len(about.tasks) > 1:
        means = [
            statistics.fmean(row.tasks[task][record["metric"]].value for task, record in about.tasks.items())
            for row in rows
        ]
        yield f"mean of {len(about.tasks)} tasks", [f"{100 * mean:.1f}" for mean in means]


def _percent(score: Score) -> str:
    return f"{100 * score.value:.1f}" + (f" ± {100 * score.stderr:.1f}" if score.stderr is not None else "")


def _settings(about: Measurement) -> str:
    """How the numbers were measured."""
    harness = ", ".join(sorted({record["harness"] for record in about.tasks.values()}))
    tasks = f", tasks by {harness} (%, ± standard error)" if harness else ""
    return (
        f"Measured in {about.model['dtype']} on {about.model['device']}{tasks}; windows do not overlap. "
        "Perplexities compare only under the same tokenizer."
    )
