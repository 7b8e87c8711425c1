"""Stage 1, corpus: reads text or token ids by name or path, gives sequences of token ids with a mask and a hash.

`corpora` gives documents by name or path. A row of a file holds ``text``, or ``input_ids`` (with an optional
``attention_mask``), which are taken as they are.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.checkpoints.deepseek.registration import register_deepseek_config
from moecover.corpora.overlap import sketch
from moecover.corpora.sources import CORPORA, HubCorpus, file_rows
from moecover.errors import InputError
from moecover.registry import unknown_name
from moecover.signals import held

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from moecover.checkpoints.structure import Structure

    Rest = tuple[NDArray[np.int64], NDArray[np.bool_]]  # tokens and mask of the blocks or rows that a sample leaves

SEQUENCES, LENGTH = 128, 2048  # the calibration set of the field: 128 blocks of 2048 tokens
PIECE_CHARS = 20_000  # longer documents are cut at line ends, so that a sample does not come from one book
POOL = 4  # documents are tokenised until there are this many times the blocks wanted, then the sample is drawn


@dataclass(frozen=True)
class Corpus:
    """Sequences of token ids, ready for a forward pass.

    Attributes:
        name: what the profile calls it.
        tokens: int64 ``[sequence, position]``.
        mask: bool ``[sequence, position]``, True where there is a token and False where there is padding.
        record: JSON-ready origin: source, sha256 of tokens and mask, sizes, seed, documents; the sketch of `overlap`.
    """

    name: str
    tokens: NDArray[np.int64]
    mask: NDArray[np.bool_]
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens, padding not counted."""
        return int(self.mask.sum())

    def __getitem__(self, rows: slice) -> Corpus:
        """A shard of the corpus: some of its sequences, with a hash of their own."""
        return make_corpus(self.name, self.tokens[rows], self.mask[rows], {**self.record, "rows": str(rows)})


def make_corpus(name: str, tokens: NDArray[np.int64], mask: NDArray[np.bool_], origin: dict[str, Any]) -> Corpus:
    """A corpus with its hash, sizes and sketch; the hash covers token ids and mask, padding excluded."""
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
    structure: Structure | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sequences: int | None = None,
    length: int | None = None,
    seed: int = 0,
    vocab_size: int | None = None,
    max_length: int | None = None,
) -> Corpus:
    """Sequences of a named corpus or of a file, in the tokens of a model.

    Text is put in seeded order, tokenised with an end-of-text token after every document (long ones are cut in pieces of
    20,000 characters), packed into blocks of ``length`` tokens, and a seeded sample of ``sequences`` blocks is drawn.
    Rows with ``input_ids`` are taken as they are.

    Args:
        name: what the profile calls the corpus; a key of `CORPORA` when there is no path.
        path: .txt, .jsonl, .jsonl.gz or .parquet file.
        structure: the model; gives tokenizer, vocabulary and longest sequence where they are not given themselves.
        tokenizer: instead of the model's; loaded only when there is text.
        sequences: sequences wanted, an error when there are fewer; None takes up to 128 blocks (all rows of ``input_ids``).
        length: tokens per block of text; None takes 2048, or ``max_length`` if that is less.
        seed: order of documents and choice of blocks.
        vocab_size: ids at or above it are refused.
        max_length: longest sequence that the model takes.

    Raises:
        InputError: unknown name, unreadable file, no text, too few blocks, or ids out of range.
    """
    return _drawn(name, path, structure, tokenizer, sequences, length, seed, vocab_size, max_length)[0]


def load_unused(
    name: str, path: str | Path | None, record: dict[str, Any], *, structure: Structure, blocks: int
) -> Corpus:
    """Blocks of a corpus that a sample of it left: of the same text, tokens and length, none of them in the sample.

    The sample is drawn again from its record and held against its hash, so it is known which blocks it took. Blocks are cut
    from the text one after the other: one that was left may continue a document of which the sample has another part.

    Args:
        name: of the corpus.
        path: the file that it was drawn from; None for a named corpus.
        record: of the sample, see `Corpus.record`.
        structure: the model that the sample was drawn for.
        blocks: at most so many, evenly over all that were left.

    Raises:
        InputError: the sample took all blocks, is not what the record says, or what `load_corpus` raises.
    """
    sample, (tokens, mask) = _drawn(
        name, path, structure, None, record["sequences"], record.get("length"), record["seed"]
    )
    if sample.record["sha256"] != record["sha256"]:
        raise InputError(f"corpus {name} is not what the profile read: drawn again, its sample has another hash (other text, tokenizer or version). Give held-out text as --perplexity NAME=PATH")  # fmt: skip
    if len(tokens) == 0:
        raise InputError(f"corpus {name}: the profile took all {record['sequences']} blocks, none is left. Give held-out text as --perplexity NAME=PATH, or make the profile with fewer --sequences")  # fmt: skip
    taken = np.unique(np.linspace(0, len(tokens) - 1, min(blocks, len(tokens))).round().astype(np.int64))
    origin: dict[str, Any] = {key: record[key] for key in ("source", "seed", "length") if key in record}
    return make_corpus(
        name, tokens[taken], mask[taken], {**origin, "left_by": record["sha256"], "blocks_left": len(tokens)}
    )


