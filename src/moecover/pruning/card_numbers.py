"""Measured numbers for a model card: reads evaluations of a plan and of the model it cuts, gives markdown.

A plan that was evaluated in memory is bit for bit its checkpoint, so the card of the checkpoint takes the plan's numbers.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from moecover.checkpoints.structure import Structure
from moecover.errors import InputError
from moecover.planning.artifact import Plan, kept_hash


class Row(Protocol):
    """One variant of a model; see `evaluation.artifact.Row`."""

    @property
    def plan(self) -> Mapping[str, Any] | None: ...
    @property
    def perplexity(self) -> Mapping[str, Any]: ...
    @property
    def tasks(self) -> Mapping[str, Mapping[str, Any]]: ...


class Measurement(Protocol):
    """What an evaluation says of a model and its variants; see `evaluation.artifact.Evaluation`."""

    @property
    def model(self) -> Mapping[str, Any]: ...
    @property
    def texts(self) -> Mapping[str, Mapping[str, Any]]: ...
    @property
    def tasks(self) -> Mapping[str, Mapping[str, Any]]: ...
    @property
    def rows(self) -> Sequence[Row]: ...


def measured(structure: Structure, plan: Plan, evaluations: Mapping[str, Measurement]) -> str:
    """A table of what evaluations say about a plan, beside the model itself where it was evaluated too.

    Args:
        structure: the model that is cut.
        plan: what is kept.
        evaluations: by the name that messages give them, what `evaluate` gave or a cell of `compare` holds.

    Raises:
        InputError: one is of another model, none has the plan, or the measurements of plan and model
            differ in texts or tasks.
    """
    original: Row | None = None
    found: Row | None = None
    about: Measurement | None = None
    for folder, one in evaluations.items():
        if one.model["fingerprint"] != structure.model_fingerprint:
            raise InputError(f"--evaluation {folder} is of {one.model['name']}, the checkpoint to cut is {structure.checkpoint.name}. Give one of that model")  # fmt: skip
        if about is not None and (_sources(one), one.tasks) != (_sources(about), about.tasks):
            raise InputError(f"--evaluation {folder} was measured on other texts or tasks than {next(iter(evaluations))}: they do not compare")  # fmt: skip
        about = one
        original = next((row for row in one.rows if row.plan is None), original)
        unrepaired = [row for row in one.rows if row.plan is not None and "repair" not in row.plan]
        found = next((row for row in unrepaired if (row.plan or {})["fingerprint"] == kept_hash(plan)), found)
    if found is None or about is None:
        raise InputError(f"--evaluation {', '.join(evaluations)} holds no row of this plan. Make one with `moecover evaluate {structure.checkpoint.name} --plan ...`")  # fmt: skip
    return "\n".join(_lines(about, original, found))


def _sources(evaluation: Measurement) -> list[tuple[str, str]]:
    return [(name, record["sha256"]) for name, record in evaluation.texts.items()]


def _lines(about: Measurement, original: Row | None, found: Row) -> list[str]:
    rows = [row for row in (original, found) if row is not None]
    lines = ["## Measured", "", f"| | {'original | ' if original else ''}here |", f"|---|{'---:|' * len(rows)}"]

    def line(what: str, values: Sequence[str]) -> None:
        lines.append(f"| {what} | {' | '.join(values)} |")

    for name, record in about.texts.items():
        shown = f"{name}{' ' + record['split'] if record.get('split') else ''}"
        line(f"perplexity, {shown}, {record['tokens']:,} tokens in windows of {record['length']}", [f"{row.perplexity[name].perplexity:.3f}" for row in rows])  # fmt: skip
        if (close := found.perplexity[name]).kl is not None:
            line(f"KL divergence from the original, {shown}, nats per token", ["0", f"{close.kl:.4f}"][-len(rows) :])
            line(f"same most likely token, {shown}", ["100 %", f"{100 * (close.top1 or 0):.1f} %"][-len(rows) :])
    for task, record in about.tasks.items():
        for metric in record["metrics"]:
            scores = [row.tasks[task][metric] for row in rows]
            line(f"{task}, {metric}, {record['num_fewshot']}-shot, {record['items']:,} items", [f"{100 * s.value:.1f}" + (f" ± {100 * s.stderr:.1f}" if s.stderr is not None else "") for s in scores])  # fmt: skip
    if len(about.tasks) > 1:
        means = [
            statistics.fmean(row.tasks[task][record["metric"]].value for task, record in about.tasks.items())
            for row in rows
        ]
        line(f"mean of {len(about.tasks)} tasks", [f"{100 * mean:.1f}" for mean in means])
    harness = sorted({str(record["harness"]) for record in about.tasks.values()})
    said = f"In {about.model['dtype']} on {about.model['device']}{', tasks by ' + ', '.join(harness) + ' (± standard error, %)' if harness else ''}; windows do not overlap, and perplexities compare only under one tokeniser."  # fmt: skip
    return [*lines, "", said, ""]
