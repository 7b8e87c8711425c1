"""The calibration tokens of a layer that one of several processes has: sums over all of them, and their order.

Processors round differently, so a number that is computed in every process may differ in its last bits from machine to
machine. What a solver decides by such a number, all processes decide alike: it is a sum over all of them, or the first
one's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moecover.runtime.distributed import total
from moecover.runtime.world import ALONE, World

if TYPE_CHECKING:
    import torch


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
        """The sum over all processes, the same bits in each of them."""
        return total(self.here, values)

    def of_first(self, values: torch.Tensor) -> torch.Tensor:
        """The values of the first process, in every process."""
        return total(self.here, values if self.here.rank == 0 else values.new_zeros(values.shape))

    def everywhere(self, holds: bool) -> bool:
        """Whether something holds in every process."""
        import torch

        if self.here.size == 1:
            return holds
        return int(self.total(torch.tensor(int(not holds), device=self.everyone.device))) == 0


def whole(corpus: torch.Tensor) -> Part:
    """All tokens, by their corpora, in one process."""
    import torch

    return Part(corpus, torch.arange(len(corpus), device=corpus.device))