def _drawn(
    name: str, path: str | Path | None, structure: Structure | None, tokenizer: PreTrainedTokenizerBase | None,
    sequences: int | None, length: int | None, seed: int, vocab_size: int | None = None, max_length: int | None = None,
) -> tuple[Corpus, Rest]:  # fmt: skip
    """The sample that `load_corpus` gives, and what it leaves."""
    if path is None and name not in CORPORA:
        raise unknown_name("corpus", name, CORPORA)
    if structure is not None:
        text = structure.checkpoint.text_config
        vocab_size, max_length = vocab_size or text.get("vocab_size"), max_length or text.get("max_position_embeddings")
    origin: dict[str, Any] = {"source": Path(path).name if path is not None else name, "seed": seed}
    streamed = False
    if path is None:
        row = CORPORA[name]
        if isinstance(row, HubCorpus):
            origin["source"], streamed = f"{row.path}@{row.revision}", row.streaming
        documents: Iterable[str] = row.documents(seed)
    else:
        rows = file_rows(Path(path))
        first = next(rows, None)
        if first is None:
            raise InputError(f"corpus {name}: {path} is empty")
        rows = itertools.chain([first], rows)
        if first.get("input_ids") is not None:
            return _take_rows(name, rows, sequences, seed, vocab_size, max_length, origin)
        documents = (_text_of(row, name, path) for row in rows)
    if tokenizer is None and structure is not None:
        tokenizer = load_tokenizer(structure.checkpoint.path)
    if tokenizer is None:
        raise InputError(f"corpus {name} holds text, but the model has no tokenizer. Give rows of `input_ids`")
    length = length or min(LENGTH, max_length or LENGTH)
    if max_length is not None and length > max_length:
        raise InputError(f"--length {length} is above the {max_length} positions of the model. Give --length {max_length} or less")  # fmt: skip
    packed, rest = _pack(name, documents, tokenizer, sequences, length, seed, origin, streamed=streamed)
    if vocab_size is not None and packed.tokens.max() >= vocab_size:
        raise InputError(f"corpus {name}: the tokenizer gives id {packed.tokens.max()}, the model's vocabulary ends at {vocab_size - 1}. Tokenizer and model do not belong together")  # fmt: skip
    return packed, rest


def _text_of(row: dict[str, Any], name: str, path: str | Path) -> str:
    if not isinstance(row.get("text"), str):
        raise InputError(f"corpus {name}: a row of {path} has no `text`; rows with and without it do not mix")
    return str(row["text"])


def _pieces(document: str) -> Iterator[str]:
    """A document in pieces of about PIECE_CHARS characters, cut at line ends where there are any."""
    start = 0
    while len(document) - start > PIECE_CHARS:
        end = document.rfind("\n", start + 1, start + PIECE_CHARS) + 1 or start + PIECE_CHARS
        yield document[start:end]
        start = end
    yield document[start:]


