"""Held-out text for perplexity: reads test splits or files, returns non-overlapping windows in the order of the text.

A corpus that has a held-out part is read only there: perplexity on calibration text says little.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.corpora.arguments import GivenCorpus, source_of
from moecover.corpora.bos import body_length, cut, prefix_of, prefix_record
from moecover.corpora.encoding import Encoder
from moecover.corpora.forms import documents
from moecover.corpora.packing import Corpus, beyond_vocabulary, block_length, make_corpus
from moecover.corpora.sources import CORPORA
from moecover.corpora.tokenizer import load_tokenizer
from moecover.errors import InputError
from moecover.registry import unknown_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moecover.checkpoints.structure import Structure

WINDOWS = 256  # of 2048 tokens: all of WikiText2's test split, and as much as is usual of C4's validation split
HELD_OUT = "-heldout"
CHARS = 8  # of a token at most, usually
MARGIN = 64  # tokens


def check_text(name: str) -> None:
    """Refuse a named corpus that calibration uses.

    Raises:
        InputError: the corpus is calibration text, or there is none of this name.
    """
    known = [n for n, corpus in CORPORA.items() if corpus.has_held_out]
    if name in CORPORA and name not in known:
        remedy = f"{name}{HELD_OUT}, or a file" if f"{name}{HELD_OUT}" in known else "a file"
        raise InputError(f"{name} is calibration text, not held-out text. Give {remedy} as NAME=PATH")
    if name not in known:
        raise unknown_name("held-out text", name, known)


def split_by_kind(texts: Iterable[str], corpora: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Held-out texts by what their names tell: those of a calibration corpus's kind, and the others.

    A text is near if it has the name of a corpus, or that name with ``-heldout``.

    Args:
        texts: names of held-out texts.
        corpora: names of calibration corpora.

    Returns:
        The near ones, and the far ones, in their order.
    """
    known, all_texts = set(corpora), tuple(texts)
    near = tuple(text for text in all_texts if text.removesuffix(HELD_OUT) in known)
    return near, tuple(text for text in all_texts if text not in near)


def tokenizer_record(tokenizer: PreTrainedTokenizerBase) -> dict[str, str | int]:
    """Class, number of entries and hash of a tokenizer: perplexities of different ones do not compare."""
    vocabulary = "\n".join(f"{token}\t{number}" for token, number in sorted(tokenizer.get_vocab().items()))
    return {
        "class": type(tokenizer).__name__,
        "entries": len(tokenizer),
        "sha256": hashlib.sha256(vocabulary.encode(errors="surrogatepass")).hexdigest(),
    }


def load_windows(
    name: str,
    path: str | Path | None = None,
    *,
    structure: Structure,
    tokenizer: PreTrainedTokenizerBase | None = None,
    length: int | None = None,
    windows: int = WINDOWS,
    bos: str = "auto",
) -> Corpus:
    """Load the first windows of a held-out text in the tokens of a model; the last one may be shorter.

    Documents are tokenized one by one, with an end-of-text token after each, and concatenated. Nothing is random.

    Args:
        name: of the text in results; a corpus with a held-out part when there is no path.
        path: a file, or another source as `moecover.corpora.grammar` has it.
        structure: the model; gives the tokenizer and the longest window.
        tokenizer: instead of the one in the model's folder; a GGUF model has none there.
        length: tokens per window; None takes 2048, or the model's positions if fewer.
        windows: at most this many.
        bos: what a window begins with, see `corpora.bos`; it is not predicted, and counts in ``length``.

    Raises:
        InputError: calibration text, an unknown name, an unreadable file, no text, no tokenizer.
    """
    text = structure.checkpoint.text_config
    length = block_length(length, text.get("max_position_embeddings"))
    given = _held_out(name, path)
    origin: dict[str, Any] = given.corpus.held_out_record(name)
    if tokenizer is None and structure.checkpoint.gguf is None:
        tokenizer = load_tokenizer(structure.checkpoint.path)
    if tokenizer is None:
        raise InputError(f"held-out text {name} needs the model's tokenizer, {structure.checkpoint.name} has none")
    prefix = prefix_of(tokenizer, bos)
    body_length(length, prefix)
    where = given.where(name).replace("corpus", "held-out text", 1)
    encoder = given.encoder(tokenizer, where)
    found = _beginning(given, where, encoder, windows * length)
    encoder.check()
    rows = list(itertools.islice(cut(found, length, prefix), windows))
    if rows and len(rows[-1]) < 2:
        del rows[-1]  # a window of one token predicts nothing
    if not rows:
        raise InputError(f"held-out text {name}: {path or origin['source']} holds no text to predict")
    if max(found) >= (size := text.get("vocab_size", max(found) + 1)):
        raise InputError(beyond_vocabulary(f"held-out text {name}", max(found), size))
    tokens, mask = np.zeros((len(rows), length), dtype=np.int64), np.zeros((len(rows), length), dtype=bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    about = {"length": length, "tokenizer": tokenizer_record(tokenizer), **prefix_record(prefix)}
    return make_corpus(name, tokens, mask, {**origin, **given.facts(), **about, **encoder.record()})


def _held_out(name: str, path: str | Path | None) -> GivenCorpus:
    given = source_of(name, path)
    named = next((known for known, corpus in CORPORA.items() if corpus is given.corpus), None)
    if named is not None:
        check_text(named)
    return given.resolved()


def _beginning(given: GivenCorpus, where: str, encoder: Encoder, tokens: int) -> list[int]:
    """The first tokens of a text; of its documents no more is tokenized than these may need."""
    longest = CHARS * (tokens + MARGIN)
    while True:
        found, cut = _ids(given, where, encoder, tokens, longest)
        if len(found) >= tokens or not cut:
            return found[:tokens]
        longest *= 4  # a text of longer tokens than usual


def _ids(given: GivenCorpus, where: str, encoder: Encoder, tokens: int, longest: int) -> tuple[list[int], bool]:
    """The first tokens of a text, and whether a document of ``longest`` characters or more ended them.

    Of such a document the beginning is tokenized, and the last `MARGIN` tokens are left out: the cut may have changed
    them. Chats are not cut.
    """
    found = list[int]()
    for document in documents(given.held_out_rows(longest), where, given.options.get("text")):
        if isinstance(document, str) and not document.strip():
            continue
        if isinstance(document, str) and len(document) >= longest:
            return found + encoder.begun(document[:longest])[:-MARGIN], True
        for ids in encoder.ids([document]):
            found += ids
        if len(found) >= tokens:
            break
    return found, False
