"""Kinds of text in a corpus: reads a corpus, writes each kind as a file of rows of ``input_ids``.

A corpus of mixed text, such as what a model writes itself, counts as one corpus in coverage: what is rare in it
protects no expert and hardly weighs in a repair. So its documents are cut into pieces, each piece is described by its
tokens (tf-idf, projected onto the leading singular directions: Deerwester et al., "Indexing by Latent Semantic
Analysis", JASIS 41, 1990), and the pieces are clustered by k-means. Each kind is then a corpus of its own, with a
weight and equations of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from moecover.corpora.bos import body_length
from moecover.corpora.packing import Corpus
from moecover.errors import InputError, arg
from moecover.files.atomic import new_folder, write_text

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy.sparse import csr_array

    Ids = NDArray[np.int64]

FILE = "kinds.json"  # beside the rows: what was split, and the kinds
KINDS = 8
PIECE = 128  # tokens, about
DIRECTIONS = 32  # singular directions in which pieces are compared
STARTS, ROUNDS = 10, 100  # of k-means
TYPICAL = 12  # tokens that describe a kind


class KindFacts(TypedDict):
    """What is written of a kind: its file, rows and tokens in it, share of the corpus, typical words."""

    file: str
    rows: int
    tokens: int
    share: float
    words: list[str]


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a document.

    Attributes:
        ids: int64 ``[token]``.
        document: index in the corpus.
        place: index of the piece in its document.
    """

    ids: Ids
    document: int
    place: int


def pieces_of(corpus: Corpus, ends: Sequence[int], *, begin: int = 0) -> list[Piece]:
    """Cut the documents of a corpus into parts of about `PIECE` tokens, those of one document of equal length.

    Args:
        corpus: a new row begins a new document.
        ends: ids that end a document; they stay part of it.
        begin: tokens that every row begins with and that are part of no document (BOS).
    """
    found: list[Piece] = []
    documents = 0
    for row, keep in zip(corpus.tokens, corpus.mask, strict=True):
        ids = row[keep][begin:]
        for document in np.split(ids, np.flatnonzero(np.isin(ids, ends)) + 1):
            if np.isin(document, ends, invert=True).any():  # more than its end
                parts = np.array_split(document, max(1, round(len(document) / PIECE)))
                found += [Piece(part, documents, place) for place, part in enumerate(parts)]
                documents += 1
    return found


def tf_idf(pieces: Sequence[Ids]) -> tuple[csr_array, Ids]:
    """Token weights of pieces: ``(1 + log count) (1 + log((1 + pieces) / (1 + pieces with it)))``, scaled to norm 1.

    Returns:
        Sparse float64 ``[piece, column]``; int64 ``[column]``, the token id of every column.
    """
    from scipy.sparse import csr_array, diags_array

    tokens, columns = np.unique(np.concatenate(pieces), return_inverse=True)
    rows = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    table = csr_array(
        (np.ones(len(columns)), (rows, columns)), shape=(len(pieces), len(tokens))
    )  # repeated entries add up
    spread = np.bincount(table.indices, minlength=len(tokens))
    table.data = 1 + np.log(table.data)
    table = table @ diags_array(1 + np.log((1 + len(pieces)) / (1 + spread)))
    lengths = np.sqrt(table.multiply(table).sum(axis=1))
    return csr_array(diags_array(1 / lengths) @ table), tokens


def described(table: csr_array, *, seed: int) -> NDArray[np.float64]:
    """Project pieces onto the leading singular directions of all, scaled to norm 1: float64 ``[piece, direction]``."""
    from scipy.sparse.linalg import svds

    least = min(table.shape)
    if least <= 2:  # too small for an iteration
        points: NDArray[np.float64] = table.toarray()
    else:
        start = np.random.default_rng(seed).normal(size=least)  # the default start differs from run to run
        left, values, _ = svds(table, k=min(DIRECTIONS, least - 1), v0=start)
        points = left * values
    points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    return points


def grouped(points: NDArray[np.float64], kinds: int, *, seed: int) -> Ids:
    """Cluster pieces by the best of `STARTS` runs of k-means.

    Args:
        points: float64 ``[piece, direction]``.
        kinds: number of clusters.
        seed: of the starts.

    Returns:
        The cluster of every piece, int64 ``[piece]``.

    Raises:
        InputError: there are fewer kinds.
    """
    from scipy.cluster.vq import ClusterError, kmeans2

    fewer = InputError(
        f"the text does not fall into {kinds} kinds: it has {len(points)} pieces, too few or too similar. "
        f"Give fewer {arg('kinds')} or more text"
    )
    if len(np.unique(points.round(9), axis=0)) < kinds:
        raise fewer
    best: Ids | None = None
    rng, least = np.random.default_rng(seed), np.inf
    for _ in range(STARTS):
        try:
            centres, labels = kmeans2(points, kinds, iter=ROUNDS, minit="++", missing="raise", rng=rng)
        except ClusterError:  # a cluster became empty
            continue
        distance = float(((points - centres[labels]) ** 2).sum())
        if distance < least:
            best, least = labels, distance
    if best is None or len(np.unique(best)) < kinds:
        raise fewer
    return best.astype(np.int64)


