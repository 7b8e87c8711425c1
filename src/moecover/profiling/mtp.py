"""Statistics of multi-token-prediction layers: reads a batch's last hidden states, adds up what their experts do.

They are those of any MoE layer. It costs one more layer for each of them; sequences with padding run one by one, since
transformers' model of these layers takes no mask.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from moecover.corpora.packing import Corpus
from moecover.profiling.hooks import recording
from moecover.profiling.sums import Sums
from moecover.runtime.drafting import Drafts

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

Add = Callable[[str, int, Mapping[str, "torch.Tensor"], "torch.Tensor"], None]


def key(corpus: str) -> str:
    """The name of a corpus's sums for these layers, beside those for the model's, which go by the corpus's own."""
    return f"mtp/{corpus}"


def num_tokens(corpus: Corpus, layers: int) -> NDArray[np.int64]:
    """Tokens of a corpus that every layer sees, ``[layer]``: all but the first k + 1 of a sequence for layer k."""
    left = corpus.mask.sum(1)[:, None] - 1 - np.arange(layers)
    tokens: NDArray[np.int64] = np.maximum(left, 0).sum(0)
    return tokens


@contextlib.contextmanager
def recording_drafts(drafts: Drafts | None, sums: Mapping[str, Sums]) -> Iterator[Add]:
    """A function that runs the layers on a batch and adds their statistics, until the block ends.

    It takes the corpus, the batch's number, the model's inputs, and its last hidden states ``[sequence, position,
    hidden]``. Without layers it does nothing.

    Args:
        drafts: the layers.
        sums: by `key`.
    """
    if drafts is None:
        yield lambda corpus, number, inputs, hidden: None
        return
    with recording(drafts.module, drafts.structure) as taps:

        def add(corpus: str, number: int, inputs: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> None:
            for tokens, states in _unpadded(inputs, hidden):
                for layer, _ in enumerate(drafts.run(states, tokens)):
                    sums[key(corpus)].add([taps[layer]], layer, number)

        yield add


def _unpadded(inputs: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and hidden states of a batch, sequence by sequence where there is padding."""
    tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is None:
        yield tokens, hidden
        return
    for row, kept in enumerate(mask.bool()):
        yield tokens[row, kept][None], hidden[row, kept.to(hidden.device)][None]
