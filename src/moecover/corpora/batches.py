"""Model inputs of a corpus, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moecover.corpora.packing import Corpus

if TYPE_CHECKING:
    import torch


def batches(corpus: Corpus, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the model inputs of a corpus.

    Columns that are padding in all sequences of a batch are cut off.

    Args:
        corpus: token ids and mask.
        batch_size: sequences per batch.

    Yields:
        ``input_ids``, int64 ``[sequence, position]``; with padding also ``attention_mask`` and ``position_ids``, the
        same.
    """
    import torch

    for start in range(0, len(corpus.tokens), batch_size):
        tokens = torch.from_numpy(corpus.tokens[start : start + batch_size])
        mask = torch.from_numpy(corpus.mask[start : start + batch_size])
        used = mask.any(0).nonzero()
        first, last = int(used[0]), int(used[-1]) + 1
        tokens, mask = tokens[:, first:last], mask[:, first:last]
        if bool(mask.all()):
            yield {"input_ids": tokens}
        else:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            yield {"input_ids": tokens, "attention_mask": mask.long(), "position_ids": positions}
