"""An evaluation as a job: reads a model, plans, texts and tasks as users give them; opens the model as it fits."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Unpack

from moecover import rehearsal
from moecover.checkpoints.opening import Model, described, fetched
from moecover.checkpoints.structure import Structure
from moecover.corpora.packing import Corpus
from moecover.corpora.tokenizer import load_tokenizer
from moecover.errors import InputError, arg
from moecover.evaluation.answers import forget_answers
from moecover.evaluation.artifact import FILE, FILES, Evaluation
from moecover.evaluation.endpoint_job import checked_server, evaluate_served
from moecover.evaluation.gguf_job import Files, check_files, evaluated_gguf
from moecover.evaluation.given import (
    Plans,
    Texts,
    load_texts,
    named_plans,
    parsed_texts,
    skip_text,
    skipping_rows,
    with_fewer,
)
from moecover.evaluation.notes import note_cuts, note_overlap, note_overlaps, note_skips
from moecover.evaluation.options import EvaluateOptions, checked_passes
from moecover.evaluation.run import evaluate as run_evaluation
from moecover.evaluation.run import skip_rules, task_overlaps
from moecover.evaluation.task_loading import resolve as resolve_tasks
from moecover.evaluation.tasks import Tasks
from moecover.files.atomic import check_output
from moecover.llama.opening import check_options, check_unused
from moecover.planning.artifact import Plan, kept_hash
from moecover.planning.fitting import check_plan
from moecover.progress import Progress, resolve
from moecover.runtime.distributed import check_same, joined, wait_for_all
from moecover.runtime.loadable import check_loadable
from moecover.runtime.memory import opened
from moecover.runtime.passes import Passes
from moecover.runtime.world import ALONE, World, check_alone, own_device


def evaluate(
    checkpoint: Model,
    /,
    plans: Plans = (),
    *,
    files: Files = (),
    texts: Texts = (),
    tasks: Sequence[str] = (),
    top_ks: Sequence[int] = (),
    skip: str | Corpus | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    windows: int | None = None,
    length: int | None = None,
    bos: str | None = None,
    libllama: str | Path | None = None,
    here: World = ALONE,
    progress: bool | Progress = True,
    **options: Unpack[EvaluateOptions],
) -> Evaluation:
    """Measure a model and plans of it: perplexity on held-out text, closeness to the model, zero-shot tasks.

    A plan is emulated on the original by masking: bit for bit what its checkpoint computes. The weights are read once.

    Args:
        checkpoint: folder, hub id, GGUF file, or a structure; a pruned checkpoint too.
        plans: files of plans, or plans by the name of their row.
        files: further GGUF files with the same tokens, as rows beside a GGUF file: pruned or quantised ones.
        texts: held-out text: names (``"wikitext2"``), ``"NAME=PATH"``, or a mapping from names to files.
        tasks: names of tasks of lm-evaluation-harness.
        top_ks: for each number, further rows: the model itself and every plan with that many experts per token.
        skip: calibration text (name or ``"NAME=PATH"``): beside every row one in which tokens skip experts by the rule
            of arXiv 2402.14800; None for no such rows.
        output: folder for the evaluation; None for none.
        overwrite: replace an evaluation that is there.
        windows: windows per text at most; None for 256.
        length: tokens per window; None for 2048, or the model's positions if fewer.
        bos: what a window begins with: ``auto`` (default) what the tokenizer adds by itself, ``always`` its BOS token,
            ``never`` nothing. Tasks begin as the harness has them.
        libllama: shared library of llama.cpp, which runs GGUF files; None for the optional dependency's.
        here: this process among others under torchrun, which share out windows and requests; each gets the evaluation.
        progress: True draws bars and a log on stderr or in a notebook; False is silent.
        **options: see `RunOptions` (batch size 1 by default), `TaskOptions` and `EndpointOptions`.

    Returns:
        A row for the model and one for every plan.

    Raises:
        InputError: nothing to measure, arguments out of range, plans that do not fit, text that cannot be read, or a
            model that gives numbers that are not finite; or the server of ``endpoint`` serves another model, or gives
            less than is needed.
        MoecoverError: the server fails.
    """
    shown, named = resolve(progress), parsed_texts(texts)
    how = checked_passes(named, tasks, options, windows=windows, length=length, bos=bos)
    if output is not None:
        check_output(Path(output), overwrite=overwrite, marker=FILE, names=FILES)
    server = checked_server(options, plans, options)
    variants = named_plans(plans)
    if output is not None:
        rehearsal.ahead("write", Path(output) / FILE)
    headers = described(checkpoint, revision=options.get("revision"), progress=shown)
    if server is not None:
        check_alone(here, "a server")
        if files or libllama is not None:
            name = "files" if files else "libllama"
            raise InputError(f"{arg(name)} is for GGUF files that run here, with {arg('endpoint')} a server runs one")
        if top_ks or skip is not None:
            name = "top_ks" if top_ks else "skip"
            raise InputError(f"{arg(name)} changes the model as it runs, with {arg('endpoint')} a server runs it")
        found = evaluate_served(
            headers,
            server,
            served_name=options.get("served_name"),
            texts=named,
            tasks=(lambda: _tasks(tasks, headers, {}, options, how, shown)) if tasks else None,
            windows=windows,
            length=length,
            bos=bos,
            output=None if output is None else Path(output),
            progress=shown,
        )
        _finished(found, output, shown)
        if output is not None:
            forget_answers(Path(output))
        return found
    others = check_files(files, headers, variants)
    variants = with_fewer(variants, top_ks, headers)
    for plan in variants.values():
        check_plan(plan, headers, unequal=headers.checkpoint.gguf is None)
    read = functools.partial(load_texts, named, length=length, windows=windows, bos=bos, progress=shown)
    if headers.checkpoint.gguf is not None:
        check_alone(here, headers.checkpoint.name)
        check_options({**options, "tasks": tasks or None, "skip": skip}, "tasks", "batch_size", "skip")
        device = options.get("device")
        found = evaluated_gguf(headers, variants, others, read, libllama=libllama, device=device, progress=shown)
        return _finished(found, output, shown)
    check_unused(libllama)
    check_loadable(headers, how.dtype)
    skipping = dict[str, Plan]()
    if skip is not None:
        check_alone(here, arg("skip"))
        skipping = skipping_rows(variants, skip, headers)
    with joined(here, own_device(here, how.device)):
        structure = fetched(headers, revision=options.get("revision"), progress=shown)
        loaded = read(structure)
        note_overlaps(loaded, variants, structure, shown)
        found_tasks = _tasks(tasks, structure, variants, options, how, shown) if tasks else None
        _check_same(here, structure, variants, loaded, tasks, how)
        rule = None if skip is None else skip_text(skip, structure, bos=bos, progress=shown)
        measured = _measured(structure, variants, skipping, loaded, found_tasks, rule, how, here, shown)
        return _finished(measured, output, shown, here)


def _check_same(
    here: World,
    structure: Structure,
    plans: Mapping[str, Plan],
    texts: Sequence[Corpus],
    tasks: Sequence[str],
    how: Passes,
) -> None:
    """Refuse processes that measure different things."""
    inputs = {"model": structure.model_fingerprint, "batch size": how.batch_size, "tasks": list(tasks)}
    inputs |= {"plans": {name: kept_hash(plan) for name, plan in plans.items()}}
    check_same(here, inputs | {"texts": {text.name: text.record for text in texts}})


def _finished(found: Evaluation, output: str | Path | None, progress: Progress, here: World = ALONE) -> Evaluation:
    """Say what was cut, and write the folder where there is to be one."""
    note_cuts(found, progress)
    note_skips(found, progress)
    if output is not None and here.rank == 0:
        found.save(Path(output))
    wait_for_all(here)
    return found


def _tasks(
    names: Sequence[str],
    structure: Structure,
    plans: Mapping[str, Plan],
    options: EvaluateOptions,
    how: Passes,
    progress: Progress,
) -> Tasks:
    """The tasks in the model's tokens, with a note where calibration text is in them."""
    with progress.spinner("reading the tasks"):
        tasks = resolve_tasks(
            list(names),
            tokenizer=load_tokenizer(structure.checkpoint.path),
            data_dir=options.get("data_dir"),
            include_path=options.get("include_path"),
            limit=options.get("limit"),
            batch_size=how.batch_size,
        )
    rehearsal.ahead("read", f"tasks {', '.join(names)}", tokens=tasks.num_tokens())
    for task, by_row in task_overlaps(tasks, plans, structure).items():
        note_overlap(f"the task {task}", "score", by_row, structure, progress)
    return tasks


