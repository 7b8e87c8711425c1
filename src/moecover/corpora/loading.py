"""Corpora as users give them: names, names with files, or loaded ones; all of a call in one list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING

from moecover import rehearsal
from moecover.checkpoints.structure import Structure
from moecover.corpora.arguments import parse_corpora
from moecover.corpora.bos import check_bos
from moecover.corpora.options import JobOptions, TextOptions
from moecover.corpora.packing import SEQUENCES, Corpus, load_corpus
from moecover.errors import InputError, arg
from moecover.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Corpora = Mapping[str, str | PathLike[str] | None] | Sequence[str | Corpus]


def parsed(corpora: Corpora) -> dict[str, str | Corpus | None]:
    """Corpora by name: the file of each, None for a named one, or the corpus itself.

    Args:
        corpora: names (``"c4"``), ``"NAME=SOURCE"``, loaded corpora, or a mapping from names to files
            (None: a named corpus).

    Raises:
        InputError: none, an unknown name, a file that does not exist or cannot be read, a name twice, or something else
            than a name or a corpus.
    """
    if isinstance(corpora, str):
        corpora = [corpora]  # one name; taken as a sequence, its letters would be names
    if not corpora:
        raise InputError(f"there is no calibration text. Give {arg('corpora')}, one or more")
    if isinstance(corpora, Mapping):
        corpora = [name if path is None else f"{name}={fspath(path)}" for name, path in corpora.items()]
    loaded = [one for one in corpora if isinstance(one, Corpus)]
    texts = [one for one in corpora if isinstance(one, str)]
    if strange := [one for one in corpora if not isinstance(one, (Corpus, str))]:
        raise InputError(f"{arg('corpora')}: {strange[0]!r} is neither a text (NAME, NAME=PATH) nor a loaded corpus")
    named = {name: path or None for name, path in (parse_corpora(texts) if texts else {}).items()}
    names = [*(one.name for one in loaded), *named]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"corpus {twice[0]} is given twice. Corpora are kept apart by name: give each its own")
    return {**{one.name: one for one in loaded}, **named}


def load_corpora(
    corpora: Corpora,
    structure: Structure,
    options: TextOptions | JobOptions,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress,
) -> list[Corpus]:
    """All corpora of a job as blocks of the model's token ids; warns of those with fewer blocks than usual.

    Args:
        corpora: see `parsed`.
        structure: of the model whose tokenizer is used.
        options: see `TextOptions`.
        tokenizer: instead of the one in the model's folder.
        progress: shows what is read.

    Raises:
        InputError: what `parsed` and `load_corpus` raise.
    """
    sequences, length, seed = options.get("sequences"), options.get("length"), options.get("seed", 0)
    bos = options.get("bos") or "auto"
    check_bos(bos)
    sources = parsed(corpora)
    of_reading = [name for name in TextOptions.__annotations__ if options.get(name) is not None]
    if of_reading and all(isinstance(source, Corpus) for source in sources.values()):
        raise InputError(f"{arg(of_reading[0])} says how text is read, but all corpora are loaded already")
    loaded = []
    for name, source in sources.items():
        if isinstance(source, Corpus):
            loaded.append(source)
            continue
        with progress.spinner(f"reading corpus {name}"):
            corpus = load_corpus(
                name,
                source,
                structure=structure,
                tokenizer=tokenizer,
                sequences=sequences,
                length=length,
                seed=seed,
                bos=bos,
            )
        rehearsal.ahead("read", f"corpus {name}", tokens=corpus.num_tokens)
        record = corpus.record
        if "length" in record and sequences is None and record["sequences"] < SEQUENCES:
            progress.say(
                f"corpus {name}: only {record['blocks_available']} blocks of {record['length']} tokens available, "
                f"{SEQUENCES} are usual"
            )
        if line := refused_text(corpus):
            progress.say(line)
        loaded.append(corpus)
    return loaded


def refused_text(corpus: Corpus) -> str:
    """What to say of the chats that the template refused; empty where there are none."""
    refused = corpus.record.get("refused")
    if not refused:
        return ""
    rows = ", ".join(map(str, refused["rows"])) + (" ..." if refused["count"] > len(refused["rows"]) else "")
    return (
        f"note: corpus {corpus.name}: the chat template refuses {refused['count']} of {refused['of']} chats, which are "
        f"left out (row {rows}): {refused['reason']}"
    )
