"""Measuring cells: evaluates the plans of a group of cells on one model, with their repairs, and writes the cells.

On the texts all cells of a group run together, beside the full model. The tasks run cell by cell for a model in memory;
layer by layer they run for all cells together, which share reads of the weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from moecover.comparison.cell_files import RepairRecord, plan_path, repair_path, write_cell
from moecover.comparison.cells import Cell
from moecover.comparison.config import UNMERGED, UNREPAIRED
from moecover.comparison.jobs import CellDone, CellFailed, EvaluationJob, ModelRan, Report, why
from moecover.comparison.open_model import OpenModel
from moecover.comparison.planning_jobs import blind_plan
from moecover.evaluation.artifact import FULL as FULL_ROW
from moecover.evaluation.artifact import Evaluation
from moecover.evaluation.run import skip_rules
from moecover.evaluation.skipping import Skipping
from moecover.planning.artifact import Plan
from moecover.repairing.applied import LayerRepair
from moecover.repairing.store import repair


@dataclass(frozen=True)
class CellRepair:
    """The repair of a cell.

    Attributes:
        of_layer: gives the repair of a MoE layer.
        record: facts on it for cell.json.
        wall_s: seconds that it took.
    """

    of_layer: Callable[[int], LayerRepair]
    record: RepairRecord
    wall_s: float


@dataclass(frozen=True)
class Ready:
    """Cells that can be measured, with their plans, repairs and skipping rules by cell id."""

    cells: list[Cell] = dataclasses.field(default_factory=list)
    plans: dict[str, Plan] = dataclasses.field(default_factory=dict)
    repairs: dict[str, CellRepair] = dataclasses.field(default_factory=dict)
    skips: dict[str, Skipping] = dataclasses.field(default_factory=dict)

    def part(self, cells: Sequence[Cell]) -> Ready:
        """Some of the cells."""
        ids = {cell.id for cell in cells}
        return Ready(
            list(cells),
            {name: plan for name, plan in self.plans.items() if name in ids},
            {name: one for name, one in self.repairs.items() if name in ids},
            {name: one for name, one in self.skips.items() if name in ids},
        )


def evaluate_cells(model: OpenModel, job: EvaluationJob) -> Iterator[Report]:
    """Evaluate cells together; if that fails for a model in memory, one by one, to find the cell that is at fault."""
    ready = Ready()
    for cell in job.cells:
        step = "planning"
        try:
            if cell.variant is not None:
                ready.plans[cell.id] = _plan_of(model, cell)
            if cell.repaired:
                step = "repairing"
                ready.repairs[cell.id] = _repair(model, job, cell, ready.plans[cell.id])
            if cell.skips:
                step = "finding what is skipped"
                ready.skips.update(_rule(model, job, cell, ready.plans[cell.id]))
            ready.cells.append(cell)
        except Exception as error:
            yield CellFailed(cell, f"{step}: {why(error)}")
    groups = [ready] if ready.cells else []
    while groups:
        group = groups.pop(0)
        try:
            yield from _measure(model, job, group)
        except Exception as error:
            if len(group.cells) > 1 and model.in_memory:
                groups[:0] = [group.part([cell]) for cell in group.cells]
            else:
                for cell in group.cells:
                    yield CellFailed(cell, why(error))
        else:
            yield ModelRan(job.model, model.engine(job.model).facts())


def _plan_of(model: OpenModel, cell: Cell) -> Plan:
    path = model.run / plan_path(cell)
    if not cell.calibration:
        blind_plan(model.structure(cell.model), cell).save(path)
    return Plan.load(path)


def _repair(model: OpenModel, job: EvaluationJob, cell: Cell, plan: Plan) -> CellRepair:
    """The repair of a cell; layers that an interrupted run has finished are reused."""
    started, config, structure = time.monotonic(), model.config, model.structure(job.model)
    corpora, running = job.fitted_on[cell.calibrated_on], model.running(job.model)
    found = repair(
        structure,
        plan,
        corpora,
        model=contextlib.nullcontext(running),
        kind=cell.repair,
        merge=cell.merge,
        folder=model.run / repair_path(cell),
        batch_size=config.batch_size,
        dtype=config.dtype,
        device=config.device,
    )
    before, after = found.mean_errors()
    record: RepairRecord = {
        "kind": cell.repair,
        "tokens": sum(c.num_tokens for c in corpora),
        "error_before": before,
        "error_after": after,
    }
    if cell.merge != UNMERGED:
        record["merge"] = cell.merge
    # In memory all layers of a variant are in use at once, layer by layer only one is.
    of_layer = functools.lru_cache(1 if running.by_layer else None)(found.of_layer(structure, plan))
    return CellRepair(of_layer, record, time.monotonic() - started)


def _rule(model: OpenModel, job: EvaluationJob, cell: Cell, plan: Plan) -> dict[str, Skipping]:
    """The rule by which the tokens of a cell skip experts."""
    return skip_rules(
        model.structure(job.model),
        {cell.id: plan},
        model=model.running(job.model),
        corpora=job.fitted_on[cell.calibrated_on],
        batch_size=model.config.batch_size,
    )


def _measure(model: OpenModel, job: EvaluationJob, group: Ready) -> Iterator[CellDone]:
    """Evaluate a group and write its cells."""
    started = time.monotonic()
    engine, texts, tasks = model.engine(job.model), model.setup_of(job.model).texts, model.tasks(job.model)
    run = functools.partial(
        engine.evaluate,
        files={cell.id: cell.file for cell in group.cells if cell.file},
        repairs={name: one.of_layer for name, one in group.repairs.items()},
        skips=group.skips,
    )
    has_full = len(group.plans) < len(group.cells)
    on_texts = run(group.plans, texts=texts) if texts else None
    on_tasks = run(group.plans, tasks=tasks, full=has_full) if tasks is not None and engine.by_layer else None
    shared_s = (time.monotonic() - started) / len(group.cells)
    for cell in group.cells:
        started = time.monotonic()
        parts = [row_of(found, cell) for found in (on_texts, on_tasks) if found is not None]
        if tasks is not None and on_tasks is None:
            alone = {} if cell.variant is None else {cell.id: group.plans[cell.id]}
            parts.append(run(alone, tasks=tasks, full=cell.variant is None))
        evaluation = functools.reduce(_joined, parts)
        mended = group.repairs.get(cell.id)
        wall_s = shared_s + time.monotonic() - started + (mended.wall_s if mended else 0)
        write_cell(
            model.run,
            cell,
            job.fingerprints[cell.id],
            evaluation=evaluation,
            wall_s=wall_s,
            repair=mended.record if mended else None,
        )
        yield CellDone(cell, _figures(evaluation))


def row_of(found: Evaluation, cell: Cell) -> Evaluation:
    """The row of a cell as an evaluation of its own."""
    name = cell.id if cell.variant is not None or cell.file else FULL_ROW
    (row,) = [row for row in found.rows if row.name == name]
    if row.plan is not None and cell.repair != UNREPAIRED:
        row = dataclasses.replace(row, plan={**row.plan, "repair": cell.repair})
    if row.plan is not None and cell.merge != UNMERGED:
        row = dataclasses.replace(row, plan={**row.plan, "merge": cell.merge})
    items, windows = {name: found.items.get(name, {})}, {name: found.windows.get(name, {})}
    return Evaluation(found.model, found.texts, found.tasks, [row], items, windows)


def _joined(on_texts: Evaluation, on_tasks: Evaluation) -> Evaluation:
    """One row from its evaluations on texts and on tasks."""
    row = dataclasses.replace(on_texts.rows[0], tasks=on_tasks.rows[0].tasks)
    return Evaluation(on_texts.model, on_texts.texts, on_tasks.tasks, [row], on_tasks.items, on_texts.windows)


def _figures(evaluation: Evaluation) -> str:
    """The figures of a cell in a line of log."""
    (row,) = evaluation.rows
    parts = [f"{name} {text.perplexity:.4g}" for name, text in row.perplexity.items()]
    scores = [row.tasks[task][about["metric"]].value for task, about in evaluation.tasks.items()]
    mean = [f"mean of {len(scores)} tasks {sum(scores) / len(scores):.3f}"] if scores else []
    return ", ".join([*parts, *mean])
