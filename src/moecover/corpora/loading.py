"""Corpora as users give them: names, names with files, or loaded ones; all of a call in one list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath

from moecover.checkpoints.structure import Structure
from moecover.corpora.options import JobOptions, TextOptions
from moecover.corpora.packing import SEQUENCES, Corpus, load_corpus
from moecover.corpora.sources import parse_corpora
from moecover.progress import Progress

Corpora = Mapping[str, str | PathLike[str] | None] | Sequence[str | Corpus]


def parsed(corpora: Corpora) -> dict[str, str | Corpus | None]:
    """Corpora by name: the file of each, None for a named one, or the corpus itself.

    Args:
        corpora: names (``"c4"``), ``"NAME=PATH"``, loaded corpora, or a mapping from names to files
            (None: a named corpus).

    Raises:
        InputError: an unknown name, a file that does not exist or cannot be read, or a name twice.
    """
    if isinstance(corpora, Mapping):
        corpora = [name if path is None else f"{name}={fspath(path)}" for name, path in corpora.items()]
    found: dict[str, str | Corpus | None] = {one.name: one for one in corpora if isinstance(one, Corpus)}
    texts = [one for one in corpora if isinstance(one, str)]
    return found | {name: path or None for name, path in (parse_corpora(texts) if texts else {}).items()}


def load_corpora(
    corpora: Corpora,
    structure: Structure,
    options: TextOptions | JobOptions,
    *,
    progress: Progress,
) -> list[Corpus]:
    """All corpora of a job as blocks of the model's token ids; warns of those with fewer blocks than usual.

    Args:
        corpora: see `parsed`.
        structure: of the model whose tokenizer is used.
        options: see `TextOptions`.
        progress: shows what is read.

    Raises:
        InputError: what `parsed` and `load_corpus` raise.
    """
    sequences, length, seed = options.get("sequences"), options.get("length"), options.get("seed", 0)
    loaded = []
    for name, source in parsed(corpora).items():
        if isinstance(source, Corpus):
            loaded.append(source)
            continue
        with progress.spinner(f"reading corpus {name}"):
            corpus = load_corpus(name, source, structure=structure, sequences=sequences, length=length, seed=seed)
        record = corpus.record
        if "length" in record and sequences is None and record["sequences"] < SEQUENCES:
            progress.say(
                f"corpus {name}: only {record['blocks_available']} blocks of {record['length']} tokens available, "
                f"{SEQUENCES} are usual"
            )
        loaded.append(corpus)
    return loaded