def _pack(
    name: str,
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    sequences: int | None,
    length: int,
    seed: int,
    origin: dict[str, Any],
    *,
    streamed: bool,
) -> tuple[Corpus, Rest]:
    wanted = sequences or SEQUENCES
    rng = np.random.default_rng(seed)
    # A stream is shuffled by its reader, so little more than is needed is read; a file is read up to a generous limit
    # (300 MB of text at the default size) and put in seeded order here.
    limit_chars = (4 if streamed else 256) * POOL * wanted * length
    texts, chars = [], 0
    for document in documents:
        for piece in _pieces(document.encode("utf-8", "replace").decode()):  # lone surrogates have no bytes
            if piece.strip():
                texts.append(piece)
                chars += len(piece)
        if chars > limit_chars:
            break
    if not texts:
        raise InputError(f"corpus {name} holds no text")
    end = tokenizer.eos_token_id
    ids: list[int] = []
    order = rng.permutation(len(texts))
    for start in range(0, len(order), 64):
        if len(ids) >= POOL * wanted * length:
            break
        batch = [texts[i] for i in order[start : start + 64]]
        for encoded in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            ids.extend(encoded if end is None else [*encoded, end])
    blocks = len(ids) // length
    if blocks == 0:
        raise InputError(f"corpus {name} holds {len(ids)} tokens, less than one block of {length}. Give a shorter --length or more text")  # fmt: skip
    if sequences is not None and blocks < sequences:
        raise InputError(f"corpus {name} gives {blocks} blocks of {length} tokens, {sequences} are wanted. Give --sequences {blocks}, a shorter --length or more text")  # fmt: skip
    chosen = np.sort(rng.choice(blocks, size=min(blocks, wanted), replace=False))
    every = np.asarray(ids[: blocks * length], dtype=np.int64).reshape(blocks, length)
    tokens, rest = every[chosen], np.delete(every, chosen, axis=0)
    origin = {**origin, "length": length, "blocks_available": blocks, "documents": len(texts)}
    sample = make_corpus(name, tokens, np.ones_like(tokens, dtype=bool), origin)
    return sample, (rest, np.ones_like(rest, dtype=bool))


def _take_rows(
    name: str,
    rows: Iterable[dict[str, Any]],
    sequences: int | None,
    seed: int,
    vocab_size: int | None,
    max_length: int | None,
    origin: dict[str, Any],
) -> tuple[Corpus, Rest]:
    pairs = []
    for number, row in enumerate(rows, 1):
        where = f"corpus {name}, row {number}"
        given = row.get("attention_mask")
        try:
            ids = np.asarray(row["input_ids"])
            mask = np.ones(ids.shape, dtype=np.int64) if given is None else np.asarray(given)
        except (KeyError, ValueError) as error:
            raise InputError(
                f"{where}: `input_ids` must be a list of whole numbers, `attention_mask` likewise"
            ) from error
        if (ids.size and ids.dtype.kind not in "iu") or (mask.size and mask.dtype.kind not in "iub"):
            raise InputError(f"{where}: `input_ids` must be a list of whole numbers, `attention_mask` likewise")
        ids, mask = ids.astype(np.int64), mask.astype(np.int64)
        if ids.ndim != 1 or ids.shape != mask.shape or not mask.any() or ((mask != 0) & (mask != 1)).any():
            raise InputError(f"{where}: `input_ids` has shape {ids.shape} and `attention_mask` {mask.shape} with {int(mask.sum())} ones; two equal lists and at least one 1 are needed")  # fmt: skip
        if ids.min() < 0 or (vocab_size is not None and ids.max() >= vocab_size):
            allowed = "0 or more" if vocab_size is None else f"0 to {vocab_size - 1}"
            raise InputError(f"{where}: token id {int(ids.max() if ids.min() >= 0 else ids.min())} is out of range. Allowed: {allowed}")  # fmt: skip
        if max_length is not None and len(ids) > max_length:
            raise InputError(f"{where}: {len(ids)} tokens, the model takes {max_length}")
        pairs.append((ids, mask.astype(bool)))
    if sequences is not None and len(pairs) < sequences:
        raise InputError(f"corpus {name} holds {len(pairs)} rows, {sequences} are wanted. Give --sequences {len(pairs)} or leave it out")  # fmt: skip
    available = len(pairs)
    left = list[tuple["NDArray[np.int64]", "NDArray[np.bool_]"]]()
    if sequences is not None and sequences < available:
        chosen = np.random.default_rng(seed).choice(available, size=sequences, replace=False).tolist()
        left = [pair for i, pair in enumerate(pairs) if i not in set(chosen)]
        pairs = [pairs[i] for i in sorted(chosen)]
    return make_corpus(name, *_padded(pairs), {**origin, "blocks_available": available}), _padded(left)


def _padded(pairs: list[tuple[NDArray[np.int64], NDArray[np.bool_]]]) -> Rest:
    """Rows of different lengths as one array and its mask."""
    width = max((len(ids) for ids, _ in pairs), default=0)
    tokens = np.zeros((len(pairs), width), dtype=np.int64)
    masks = np.zeros((len(pairs), width), dtype=bool)
    for i, (ids, mask) in enumerate(pairs):
        tokens[i, : len(ids)], masks[i, : len(ids)] = ids, mask
    return tokens, masks


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a checkpoint folder, None where there is none.

    Raises:
        InputError: there is one, but it cannot be loaded.
    """
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((folder / n).is_file() for n in names):
        return None
    with held():
        from transformers import AutoTokenizer

    register_deepseek_config()
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a broken tokenizer makes the library raise
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{folder}: the tokenizer could not be loaded: {reason}") from error
