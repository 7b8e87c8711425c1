"""The text of `shrink`: corpora as users give them, or WikiText2 and C4, and what the model writes, by kind.

Every corpus is divided: the first part calibrates, the rest is held out for what is measured. Tokens that the text
hardly holds are one more corpus, see `corpora.rare_tokens`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moecover.corpora.generation import cache_bytes
from moecover.corpora.loading import Corpora, parsed, refused_text
from moecover.corpora.own_text import generate
from moecover.corpora.packing import LENGTH, Corpus, load_corpus
from moecover.corpora.rare_tokens import NAME as RARE
from moecover.corpora.rare_tokens import rare_tokens
from moecover.corpora.splitting import split
from moecover.errors import InputError, MoecoverError, arg
from moecover.progress import Progress
from moecover.runtime.distributed import of_first
from moecover.runtime.world import ALONE, World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moecover.checkpoints.structure import Structure
    from moecover.runtime.options import RunOptions
    from moecover.shrinking.quality import Quality

NAMED = ("wikitext2", "c4")  # where no corpus is given
OWN, KINDS, ROWS_OF_KIND = "self", 16, 6  # kinds of text at most, and rows of the text for each
ROOM = 2 << 30  # bytes of keys and values of all rows at once, above which the model writes them in batches
OWN_FILE, KINDS_FOLDER = "own-text.jsonl", "kinds"


@dataclass(frozen=True)
class Texts:
    """Calibration text and held-out text of the same corpora."""

    calibration: list[Corpus]
    held_out: list[Corpus]

    @property
    def tokens(self) -> int:
        """Tokens of the calibration text."""
        return sum(corpus.num_tokens for corpus in self.calibration)


def own_corpora(
    structure: Structure, work: Path, quality: Quality, options: RunOptions, *, here: World = ALONE, progress: Progress
) -> list[str]:
    """What the model writes, as corpora by kind: ``NAME=FOLDER``; files that are there are taken as they are.

    Args:
        structure: the model.
        work: folder for the text.
        quality: how much.
        options: how the model runs.
        here: this process among those that share the work.
        progress: shows the steps.

    Raises:
        InputError: a model that does not fit into memory, or cannot generate.
    """
    file, folder = work / OWN_FILE, work / KINDS_FOLDER
    if not of_first(here, file.exists()):
        small = cache_bytes(structure, tokens=quality.rows * length_of(structure), itemsize=4) < ROOM
        running: RunOptions = {**options, "batch_size": quality.rows if small else None}
        generate(structure, file, sequences=quality.rows, here=here, progress=progress, **running)
    refused: str | None = None
    if here.rank == 0 and not folder.exists():
        kinds = max(2, min(KINDS, quality.rows // ROWS_OF_KIND))
        try:
            split(structure, f"{OWN}={file}", folder, kinds=kinds, progress=progress)
        except InputError as error:
            refused = str(error)
    if (refused := of_first(here, refused)) is not None:  # in every process
        raise InputError(refused)
    return [f"{OWN}={folder}"]


def named_corpora(
    corpora: Corpora | None,
    structure: Structure,
    quality: Quality,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress,
) -> list[str | Corpus]:
    """The corpora that are given, read; else WikiText2 and C4, none where the hub is out of reach, which is said.

    Raises:
        InputError: a corpus that is given and cannot be read.
    """
    if corpora is not None:
        given = parsed(corpora).items()
        return [_read(name, one, structure, quality, tokenizer, progress) for name, one in given]
    found: list[str | Corpus] = []
    for name in NAMED:
        try:
            with progress.spinner(f"reading corpus {name}"):
                load_corpus(name, structure=structure, tokenizer=tokenizer, sequences=1)
        except (InputError, MoecoverError) as error:
            progress.say(f"note: {name} is left out: {error}")
            continue
        found.append(name)
    return found


def check_some(corpora: Sequence[str | Corpus]) -> None:
    """Refuse to calibrate on nothing.

    Raises:
        InputError: there is no corpus.
    """
    if not corpora:
        raise InputError(f"there is no text to calibrate on: give {arg('corpora')}")


def divided(
    corpora: Sequence[str | Corpus],
    structure: Structure,
    quality: Quality,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress,
) -> Texts:
    """All corpora, each divided into calibration text and held-out text; and rare tokens, to calibrate on only.

    Args:
        corpora: names, ``NAME=PATH``, or loaded ones.
        structure: of the model whose tokens they have.
        quality: how much of each.
        tokenizer: instead of the one in the model's folder.
        progress: shows what is read.

    Raises:
        InputError: a corpus that cannot be read, or none has more than a block.
    """
    calibration, held_out = [], []
    for name, source in parsed(corpora).items():
        corpus = _read(name, source, structure, quality, tokenizer, progress)
        blocks = len(corpus.tokens)
        apart = min(quality.windows, max(1, blocks // 5), blocks - 1)
        calibration.append(corpus[: min(quality.blocks, blocks - apart)])
        if apart:
            held_out.append(corpus[blocks - apart :])
        else:
            progress.say(f"note: {name} is one block of text: it calibrates, and nothing of it is held out")
    if not held_out:
        raise InputError(
            f"{arg('corpora', next(iter(parsed(corpora))))} is one block of text, two are needed: one to calibrate on, "
            "one to measure on"
        )
    if RARE not in (corpus.name for corpus in calibration):
        blocks = max(1, quality.rows // KINDS)
        calibration.append(
            rare_tokens(structure, calibration, tokenizer=tokenizer, blocks=blocks, length=length_of(structure))
        )
        progress.say(f"corpus {RARE}: {calibration[-1].record['source']}")
    return Texts(calibration, held_out)


def _read(
    name: str,
    source: str | Corpus | None,
    structure: Structure,
    quality: Quality,
    tokenizer: PreTrainedTokenizerBase | None,
    progress: Progress,
) -> Corpus:
    """A corpus, loaded where it is not; says which chats are left out."""
    if isinstance(source, Corpus):
        return source
    with progress.spinner(f"reading corpus {name}"):
        corpus = _loaded(name, source, structure, quality, tokenizer)
    if line := refused_text(corpus):
        progress.say(line)
    return corpus


def _loaded(
    name: str, path: str | None, structure: Structure, quality: Quality, tokenizer: PreTrainedTokenizerBase | None
) -> Corpus:
    """A corpus of as many blocks as wanted, or as there are."""
    wanted = quality.blocks + quality.windows
    corpus = load_corpus(name, path, structure=structure, tokenizer=tokenizer)
    available = corpus.record.get("blocks_available", len(corpus.tokens))
    if len(corpus.tokens) < min(wanted, available):
        more = min(wanted, available)
        corpus = load_corpus(name, path, structure=structure, tokenizer=tokenizer, sequences=more)
    return corpus


def length_of(structure: Structure) -> int:
    """Tokens of a block."""
    most = structure.checkpoint.text_config.get("max_position_embeddings")
    return min(LENGTH, most) if isinstance(most, int) and most > 0 else LENGTH
