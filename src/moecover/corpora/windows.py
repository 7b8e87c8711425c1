"""Held-out text for perplexity: reads test splits or files, returns non-overlapping windows in the order of the text.

A corpus that has a held-out part is read only there: perplexity on calibration text says little.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moecover.corpora.documents import FileCorpus, NamedCorpus
from moecover.corpora.packing import Corpus, beyond_vocabulary, block_length, load_tokenizer, make_corpus
from moecover.corpora.sources import CORPORA
from moecover.errors import InputError
from moecover.registry import unknown_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moecover.checkpoints.structure import Structure

WINDOWS = 256  # of 2048 tokens: all of WikiText2's test split, and as much as is usual of C4's validation split
HELD_OUT = "-heldout"


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
    length: int | None = None,
    windows: int = WINDOWS,
) -> Corpus:
    """Load the first windows of a held-out text in the tokens of a model; the last one may be shorter.

    Documents are tokenized one by one, with an end-of-text token after each, and concatenated. Nothing is random.

    Args:
        name: of the text in results; a corpus with a held-out part when there is no path.
        path: .txt, .jsonl, .jsonl.gz or .parquet file.
        structure: the model; gives the tokenizer and the longest window.
        length: tokens per window; None takes 2048, or the model's positions if fewer.
        windows: at most this many.

    Raises:
        InputError: calibration text, an unknown name, an unreadable file, no text, no tokenizer.
    """
    text = structure.checkpoint.text_config
    length = block_length(length, text.get("max_position_embeddings"))
    source = _held_out(name, path)
    origin = source.held_out_record(name)
    tokenizer = load_tokenizer(structure.checkpoint.path)
    if tokenizer is None:
        raise InputError(f"held-out text {name} needs the model's tokenizer, {structure.checkpoint.name} has none")
    found = list(itertools.islice(_ids(source.held_out_documents(), tokenizer), windows * length))
    if len(found) < 2:
        raise InputError(f"held-out text {name}: {path or origin['source']} holds no text to predict")
    if max(found) >= (size := text.get("vocab_size", max(found) + 1)):
        raise InputError(beyond_vocabulary(f"held-out text {name}", max(found), size))
    if len(found) % length == 1:
        del found[-1]  # a window of one token predicts nothing
    count = -(-len(found) // length)
    tokens, mask = np.zeros((count, length), dtype=np.int64), np.zeros((count, length), dtype=bool)
    tokens.reshape(-1)[: len(found)], mask.reshape(-1)[: len(found)] = found, True
    return make_corpus(name, tokens, mask, {**origin, "length": length, "tokenizer": tokenizer_record(tokenizer)})


def _held_out(name: str, path: str | Path | None) -> NamedCorpus:
    if path is not None:
        return FileCorpus(path)
    check_text(name)
    return CORPORA[name]


def _ids(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    end = tokenizer.eos_token_id
    for document in filter(str.strip, documents):
        yield from tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if end is not None:
            yield end