def _measured(
    structure: Structure,
    plans: Mapping[str, Plan],
    skipping: Mapping[str, Plan],
    texts: Sequence[Corpus],
    tasks: Tasks | None,
    skip: Corpus | None,
    how: Passes,
    here: World,
    progress: Progress,
) -> Evaluation:
    """Open the model as it fits, and measure."""
    variants = 1 + len(plans) + len(skipping)
    read = [*texts, *([] if skip is None else [skip])]
    longest = max([text.tokens.shape[1] for text in read] + ([tasks.longest] if tasks is not None else []))
    tokens = sum(text.num_tokens for text in texts)
    batches = sum(-(-len(text.tokens) // how.batch_size) for text in texts)
    if tasks is not None:
        tokens, batches = tokens + tasks.num_tokens(), batches - (-tasks.num_requests // how.batch_size)
    with opened(
        structure,
        tokens=0,
        batch_tokens=how.batch_size * longest,
        in_parts=(-(-tokens * variants // here.size), -(-batches * variants // here.size)),
        unit=how.batch_size * max((text.tokens.shape[1] for text in texts), default=0) * variants,
        dtype=how.dtype,
        device=own_device(here, how.device),
        device_map=how.device_map,
        memory_limit=how.memory_limit,
        head=True,
        here=here,
        say=progress.say,
    ) as model:
        size, rules = how.batch_size, None
        if skip is not None:
            rules = skip_rules(structure, skipping, model=model, corpora=[skip], batch_size=size)
        return run_evaluation(
            structure,
            {**plans, **skipping},
            model=model,
            texts=texts,
            tasks=tasks,
            skips=rules,
            batch_size=size,
            bar=progress.bar,
        )
