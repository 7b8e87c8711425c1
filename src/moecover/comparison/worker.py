"""The work of a comparison: takes jobs, writes profiles, plans and evaluated cells into the run folder.

A job is planning (one profile, from which all methods and budgets plan), the evaluation of some cells of one model, or the
profile of what its tasks have it read. What a worker needs is in `Work`; it loads a model once and keeps it until a job asks for another. Nothing here knows
the grid: `comparison` says what is to be done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.structure import Structure, read_structure
from moecover.comparison.config import UNREPAIRED, Cell, Config
from moecover.corpora.packing import Corpus, load_tokenizer
from moecover.corpora.sources import set_folder, set_name
from moecover.errors import InputError, MoecoverError, is_out_of_memory
from moecover.evaluation.artifact import FULL, Evaluation
from moecover.evaluation.run import evaluate
from moecover.evaluation.task_usage import task_corpora
from moecover.evaluation.tasks import Tasks, resolve
from moecover.files.atomic import PARTIAL, canonical_json, new_folder, write_text
from moecover.planning.artifact import Plan
from moecover.planning.run import check_options, plan_budgets
from moecover.profiling.artifact import Profile, model_record
from moecover.profiling.run import profile
from moecover.registry import load_plugin
from moecover.repairing.layers import LayerRepair
from moecover.repairing.store import repair
from moecover.runtime.memory import opened
from moecover.runtime.pass_state import kept_for_later, remove
from moecover.runtime.running import Running

if TYPE_CHECKING:
    pass

SCHEMA = 1
Sample = tuple[tuple[str, ...], int]  # of calibration text: names of its corpora, and its seed
CELL, MADE_FROM = "cell.json", "made-from.json"
USAGE_TEXTS = 256  # of every task, a seeded sample, tell which experts it uses
DONE, FAILED = "done", "failed"


# ----------------------------------------------------------------------------------------------------- jobs and reports
@dataclass(frozen=True)
class Subject:
    """A model on this machine with the texts that its cells are measured on.

    Attributes:
        name: of the model.
        folder: of its checkpoint.
        weights: a hash of them.
        limit: bytes of memory that it may use.
        batch_tokens: tokens of the largest forward pass.
        tokens: of the largest set of texts that is read at once.
        in_parts: tokens and forward passes of one variant in the tasks, see `fitting.cost`.
        extra: bytes of memory that repairs take beside the model.
        texts: for perplexity.
    """

    name: str
    folder: Path
    weights: str
    limit: int
    batch_tokens: int
    tokens: int
    in_parts: tuple[int, int]
    extra: int
    texts: tuple[Corpus, ...]


@dataclass(frozen=True)
class Work:
    """What a worker needs.

    Attributes:
        run: the run folder.
        config: the comparison.
        subjects: the models by name.
        threads: of torch in this process; None leaves them as they are.
    """

    run: Path
    config: Config
    subjects: Mapping[str, Subject]
    threads: int | None


@dataclass(frozen=True)
class Planning:
    """Profile a model on a calibration sample, and plan some cells from it."""

    model: str
    corpora: tuple[Corpus, ...]
    sample: int
    cells: tuple[Cell, ...]

    @property
    def folder(self) -> str:
        """Of the profile, within the run."""
        return f"profiles/{self.model}/{set_folder([c.name for c in self.corpora])}-{self.sample}"


@dataclass(frozen=True)
class Evaluating:
    """Evaluate some cells of a model; the plans of those that have one are there, and text for those that are repaired."""

    model: str
    cells: tuple[Cell, ...]
    fingerprints: Mapping[str, str]
    repaired_on: Mapping[Sample, tuple[Corpus, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Using:
    """Profile a model on the texts of its tasks, to tell afterwards which experts they use."""

    model: str

    @property
    def folder(self) -> str:
        """Of the profile, within the run."""
        return f"profiles/{self.model}/tasks"


@dataclass(frozen=True)
class Finished:
    """A cell is on the disk."""

    cell: Cell
    wall_s: float
    words: str


@dataclass(frozen=True)
class Failure:
    """A cell could not be made."""

    cell: Cell
    reason: str


@dataclass(frozen=True)
class Said:
    """A line of log."""

    line: str


@dataclass(frozen=True)
class Ran:
    """How a model ran: dtype, device, processor and the most memory so far."""

    model: str
    facts: Mapping[str, Any]


def why(error: BaseException) -> str:
    """The reason of a failure in one line."""
    if is_out_of_memory(error):
        return "not enough memory. Give a smaller batch_size, length or window, a smaller dtype, or a memory_limit to run layer by layer"  # fmt: skip
    text = " ".join(str(error).split())
    return text if isinstance(error, MoecoverError) else f"{type(error).__name__}: {text}"


# ------------------------------------------------------------------------------------------------------------- the bench
@contextlib.contextmanager
def bench(work: Work) -> Iterator[Callable[[Planning | Evaluating | Using], Iterator[Any]]]:
    """A handler of jobs that keeps the model of the last one open."""
    if work.threads is not None:
        import torch

        torch.set_num_threads(work.threads)
    for path in work.config.plugins:
        load_plugin(path)
    with contextlib.closing(_Table(work)) as table:

        def handle(job: Planning | Evaluating | Using) -> Iterator[Any]:
            if isinstance(job, Using):
                return _using(table, job)
            return _planning(table, job) if isinstance(job, Planning) else _evaluating(table, job)

        yield handle


class _Table:
    """The model that is open: at most one."""

    def __init__(self, work: Work) -> None:
        self.work, self._name = work, ""
        self._open = contextlib.ExitStack()
        self._failure: Exception | None = None
        self._model: Running | None = None
        self._tasks: Tasks | None = None
        self._structure: Structure | None = None

    def structure(self, name: str) -> Structure:
        """The checkpoint of a model, headers only."""
        if name != self._name:
            self.close()
            self._name, self._failure = name, None
            self._structure = read_structure(self.work.subjects[name].folder)
        assert self._structure is not None
        return self._structure

    def model(self, name: str) -> Running:
        """The live model.

        Raises:
            Exception: what loading it raised, again for every cell that asks.
        """
        structure = self.structure(name)
        if self._failure is not None:
            raise self._failure
        if self._model is None:
            subject, config = self.work.subjects[name], self.work.config
            try:
                self._model = self._open.enter_context(
                    opened(
                        structure, tokens=subject.tokens, batch_tokens=subject.batch_tokens, in_parts=subject.in_parts,
                        dtype=config.dtype, device=config.device, memory_limit=subject.limit, head=True, extra=subject.extra,
                    )
                )  # fmt: skip
            except Exception as error:
                self._failure = error
                raise
        return self._model

    def tasks(self, name: str) -> Tasks | None:
        """The tasks with the tokenizer of a model, None where none are asked for."""
        structure = self.structure(name)
        if self._tasks is None and self.work.config.tasks:
            self._tasks = tasks_of(self.work.config, structure)
        return self._tasks

    def close(self) -> None:
        self._model = self._tasks = None
        self._open.close()


def tasks_of(config: Config, structure: Structure) -> Tasks:
    """The tasks of a comparison in the tokens of a model."""
    data_dir, include_path = (None if p is None else Path(p) for p in (config.data_dir, config.include_path))
    return resolve(
        config.tasks, tokenizer=load_tokenizer(structure.checkpoint.path), data_dir=data_dir, include_path=include_path,
        limit=config.limit, batch_size=config.batch_size,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------- profiles and plans
def options_of(cell: Cell) -> dict[str, Any]:
    """Options of `plan_budgets` for a cell that is not the full model."""
    assert cell.variant is not None
    options = dict(cell.variant.options)
    if cell.variant.saliency is not None:
        options["saliency"] = cell.variant.saliency
    if cell.seed is not None:
        options["seed"] = cell.seed
    return options


def plan_path(cell: Cell) -> str:
    """Of a cell's plan, within the run."""
    return f"plans/{cell.id}.json"


