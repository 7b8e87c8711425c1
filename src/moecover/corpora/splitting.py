"""Kinds of text, as a job: reads a corpus as users give it, writes a folder of corpora, one a kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moecover.checkpoints.opening import Model, described
from moecover.checkpoints.structure import Structure
from moecover.corpora.arguments import parse_corpora
from moecover.corpora.bos import check_bos, prefix_of
from moecover.corpora.kinds import FILE, KINDS, KindFacts, write_kinds
from moecover.corpora.kinds import split as split_corpus
from moecover.corpora.options import TextOptions
from moecover.corpora.packing import Corpus, holds_rows, load_corpus
from moecover.corpora.tokenizer import load_tokenizer
from moecover.errors import InputError, arg
from moecover.files.atomic import check_output
from moecover.files.locks import locked
from moecover.progress import Progress, resolve
from moecover.runtime.passes import check_least
from moecover.text import Cell, Shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORDS_SHOWN = 8  # typical tokens of a kind in a line


@dataclass(frozen=True, repr=False)
class Kinds(Shown):
    """The kinds of text that a corpus was split into.

    Attributes:
        output: folder with a file a kind.
        name: of the corpus.
        kinds: of each: rows, share of the tokens, typical tokens.
    """

    output: Path
    name: str
    kinds: list[KindFacts]

    def summary(self) -> str:
        """See `Shown`."""
        return f"{self.output}: {len(self.kinds)} kinds of text"

    def rows_shown(self) -> list[dict[str, Cell]]:
        """See `Shown`: one row a kind."""
        return [
            {
                "kind": f"{self.name}-{number}",
                "share": kind["share"],
                "rows": kind["rows"],
                "typical tokens": " ".join(kind["words"][:WORDS_SHOWN]),
            }
            for number, kind in enumerate(self.kinds, 1)
        ]


def split(
    checkpoint: Model,
    /,
    corpus: str | Corpus,
    output: str | Path,
    *,
    kinds: int | None = None,
    sequences: int | None = None,
    length: int | None = None,
    seed: int = 0,
    bos: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    progress: bool | Progress = True,
) -> Kinds:
    """Split a corpus of mixed text into its kinds of text, each a corpus of its own.

    Args:
        checkpoint: the model whose tokens the text has: folder, hub id or structure.
        corpus: a name, ``"NAME=PATH"`` of a file, or a loaded corpus.
        output: folder to write: 1.jsonl, 2.jsonl and so on, to be given as ``NAME=FOLDER``.
        kinds: how many; None for 8.
        sequences: blocks to read; None for up to 128 (all rows of ``input_ids``).
        length: tokens per row; None for that of the rows (of text 2048, or the model's positions if fewer).
        seed: of the sample of blocks and of where the clustering starts.
        bos: what blocks of text begin with, see `TextOptions`; kinds of rows that begin so begin so too.
        overwrite: replace kinds that are there.
        revision: branch, tag or commit of a hub model.
        progress: True draws a log on stderr or in a notebook; False is silent.

    Raises:
        InputError: arguments out of range, a folder instead of one file, or text too short to be split.
    """
    shown, folder = resolve(progress), Path(output)
    check_least(1, sequences=sequences)
    check_least(2, length=length, kinds=kinds)
    check_least(0, seed=seed)
    check_bos(bos or "auto")
    name, path = (corpus.name, "") if isinstance(corpus, Corpus) else _source(corpus)
    check_output(folder, overwrite=overwrite, marker=FILE, names=(FILE, "[0-9]*.jsonl"))
    structure = described(checkpoint, revision=revision, progress=shown)
    if structure.checkpoint.gguf is not None:
        raise InputError(
            f"{structure.checkpoint.name} is a GGUF file, whose tokenizer runs in llama.cpp. Give the folder of its "
            "original: one with the same tokenizer will do"
        )
    tokenizer = load_tokenizer(structure.checkpoint.path)
    text: TextOptions = {"sequences": sequences, "length": length, "seed": seed, "bos": bos}
    loaded = _loaded(corpus, name, path or None, structure, tokenizer, text, shown)
    prefix = _prefix(loaded, tokenizer, bos or "auto")
    ends = end_tokens(structure, tokenizer)
    with shown.spinner(f"grouping {loaded.num_tokens:,} tokens"):
        rows, typical = split_corpus(loaded, ends, kinds=kinds or KINDS, seed=seed, begin=len(prefix))
    words = [_words(tokenizer, ids) for ids in typical]
    target = folder.resolve()
    with locked(target):
        sizes: dict[str, int] = {"length": length or loaded.tokens.shape[1]}
        facts = write_kinds(target, loaded, rows, words, **sizes, ends=ends, prefix=prefix)
    return Kinds(folder, name, facts)


def _loaded(
    corpus: str | Corpus,
    name: str,
    path: str | None,
    structure: Structure,
    tokenizer: PreTrainedTokenizerBase | None,
    text: TextOptions,
    progress: Progress,
) -> Corpus:
    """The corpus in the model's tokens, read where it is not loaded yet; rows of ``input_ids`` keep their length.

    Raises:
        InputError: it is loaded and a number of blocks to read is given, or it cannot be read.
    """
    if isinstance(corpus, Corpus):
        if text["sequences"] is not None:
            raise InputError(f"{arg('sequences')} says how text is read, but the corpus is loaded already")
        return corpus
    with progress.spinner(f"reading corpus {name}"):
        return load_corpus(
            name,
            path,
            structure=structure,
            tokenizer=tokenizer,
            sequences=text["sequences"],
            length=None if holds_rows(name, path) else text["length"],
            seed=text["seed"],
            bos=text["bos"] or "auto",
        )


def _prefix(corpus: Corpus, tokenizer: PreTrainedTokenizerBase | None, bos: str) -> tuple[int, ...]:
    """The ids that all sequences of a corpus begin with because the tokenizer puts them there."""
    prefix = () if tokenizer is None else prefix_of(tokenizer, bos)
    rows = (row[keep][: len(prefix)].tolist() for row, keep in zip(corpus.tokens, corpus.mask, strict=True))
    return prefix if all(row == list(prefix) for row in rows) else ()


def _source(corpus: str) -> tuple[str, str]:
    """Name and file of one corpus.

    Raises:
        InputError: it is a folder.
    """
    sources = parse_corpora([corpus])
    if len(sources) > 1:
        raise InputError(f"{arg('corpora', corpus)} is a folder, which is split already. Give one file")
    return next(iter(sources.items()))


def end_tokens(structure: Structure, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Ids that end a document, by the tokenizer and by the model's configuration."""
    named = [tokenizer and tokenizer.eos_token_id, structure.checkpoint.text_config.get("eos_token_id")]
    ends = [end for one in named if one is not None for end in (one if isinstance(one, list) else [one])]
    return list(dict.fromkeys(ends))


def _words(tokenizer: PreTrainedTokenizerBase | None, ids: list[int]) -> list[str]:
    """Tokens as a reader sees them, no blanks and none twice; their numbers where there is no tokenizer."""
    if tokenizer is None:
        return list(map(str, ids))
    words = (str(tokenizer.decode([i])).strip() for i in ids)
    return list(dict.fromkeys(word for word in words if word and word.isprintable()))
