"""The comparison of many variants: reads a configuration, fills a run folder cell by cell, gives the results.

Everything that can be checked is checked before the first cell. A cell is written as it is finished and found again by its
fingerprint, which covers all that it depends on; so the same command goes on where it was interrupted, and a grid that
was extended computes what is new. `comparing` does the work, `crew` shares it among processes, `results` tells it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from moecover import progress
from moecover.checkpoints.shipped import shipped_model
from moecover.checkpoints.source import open_checkpoint
from moecover.checkpoints.structure import Structure, read_structure
from moecover.comparison.config import (
    SHIPPED,
    UNREPAIRED,
    Asked,
    Cell,
    Config,
    ModelEntry,
    cells,
    check_sources,
    corpora_of,
)
from moecover.comparison.pool import Died, work
from moecover.comparison.tables import write_results
from moecover.comparison.worker import (
    CELL,
    DONE,
    MADE_FROM,
    Evaluating,
    Failure,
    Finished,
    Planning,
    Ran,
    Said,
    Sample,
    Subject,
    Using,
    Work,
    bench,
    options_of,
    plan_path,
    tasks_of,
    write_cell,
)
from moecover.corpora.overlap import WORTH_SAYING, overlap
from moecover.corpora.packing import Corpus, load_corpus
from moecover.corpora.sources import parse_corpora, set_name
from moecover.corpora.windows import load_windows
from moecover.errors import InputError, MoecoverError
from moecover.evaluation.task_usage import FILE as USAGE
from moecover.evaluation.task_usage import save, usage
from moecover.files.atomic import PARTIAL, canonical_json, locked, write_text
from moecover.planning.artifact import Plan
from moecover.planning.run import check_options
from moecover.profiling.artifact import Profile
from moecover.profiling.layer_inputs import sample_of
from moecover.registry import load_plugin
from moecover.repairing.layers import needed_bytes
from moecover.repairing.targets import Place, check_dtype, places_on_disk
from moecover.runtime.loading import check_device, check_loadable
from moecover.runtime.memory import Cost, available_memory, cost, parse_size, seconds_of
from moecover.signals import held
from moecover.text import duration_text

CONFIG, MODELS = "config.yaml", "models.json"
GROUP = 8  # cells of a model in memory that are measured together: the full model's logits are computed once for them
REPAIR = 10  # passes over its text that the repair of a cell is reckoned as, before one was timed
HEAD_BYTES = 4096  # of every tensor, that enter the fingerprint of the weights


@dataclass(frozen=True)
class Outcome:
    """What a comparison came to.

    Attributes:
        results: what results.json holds.
        failures: reason by cell id.
        made: cells that this run made.
    """

    results: dict[str, Any]
    failures: dict[str, str]
    made: int


@dataclass
class _Model:
    """A model with its cells and what is known of them."""

    entry: ModelEntry
    structure: Structure
    cells: list[Cell]
    samples: dict[Sample, tuple[Corpus, ...]] = field(default_factory=dict)
    repaired_on: dict[Sample, tuple[Corpus, ...]] = field(default_factory=dict)  # what of a sample a repair runs on
    places: list[Place] = field(default_factory=list)  # of what is repaired, where something is
    texts: tuple[Corpus, ...] = ()
    weights: str = ""
    in_tasks: tuple[int, int] = (0, 0)  # tokens and forward passes of one variant
    longest: int = 0  # tokens of a request of its tasks
    in_memory: tuple[str, ...] = ()  # tasks that do not run layer by layer
    fingerprints: dict[str, str] = field(default_factory=dict)
    pending: list[Cell] = field(default_factory=list)
    walls: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.entry.name


# ------------------------------------------------------------------------------------------------------------ checks
def _headers(asked: Asked, number: int) -> Structure:
    """The structure of a model, of a hub model from its headers alone."""
    entry = asked.config.models[number]
    try:
        name = entry.model
        source: Any = shipped_model(name.removeprefix(SHIPPED)) if name.startswith(SHIPPED) else name
        with progress.spinner(f"reading {entry.name}"):
            structure = read_structure(open_checkpoint(source, revision=entry.revision, headers_only=True))
        check_loadable(structure)
    except InputError as error:
        raise asked.wrong(error, "models", number) from error
    for warning in structure.warnings:
        progress.say(f"note: {entry.name}: {warning}")
    return structure


def _checked(asked: Asked) -> list[_Model]:
    """The models with their cells.

    Raises:
        InputError: whatever cannot be, before anything is fetched.
    """
    config = asked.config
    for number, path in enumerate(config.plugins):
        try:
            load_plugin(path)
        except InputError as error:
            raise asked.wrong(error, "plugins", number) from error
    check_sources(asked)
    if config.memory_limit is not None:
        try:
            parse_size(config.memory_limit)
        except InputError as error:
            raise asked.wrong(error, "memory_limit") from error
    try:
        check_device(config.dtype, config.device)
    except InputError as error:
        raise asked.wrong(error, "device" if "device" in str(error) else "dtype") from error
    with held():
        structures = [_headers(asked, number) for number in range(len(config.models))]
    found = []
    for entry, structure in zip(config.models, structures, strict=True):
        found.append(_Model(entry, structure, cells(asked, entry, structure.topology)))
        if any(cell.repair != UNREPAIRED for cell in found[-1].cells):
            found[-1].places = _repairable(asked, entry.name, structure)
    return found


def _repairable(asked: Asked, name: str, structure: Structure) -> list[Place]:
    """What a repair refits in a model.

    Raises:
        InputError: the model cannot be repaired, with the line.
    """
    try:
        where = places_on_disk(structure)
        check_dtype(structure, where, asked.config.dtype)
    except InputError as error:
        text = str(error).replace("repair=none", f"repair: {UNREPAIRED}").replace("dtype=", "dtype: ")  # fmt: skip
        raise asked.wrong(
            InputError(f"{name}: {text}"), "methods" if asked.config.repairs == [UNREPAIRED] else "repairs"
        ) from error
    return where


def _prepare(asked: Asked, model: _Model) -> None:
    """Fetch a model, read its texts and calibration samples, and give every cell its fingerprint."""
    config, entry = asked.config, model.entry
    if model.structure.checkpoint.folder is None:
        progress.say(f"fetching {entry.model}")
        model.structure = read_structure(entry.model, revision=entry.revision)
    structure = model.structure
    wanted = dict.fromkeys((c.calibration, c.sample) for c in model.cells if c.calibration)
    sources = {tuple(corpora_of(arguments)): parse_corpora(arguments) for arguments in config.calibration}
    texts = parse_corpora(config.perplexity) if config.perplexity else {}
    at: tuple[str | int, ...] = ()
    try:
        for number, (name, path) in enumerate(texts.items()):
            at = ("perplexity", number)
            with progress.spinner(f"{entry.name}: reading text {name}"):
                text = load_windows(
                    name, path or None, structure=structure, length=config.window, windows=config.windows
                )
                model.texts += (text,)
        for calibration, sample in wanted:
            at = ("calibration", [tuple(corpora_of(c)) for c in config.calibration].index(calibration))
            with progress.spinner(f"{entry.name}: reading corpora {set_name(calibration, ' and ')}, sample {sample}"):
                corpora = tuple(
                    load_corpus(n, p or None, structure=structure, sequences=config.sequences, length=config.length, seed=sample)
                    for n, p in sources[calibration].items()
                )  # fmt: skip
                model.samples[calibration, sample] = corpora
    except InputError as error:
        raise asked.wrong(InputError(f"{entry.name}: {error}"), *at) from error
    try:
        for which in dict.fromkeys((c.calibration, c.sample) for c in model.cells if c.repair != UNREPAIRED):
            taken = sample_of(model.samples[which], config.repair_tokens, flag="repair_tokens")
            model.repaired_on[which] = tuple(taken)
    except InputError as error:
        raise asked.wrong(InputError(f"{entry.name}: {error}"), "repair_tokens") from error
    _warn_of_overlap(model)
    tasks = None
    if config.tasks:
        tasks = _tasks_fingerprint(asked, model)
    model.weights, versions = weights_fingerprint(structure), _versions()
    for cell in model.cells:
        model.fingerprints[cell.id] = _fingerprint(config, model, cell, tasks, versions)


def _warn_of_overlap(model: _Model) -> None:
    """Say where what is measured on is calibration text too, and where the calibration samples are mostly the same text."""
    for text in model.texts:
        share = max((overlap(text.tokens, text.mask, [c.record for c in corpora]) for corpora in model.samples.values()), default=0.0)
        if share >= WORTH_SAYING:
            progress.say(f"note: {model.name}: {share:.0%} of the text {text.name} is in the calibration text too: that perplexity says little of other text")  # fmt: skip
    by_corpus: dict[str, list[dict[str, Any]]] = {}
    for corpora in model.samples.values():
        for corpus in corpora:
            by_corpus.setdefault(corpus.name, []).append(corpus.record)
    for name, records in by_corpus.items():
        share = max(r["sequences"] / r["blocks_available"] for r in records)
        if len({r["sha256"] for r in records}) > 1 and share > 0.5:
            progress.say(f"note: {model.name}: every sample of {name} is {share:.0%} of the text that is there, so the samples overlap and their spread is too small. Give fewer sequences or more text")  # fmt: skip


def weights_fingerprint(structure: Structure) -> str:
    """Hash of the beginning of every tensor: other weights under the same routers are other weights."""
    digest = hashlib.sha256(structure.model_fingerprint.encode())
    files: dict[str, int] = {}
    try:
        for name, entry in sorted(structure.checkpoint.tensors.items()):
            if entry.shard not in files:
                files[entry.shard] = os.open(structure.checkpoint.path / entry.shard, os.O_RDONLY)
            digest.update(name.encode() + os.pread(files[entry.shard], min(entry.num_bytes, HEAD_BYTES), entry.start))
    finally:
        for descriptor in files.values():
            os.close(descriptor)
    return digest.hexdigest()


def _tasks_fingerprint(asked: Asked, model: _Model) -> str:
    """Hash of the tasks: their definitions, every document, how many are scored, and the harness; notes their sizes.

    Raises:
        InputError: a task that is unknown or whose documents are missing, with the line.
    """
    from importlib.metadata import version

    try:
        with progress.spinner("reading the tasks"):
            tasks = tasks_of(asked.config, model.structure)
            passes = -(-tasks.num_requests // asked.config.batch_size)
            model.in_tasks, model.longest = (tasks.num_tokens(), passes), tasks.longest
            model.in_memory = tasks.in_memory()
    except InputError as error:
        raise asked.wrong(InputError(str(error).removeprefix("--tasks ")), "tasks") from error
    digest = hashlib.sha256(json.dumps([version("lm_eval"), tasks.parts, asked.config.limit]).encode())
    for name, task in sorted(tasks.loaded["tasks"].items()):
        about = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(task.dump_config(), default=str, sort_keys=True))
        digest.update(f"{name} {about}".encode())
        for document in itertools.islice(task.eval_docs, asked.config.limit):
            digest.update(json.dumps(document, default=str, sort_keys=True).encode())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    import torch
    import transformers

    from moecover import __version__

    return {"moecover": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _fingerprint(config: Config, model: _Model, cell: Cell, tasks: str | None, versions: Mapping[str, str]) -> str:
    """Hash of everything that a cell depends on."""
    plan: Any = None
    if cell.variant is not None:
        options = options_of(cell)
        complete = check_options(
            cell.variant.method, {k: v for k, v in options.items() if k != "protect_super_experts"}
        )
        known = {k: v for k, v in complete.items() if isinstance(v, (str, int, float, bool, dict, type(None)))}
        plan = [
            cell.variant.method,
            known | options,
            cell.keep,
            config.search_tokens if cell.variant.searches else None,
        ]
        if cell.repair != UNREPAIRED:
            plan += [cell.repair, sum(c.num_tokens for c in model.repaired_on[cell.calibration, cell.sample])]
    corpora = [c.record for c in model.samples[cell.calibration, cell.sample]] if cell.calibration else []
    texts = {text.name: text.record for text in model.texts}
    plugins = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in config.plugins]
    value = [model.weights, plan, corpora, texts, tasks, config.batch_size, config.dtype, check_device(config.dtype, config.device), versions, plugins]  # fmt: skip
    return hashlib.sha256(canonical_json(json.loads(json.dumps(value))).encode()).hexdigest()


def stored(run: Path, cell: Cell) -> dict[str, Any] | None:
    """cell.json of a cell, None where there is none that can be read."""
    try:
        found = json.loads((run / "cells" / cell.id / CELL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"fingerprint", "status"} <= found.keys() else None


# ------------------------------------------------------------------------------------------------------------ the jobs
def _limit(config: Config, jobs: int) -> int:
    """Bytes of memory that one worker may use."""
    if config.memory_limit is not None:
        return parse_size(config.memory_limit)
    device = check_device(config.dtype, config.device)
    return int(0.9 * available_memory(device) / jobs)


def _subject(model: _Model, config: Config, limit: int) -> Subject:
    texts = [*model.texts, *(corpus for sample in model.samples.values() for corpus in sample)]
    longest = max([corpus.tokens.shape[1] for corpus in texts] + [model.longest])
    passes = [model.texts, *model.samples.values()]
    tokens = max(sum(corpus.num_tokens for corpus in corpora) for corpora in passes)
    extra = 0
    if model.places:
        keep = max(cell.keep for cell in model.cells if cell.repair != UNREPAIRED)
        repaired = max(sum(c.num_tokens for c in corpora) for corpora in model.repaired_on.values())
        extra = needed_bytes(model.structure, model.places, keep=keep, tokens=repaired, dtype=config.dtype)
    return Subject(
        model.name, model.structure.checkpoint.path, model.weights, limit, config.batch_size * longest, tokens,
        (model.in_tasks[0] * len(model.cells), model.in_tasks[1] * len(model.cells)), extra, model.texts,
    )  # fmt: skip


def _cost(model: _Model, subject: Subject, config: Config, tokens: int, in_parts: tuple[int, int] = (0, 0)) -> Cost:
    return cost(
        model.structure, tokens=tokens, batch_tokens=subject.batch_tokens, in_parts=in_parts, dtype=config.dtype,
        limit=subject.limit, head=True, extra=subject.extra,
    )  # fmt: skip


def _check_fits(asked: Asked, model: _Model, subject: Subject) -> None:
    """Refuse a model of which not even one layer fits, and tasks that need a model in memory which does not fit.

    Raises:
        InputError: with the line of the limit, or of the tasks.
    """
    found = _cost(model, subject, asked.config, subject.tokens, subject.in_parts)
    if found.by_layer and model.in_memory:
        raise asked.wrong(InputError(f"{model.name}: {', '.join(model.in_memory)} needs the model in memory, which does not fit: {found.whole / 1e9:.1f} GB of memory are needed, {subject.limit / 1e9:.1f} GB may be used. Leave the task out, or give a larger memory_limit"), "tasks")  # fmt: skip
    if found.by_layer and found.streamed > subject.limit:
        raise asked.wrong(InputError(f"{model.name}: one layer at a time still needs {found.streamed / 1e9:.1f} GB of memory, {subject.limit / 1e9:.1f} GB may be used. Give a smaller batch_size or length, fewer --jobs, or a larger memory_limit"), "memory_limit")  # fmt: skip


def _share(model: _Model, subject: Subject, config: Config) -> int | None:
    """How many cells of a model that runs layer by layer share one read; None where the model is in memory.

    Every cell has hidden states of its own for all texts, twice, and one layer's repair.
    """
    found = _cost(model, subject, config, sum(text.num_tokens for text in model.texts))
    if not found.by_layer:
        return None
    layer = sum(e.num_bytes for n, e in model.structure.checkpoint.tensors.items() if n in _refitted(model))
    each = 2 * found.hidden + layer // max(len(model.places), 1)
    return max(1, int((subject.limit - found.streamed + each) // max(each, 1)))


def _refitted(model: _Model) -> set[str]:
    """Names of the tensors that a repair changes."""
    return {name for p in model.places for name in (*p.experts, *(p.shared or ())[1:])}


class _Schedule:
    """The queue of jobs, which grows when a profile is there.

    In memory, cells are evaluated in groups of `GROUP`, those that need no profile first; a model that runs layer by layer is
    evaluated when all its plans are there, as many at once as memory takes: they share a read of its weights.
    """

    def __init__(
        self, models: Sequence[_Model], subjects: Mapping[str, Subject], uses: Sequence[Using], config: Config, jobs: int
    ) -> None:  # fmt: skip
        self.queue: deque[Any] = deque()
        self._jobs, self._lost = jobs, set[str]()
        self._by_layer = {m.name: _share(m, subjects[m.name], config) for m in models}
        self._models = {m.name: m for m in models}
        self._open: dict[str, set[int]] = {}
        self._gathered: dict[str, list[Cell]] = {}
        for model in models:
            free = [cell for cell in model.pending if not cell.calibration]
            plannings = [
                Planning(model.name, corpora, sample, mine)
                for (calibration, sample), corpora in model.samples.items()
                if (mine := tuple(c for c in model.pending if (c.calibration, c.sample) == (calibration, sample)))
            ]
            self._open[model.name] = {id(job) for job in plannings}
            if self._by_layer[model.name] and plannings:
                self._gathered[model.name] = free
                self.queue.extend(plannings)
            else:
                self.queue.extend([*self._evaluations(model.name, free), *plannings])
        self.queue.extend(uses)

    def _evaluations(self, name: str, found: Sequence[Cell]) -> list[Evaluating]:
        size = self._by_layer[name] or min(GROUP, -(-len(found) // self._jobs))
        model = self._models[name]

        def text_of(part: Sequence[Cell]) -> dict[Sample, tuple[Corpus, ...]]:
            samples = dict.fromkeys((c.calibration, c.sample) for c in part if c.repair != UNREPAIRED)
            return {sample: model.repaired_on[sample] for sample in samples}

        return [
            Evaluating(name, tuple(part), {c.id: model.fingerprints[c.id] for c in part}, text_of(part))
            for i in range(0, len(found), max(size, 1))
            if (part := found[i : i + size])
        ]

    def lost(self, cell: Cell) -> None:
        """A cell has failed: it is not evaluated."""
        self._lost.add(cell.id)

    def ended(self, job: Any) -> None:
        """A job is done: what waited for it comes next."""
        if not isinstance(job, Planning):
            return
        self._open[job.model].discard(id(job))
        ready = [cell for cell in job.cells if cell.id not in self._lost]
        if not self._by_layer[job.model]:
            self.queue.extendleft(reversed(self._evaluations(job.model, ready)))
            return
        gathered = self._gathered.setdefault(job.model, [])
        gathered += ready
        if not self._open[job.model]:
            self.queue.extendleft(reversed(self._evaluations(job.model, gathered)))


# --------------------------------------------------------------------------------------------------------- the whole run
def compare(asked: Asked, run: Path, *, jobs: int = 1, command: str = "") -> Outcome:
    """Fill a run folder with the cells of a grid that are not there yet, and write the results.

    Args:
        asked: the configuration, from `grid.read`.
        run: the folder; made, or filled further.
        jobs: processes; each holds a model.
        command: what was typed, for the results.

    Raises:
        InputError: something in the configuration cannot be, or the folder is none of ours.
    """
    if jobs < 1:
        raise InputError(f"--jobs {jobs} is out of range: 1 or more")
    run = Path(os.path.abspath(run))  # noqa: PTH100
    if run.exists() and (not run.is_dir() or (any(run.iterdir()) and not (run / CONFIG).is_file())):
        raise InputError(f"{run} was not written by `moecover compare` (it holds no {CONFIG}). Choose another folder")
    models = _checked(asked)
    with locked(run):
        _sweep(run)
        for model in models:
            _prepare(asked, model)
        write_text(run / CONFIG, asked.config.text())
        _look(run, models)
        subjects = {m.name: _subject(m, asked.config, _limit(asked.config, jobs)) for m in models}
        for model in models:
            _check_fits(asked, model, subjects[model.name])
        progress.say(_plan_line(run, models, subjects, asked.config, jobs))
        made = sum(len(m.pending) for m in models)
        uses = [Using(m.name) for m in models if asked.config.tasks and m.samples]
        uses = [job for job in uses if made or not (run / job.folder / MADE_FROM).is_file()]
        machine = _stored_models(run)
        try:
            if made or uses:
                _run(run, asked.config, models, subjects, uses, jobs, machine)
        finally:
            write_text(run / MODELS, json.dumps(_about_models(models, machine), indent=1) + "\n")
        _write_usage(run, models, asked.config)
        results = write_results(run, [cell for m in models for cell in m.cells], command=command)
    return Outcome(results, {c["id"]: c["reason"] for c in results["cells"] if c["status"] != DONE}, made)


def _sweep(run: Path) -> None:
    """Remove what a killed run left half-written: no other run holds the folder."""
    for folder in ("cells", "plans"):
        for left in (run / folder).glob(f".*{PARTIAL}") if (run / folder).is_dir() else ():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        for left in (run / folder).glob(".*.replaced") if (run / folder).is_dir() else ():
            shutil.rmtree(left)


def _look(run: Path, models: Sequence[_Model]) -> None:
    """Which cells are pending; says which of those that are there have to be made anew."""
    changed, known = [], {cell.id for m in models for cell in m.cells}
    for model in models:
        for cell in model.cells:
            found = stored(run, cell)
            if found is not None and found["status"] == DONE and found["fingerprint"] == model.fingerprints[cell.id]:
                if found.get("wall_s") is not None:
                    model.walls.append(found["wall_s"])
                continue
            if found is not None and found["status"] == DONE:
                changed.append(cell)
                (run / "plans" / f"{cell.id}.json").unlink(missing_ok=True)
            model.pending.append(cell)
    if changed:
        others = f" and {len(changed) - 1} other cells" if len(changed) > 1 else ""
        progress.say(
            f"{changed[0].words}{others}: made from other inputs (model, texts, options or versions), made anew"
        )
    folder = run / "cells"
    if spare := sorted(p.name for p in folder.iterdir() if p.name not in known) if folder.is_dir() else []:
        progress.say(f"{len(spare)} cells in {folder} are not part of this grid and are left as they are, the first is {spare[0]}")  # fmt: skip


def _plan_line(run: Path, models: Sequence[_Model], subjects: Mapping[str, Subject], config: Config, jobs: int) -> str:
    """How many cells there are, what is there already, and how long the rest will take."""
    total, pending = sum(len(m.cells) for m in models), sum(len(m.pending) for m in models)
    if not pending:
        return f"{run}: all {total} cells are there"
    seconds = 0.0
    for model in models:
        if not model.pending:
            continue
        if model.walls:
            seconds += len(model.pending) * sum(model.walls) / len(model.walls)
            continue
        subject = subjects[model.name]
        device = check_device(config.dtype, config.device)
        passes = [(sum(text.num_tokens for text in model.texts), model.in_tasks)] * len(model.pending)
        passes += [(sum(c.num_tokens for c in sample), (0, 0)) for sample in model.samples.values()]
        repaired = [model.repaired_on[c.calibration, c.sample] for c in model.pending if c.repair != UNREPAIRED]
        passes += [(REPAIR * sum(c.num_tokens for c in sample), (0, 0)) for sample in repaired]
        for (tokens, in_parts), times in Counter(passes).items():
            one = _cost(model, subject, config, tokens, in_parts)
            seconds += times * seconds_of(one, model.structure, dtype=config.dtype, device=device)
    return f"{run}: {total} cells, {total - pending} are there, {pending} to go: about {duration_text(seconds / jobs)} on this machine"  # fmt: skip


def _run(
    run: Path, config: Config, models: Sequence[_Model], subjects: Mapping[str, Subject], uses: Sequence[Using], jobs: int,
    machine: dict[str, Any],
) -> None:  # fmt: skip
    """Work through all pending cells, and profile the tasks."""
    schedule = _Schedule(models, subjects, uses, config, jobs)
    prints = {cell_id: p for m in models for cell_id, p in m.fingerprints.items()}
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None
    total = sum(len(m.pending) for m in models)
    count = _Count(total)
    reports = work(schedule.queue, partial(bench, Work(run, config, subjects, threads)), jobs=jobs)

    def failed(cell: Cell, reason: str) -> None:
        write_cell(run, cell, prints[cell.id], reason=reason)
        schedule.lost(cell)
        count.add(cell, f"FAILED: {reason}")

    with contextlib.closing(reports), progress.bar("comparing", total, unit="cells") as count.advance, _noted(count):
        settled: set[str] = set()
        for job, report in reports:
            if isinstance(report, Finished):
                settled.add(report.cell.id)
                count.add(report.cell, report.words)
            elif isinstance(report, Failure):
                settled.add(report.cell.id)
                failed(report.cell, report.reason)
            elif isinstance(report, Ran):
                before = machine.get(report.model, {})
                machine[report.model] = {**report.facts, **{k: max(v, before.get(k) or 0) for k, v in report.facts.items() if k.startswith("peak_") and v is not None}}  # fmt: skip
            else:
                if isinstance(report, Said):
                    progress.say(report.line)
                    continue
                if isinstance(report, Died) and isinstance(job, Using):
                    progress.say(f"{job.model}: not known which experts the tasks use: {report.reason}")
                elif isinstance(report, Died):
                    for cell in job.cells:
                        if cell.id not in settled:
                            failed(cell, report.reason)
                schedule.ended(job)


def _write_usage(run: Path, models: Sequence[_Model], config: Config) -> None:
    """usage.json: which experts the tasks use and what every plan left of them, from the profiles that are there.

    The utility is that of the first calibration sample.
    """
    found = []
    for model in models:
        calibrated = next(iter(model.samples.items()), None)
        if calibrated is None or not (run / (folder := Using(model.name).folder) / MADE_FROM).is_file():
            continue
        (_, sample), corpora = calibrated
        generic = run / Planning(model.name, corpora, sample, ()).folder
        done = [c for c in model.cells if c.variant is not None and (stored(run, c) or {}).get("status") == DONE]
        if (generic / MADE_FROM).is_file():
            plans = {cell.id: Plan.load(run / plan_path(cell)) for cell in done}
            found.append(usage(Profile.load(generic), Profile.load(run / folder), plans, saliency=config.saliencies[0]))
    if found and config.tasks:
        save(found, run / USAGE)
    else:
        (run / USAGE).unlink(missing_ok=True)


class _Count:
    """Cells done so far, with an estimate for the rest."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.started = total, 0, time.monotonic()
        self.advance: Any = lambda cells: None

    def add(self, cell: Cell, words: str) -> None:
        self.done += 1
        self.advance(1)
        left = (time.monotonic() - self.started) / self.done * (self.total - self.done)
        rest = f"; about {duration_text(left)} to go" if self.done < self.total else ""
        progress.say(f"[{self.done}/{self.total}] {cell.words}: {words}{rest}")


