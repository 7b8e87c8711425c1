"""Corpora: reads text or token ids by name or path, returns sequences of token ids with a mask and their origin."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.checkpoints.opening import Model
from moecover.checkpoints.structure import Structure, read_structure
from moecover.corpora.arguments import GivenCorpus, source_of
from moecover.corpora.bos import prefix_of
from moecover.corpora.forms import Row, documents
from moecover.corpora.overlap import sketch
from moecover.corpora.sampling import Sample, sample_rows, sample_text
from moecover.corpora.sources import check_name
from moecover.corpora.tokenizer import load_tokenizer
from moecover.errors import InputError, arg
from moecover.text import Cell, Shown

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase


SEQUENCES, LENGTH = 128, 2048  # the calibration set of the field: 128 blocks of 2048 tokens


@dataclass(frozen=True, repr=False)
class Corpus(Shown):
    """Sequences of token ids, ready for a forward pass.

    Attributes:
        name: of the corpus, in profiles and plans.
        tokens: int64 ``[sequence, position]``.
        mask: bool ``[sequence, position]``, True where there is a token and False where there is padding.
        record: JSON-ready origin: source, sha256 of tokens and mask, sizes, seed, documents; the sketch of `overlap`.
    """

    name: str
    tokens: NDArray[np.int64]
    mask: NDArray[np.bool_]
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, without padding."""
        return int(self.mask.sum())

    def __getitem__(self, rows: slice) -> Corpus:
        """A shard of the corpus: some of its sequences, with a hash of their own."""
        return make_corpus(self.name, self.tokens[rows], self.mask[rows], {**self.record, "rows": str(rows)})

    def summary(self) -> str:
        sequences, length = self.tokens.shape
        source = self.record.get("source", self.name)
        origin = "" if source == self.name else f", from {source}"
        return f"{self.name}: {sequences} sequences of up to {length} tokens, {self.num_tokens:,} in all{origin}"

    def rows_shown(self) -> list[dict[str, Cell]]:
        sequences, length = self.tokens.shape
        row: dict[str, Cell] = {"corpus": self.name, "sequences": sequences, "length": length}
        return [row | {"tokens": self.num_tokens, "source": self.record.get("source")}]


def make_corpus(name: str, tokens: NDArray[np.int64], mask: NDArray[np.bool_], origin: dict[str, Any]) -> Corpus:
    """Make a corpus from arrays, with hash, sizes and sketch in its record.

    Args:
        name: of the corpus.
        tokens: int64 ``[sequence, position]``.
        mask: bool of the same shape, True where there is a token; the hash covers these only.
        origin: further entries of the record, JSON-ready.
    """
    digest = hashlib.sha256()
    for row, keep in zip(tokens, mask, strict=True):
        digest.update(len(row[keep]).to_bytes(8, "little") + row[keep].astype("<i8").tobytes())
    sizes = {"sequences": len(tokens), "tokens": int(mask.sum()), "sha256": digest.hexdigest()}
    sizes["sketch"] = sketch(tokens, mask)
    return Corpus(name, tokens, mask, {**origin, **sizes})


def load_corpus(
    name: str,
    path: str | Path | None = None,
    *,
    structure: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sequences: int | None = None,
    length: int | None = None,
    seed: int = 0,
    bos: str = "auto",
    vocab_size: int | None = None,
    max_length: int | None = None,
) -> Corpus:
    """Load a named corpus, a file or a data set of the hub as sequences of token ids of a model.

    Text is put in seeded order, tokenized with an end-of-text token after every document (long ones are cut in pieces
    of 20,000 characters), packed into blocks of ``length`` tokens, and a seeded sample of ``sequences`` blocks is
    drawn. Chats are packed likewise, in the tokens of the model's chat template. Rows with ``input_ids`` are taken as
    they are.

    Args:
        name: of the corpus, in profiles and plans; a key of `CORPORA` when there is no path.
        path: a file, or another source as `moecover.corpora.grammar` has it: ``"hf:owner/name/train?text=content"``.
            Its own ``sequences`` and ``seed`` go before those given here.
        structure: the model as folder, hub id or structure; default tokenizer, vocabulary and longest sequence.
        tokenizer: instead of the model's; loaded only when there is text.
        sequences: sequences wanted, an error when there are fewer; None takes up to 128 blocks (all rows of
            ``input_ids``).
        length: tokens per block of text; None takes 2048, or ``max_length`` if that is less. Rows of other lengths are
            refused: they are not cut.
        seed: of the order of documents and the choice of blocks.
        bos: what blocks of text begin with, see `corpora.bos`.
        vocab_size: ids at or above it are refused.
        max_length: longest sequence that the model takes.

    Returns:
        The corpus; its record tells where it comes from.

    Raises:
        InputError: unknown name, unreadable file, no text, too few blocks, or ids out of range.
    """
    if structure is not None and not isinstance(structure, Structure):
        structure = read_structure(structure)
    if structure is not None:
        text = structure.checkpoint.text_config
        vocab_size, max_length = vocab_size or text.get("vocab_size"), max_length or text.get("max_position_embeddings")
    given = source_of(name, path).resolved()
    options, seed = given.options, given.options.get("seed", seed)
    sample = _drawn(
        name,
        given,
        structure=structure,
        tokenizer=tokenizer,
        sequences=options.get("sequences", sequences),
        length=length,
        seed=seed,
        begin=lambda tokenizer: prefix_of(tokenizer, bos),
        vocab_size=vocab_size,
        max_length=max_length,
    )
    return _corpus_of(name, given, sample, seed)