def repair_path(cell: Cell) -> str:
    """Of the finished layers of a cell's repair, within the run; gone when the cell is there."""
    return f"repairs/{cell.id}"


def _planning(table: _Table, job: Planning) -> Iterator[Any]:
    """One profile, then the plans of every method and seed, all budgets of it at once."""
    try:
        searches = any(cell.variant is not None and cell.variant.searches for cell in job.cells)
        made = _profiled(table, job.model, job.folder, job.corpora, searches=searches)
    except Exception as error:
        for cell in job.cells:
            yield Failure(cell, f"profiling {set_name([c.name for c in job.corpora], ', ')}: {why(error)}")
        return
    groups: dict[str, list[Cell]] = {}
    for cell in job.cells:
        assert cell.variant is not None
        groups.setdefault(canonical_json([cell.variant.method, options_of(cell)]), []).append(cell)
    for group in groups.values():
        try:
            _planned(table, job, made, group)
        except Exception as error:
            for cell in group:
                yield Failure(cell, f"planning: {why(error)}")


def _profiled(table: _Table, model: str, name: str, corpora: Sequence[Corpus], *, searches: bool = False) -> Profile:
    """A profile by its name within the run folder, from there where it is there already."""
    config, structure = table.work.config, table.structure(model)
    folder = table.work.run / name
    asked = {
        "model": table.work.subjects[model].weights, "corpora": [c.record for c in corpora], "batch_size": config.batch_size,
        "dtype": config.dtype, "device": config.device,
    }  # fmt: skip
    asked = json.loads(json.dumps(asked))
    with contextlib.suppress(OSError, ValueError, InputError):
        found = json.loads((folder / MADE_FROM).read_text(encoding="utf-8"))
        kept = found.pop("search_tokens")
        if found == asked and (not searches or kept == config.search_tokens):
            return Profile.load(folder)
    (folder / MADE_FROM).unlink(missing_ok=True)
    state = folder.with_name(f".{folder.name}{PARTIAL}")
    with kept_for_later(state):
        made = profile(
            structure, corpora, model=table.model(model), batch_size=config.batch_size, state=state,
            keep_inputs=(config.search_tokens, folder) if searches else None,
        )  # fmt: skip
        made.save(folder)
        write_text(folder / MADE_FROM, json.dumps({**asked, "search_tokens": config.search_tokens if searches else None}) + "\n")  # fmt: skip
    remove(state)
    return made


