"""Preparing the models of a comparison: downloads them, reads texts and samples, gives every cell its fingerprint."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.opening import fetched
from moecover.checkpoints.structure import Structure
from moecover.comparison.config import corpora_of
from moecover.comparison.fingerprints import (
    cell_fingerprint,
    hashed_weights,
    remembered,
    tasks_fingerprint,
    versions,
    weights_fingerprint,
)
from moecover.comparison.models import ComparedModel
from moecover.comparison.open_model import tasks_of
from moecover.comparison.reading import Request
from moecover.corpora.arguments import parse_corpora
from moecover.corpora.loading import refused_text
from moecover.corpora.overlap import WORTH_SAYING, overlap
from moecover.corpora.packing import load_corpus
from moecover.corpora.sources import set_name
from moecover.corpora.windows import load_windows
from moecover.errors import InputError
from moecover.llama.library import Library, load
from moecover.llama.opening import opened_vocabulary
from moecover.profiling.layer_inputs import sample_of
from moecover.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOSTLY = 0.5  # of the text: samples that take more of it overlap, so that their spread is underestimated


def prepare(request: Request, model: ComparedModel, run: Path, progress: Progress) -> None:
    """Download a model, read what its cells depend on, and give every cell its fingerprint.

    Args:
        request: the comparison.
        model: of it.
        run: the run folder, where hashes of weights are remembered.
        progress: shows the stages.

    Raises:
        InputError: a text or task that cannot be read, with the line.
    """
    tasks, library = read_text(request, model, progress)
    model.weights = _hashed(model, model.name, model.structure, run, progress)
    for name, file in model.files.items():
        model.files_weights[name] = _hashed(model, model.name_of(name), file, run, progress)
    computed_by = versions(library)
    for cell in model.cells:
        model.fingerprints[cell.id] = cell_fingerprint(request.config, model, cell, tasks, computed_by)


def read_text(request: Request, model: ComparedModel, progress: Progress) -> tuple[str | None, Library | None]:
    """Download a model, and read its texts, samples and tasks.

    Args:
        request: the comparison.
        model: of it.
        progress: shows the stages.

    Returns:
        The fingerprint of the tasks, None without any; the library that runs a GGUF file.

    Raises:
        InputError: a text or task that cannot be read, with the line.
    """
    model.structure = fetched(model.structure, revision=model.entry.revision, progress=progress)
    library = load(request.config.libllama) if model.entry.gguf else None
    with contextlib.nullcontext() if library is None else opened_vocabulary(model.structure, library) as tokenizer:
        _read_texts(request, model, tokenizer, progress)
        _read_samples(request, model, tokenizer, progress)
    _warn_of_overlap(model, progress)
    return _read_tasks(request, model, progress) if request.config.tasks else None, library


def _hashed(model: ComparedModel, name: str, structure: Structure, run: Path, progress: Progress) -> str:
    """The hash of the weights of a model or file, whose shards' hashes are noted under a name."""
    model.shard_hashes[name] = found = hashed_weights(structure, remembered(run).get(name, {}), progress)
    return weights_fingerprint(structure, found)


def _read_texts(
    request: Request, model: ComparedModel, tokenizer: PreTrainedTokenizerBase | None, progress: Progress
) -> None:
    """Read the texts for perplexity; a checkpoint has its tokenizer in its folder."""
    config = request.config
    texts = parse_corpora(config.perplexity) if config.perplexity else {}
    for number, (name, path) in enumerate(texts.items()):
        try:
            with progress.spinner(f"{model.name}: reading text {name}"):
                text = load_windows(
                    name,
                    path or None,
                    structure=model.structure,
                    tokenizer=tokenizer,
                    length=config.window,
                    windows=config.windows,
                    bos=config.bos,
                )
        except InputError as error:
            raise request.error(f"{model.name}: {error}", "perplexity", number) from error
        model.texts += (text,)


def _read_samples(
    request: Request, model: ComparedModel, tokenizer: PreTrainedTokenizerBase | None, progress: Progress
) -> None:
    """Read the calibration samples, and the part of them that merges, repairs and skipping rules are made on."""
    config = request.config
    sets = [tuple(corpora_of(arguments)) for arguments in config.calibration]
    for names, seed in dict.fromkeys(c.calibrated_on for c in model.cells if c.calibration):
        number = sets.index(names)
        try:
            with progress.spinner(f"{model.name}: reading corpora {set_name(names, ' and ')}, sample {seed}"):
                model.samples[names, seed] = tuple(
                    load_corpus(
                        name,
                        path or None,
                        structure=model.structure,
                        tokenizer=tokenizer,
                        sequences=config.sequences,
                        length=config.length,
                        seed=seed,
                        bos=config.bos,
                    )
                    for name, path in parse_corpora(config.calibration[number]).items()
                )
        except InputError as error:
            raise request.error(f"{model.name}: {error}", "calibration", number) from error
        for line in filter(None, map(refused_text, model.samples[names, seed])):
            progress.say(line)
    try:
        for sample in dict.fromkeys(c.calibrated_on for c in model.cells if c.fitted):
            taken = sample_of(model.samples[sample], config.repair_tokens, argument="repair_tokens")
            model.fitted_on[sample] = tuple(taken)
    except InputError as error:
        raise request.error(f"{model.name}: {error}", "repair_tokens") from error


def _read_tasks(request: Request, model: ComparedModel, progress: Progress) -> str:
    """Read the tasks and note their sizes.

    Returns:
        Their fingerprint.

    Raises:
        InputError: a task that is unknown or whose documents are missing, with the line.
    """
    try:
        with progress.spinner("reading the tasks"):
            tasks = tasks_of(request.config, model.structure)
            passes = -(-tasks.num_requests // request.config.batch_size)
            model.in_tasks, model.longest = (tasks.num_tokens(), passes), tasks.longest
            model.in_memory = tasks.in_memory()
            records = [corpus.record for sample in model.samples.values() for corpus in sample]
            shares = {name: overlap(text.tokens, text.mask, records) for name, text in tasks.texts.items()}
    except InputError as error:
        text = str(error).removeprefix("--tasks ").removeprefix("tasks=")  # the place says that already
        raise request.error(text, "tasks") from error
    for name, share in shares.items():
        if share >= WORTH_SAYING:
            progress.say(
                f"note: {model.name}: {share:.0%} of the task {name} is in the calibration text too, so its score says "
                "little about unseen text"
            )
    return tasks_fingerprint(tasks, request.config.limit)


def _warn_of_overlap(model: ComparedModel, progress: Progress) -> None:
    """Say which test texts are calibration text too, and which calibration samples are mostly the same text."""
    for text in model.texts:
        share = max(
            (overlap(text.tokens, text.mask, [c.record for c in corpora]) for corpora in model.samples.values()),
            default=0.0,
        )
        if share >= WORTH_SAYING:
            progress.say(
                f"note: {model.name}: {share:.0%} of the text {text.name} is in the calibration text too, so its "
                "perplexity says little about unseen text"
            )
    by_corpus: dict[str, list[dict[str, Any]]] = {}
    for corpora in model.samples.values():
        for corpus in corpora:
            by_corpus.setdefault(corpus.name, []).append(corpus.record)
    for name, records in by_corpus.items():
        share = max(r["sequences"] / r["blocks_available"] for r in records)
        if len({r["sha256"] for r in records}) > 1 and share > MOSTLY:
            progress.say(
                f"note: {model.name}: every sample of {name} takes {share:.0%} of the available text, so the samples "
                "overlap and their spread is underestimated. Give fewer sequences or more text"
            )
