"""Global: one ranking of the experts of all layers, so that layers keep different numbers; for evaluation only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moecover.errors import InputError
from moecover.planning.method import METHODS
from moecover.planning.options import SALIENCY

if TYPE_CHECKING:
    from moecover.planning.artifact import LayerPlan
    from moecover.planning.selection import Budget
    from moecover.profiling.artifact import Profile


@METHODS(
    "global",
    label="global",
    paper="layer-wise shares ranked over the model, as the global scopes of MoNE and RCO; evaluation only",
    options=(SALIENCY,),
    unequal=True,
    rank=10,
)
def global_budget(profile: Profile, budget: Budget, *, saliency: str = "contribution") -> list[LayerPlan]:
    """The experts with the largest shares of their layer's saliency, over all layers together.

    Saliencies of a layer are scaled to sum 1: their size grows with depth, which says nothing of what an expert is
    worth. Every layer keeps at least what its router needs. In a router with groups the next best expert of each group
    is taken together, by the mean of their shares.

    Args:
        profile: statistics of every corpus, which are added up.
        budget: experts to keep, on average over the layers.
        saliency: name in `SALIENCIES`.
    """
    import dataclasses

    from moecover.corpora.sources import ALL_CORPORA
    from moecover.planning.saliency import utility_of
    from moecover.planning.selection import layer_plan, ranked, shared_budget

    utility = {ALL_CORPORA: utility_of(saliency, profile.pooled())}
    if (utility[ALL_CORPORA] < 0).any():
        raise InputError(
            f"saliency {saliency} gives negative values, which cannot be scaled to shares. Use another one"
        )
    counts = shared_budget(utility[ALL_CORPORA], budget, profile.topology)
    plans = []
    for layer, order in enumerate(ranked(utility[ALL_CORPORA]).tolist()):
        room = dataclasses.replace(budget, keep=counts[layer]).room(layer)
        plans.append(layer_plan(profile, layer, room, room.fill(order), utility=utility))
    return plans
