"""The numeric proof of a pruned GGUF model: runs it beside the masked original in llama.cpp, compares probabilities."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moecover.checkpoints.structure import Structure
from moecover.corpora.packing import Corpus
from moecover.errors import InputError
from moecover.llama.library import Library
from moecover.llama.masking import mask_of, masked_session
from moecover.llama.model import opened
from moecover.llama.opening import tokenizer_in
from moecover.planning.artifact import Plan
from moecover.verification.verify import verification_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

BOUND = 1e-4  # nats, in float32
ROWS = 64  # whose probabilities are computed together


class Numeric(NamedTuple):
    """The outcome.

    Attributes:
        largest: difference of a token's log-probability, in nats, over all tokens of the vocabulary at every position.
        tokens: number of positions.
        corpora: names of the text.
        fails: whether the difference is too large; of files whose experts are not float32 it is only told.
    """

    largest: float
    tokens: int
    corpora: list[str]
    fails: bool


def is_exact(structure: Structure) -> bool:
    """Whether the experts are stored in float32, so that a difference would not come from rounded products."""
    return all(structure.checkpoint.tensors[name].dtype == "F32" for name in structure.tensors)


def compare(
    original: Structure,
    cut: Structure,
    plan: Plan,
    library: Library,
    *,
    corpora: Sequence[Corpus | tuple[str, str]],
    on_cpu: bool,
    required: bool,
) -> Numeric | str:
    """Run the original, masked by a plan, and the pruned model on the same text.

    Args:
        original: the file that was pruned.
        cut: the result.
        plan: by which it was pruned.
        library: from `library.load`.
        corpora: see `verification_text`.
        on_cpu: leave a GPU alone.
        required: whether an original that llama.cpp does not run is an error.

    Returns:
        The outcome; or, in words, why the original does not run.

    Raises:
        InputError: llama.cpp does not run the original, and it is required; or it runs it, but not the pruned file.
    """
    import torch

    threads, mask = torch.get_num_threads(), mask_of(original, library, plan.kept, plan.channels)
    with contextlib.ExitStack() as stack:
        try:
            full = stack.enter_context(opened(_path(original), library, on_cpu=on_cpu))
            texts = verification_text(original, corpora=corpora, tokenizer=tokenizer_in(original, full))
            rows = [row[keep] for text in texts for row, keep in zip(text.tokens, text.mask, strict=True)]
            longest = max(map(len, rows))
            expected = stack.enter_context(masked_session(full, mask, longest, threads=threads))
        except InputError as error:
            if required:
                raise
            return str(error)
        pruned = stack.enter_context(opened(_path(cut), library, on_cpu=on_cpu))
        found = stack.enter_context(pruned.session(longest, threads=threads))
        largest = 0.0
        for row in rows:
            for (_, one), (_, two) in zip(expected.run(row), found.run(row), strict=True):
                largest = max(largest, _difference(one, two))
    fails = is_exact(original) and not largest <= BOUND
    return Numeric(largest, sum(map(len, rows)), [text.name for text in texts], fails)


def _path(structure: Structure) -> Path:
    assert structure.checkpoint.gguf is not None
    return structure.checkpoint.gguf.first.path


def _difference(one: NDArray[np.float32], two: NDArray[np.float32]) -> float:
    """Largest difference of the log-probabilities of logits ``[token, vocabulary]``; infinite where one is NaN."""
    import torch

    if one.shape != two.shape:
        raise InputError(f"the models have vocabularies of {one.shape[1]} and {two.shape[1]} tokens")
    largest = 0.0
    for start in range(0, len(one), ROWS):
        parts = [torch.from_numpy(logits[start : start + ROWS]).log_softmax(-1) for logits in (one, two)]
        found = float((parts[0] - parts[1]).abs().max())
        largest = max(largest, found if found == found else float("inf"))
    return largest