@contextlib.contextmanager
def _noted(count: _Count) -> Iterator[None]:
    """Have an interrupt say what stays."""
    try:
        yield
    except BaseException as error:
        text = f"{count.done} of {count.total} cells are done and stay; the same command goes on from there"
        if isinstance(error, MoecoverError):
            raise type(error)(f"{error}. {text}") from error
        error.add_note(text)
        raise


# --------------------------------------------------------------------------------------------------------------- models
def _stored_models(run: Path) -> dict[str, Any]:
    """How the models ran before, by name."""
    keys = ("dtype", "device", "peak_rss_bytes", "peak_device_bytes", "cpu", "layer_by_layer")
    try:
        found = json.loads((run / MODELS).read_text(encoding="utf-8"))
        return {m["name"]: {k: m[k] for k in keys} for m in found if m.get("dtype")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _about_models(models: Sequence[_Model], machine: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What models.json holds."""
    found = []
    for model in models:
        structure, topology = model.structure, model.structure.topology
        sizes = {str(keep): structure.num_bytes(keep) for keep in sorted({c.keep for c in model.cells})}
        nothing = dict.fromkeys(("dtype", "device", "peak_rss_bytes", "peak_device_bytes", "cpu", "layer_by_layer"))
        found.append({
            "name": model.name, "model": model.entry.model, "revision": structure.checkpoint.revision, "family": topology.family,
            "fingerprint": structure.model_fingerprint, "experts": topology.num_experts, "top_k": topology.top_k,
            "layers": len(topology.decoder_layers), "num_bytes": structure.checkpoint.num_bytes, "num_bytes_by_keep": sizes,
            **nothing, **machine.get(model.name, {}),
        })  # fmt: skip
    return found
