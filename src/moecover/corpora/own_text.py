"""Text that a model writes itself, as a job: reads a model as users give it, writes a corpus of its own."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from moecover import rehearsal
from moecover.checkpoints.opening import Model, described, fetched
from moecover.checkpoints.structure import Structure
from moecover.corpora.bos import body_length, check_bos, prefix_of
from moecover.corpora.generation import cache_bytes, write_generated
from moecover.corpora.packing import LENGTH, SEQUENCES, Corpus, load_corpus
from moecover.corpora.tokenizer import load_tokenizer
from moecover.errors import InputError, arg
from moecover.progress import Progress, resolve
from moecover.runtime.cost import itemsizes
from moecover.runtime.distributed import check_same, joined, wait_for_all
from moecover.runtime.loadable import check_loadable
from moecover.runtime.memory import opened
from moecover.runtime.options import RunOptions, check_known
from moecover.runtime.passes import Passes, check_least, passes
from moecover.runtime.running import Running
from moecover.runtime.world import ALONE, World, own_device

ENDING, NAME, BATCH_SIZE = ".jsonl", "self", 16
PACE = 9.0  # seconds over those of a plain pass: 24,576 tokens took qwen2-moe-tiny 26.6 s, and a pass over them 2.9 s


def check_file(path: Path, *, overwrite: bool) -> None:
    """Refuse a file that rows of token ids may not be written to.

    Raises:
        InputError: another ending, or something exists and is not to be replaced.
    """
    if path.suffix != ENDING:
        raise InputError(f"{path}: rows of token ids are written. Give a name that ends in {ENDING}")
    if path.exists() and not (overwrite and path.is_file()):
        remedy = "" if path.is_dir() else f", or give {arg('overwrite')}"
        raise InputError(f"{path} exists. Choose another output{remedy}")


def generate(
    checkpoint: Model,
    /,
    output: str | Path,
    *,
    sequences: int | None = None,
    length: int | None = None,
    seed: int = 0,
    bos: str | None = None,
    overwrite: bool = False,
    here: World = ALONE,
    progress: bool | Progress = True,
    **options: Unpack[RunOptions],
) -> Corpus:
    """Have a model write its own calibration text (arXiv 2410.17170), for text that no named corpus has.

    Args:
        checkpoint: folder, hub id, or a structure from `read_structure`.
        output: file to write, .jsonl: rows of ``input_ids``. An interrupted run resumes.
        sequences: rows; None for 128.
        length: tokens per row; None for 2048, or the model's positions if fewer.
        seed: of the draws.
        bos: what every row begins with, before its first document: see `TextOptions`.
        overwrite: replace a file that is there.
        here: this process among others under torchrun, which share out the batches; each gets the corpus.
        progress: True draws bars and a log on stderr or in a notebook; False is silent.
        **options: see `RunOptions`; batch size (rows at a time) 16 by default.

    Returns:
        The corpus, called ``self``.

    Raises:
        InputError: arguments out of range, a model that does not fit into memory or cannot generate, or an output that
            exists.
        MoecoverError: the disk is full.
    """
    shown, path = resolve(progress), Path(output)
    check_known(options, RunOptions)
    check_least(1, sequences=sequences)
    check_least(2, length=length)
    check_least(0, seed=seed)
    check_bos(bos or "auto")
    check_file(path, overwrite=overwrite)
    how = passes(options, batch_size=BATCH_SIZE)
    headers = described(checkpoint, revision=options.get("revision"), progress=shown)
    check_loadable(headers, how.dtype)
    tokens, rows = _length(headers, length), sequences or SEQUENCES
    rehearsal.ahead("write", path, tokens=rows * tokens)
    structure = fetched(headers, revision=options.get("revision"), progress=shown)
    prefix = _prefix(structure, bos or "auto", tokens)
    device = own_device(here, how.device)
    with joined(here, device), _opened(structure, rows, tokens, replace(how, device=device), here, shown) as model:
        check_same(here, {"model": structure.model_fingerprint, "sizes": [rows, tokens, how.batch_size, seed]})
        sizes = {"sequences": rows, "length": tokens, "batch_size": min(how.batch_size, rows), "seed": seed}
        with shown.bar("generating", -(-rows * tokens // here.size)) as advance:
            write_generated(structure, model, path.resolve(), **sizes, prefix=prefix, advance=advance, say=shown.say)
        wait_for_all(here)
    return load_corpus(NAME, path, structure=structure)


def _length(headers: Structure, length: int | None) -> int:
    """Tokens per row.

    Raises:
        InputError: more than the model has positions.
    """
    most = headers.checkpoint.text_config.get("max_position_embeddings")
    tokens = length or min(LENGTH, most or LENGTH)
    if most is not None and tokens > most:
        raise InputError(
            f"{arg('length', tokens)} is above the {most} positions of the model. Give {arg('length', most)} or less"
        )
    return tokens


def _prefix(structure: Structure, bos: str, length: int) -> tuple[int, ...]:
    """Ids that every row begins with.

    Raises:
        InputError: they need a tokenizer and there is none, or they leave no room in a row of ``length`` tokens.
    """
    tokenizer = load_tokenizer(structure.checkpoint.path)
    if tokenizer is None and bos == "always":
        raise InputError(f"{arg('bos', bos)} needs the model's tokenizer, {structure.checkpoint.name} has none")
    prefix = () if tokenizer is None else prefix_of(tokenizer, bos)
    body_length(length, prefix)
    return prefix


def _opened(
    structure: Structure, rows: int, tokens: int, how: Passes, here: World, progress: Progress
) -> contextlib.AbstractContextManager[Running]:
    """The model, with room for its key-value cache."""
    at_once = min(how.batch_size, rows)
    cache = cache_bytes(structure, tokens=at_once * tokens, itemsize=itemsizes(structure, how.dtype)[1])
    return opened(
        structure,
        tokens=rows * tokens,
        batch_tokens=at_once,
        dtype=how.dtype,
        device=how.device,
        device_map=how.device_map,
        memory_limit=how.memory_limit,
        head=True,
        extra=cache,
        pace=PACE,
        whole=f"{structure.checkpoint.name} does not fit into memory, and layer by layer all of it would be read for "
        f"every token. Give a smaller {arg('batch_size')} or a larger {arg('memory_limit')}, or have a server write "
        "text and give it as --corpus self=FILE",
        here=here,
        say=progress.say,
    )
