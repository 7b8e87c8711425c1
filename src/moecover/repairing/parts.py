"""The calibration tokens of a layer that one of several processes has: sums over all of them, and their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moecover.runtime.distributed import total
from moecover.runtime.world import ALONE, World

if TYPE_CHECKING:
    import torch

Total = Callable[["torch.Tensor"], "torch.Tensor"]  # the sum of a tensor over all processes, the same in each of them


@dataclass(frozen=True)
class Part:
    """The tokens of this process.

    Attributes:
        everyone: index of the corpus of every token of all processes, int64 ``[all]``.
        mine: which of them this process has, ascending, int64 ``[token]``.
        here: this process.
    """

    everyone: torch.Tensor
    mine: torch.Tensor
    here: World = ALONE

    @property
    def corpus(self) -> torch.Tensor:
        """Index of the corpus of every token here, int64 ``[token]``."""
        return self.everyone[self.mine]

    def to(self, device: torch.device) -> Part:
        """The same on a device."""
        return Part(self.everyone.to(device), self.mine.to(device), self.here)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes."""
        return total(self.here, values)


def whole(corpus: torch.Tensor) -> Part:
    """All tokens, by their corpora, in one process."""
    import torch

    return Part(corpus, torch.arange(len(corpus), device=corpus.device))