def _planned(table: _Table, job: Planning, made: Profile, group: list[Cell]) -> None:
    """Write the plans of one method at several budgets, of one budget the same for every repair.

    What was searched for before is not searched again.
    """
    first = group[0]
    assert first.variant is not None
    options, run = options_of(first), table.work.run
    if first.variant.searches and made.inputs is not None:
        group = [cell for cell in group if not _searched(run / plan_path(cell), cell, made, options)]
        options |= {"model": table.model(job.model), "structure": table.structure(job.model)}
    if group:
        keeps = sorted({cell.keep for cell in group})
        plans = dict(zip(keeps, plan_budgets(made, method=first.variant.method, keeps=keeps, **options), strict=True))
        for cell in group:
            plans[cell.keep].save(run / plan_path(cell))


def _using(table: _Table, job: Using) -> Iterator[Any]:
    """The profile of the texts of the tasks: for analysis, no plan is made from it."""
    try:
        tasks = table.tasks(job.model)
        assert tasks is not None
        structure = table.structure(job.model)
        corpora = task_corpora(tasks.documents(), structure=structure, tokenizer=tasks.tokenizer, limit=USAGE_TEXTS)
        _profiled(table, job.model, job.folder, corpora)
    except Exception as error:
        yield Said(f"{job.model}: not known which experts the tasks use: {why(error)}")


