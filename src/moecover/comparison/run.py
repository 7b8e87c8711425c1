"""The whole comparison: reads a configuration, fills a run folder cell by cell, writes the results.

Everything that can be checked is checked before the first cell. A cell is written as soon as it is finished and found
again by its fingerprint: the same command continues an interrupted run, and an extended grid computes only new cells.
Several processes may fill one folder side by side: it is locked while one prepares or writes the results.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from moecover import rehearsal
from moecover.comparison.cell_files import CONFIG, DONE, plan_path, stored_cell
from moecover.comparison.cells import Cell
from moecover.comparison.checks import checked
from moecover.comparison.config import Config
from moecover.comparison.costs import check_fits, estimated_seconds, memory_limit, setup_of
from moecover.comparison.fingerprints import remember
from moecover.comparison.jobs import PlanJob, RunFacts, TaskProfileJob, WorkerSetup
from moecover.comparison.members import Members
from moecover.comparison.models import ComparedModel, stored_facts, with_peaks, write_models
from moecover.comparison.outlook import find_pending, outlook, prepare_dry, rehearse
from moecover.comparison.planning_jobs import MADE_FROM
from moecover.comparison.pools import LOCAL, opened_engine
from moecover.comparison.preparing import prepare
from moecover.comparison.reading import Request, request
from moecover.comparison.results import Comparison, cut_texts, write_results
from moecover.comparison.schedule import Schedule
from moecover.comparison.shipping import ARRIVING
from moecover.comparison.working import Workers, work_through
from moecover.errors import InputError, arg
from moecover.evaluation.task_usage import FILE as USAGE
from moecover.evaluation.task_usage import save, usage
from moecover.files.atomic import PARTIAL, digest, write_text
from moecover.files.locks import locked
from moecover.planning.artifact import Plan
from moecover.profiling.artifact import Profile
from moecover.progress import Progress, resolve
from moecover.runtime.devices import check_device
from moecover.text import counted


def compare(
    config: Config | Request | Mapping[str, object] | Path | str,
    run: Path | str,
    *,
    jobs: int = 1,
    engine: str = LOCAL,
    address: str | None = None,
    gpus_per_job: float = 0,
    command: str = "",
    progress: bool | Progress = True,
) -> Comparison:
    """Evaluate a grid of models, calibration sets, methods, budgets and seeds, and compare the methods.

    Only cells that the run folder does not hold yet are computed, so the same call continues an interrupted run. The
    same call in other processes, on any machine that sees the folder, shares the cells with this one.

    Args:
        config: a `Config`, its fields as a mapping, or the path of a YAML file; docs/compare.md describes the fields.
        run: the run folder, created or extended.
        jobs: number of processes; each loads a model of its own.
        engine: where they run: ``local``, this machine, or ``ray``, a cluster.
        address: of the cluster: ``auto`` or HOST:PORT; None starts one on this machine.
        gpus_per_job: GPUs of each process on a cluster.
        command: the command line, for the results.
        progress: True draws bars and a log on stderr or in a notebook; False is silent.

    Returns:
        The results of all cells of the grid.

    Raises:
        InputError: something in the configuration cannot run, the folder is not a run folder, another process fills
            it with another grid, or there is no such cluster.
        MoecoverError: the disk is full or the folder cannot be written.
    """
    if jobs < 1:
        raise InputError(f"{arg('jobs', jobs)} is out of range: 1 or more")
    shown = resolve(progress)
    folder = Path(os.path.abspath(run))  # noqa: PTH100
    _check_folder(folder, shown)
    asked = config if isinstance(config, Request) else request(config)
    if jobs > 1 and asked.config.device_map is not None:
        raise InputError(f"{arg('jobs', jobs)}: every worker would take all devices of `device_map`. Give one")
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(opened_engine(engine, address=address, gpus_per_job=gpus_per_job))
        models = checked(asked, shown)
        workers = Workers(work, jobs, jobs if engine == LOCAL else 1)
        made = _fill(asked, folder, models, workers, shown, stack)
        results = write_results(folder, [cell for m in models for cell in m.cells], command=command)
    for name, notes in cut_texts(results["cut"]).items():
        for note in notes:
            shown.say(f"note: {name}: {note}")
    return Comparison(Path(run), results, made)


def _check_folder(run: Path, progress: Progress) -> None:
    """Refuse a folder that holds something else than a run."""
    if not run.exists():
        return
    with _locked(run, progress):
        if not run.is_dir() or (any(run.iterdir()) and not (run / CONFIG).is_file()):
            raise InputError(
                f"{run} was not written by `moecover compare` (it holds no {CONFIG}). Choose another folder"
            )


def _locked(run: Path, progress: Progress) -> AbstractContextManager[None]:
    """The lock on the run folder, after other processes that hold it for a while."""
    return locked(run, waiting=lambda: progress.say(f"{run} is being prepared or written by another process: waiting"))


def _fill(
    asked: Request,
    run: Path,
    models: Sequence[ComparedModel],
    workers: Workers,
    progress: Progress,
    stack: contextlib.ExitStack,
) -> int:
    """Fill a run folder, beside other processes that do the same.

    Args:
        asked: the comparison.
        run: the run folder.
        models: of it.
        workers: what computes the cells.
        progress: shows the stages.
        stack: holds the lock of the folder when the cells are done, until it is closed.

    Returns:
        How many cells were computed here.
    """
    config, limit, jobs = asked.config, memory_limit(asked.config, workers.here), workers.jobs
    if rehearsal.on():
        prepare_dry(asked, run, models, progress)
        rehearse(asked, run, models, {m.name: setup_of(m, config, limit) for m in models}, jobs)
    members = Members(run)
    stack.callback(members.close)
    with _locked(run, progress):
        _prepare(asked, run, models, members, progress)
    setups = {m.name: setup_of(m, config, limit) for m in models}
    for model in models:
        check_fits(asked, model, setups[model.name])
    one = estimated_seconds(models, setups, config)
    seconds = None if one is None else one / jobs
    progress.say(f"{run}: {outlook(models, seconds)}")
    made, pending = 0, any(m.pending for m in models)
    profiles = [TaskProfileJob(m.name) for m in models if config.tasks and m.samples]
    profiles = [job for job in profiles if pending or not (run / job.folder / MADE_FROM).is_file()]
    facts: dict[str, RunFacts] = {}
    try:
        if pending or profiles:
            threads = max(1, (os.cpu_count() or 1) // workers.here) if workers.here > 1 else None
            device = check_device(config.dtype, config.device)
            setup = WorkerSetup(run, config, setups, threads, device, members.marker)
            schedule = Schedule(models, setups, profiles, config, jobs)
            made = work_through(setup, models, schedule, members, workers, facts, progress, seconds=seconds)
    finally:
        stack.enter_context(_locked(run, progress))
        stack.callback(_leave, run, members)
        before = stored_facts(run)
        write_models(run, models, before | {name: with_peaks(one, before.get(name)) for name, one in facts.items()})
    _write_usage(run, models, config)
    return made


def _prepare(asked: Request, run: Path, models: Sequence[ComparedModel], members: Members, progress: Progress) -> None:
    """Prepare the models and the locked run folder, and note which cells are pending."""
    for model in models:
        prepare(asked, model, run, progress)
    members.join(digest([[cell.to_json(), m.fingerprints[cell.id]] for m in models for cell in m.cells]))
    if others := members.others():
        progress.say(f"{run}: cells are shared with {counted(others, 'other process')}")
    else:
        _remove_partial(run)
    write_text(run / CONFIG, asked.config.text())
    remember(run, {name: one for model in models for name, one in model.shard_hashes.items()})
    _note_pending(run, models, alone=not others, progress=progress)


def _leave(run: Path, members: Members) -> None:
    """Leave the locked run folder, the last one without what killed processes left."""
    if members.leave():
        _remove_partial(run)


def _remove_partial(run: Path) -> None:
    """Remove what a killed run left half-written: no other process fills the folder."""
    shutil.rmtree(run / ARRIVING, ignore_errors=True)
    for folder in ("cells", "plans"):
        for left in (run / folder).glob(f".*{PARTIAL}") if (run / folder).is_dir() else ():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        for left in (run / folder).glob(".*.replaced") if (run / folder).is_dir() else ():
            shutil.rmtree(left)


def _note_pending(run: Path, models: Sequence[ComparedModel], *, alone: bool, progress: Progress) -> None:
    """Note which cells are pending; say which finished ones have to be recomputed, from new plans.

    Beside other processes the plans stay: the first of them has made them anew.
    """
    changed = find_pending(run, models)
    for cell in changed if alone else ():
        (run / plan_path(cell)).unlink(missing_ok=True)
    if changed:
        others = f" and {counted(len(changed) - 1, 'other cell')}" if len(changed) > 1 else ""
        progress.say(
            f"{changed[0].words}{others}: recomputed, because inputs have changed (model, texts, options or versions)"
        )
    known, folder = {cell.id for m in models for cell in m.cells}, run / "cells"
    if spare := sorted(p.name for p in folder.iterdir() if p.name not in known) if folder.is_dir() else []:
        progress.say(f"{counted(len(spare), 'cell')} in {folder} from other grids, left as before, first {spare[0]}")


def _write_usage(run: Path, models: Sequence[ComparedModel], config: Config) -> None:
    """Write usage.json: which experts the tasks use and what every plan kept of them.

    The utility of generic text is that of the first calibration sample.
    """
    found = []
    for model in models:
        calibrated = next(iter(model.samples.items()), None)
        of_tasks = run / TaskProfileJob(model.name).folder
        if calibrated is None or not (of_tasks / MADE_FROM).is_file():
            continue
        (_, sample), corpora = calibrated
        generic = run / PlanJob(model.name, corpora, sample, ()).folder
        if (generic / MADE_FROM).is_file():
            done = [c for c in model.cells if c.variant is not None and _is_done(run, c)]
            plans = {cell.id: Plan.load(run / plan_path(cell)) for cell in done}
            profiles = Profile.load(generic), Profile.load(of_tasks)
            found.append(usage(*profiles, plans, saliency=config.saliencies[0]))
    if found and config.tasks:
        save(found, run / USAGE)
    else:
        (run / USAGE).unlink(missing_ok=True)


def _is_done(run: Path, cell: Cell) -> bool:
    found = stored_cell(run, cell)
    return found is not None and found["status"] == DONE
