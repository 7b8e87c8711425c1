"""Model inputs of a corpus, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moecover.corpora.packing import Corpus

if TYPE_CHECKING:
    import torch


def batches(corpus: Corpus, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Model inputs of a corpus, ``batch_size`` sequences at a time; mask and positions only where there is padding."""
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
