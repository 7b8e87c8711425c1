"""Held-out text for perplexity: reads test splits or files, gives non-overlapping windows in the order of the text.

Calibration text is no measure of what was calibrated on it: a corpus that has a held-out part is only read there.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.corpora.packing import LENGTH, Corpus, load_tokenizer, make_corpus
from moecover.corpora.sources import CORPORA, HubCorpus, file_rows
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
        InputError: it has no held-out part under this name, or there is none of this name.
    """
    known = [n for n, row in CORPORA.items() if isinstance(row, HubCorpus) or n.endswith(HELD_OUT)]
    if name in CORPORA and name not in known:
        raise InputError(f"--perplexity {name} is calibration text. Give {name}{HELD_OUT}, or a file as NAME=PATH")
    if name not in known:
        raise unknown_name("--perplexity", name, known)


def _documents(name: str, path: str | Path | None) -> tuple[dict[str, Any], Iterable[str]]:
    """Origin and documents of a text."""
    if path is not None:
        rows = (row.get("text") for row in file_rows(Path(path)))
        return {"source": Path(path).name}, (_text(row, name, path) for row in rows)
    check_text(name)
    corpus = CORPORA[name]
    if isinstance(corpus, HubCorpus):
        return {"source": f"{corpus.path}@{corpus.revision}", "split": corpus.held_out}, corpus.held_out_documents()
    return {"source": name}, corpus.documents(0)


def _text(text: Any, name: str, path: str | Path) -> str:
    if not isinstance(text, str):
        raise InputError(f"--perplexity {name}: a row of {path} has no `text`")
    return text


def tokenizer_record(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Class, number of entries and hash of a tokeniser: perplexities of different ones do not compare."""
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
    """The first windows of a held-out text, in the tokens of a model; the last one may be shorter.

    Documents are tokenised one by one, with an end-of-text token after each, and joined. Nothing is drawn by chance.

    Args:
        name: what the result calls it; a corpus with a held-out part when there is no path.
        path: .txt, .jsonl, .jsonl.gz or .parquet file.
        structure: the model; gives the tokeniser and the longest window.
        length: tokens per window; None takes 2048, or the model's positions if fewer.
        windows: at most so many.

    Raises:
        InputError: calibration text, an unknown name, an unreadable file, no text, no tokeniser.
    """
    text = structure.checkpoint.text_config
    limit = text.get("max_position_embeddings")
    length = length or min(LENGTH, limit or LENGTH)
    if limit is not None and length > limit:
        raise InputError(f"--length {length} is above the {limit} positions of the model. Give --length {limit} or less")  # fmt: skip
    origin, documents = _documents(name, path)
    tokenizer = load_tokenizer(structure.checkpoint.path)
    if tokenizer is None:
        raise InputError(f"--perplexity {name} needs the model's tokenizer, {structure.checkpoint.name} has none")
    found = list(itertools.islice(_ids(documents, tokenizer), windows * length))
    if len(found) < 2:
        raise InputError(f"--perplexity {name}: {path or origin['source']} holds no text to predict")
    if max(found) >= (size := text.get("vocab_size", max(found) + 1)):
        raise InputError(f"--perplexity {name}: the tokenizer gives id {max(found)}, the model's vocabulary ends at {size - 1}. Tokenizer and model do not belong together")  # fmt: skip
    if len(found) % length == 1:
        del found[-1]  # a window of one token predicts nothing
    count = -(-len(found) // length)
    tokens, mask = np.zeros((count, length), dtype=np.int64), np.zeros((count, length), dtype=bool)
    tokens.reshape(-1)[: len(found)], mask.reshape(-1)[: len(found)] = found, True
    return make_corpus(name, tokens, mask, {**origin, "length": length, "tokenizer": tokenizer_record(tokenizer)})


def _ids(documents: Iterable[str], tokenizer: Any) -> Iterator[int]:
    end = tokenizer.eos_token_id
    for document in filter(str.strip, documents):
        yield from tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if end is not None:
            yield end