def _searched(path: Path, cell: Cell, made: Profile, options: dict[str, Any]) -> bool:
    """Whether a plan is there that the search would give again."""
    assert cell.variant is not None
    assert made.inputs is not None
    if not path.is_file():
        return False
    try:
        plan = Plan.load(path)
    except InputError:
        return False
    asked = {k: v for k, v in options.items() if k != "protect_super_experts"}
    complete = {k: v for k, v in check_options(cell.variant.method, asked).items() if k in plan.options or k in asked}
    return (
        plan.profile_fingerprint == made.fingerprint
        and (plan.method, plan.keep) == (cell.variant.method, cell.keep)
        and {k: v for k, v in plan.options.items() if k != "protect_super_experts"} == complete
        and plan.options.get("protect_super_experts", False) == options.get("protect_super_experts", False)
        and all(layer.tokens == made.inputs.num_tokens for layer in plan.layers)
    )


def blind_plan(structure: Structure, cell: Cell) -> Plan:
    """The plan of a method that looks at no statistics."""
    assert cell.variant is not None
    nothing = Profile(structure.topology, {}, {}, model_record(structure))
    return plan_budgets(nothing, method=cell.variant.method, keeps=[cell.keep], **options_of(cell))[0]


# ------------------------------------------------------------------------------------------------------------ evaluation
def _evaluating(table: _Table, job: Evaluating) -> Iterator[Any]:
    """Evaluate cells together; where that fails and it is not known whose fault it is, one by one."""
    plans: dict[str, Plan] = {}
    repairs: dict[str, _Repair] = {}
    cells: list[Cell] = []
    for cell in job.cells:
        doing = "planning"
        try:
            if cell.variant is not None:
                plans[cell.id] = _plan_of(table, cell)
            if cell.repair != UNREPAIRED:
                doing = "repairing"
                repairs[cell.id] = _repaired(table, job, cell, plans[cell.id])
            cells.append(cell)
        except Exception as error:
            yield Failure(cell, f"{doing}: {why(error)}")
    groups = [cells] if cells else []
    while groups:
        group = groups.pop(0)
        try:
            model = table.model(job.model)
            yield from _measured(table, job, group, plans, repairs)
        except Exception as error:
            if len(group) > 1 and table._model is not None and not table._model.by_layer:
                groups[:0] = [[cell] for cell in group]
            else:
                for cell in group:
                    yield Failure(cell, why(error))
        else:
            yield Ran(job.model, facts_of(model))


def _plan_of(table: _Table, cell: Cell) -> Plan:
    path = table.work.run / plan_path(cell)
    if cell.variant is not None and cell.variant.blind:
        blind_plan(table.structure(cell.model), cell).save(path)
    return Plan.load(path)


@dataclass(frozen=True)
class _Repair:
    """The repair of a cell: what gives it, layer by layer, what is said of it, and the seconds that it took."""

    of_layer: Callable[[int], LayerRepair]
    facts: dict[str, Any]
    wall_s: float


def _repaired(table: _Table, job: Evaluating, cell: Cell, plan: Plan) -> _Repair:
    """The repair of a cell, from the finished layers that are there."""
    started, config, structure = time.monotonic(), table.work.config, table.structure(job.model)
    corpora, model = job.repaired_on[cell.calibration, cell.sample], table.model(job.model)
    found = repair(
        structure, plan, corpora, model=contextlib.nullcontext(model), kind=cell.repair,
        folder=table.work.run / repair_path(cell), batch_size=config.batch_size, dtype=config.dtype, device=config.device,
    )  # fmt: skip
    before, after = found.mean_errors()
    facts = {"kind": cell.repair, "tokens": sum(c.num_tokens for c in corpora), "error_before": before, "error_after": after}  # fmt: skip
    # In memory all layers of a variant are in use at once, layer by layer only one is.
    of_layer = functools.lru_cache(1 if model.by_layer else None)(found.of_layer(structure, plan))
    return _Repair(of_layer, facts, time.monotonic() - started)