def load_unused(
    name: str, path: str | Path | None, record: dict[str, Any], *, structure: Structure, blocks: int
) -> Corpus:
    """Load blocks of a corpus that are not in a sample of it, from the same text and of the same length.

    The sample is drawn again from its record and compared by its hash, so it is known which blocks it took. Blocks are
    cut from the text one after the other: one that was left may continue a document of which the sample has another
    part.

    Args:
        name: of the corpus.
        path: the file that it was drawn from; None for a named corpus.
        record: of the sample, see `Corpus.record`.
        structure: the model that the sample was drawn for.
        blocks: at most this many, evenly spaced over all that were left.

    Raises:
        InputError: the sample took all blocks, is not what the record says, or what `load_corpus` raises.
    """
    text = structure.checkpoint.text_config
    given, seed = source_of(name, path).resolved(), record["seed"]
    sample = _drawn(
        name,
        given,
        structure=structure,
        tokenizer=None,
        sequences=record["sequences"],
        length=record.get("length"),
        seed=seed,
        begin=lambda tokenizer: tuple(record.get("bos", ())),
        vocab_size=text.get("vocab_size"),
        max_length=text.get("max_position_embeddings"),
    )
    remedy = "Give held-out text as --perplexity NAME=PATH"
    if _corpus_of(name, given, sample, seed).record["sha256"] != record["sha256"]:
        raise InputError(
            f"corpus {name} is not what the profile read: drawn again, its sample has another hash "
            f"(other text, tokenizer or version). {remedy}"
        )
    tokens, mask = sample.rest
    if len(tokens) == 0:
        raise InputError(
            f"corpus {name}: the profile took all {record['sequences']} blocks, none is left. {remedy}, or make the "
            f"profile with fewer {arg('sequences')}"
        )
    taken = np.unique(np.linspace(0, len(tokens) - 1, min(blocks, len(tokens))).round().astype(np.int64))
    origin: dict[str, Any] = {key: record[key] for key in ("source", "seed", "length", "bos") if key in record}
    return make_corpus(
        name, tokens[taken], mask[taken], {**origin, "left_by": record["sha256"], "blocks_left": len(tokens)}
    )


def holds_rows(name: str, path: str | Path | None) -> bool:
    """Whether a corpus holds rows of ``input_ids`` instead of text, by its first row."""
    given = source_of(name, path).resolved()
    return _are_ids(given, next(given.rows(0), {}))


def _are_ids(given: GivenCorpus, first: Row) -> bool:
    return first.get("input_ids") is not None and "text" not in given.options


def _corpus_of(name: str, given: GivenCorpus, sample: Sample, seed: int) -> Corpus:
    return make_corpus(name, *sample.drawn, {**given.record(name), "seed": seed, **sample.facts})


def _drawn(
    name: str,
    given: GivenCorpus,
    *,
    structure: Structure | None,
    tokenizer: PreTrainedTokenizerBase | None,
    sequences: int | None,
    length: int | None,
    seed: int,
    begin: Callable[[PreTrainedTokenizerBase], tuple[int, ...]],
    vocab_size: int | None,
    max_length: int | None,
) -> Sample:
    """The sample that `load_corpus` returns, and what it leaves."""
    rows, where = given.rows(seed), given.where(name)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{where} is empty, it holds no text")
    rows = itertools.chain([first], rows)
    if _are_ids(given, first):
        sizes = {"sequences": sequences, "length": length, "vocab_size": vocab_size, "max_length": max_length}
        return sample_rows(name, rows, where, seed=seed, **sizes)
    if tokenizer is None and structure is not None and structure.checkpoint.gguf is None:
        tokenizer = load_tokenizer(structure.checkpoint.path)
    if tokenizer is None:
        raise InputError(f"corpus {name} holds text, but the model has no tokenizer. Give rows of `input_ids`")
    sample = sample_text(
        name,
        documents(rows, where, given.options.get("text")),
        given.encoder(tokenizer, where),
        sequences=sequences or SEQUENCES,
        or_fewer=sequences is None,
        length=block_length(length, max_length),
        seed=seed,
        streaming=given.corpus.streaming,
        prefix=begin(tokenizer),
    )
    largest = sample.drawn.tokens.max()
    if vocab_size is not None and largest >= vocab_size:
        raise InputError(beyond_vocabulary(f"corpus {name}", largest, vocab_size))
    return sample


def block_length(length: int | None, limit: int | None) -> int:
    """Tokens per block: as given, else 2048 or the positions of the model if fewer.

    Raises:
        InputError: more than the model's positions.
    """
    length = length or min(LENGTH, limit or LENGTH)
    if limit is not None and length > limit:
        raise InputError(
            f"{arg('length', length)} is above the {limit} positions of the model. Give {arg('length', limit)} or less"
        )
    return length


def beyond_vocabulary(what: str, token: int, vocab_size: int) -> str:
    """The message on a token id that the model does not have."""
    return (
        f"{what}: the tokenizer gives id {token}, the model's vocabulary ends at {vocab_size - 1}. "
        "Tokenizer and model do not belong together"
    )
