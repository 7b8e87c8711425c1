"""Pooled: one ranking of the experts over all corpora together; with saliency ``reap``, REAP (arXiv 2510.13999)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moecover.planning.method import METHODS
from moecover.planning.options import SALIENCY

if TYPE_CHECKING:
    from moecover.planning.artifact import LayerPlan
    from moecover.planning.selection import Budget
    from moecover.profiling.artifact import Profile


@METHODS(
    "pooled",
    paper="arXiv 2510.13999 with --saliency reap",
    options=(SALIENCY,),
    compared=True,
    published={"reap": "REAP"},
    rank=1,
)
def pooled(profile: Profile, budget: Budget, *, saliency: str = "contribution") -> list[LayerPlan]:
    """The experts with the highest saliency over all corpora together.

    Args:
        profile: statistics of every corpus, which are added up.
        budget: experts to keep.
        saliency: name in `SALIENCIES`.
    """
    from moecover.corpora.sources import ALL_CORPORA
    from moecover.planning.saliency import utility_of
    from moecover.planning.selection import layer_plan, ranked

    utility = {ALL_CORPORA: utility_of(saliency, profile.pooled())}
    plans = []
    for layer, order in enumerate(ranked(utility[ALL_CORPORA]).tolist()):
        room = budget.room(layer)
        plans.append(layer_plan(profile, layer, room, room.fill(order), utility=utility))
    return plans
