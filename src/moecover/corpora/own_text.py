"""Text that a model writes itself, as a job: reads a model as users give it, writes a corpus of its own."""

from __future__ import annotations

from pathlib import Path

from moecover.checkpoints.opening import Model, described, fetched
from moecover.corpora.generation import cache_bytes, write_generated
from moecover.corpora.packing import LENGTH, SEQUENCES, Corpus, load_corpus
from moecover.errors import InputError, arg
from moecover.progress import Progress, resolve
from moecover.runtime.loading import check_loadable
from moecover.runtime.memory import itemsizes, opened
from moecover.runtime.passes import check_least, check_positive, passes

ENDING, NAME, BATCH_SIZE = ".jsonl", "self", 16


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
    batch_size: int | None = None,
    overwrite: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    memory_limit: int | str | None = None,
    revision: str | None = None,
    progress: bool | Progress = True,
) -> Corpus:
    """Have a model write its own calibration text (arXiv 2410.17170), for text that no named corpus has.

    Args:
        checkpoint: folder, hub id, or a structure from `read_structure`.
        output: file to write, .jsonl: rows of ``input_ids``. An interrupted run resumes.
        sequences: rows; None for 128.
        length: tokens per row; None for 2048, or the model's positions if fewer.
        seed: of the draws.
        batch_size: rows at a time; None for 16.
        overwrite: replace a file that is there.
        dtype: torch dtype by name; None for the checkpoint's.
        device: torch device by name; None for a GPU where there is one.
        memory_limit: memory that may be used, in bytes or as text; None for nine tenths of what is free.
        revision: branch, tag or commit of a hub model.
        progress: True draws bars and a log on stderr or in a notebook; False is silent.

    Returns:
        The corpus, called ``self``.

    Raises:
        InputError: arguments out of range, a model that does not fit into memory or cannot generate, or an output that
            exists.
        MoecoverError: the disk is full.
    """
    shown, path = resolve(progress), Path(output)
    check_positive(sequences=sequences)
    check_least(2, length=length)
    check_positive(batch_size=batch_size)
    check_least(0, seed=seed)
    check_file(path, overwrite=overwrite)
    how = passes(
        batch_size=batch_size, dtype=dtype, device=device, memory_limit=memory_limit, default_batch_size=BATCH_SIZE
    )
    headers = described(checkpoint, revision=revision, progress=shown)
    check_loadable(headers)
    most = headers.checkpoint.text_config.get("max_position_embeddings")
    tokens, rows = length or min(LENGTH, most or LENGTH), sequences or SEQUENCES
    if most is not None and tokens > most:
        raise InputError(
            f"{arg('length', tokens)} is above the {most} positions of the model. Give {arg('length', most)} or less"
        )
    structure = fetched(headers, revision=revision, progress=shown)
    at_once = min(how.batch_size, rows)
    cache = cache_bytes(structure, tokens=at_once * tokens, itemsize=itemsizes(structure, how.dtype)[1])
    with opened(
        structure, tokens=rows * tokens, batch_tokens=at_once, dtype=how.dtype, device=how.device,
        memory_limit=how.memory_limit, head=True, extra=cache, say=shown.say,
    ) as model:  # fmt: skip
        if model.by_layer:
            raise InputError(
                f"{structure.checkpoint.name} does not fit into memory, and layer by layer all of it would be read for "
                f"every token. Give a smaller {arg('batch_size')} or a larger {arg('memory_limit')}, or have a server "
                "write text and give it as --corpus self=FILE"
            )
        with shown.bar("generating", rows * tokens) as advance:
            write_generated(
                structure, model, path.resolve(), sequences=rows, length=tokens, seed=seed, batch_size=at_once,
                advance=advance, say=shown.say,
            )  # fmt: skip
    return load_corpus(NAME, path, structure=structure)