def rows_of(pieces: Sequence[Piece], length: int, end: int | None) -> list[Ids]:
    """Concatenate the pieces of a kind into rows of equal length.

    An incomplete last row is dropped unless it is the only one.

    Args:
        pieces: in their order in the corpus.
        length: tokens per row.
        end: id put after a piece that the next one does not continue, unless it ends in it already; None puts nothing.
    """
    parts: list[Ids] = []
    for piece, after in zip(pieces, [*pieces[1:], None], strict=True):
        parts.append(piece.ids)
        continued = after is not None and (after.document, after.place) == (piece.document, piece.place + 1)
        if end is not None and not continued and piece.ids[-1] != end:
            parts.append(np.array([end]))
    ids = np.concatenate(parts)
    rows = [ids[start : start + length] for start in range(0, len(ids), length)]
    return rows if len(rows) == 1 or len(rows[-1]) == length else rows[:-1]


def split(
    corpus: Corpus, ends: Sequence[int], *, kinds: int = KINDS, seed: int = 0, begin: int = 0
) -> tuple[list[list[Piece]], list[list[int]]]:
    """Split a corpus into kinds of text.

    Args:
        corpus: of any source.
        ends: ids that end a document.
        kinds: number of kinds.
        seed: of the starts of k-means.
        begin: see `pieces_of`.

    Returns:
        The pieces of every kind, the largest kind first; `TYPICAL` token ids of every kind, the most typical first.

    Raises:
        InputError: there are fewer kinds.
    """
    pieces = pieces_of(corpus, ends, begin=begin)
    if len(pieces) < kinds:
        raise InputError(
            f"corpus {corpus.name} has {len(pieces)} pieces of about {PIECE} tokens, too few for {kinds} kinds. "
            f"Give fewer {arg('kinds')} or more text"
        )
    table, tokens = tf_idf([piece.ids for piece in pieces])
    labels = grouped(described(table, seed=seed), kinds, seed=seed)
    found = []
    overall = np.asarray(table.mean(axis=0)).ravel()
    for kind in range(kinds):
        mine = np.flatnonzero(labels == kind)
        says = np.asarray(table[mine].mean(axis=0)).ravel() - overall
        typical = [int(t) for t in tokens[np.argsort(-says, kind="stable")] if t not in ends][:TYPICAL]
        found.append(([pieces[i] for i in mine], typical))
    found.sort(key=lambda kind: -sum(len(piece.ids) for piece in kind[0]))
    return [mine for mine, _ in found], [typical for _, typical in found]


def write_kinds(
    folder: Path,
    corpus: Corpus,
    kinds: Sequence[Sequence[Piece]],
    words: Sequence[Sequence[str]],
    *,
    length: int,
    ends: Sequence[int],
    prefix: tuple[int, ...] = (),
) -> list[KindFacts]:
    """Write a folder with 1.jsonl, 2.jsonl ... for ``--corpus NAME=FOLDER``, and `FILE`; it appears only when complete.

    Args:
        folder: to be written.
        corpus: that was split.
        kinds: from `split`.
        words: typical words of every kind.
        length: tokens per row.
        ends: ids that end a document.
        prefix: ids that every row begins with; they count in ``length``.

    Raises:
        MoecoverError: the disk is full or the folder cannot be written.
    """
    facts: list[KindFacts] = []
    whole = sum(len(piece.ids) for kind in kinds for piece in kind)
    with new_folder(folder) as draft:
        for number, (kind, typical) in enumerate(zip(kinds, words, strict=True), 1):
            rows = rows_of(kind, body_length(length, prefix), ends[0] if ends else None)
            lines = (json.dumps({"input_ids": [*prefix, *row.tolist()]}) + "\n" for row in rows)
            write_text(draft / f"{number}.jsonl", "".join(lines))
            facts.append(
                {
                    "file": f"{number}.jsonl",
                    "rows": len(rows),
                    "tokens": sum(len(prefix) + len(row) for row in rows),
                    "share": sum(len(piece.ids) for piece in kind) / whole,
                    "words": list(typical),
                }
            )
        record = {key: value for key, value in corpus.record.items() if key != "sketch"}
        write_text(draft / FILE, json.dumps({"corpus": corpus.name, **record, "kinds": facts}, indent=1) + "\n")
    return facts
