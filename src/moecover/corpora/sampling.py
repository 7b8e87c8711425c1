"""The calibration sample of a corpus: reads documents or rows, returns token ids, and those that were not drawn.

Text is put in seeded order, tokenized, concatenated and cut into blocks of equal length, and a seeded sample of the
blocks is drawn. Rows of token ids are taken as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moecover.corpora.bos import body_length, prefix_record
from moecover.corpora.rows import Row, pieces
from moecover.errors import InputError, arg

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

POOL = 4  # documents are tokenized until there are this many times the blocks wanted, then the sample is drawn
WHOLE_NUMBERS = "`input_ids` must be a list of whole numbers, `attention_mask` likewise"


class Blocks(NamedTuple):
    """Token ids int64 ``[sequence, position]`` and their mask, bool, True where there is a token."""

    tokens: NDArray[np.int64]
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Sample:
    """Blocks or rows that were drawn.

    Attributes:
        drawn: the sample.
        rest: the blocks or rows that were not drawn.
        facts: ``blocks_available``; of text also ``length`` of a block, the number of ``documents``, and ``bos``, the
            ids that every block begins with, where there are some.
    """

    drawn: Blocks
    rest: Blocks
    facts: dict[str, Any]


def sample_text(
    name: str,
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequences: int,
    length: int,
    seed: int,
    or_fewer: bool = False,
    streaming: bool = False,
    prefix: tuple[int, ...] = (),
) -> Sample:
    """Draw blocks of a text.

    Args:
        name: of the corpus, for messages.
        documents: the text.
        tokenizer: of the model.
        sequences: blocks wanted.
        length: tokens per block.
        seed: of the order of the documents and of the choice of blocks.
        or_fewer: whether a text with fewer blocks will do.
        streaming: whether the documents arrive in a random order already, so that few more than needed are read.
        prefix: ids that every block begins with; they count in ``length``.

    Raises:
        InputError: no text, or too few blocks.
    """
    body = body_length(length, prefix)
    rng = np.random.default_rng(seed)
    # A file is read up to a generous limit (300 MB of text at the default size) and shuffled here.
    texts = _read(documents, limit=(4 if streaming else 256) * POOL * sequences * length)
    if not texts:
        raise InputError(f"corpus {name} holds no text")
    order = rng.permutation(len(texts))
    ids = _tokenized([texts[i] for i in order], tokenizer, limit=POOL * sequences * length)
    blocks = len(ids) // body
    if blocks == 0:
        raise InputError(
            f"corpus {name} holds {len(ids)} tokens, less than one block of {length}. "
            f"Give a shorter {arg('length')} or more text"
        )
    if blocks < sequences and not or_fewer:
        raise InputError(
            f"corpus {name} gives {blocks} blocks of {length} tokens, {sequences} are wanted. "
            f"Give {arg('sequences', blocks)}, a shorter {arg('length')} or more text"
        )
    chosen = np.sort(rng.choice(blocks, size=min(blocks, sequences), replace=False))
    every = np.asarray(ids[: blocks * body], dtype=np.int64).reshape(blocks, body)
    every = np.concatenate([np.tile(np.array(prefix, dtype=np.int64), (blocks, 1)), every], axis=1)
    drawn, rest = every[chosen], np.delete(every, chosen, axis=0)
    return Sample(
        Blocks(drawn, np.ones_like(drawn, dtype=bool)),
        Blocks(rest, np.ones_like(rest, dtype=bool)),
        {"length": length, "blocks_available": blocks, "documents": len(texts), **prefix_record(prefix)},
    )


def _read(documents: Iterable[str], *, limit: int) -> list[str]:
    """Pieces of documents, until there are more than ``limit`` characters."""
    texts, chars = list[str](), 0
    for document in documents:
        for piece in pieces([document.encode("utf-8", "replace").decode()]):  # lone surrogates have no bytes
            if piece.strip():
                texts.append(piece)
                chars += len(piece)
        if chars > limit:
            break
    return texts


def _tokenized(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, limit: int) -> list[int]:
    """Token ids of texts with an end-of-text token after each, until there are at least ``limit``."""
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for start in range(0, len(texts), 64):
        if len(ids) >= limit:
            break
        batch = list(texts[start : start + 64])
        for encoded in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            ids.extend(encoded if end is None else [*encoded, end])
    return ids


def sample_rows(
    name: str,
    rows: Iterable[Row],
    *,
    sequences: int | None,
    seed: int,
    length: int | None,
    vocab_size: int | None,
    max_length: int | None,
) -> Sample:
    """Draw rows of token ids.

    Args:
        name: of the corpus, for messages.
        rows: each with ``input_ids`` and perhaps an ``attention_mask``.
        sequences: rows wanted; None takes all.
        seed: of the choice.
        length: of every row; None for any.
        vocab_size: ids at or above it are refused.
        max_length: longest row allowed.

    Raises:
        InputError: a row is malformed or out of range, or there are too few.
    """
    pairs = []
    for number, row in enumerate(rows, 1):
        where = f"corpus {name}, row {number}"
        ids, mask = _checked_row(where, row)
        if ids.min() < 0 or (vocab_size is not None and ids.max() >= vocab_size):
            allowed = "0 or more" if vocab_size is None else f"0 to {vocab_size - 1}"
            wrong = int(ids.max() if ids.min() >= 0 else ids.min())
            raise InputError(f"{where}: token id {wrong} is out of range. Allowed: {allowed}")
        if max_length is not None and len(ids) > max_length:
            raise InputError(f"{where}: {len(ids)} tokens, the model takes at most {max_length}")
        pairs.append((ids, mask.astype(bool)))
    for number, (ids, _) in enumerate(pairs, 1):
        if length is not None and len(ids) != length:
            raise InputError(
                f"corpus {name}, row {number}: {len(ids)} tokens, {arg('length', length)} is asked for, which cuts "
                "text into blocks but takes rows of `input_ids` as they are. Leave it out, or give rows of that length"
            )
    available = len(pairs)
    if sequences is not None and available < sequences:
        raise InputError(
            f"corpus {name} holds {available} rows, {sequences} are wanted. "
            f"Give {arg('sequences', available)} or leave it out"
        )
    left = list[tuple["NDArray[np.int64]", "NDArray[np.bool_]"]]()
    if sequences is not None and sequences < available:
        chosen = np.random.default_rng(seed).choice(available, size=sequences, replace=False).tolist()
        drawn = set(chosen)
        left = [pair for i, pair in enumerate(pairs) if i not in drawn]
        pairs = [pairs[i] for i in sorted(chosen)]
    return Sample(_padded(pairs), _padded(left), {"blocks_available": available})


def _checked_row(where: str, row: Row) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and mask of a row, both int64 ``[position]``."""
    given = row.get("attention_mask")
    try:
        ids = np.asarray(row["input_ids"])
        mask = np.ones(ids.shape, dtype=np.int64) if given is None else np.asarray(given)
    except (KeyError, ValueError) as error:
        raise InputError(f"{where}: {WHOLE_NUMBERS}") from error
    if (ids.size and ids.dtype.kind not in "iu") or (mask.size and mask.dtype.kind not in "iub"):
        raise InputError(f"{where}: {WHOLE_NUMBERS}")
    ids, mask = ids.astype(np.int64), mask.astype(np.int64)
    if ids.ndim != 1 or ids.shape != mask.shape or not mask.any() or ((mask != 0) & (mask != 1)).any():
        raise InputError(
            f"{where}: `input_ids` has shape {ids.shape} and `attention_mask` {mask.shape} with {int(mask.sum())} "
            "ones; two equal lists and at least one 1 are needed"
        )
    return ids, mask


def _padded(pairs: Sequence[tuple[NDArray[np.int64], NDArray[np.bool_]]]) -> Blocks:
    """Rows of different lengths as one array and its mask."""
    width = max((len(ids) for ids, _ in pairs), default=0)
    tokens = np.zeros((len(pairs), width), dtype=np.int64)
    masks = np.zeros((len(pairs), width), dtype=bool)
    for i, (ids, mask) in enumerate(pairs):
        tokens[i, : len(ids)], masks[i, : len(ids)] = ids, mask
    return Blocks(tokens, masks)
