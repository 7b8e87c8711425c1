"""A MoE layer of a model that runs, as a search asks it: what it computes, masked or not, and the errors of masks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moecover.checkpoints.structure import Structure
from moecover.planning.search.products import Products, WorstCorpusProducts
from moecover.planning.search.routing import AskRouter, recognise
from moecover.runtime.finite import is_finite, not_finite
from moecover.runtime.masking import masked_layer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LiveLayer:
    """One MoE layer of a live model.

    Attributes:
        model: the live model.
        structure: its checkpoint.
        router: of the layer.
        ask: calls the router as the model does, see `observe_calls`.
        layer: MoE layer.
    """

    model: torch.nn.Module
    structure: Structure
    router: torch.nn.Module
    ask: AskRouter
    layer: int

    @property
    def experts(self) -> torch.nn.Module:
        """The module of the routed experts."""
        return self.model.get_submodule(self.structure.experts_modules[self.layer])

    def masked(self, kept: Sequence[int]) -> contextlib.AbstractContextManager[None]:
        """A block in which the layer routes to the kept experts only."""
        return masked_layer(self.model, self.structure, self.router, self.layer, kept)

    def routed(self, hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Routed output of every batch ``[token, hidden]``."""
        found = []
        for batch in hidden:
            _, weights, index, *_ = self.ask(batch)
            found.append(self.experts(batch, index, weights))
        return found

    def products(
        self,
        hidden: Sequence[torch.Tensor],
        corpus_of: Sequence[int] | None,
        targets: Sequence[torch.Tensor] | None = None,
    ) -> Products:
        """What the losses of subsets follow from; see `search_layer`.

        Raises:
            InputError: the router cannot be re-routed.
        """
        import torch

        sample = torch.cat(list(hidden))
        if not is_finite(sample):
            raise not_finite("", "the hidden states that enter the experts are")
        routing = recognise(self.model, self.structure, self.router, self.ask, self.layer, sample[:256])
        logits = torch.cat([self.ask(batch)[0] for batch in hidden])
        target = None if targets is None else torch.cat(list(targets))
        if corpus_of is None:
            return Products(self.experts, routing, hidden, logits, target)
        sizes = [0] * (1 + max(corpus_of))
        for batch, corpus in zip(hidden, corpus_of, strict=True):
            sizes[corpus] += len(batch)
        return WorstCorpusProducts(self.experts, routing, torch.split(sample, sizes), logits, target)


def squared_errors(
    live: LiveLayer,
    kept: Sequence[int],
    hidden: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor] | None = None,
) -> list[tuple[float, float]]:
    """||Z - Z_S||^2 and ||Z||^2 of every batch: forward passes in the model's dtype, differences in float64."""
    whole = live.routed(hidden) if targets is None else targets
    with live.masked(kept):
        cut = live.routed(hidden)
    return [
        (float((a.double() - b.double()).square().sum()), float(a.double().square().sum()))
        for a, b in zip(whole, cut, strict=True)
    ]


def worst_error(squares: Sequence[tuple[float, float]], corpus_of: Sequence[int]) -> float:
    """The largest over corpora of ||Z - Z_S||_F / ||Z||_F, from the squares of every batch."""
    sums = [[0.0, 0.0] for _ in range(1 + max(corpus_of))]
    for (difference, whole), corpus in zip(squares, corpus_of, strict=True):
        sums[corpus][0] += difference
        sums[corpus][1] += whole
    return max(math.sqrt(difference / whole) if whole else 0.0 for difference, whole in sums)
