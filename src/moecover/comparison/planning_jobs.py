"""Profiles and plans of cells: one profile per calibration sample, from which all methods and budgets plan.

Reads a model, calibration text and profiles of earlier runs; writes ``profiles/`` and ``plans/`` of the run folder.
The file made-from.json of a profile says what it was made from; while that stays the same, it is reused.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from moecover.checkpoints.structure import Structure
from moecover.comparison.cell_files import plan_path
from moecover.comparison.cells import Cell
from moecover.comparison.jobs import CellFailed, Note, PlanJob, Report, TaskProfileJob, why
from moecover.comparison.open_model import OpenModel
from moecover.comparison.variants import CHANNELS, OF_EVERY_METHOD, SUPER_EXPERTS, Variant
from moecover.corpora.packing import Corpus
from moecover.corpora.sources import set_name
from moecover.errors import InputError
from moecover.evaluation.task_usage import task_corpora
from moecover.files.atomic import PARTIAL, canonical_json, write_text
from moecover.files.reading import read_json
from moecover.planning.artifact import Plan, with_top_k
from moecover.planning.fitting import channel_groups
from moecover.planning.methods import METHODS
from moecover.planning.run import plan_budgets
from moecover.planning.shapes import Shape
from moecover.profiling.artifact import Profile
from moecover.profiling.records import model_record
from moecover.runtime.pass_state import kept_for_later, remove

MADE_FROM = "made-from.json"
USAGE_TEXTS = 256  # of every task, a seeded sample, on which the model is profiled


def plan_cells(model: OpenModel, job: PlanJob) -> Iterator[Report]:
    """Make one profile, then the plans of every method and seed, all budgets of one at once."""
    try:
        searches = any(_variant(cell).searches for cell in job.cells)
        found = _profile(model, job.model, job.folder, job.corpora, searches=searches)
    except Exception as error:
        for cell in job.cells:
            yield CellFailed(cell, f"profiling {set_name([c.name for c in job.corpora], ', ')}: {why(error)}")
        return
    groups: dict[str, list[Cell]] = {}
    for cell in job.cells:
        variant = _variant(cell)
        groups.setdefault(canonical_json([variant.method, variant.plan_options(cell.seed)]), []).append(cell)
    for group in groups.values():
        try:
            _plan_group(model, job.model, found, group)
        except Exception as error:
            for cell in group:
                yield CellFailed(cell, f"planning: {why(error)}")


def profile_tasks(model: OpenModel, job: TaskProfileJob) -> Iterator[Report]:
    """Profile the texts of the tasks: for analysis only, no plan is made from it."""
    try:
        tasks = model.tasks(job.model)
        assert tasks is not None
        structure = model.structure(job.model)
        corpora = task_corpora(tasks.documents(), structure=structure, tokenizer=tasks.tokenizer, limit=USAGE_TEXTS)
        _profile(model, job.model, job.folder, corpora)
    except Exception as error:
        yield Note(f"{job.model}: which experts the tasks use is unknown: {why(error)}")


def blind_plan(structure: Structure, cell: Cell) -> Plan:
    """The plan of a method that uses no statistics."""
    profile = Profile(structure.topology, {}, {}, model_record(structure))
    variant = _variant(cell)
    return with_top_k(_plans(profile, structure, variant, cell.seed, [Shape(cell.keep)])[0], variant.top_k)


def _variant(cell: Cell) -> Variant:
    """The variant of a cell that is not the full model."""
    assert cell.variant is not None
    return cell.variant


def _profile(model: OpenModel, name: str, path: str, corpora: Sequence[Corpus], *, searches: bool = False) -> Profile:
    """A profile in the run folder: read if it was made from the same inputs, else made.

    Args:
        model: of the worker.
        name: of the model.
        path: the profile's folder, relative to the run folder.
        corpora: text.
        searches: also save a sample of the inputs of every MoE layer.
    """
    config, folder = model.config, model.run / path
    inputs = {
        "model": model.setup_of(name).weights,
        "corpora": [c.record for c in corpora],
        "batch_size": config.batch_size,
        "dtype": config.dtype,
        "device": config.device,
    }
    inputs = json.loads(json.dumps(inputs))
    with contextlib.suppress(OSError, ValueError, InputError):
        stored = read_json(folder / MADE_FROM)
        search_tokens = stored.pop("search_tokens")
        if stored == inputs and (not searches or search_tokens == config.search_tokens):
            return Profile.load(folder)
    (folder / MADE_FROM).unlink(missing_ok=True)
    state = folder.with_name(f".{folder.name}{PARTIAL}")
    with kept_for_later(state):
        inputs_kept = (config.search_tokens, folder) if searches else None
        made = model.engine(name).profile(corpora, state=state, keep_inputs=inputs_kept)
        made.save(folder)
        record = {**inputs, "search_tokens": config.search_tokens if searches else None}
        write_text(folder / MADE_FROM, json.dumps(record) + "\n")
    remove(state)
    return made


def _plan_group(model: OpenModel, name: str, found: Profile, group: Sequence[Cell]) -> None:
    """Write the plans of one method at several budgets; plans of one budget are the same for every repair.

    A search whose result exists is not repeated.
    """
    variant, seed = _variant(group[0]), group[0].seed
    live: dict[str, object] = {}
    if variant.searches and found.inputs is not None:
        group = [cell for cell in group if not _is_searched(model.run / plan_path(cell), cell, found)]
        live = {"model": model.running(name), "structure": model.structure(name)} if group else {}
    if group:
        shapes = list(dict.fromkeys(Shape(cell.keep, cell.width) for cell in group))
        plans = dict(zip(shapes, _plans(found, model.structure(name), variant, seed, shapes, live), strict=True))
        for cell in group:
            plan = with_top_k(plans[Shape(cell.keep, cell.width)], _variant(cell).top_k)
            plan.save(model.run / plan_path(cell))


def _plans(
    found: Profile,
    structure: Structure,
    variant: Variant,
    seed: int | None,
    shapes: Sequence[Shape],
    live: Mapping[str, object] | None = None,
) -> list[Plan]:
    """Plans of a variant, one per budget; ``live`` is what a search needs: the model and its structure.

    Of weights that are stored in blocks of channels, whole blocks stay, as in what `prune` writes.
    """
    thin = any(shape.width is not None for shape in shapes)
    options = {**variant.plan_options(seed), **METHODS[variant.method].given(structure=structure), **(live or {})}
    protect, turns = bool(options.pop(SUPER_EXPERTS, False)), options.pop(CHANNELS, 0.0)
    assert isinstance(turns, float)
    return plan_budgets(
        found,
        method=variant.method,
        keeps=[shape.keep for shape in shapes],
        widths=[shape.width for shape in shapes],
        protect_super_experts=protect,
        protect_channels=turns if thin else 0.0,
        channel_groups=channel_groups(structure) if thin else 1,
        **options,
    )


def _is_searched(path: Path, cell: Cell, found: Profile) -> bool:
    """Whether there is a plan that the search would give again."""
    variant, inputs = _variant(cell), found.inputs
    assert inputs is not None
    if not path.is_file():
        return False
    try:
        plan = Plan.load(path)
    except InputError:
        return False
    options = variant.plan_options(cell.seed)
    protect, turns = options.pop(SUPER_EXPERTS, False), options.pop(CHANNELS, 0.0)
    complete = METHODS[variant.method].complete(options)
    wanted = {k: v for k, v in complete.items() if k in plan.options or k in options}
    return (
        plan.profile_fingerprint == found.fingerprint
        and (plan.method, plan.keep, plan.width) == (variant.method, cell.keep, cell.width)
        and {k: v for k, v in plan.options.items() if k not in (*OF_EVERY_METHOD, "channel_groups")} == wanted
        and plan.options.get(SUPER_EXPERTS, False) == protect
        and (plan.width is None or plan.options.get(CHANNELS, 0.0) == turns)
        and all(layer.tokens == inputs.num_tokens for layer in plan.layers)
    )