def _measured(
    table: _Table, job: Evaluating, group: list[Cell], plans: Mapping[str, Plan], repairs: Mapping[str, _Repair]
) -> Iterator[Finished]:
    """The texts for all cells together, the full model beside them; then the tasks, cell by cell.

    Layer by layer the tasks are for all cells together too: they share reads of the weights.
    """
    started = time.monotonic()
    structure, model, texts = table.structure(job.model), table.model(job.model), table.work.subjects[job.model].texts
    batch_size, tasks = table.work.config.batch_size, table.tasks(job.model)
    chosen = {cell.id: plans[cell.id] for cell in group if cell.variant is not None}
    mended = {name: repair.of_layer for name, repair in repairs.items()}
    read: Evaluation | None = None
    answered: Evaluation | None = None
    if texts:
        read = evaluate(structure, chosen, model=model, texts=texts, repairs=mended, batch_size=batch_size)
    if tasks is not None and model.by_layer:
        full = len(chosen) < len(group)
        answered = evaluate(
            structure, chosen, model=model, tasks=tasks, full=full, repairs=mended, batch_size=batch_size
        )
    shared = (time.monotonic() - started) / len(group)
    for cell in group:
        started = time.monotonic()
        name, parts = cell.id if cell.variant is not None else FULL, [part_of(read, cell)] if read is not None else []
        if answered is not None:
            parts.append(part_of(answered, cell))
        elif tasks is not None:
            alone = {} if cell.variant is None else {name: plans[name]}
            parts.append(evaluate(structure, alone, model=model, tasks=tasks, full=cell.variant is None, repairs=mended, batch_size=batch_size))  # fmt: skip
        one = functools.reduce(both, parts)
        wall_s = shared + time.monotonic() - started + (repairs[cell.id].wall_s if cell.id in repairs else 0)
        facts = repairs[cell.id].facts if cell.id in repairs else None
        write_cell(table.work.run, cell, job.fingerprints[cell.id], evaluation=one, wall_s=wall_s, repair=facts)
        remove(table.work.run / repair_path(cell))
        yield Finished(cell, wall_s, summary(one))


def part_of(found: Evaluation, cell: Cell) -> Evaluation:
    """A cell's row of an evaluation, by itself."""
    name = cell.id if cell.variant is not None else FULL
    (row,) = [row for row in found.rows if row.name == name]
    if row.plan is not None and cell.repair != UNREPAIRED:
        row = dataclasses.replace(row, plan={**row.plan, "repair": cell.repair})
    items, windows = {name: found.items.get(name, {})}, {name: found.windows.get(name, {})}
    return Evaluation(found.model, found.texts, found.tasks, [row], items, windows)


def both(one: Evaluation, two: Evaluation) -> Evaluation:
    """Texts of the first and tasks of the second evaluation of the same row."""
    row = dataclasses.replace(one.rows[0], tasks=two.rows[0].tasks)
    return Evaluation(one.model, one.texts, two.tasks, [row], two.items, one.windows)


def write_cell(
    run: Path, cell: Cell, fingerprint: str, *, evaluation: Evaluation | None = None, reason: str | None = None,
    wall_s: float | None = None, repair: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write a cell's folder; it appears only when complete."""
    planned = cell.variant is not None and (run / plan_path(cell)).is_file()
    about = {
        "schema": SCHEMA, **cell.to_json(), "fingerprint": fingerprint, "status": DONE if evaluation is not None else FAILED,
        "reason": reason, "wall_s": None if wall_s is None else round(wall_s, 2), "plan": plan_path(cell) if planned else None,
        "repaired": repair,
    }  # fmt: skip
    with new_folder(run / "cells" / cell.id) as folder:
        if evaluation is not None:
            evaluation.save(folder)
        write_text(folder / CELL, json.dumps(about, indent=1) + "\n")


def summary(evaluation: Evaluation) -> str:
    """The figures of a cell in a line of log."""
    (row,) = evaluation.rows
    parts = [f"{name} {text.perplexity:.4g}" for name, text in row.perplexity.items()]
    scores = [row.tasks[task][about["metric"]].value for task, about in evaluation.tasks.items()]
    return ", ".join([*parts, *([f"mean of {len(scores)} tasks {sum(scores) / len(scores):.3f}"] if scores else [])])


def facts_of(model: Running) -> dict[str, Any]:
    """How a model runs in this process."""
    import torch

    device = model.device
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "cpu": processor(),
        "layer_by_layer": model.by_layer,
    }


@functools.cache
def processor() -> str:
    """Name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
