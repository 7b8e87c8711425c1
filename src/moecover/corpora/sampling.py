"""The calibration sample of a corpus: reads documents or rows, returns token ids, and those that were not drawn.

Documents are put in seeded order, tokenized, concatenated and cut into blocks of equal length, and a seeded sample of
the blocks is drawn. Rows of token ids are taken as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moecover.corpora.bos import body_length, cut, prefix_record
from moecover.corpora.encoding import Encoder
from moecover.corpora.forms import Chat, Document, Row, place_of
from moecover.corpora.pieces import pieces
from moecover.errors import InputError, arg

if TYPE_CHECKING:
    from numpy.typing import NDArray

POOL = 4  # documents are tokenized until there are this many times the blocks wanted, then the sample is drawn
ROWS = 64  # rows of token ids are read until there are this many times the rows wanted
LEAST_CHARS = 1 << 24  # that are read for a small pool too
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
    documents: Iterable[Document],
    encoder: Encoder,
    *,
    sequences: int,
    length: int,
    seed: int,
    or_fewer: bool = False,
    streaming: bool = False,
    prefix: tuple[int, ...] = (),
) -> Sample:
    """Draw blocks of documents.

    Args:
        name: of the corpus, for messages.
        documents: texts or chats.
        encoder: gives their token ids.
        sequences: blocks wanted.
        length: tokens per block.
        seed: of the order of the documents and of the choice of blocks.
        or_fewer: whether a text with fewer blocks will do.
        streaming: whether the documents arrive in a random order already, so that few more than needed are read.
        prefix: ids that every block begins with; they count in ``length``.

    Raises:
        InputError: no text, too few blocks, or chats of which the template takes none.
    """
    body_length(length, prefix)
    rng = np.random.default_rng(seed)
    found = _read(documents, limit=_limit(POOL * sequences * length, streaming=streaming))
    if not found:
        raise InputError(f"corpus {name} holds no text")
    order = rng.permutation(len(found))
    ids = _tokenized([found[i] for i in order], encoder, limit=POOL * sequences * length)
    encoder.check()
    whole = [block for block in cut(ids, length, prefix) if len(block) == length]
    every, blocks = np.array(whole, dtype=np.int64).reshape(-1, length), len(whole)
    if blocks == 0:
        raise InputError(
            f"corpus {name} holds {len(ids)} tokens, less than one block of {length}. "
            f"Give a shorter {arg('length')} or more text"
        )
    if blocks < sequences and not or_fewer:
        raise InputError(
            f"corpus {name} gives {blocks} block{'s' * (blocks > 1)} of {length} tokens, {sequences} are wanted. "
            f"Give {arg('sequences', blocks)}, a shorter {arg('length')} or more text"
        )
    chosen = np.sort(rng.choice(blocks, size=min(blocks, sequences), replace=False))
    drawn, rest = every[chosen], np.delete(every, chosen, axis=0)
    return Sample(
        Blocks(drawn, np.ones_like(drawn, dtype=bool)),
        Blocks(rest, np.ones_like(rest, dtype=bool)),
        {
            "length": length,
            "blocks_available": blocks,
            "documents": len(found),
            **prefix_record(prefix),
            **encoder.record(),
        },
    )


def _limit(tokens: int, *, streaming: bool) -> int:
    """Characters that are read for a pool of so many tokens: far more than needed, so that a file is sampled all over.

    For the default pool of a million tokens these are 34 million, however large the file is.
    """
    return 4 * tokens if streaming else min(256 * tokens, max(32 * tokens, LEAST_CHARS))


def _read(documents: Iterable[Document], *, limit: int) -> list[Document]:
    """Documents, texts in pieces, until there are more than ``limit`` characters."""
    found, chars = list[Document](), 0
    for document in documents:
        if isinstance(document, Chat):
            found.append(document)
            chars += document.size()
        else:
            parts = [piece for piece in pieces([document]) if piece.strip()]
            found += parts
            chars += sum(map(len, parts))
        if chars > limit:
            break
    return found


def _tokenized(documents: Sequence[Document], encoder: Encoder, *, limit: int) -> list[int]:
    """Token ids of documents one after the other, until there are at least ``limit``."""
    ids: list[int] = []
    for start in range(0, len(documents), 64):
        if len(ids) >= limit:
            break
        for one in encoder.ids(documents[start : start + 64]):
            ids.extend(one)
    return ids


def sample_rows(
    name: str,
    rows: Iterable[Row],
    where: str,
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
        where: what messages call their source.
        sequences: rows wanted, of the first `ROWS` times as many; None takes all.
        seed: of the choice.
        length: of every row; None for any.
        vocab_size: ids at or above it are refused.
        max_length: longest row allowed.

    Raises:
        InputError: a row is malformed or out of range, or there are too few.
    """
    pairs, places = [], list[str]()
    for number, row in enumerate(itertools.islice(rows, sequences and ROWS * sequences), 1):
        place = place_of(row, where, number)
        ids, mask = _checked_row(place, row)
        if ids.min() < 0 or (vocab_size is not None and ids.max() >= vocab_size):
            allowed = "0 or more" if vocab_size is None else f"0 to {vocab_size - 1}"
            wrong = int(ids.max() if ids.min() >= 0 else ids.min())
            raise InputError(f"{place}: token id {wrong} is out of range. Allowed: {allowed}")
        if max_length is not None and len(ids) > max_length:
            raise InputError(f"{place}: {len(ids)} tokens, the model takes at most {max_length}")
        pairs.append((ids, mask.astype(bool)))
        places.append(place)
    for place, (ids, _) in zip(places, pairs, strict=True):
        if length is not None and len(ids) != length:
            raise InputError(
                f"{place}: {len(ids)} tokens, {arg('length', length)} is asked for, which cuts "
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


def _checked_row(place: str, row: Row) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and mask of a row, both int64 ``[position]``."""
    given = row.get("attention_mask")
    try:
        ids = np.asarray(row["input_ids"])
        mask = np.ones(ids.shape, dtype=np.int64) if given is None else np.asarray(given)
    except (KeyError, ValueError) as error:
        raise InputError(f"{place}: {WHOLE_NUMBERS}") from error
    if (ids.size and ids.dtype.kind not in "iu") or (mask.size and mask.dtype.kind not in "iub"):
        raise InputError(f"{place}: {WHOLE_NUMBERS}")
    ids, mask = ids.astype(np.int64), mask.astype(np.int64)
    if ids.ndim != 1 or ids.shape != mask.shape or not mask.any() or ((mask != 0) & (mask != 1)).any():
        raise InputError(
            f"{place}: `input_ids` has shape {ids.shape} and `attention_mask` {mask.shape} with {int(mask.sum())} "
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
