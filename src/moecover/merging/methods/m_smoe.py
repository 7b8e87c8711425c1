"""M-SMoE: every dropped expert joins the kept one that the router scores most alike (arXiv 2310.01334)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moecover.merging.method import MERGES, ROUTER, Pair

if TYPE_CHECKING:
    import torch

    from moecover.merging.facts import Groups, LayerFacts


def unlike_weights(pair: Pair) -> torch.Tensor:
    """Minus the products of the channels' weights: the least in all is the least squared distance, section 3.1."""
    return -(pair.centre @ pair.member.T)


@MERGES("m-smoe", label="M-SMoE", paper="arXiv 2310.01334", needs=(ROUTER,), cost=unlike_weights)
def m_smoe(facts: LayerFacts) -> Groups:
    """Into the kept expert with the most similar router logits; weighted by frequency, channels matched by weights.

    As the authors' code (UNITES-Lab/MC-SMoE): cosine of the logits over the tokens, averages weighted by the share of
    tokens. Their dominant experts are the most frequent of all layers together, here those of the plan. They align all
    experts to the first one of the layer, here every member to its group's kept one. Ties go to the lowest id.
    """
    import numpy as np

    from moecover.merging.facts import Groups

    kept = np.array(facts.kept)
    centre_of = kept[np.argmax(facts.router[:, kept], axis=1)]
    centre_of[kept] = kept
    return Groups(centre_of, facts.counts)
