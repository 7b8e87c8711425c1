"""How the tokens of a layer count in its repair: corpora of equal weight, and the tokens that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moecover.repairing.parts import Part
from moecover.repairing.sums import Block, squares
from moecover.runtime.segments import segment_sums

if TYPE_CHECKING:
    import torch


class Calibration:
    """How the tokens of a layer count.

    Args:
        target: the original's output, ``[token, hidden]``.
        part: the tokens among those of all processes; the tokens of a corpus in their order.
        weights: of every corpus; None weighs all the same.
        held_share: share of every corpus's tokens that is held out.

    Attributes:
        corpus: of every token, int64 ``[token]``.
        part: as given.
        any_held: whether a token is held out, in any process.
        held: which tokens are held out, the last ones of every corpus, bool ``[token]``.
        inverse: 1 over the squared target of every corpus, 0 for a corpus without any; float64 ``[corpus]``.
        of_corpus: weight of every corpus, they sum to 1; float64 ``[corpus]``.
    """

    def __init__(self, target: torch.Tensor, part: Part, weights: Sequence[float] | None, held_share: float) -> None:
        import torch

        corpus = part.everyone
        self.part, self.corpus = part, part.corpus
        given = [1.0] * (int(corpus.max()) + 1) if weights is None else list(weights)
        self._number = len(given)
        counts = torch.bincount(corpus, minlength=self._number)
        first = torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])
        place = torch.empty_like(corpus)
        place[torch.argsort(corpus, stable=True)] = torch.arange(len(corpus), device=corpus.device)
        self._held = (place - first[corpus]) >= (counts - (counts * held_share).long())[corpus]
        self.held, self.any_held = self._held[part.mine], bool(self._held.any())
        norms = self.by_corpus(squares(target))
        self.inverse = torch.where(norms > 0, 1 / norms, 0.0)
        self.of_corpus = torch.tensor(given, device=corpus.device).double()
        self.of_corpus /= self.of_corpus.sum()

    def by_corpus(self, values: torch.Tensor) -> torch.Tensor:
        """Sums of values of the tokens by corpus, over all processes; float64 ``[corpus]``."""
        return self.part.total(segment_sums(values, self.corpus, self._number))

    def losses(self, residual: torch.Tensor) -> torch.Tensor:
        """Squared residual of every corpus as a share of its squared target, float64 ``[corpus]``."""
        return self.by_corpus(squares(residual)) * self.inverse

    def share(self) -> torch.Tensor:
        """The weight of every token, float64 ``[token]``; mean 1, so that products stay in their dtype's range."""
        of_corpus = self.of_corpus * self.inverse
        return of_corpus[self.corpus] / of_corpus[self.part.everyone].mean()

    def counting(self, *, held: bool) -> torch.Tensor:
        """Which tokens of all processes count, with or without those that are held out; int64, ascending."""
        counts = (self.of_corpus * self.inverse)[self.part.everyone] > 0
        return (counts if held else counts & ~self._held).nonzero()[:, 0]

    def too_few(self, blocks: Sequence[Block], kind: str) -> dict[str, str]:
        """Blocks with fewer tokens to fit than unknowns, and why they keep their weights."""
        import torch

        fitted, found = ~self.held & (self.of_corpus > 0)[self.corpus], {}
        counts = self.part.total(torch.stack([fitted[block.tokens].sum() for block in blocks])).tolist()
        for block, rows in zip(blocks, counts, strict=True):
            unknowns = block.weight.shape[1] if kind == "ridge" else 1
            if rows < unknowns:
                found[block.name] = f"{rows} tokens to fit, {unknowns} are needed"
        return found

    def improves(self, before: torch.Tensor, after: torch.Tensor) -> bool:
        """Whether no corpus that counts has a larger error than before, and some have a smaller one."""
        import torch

        old, new = before[self.of_corpus > 0], after[self.of_corpus > 0]
        return bool((new <= old).all()) and not torch.equal(new, old)
