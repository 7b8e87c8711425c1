"""AIMER: the experts whose weights are least even, from the weights alone (arXiv 2603.18492, its authors' code)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moecover.planning.method import METHODS

if TYPE_CHECKING:
    from moecover.checkpoints.structure import Structure
    from moecover.planning.artifact import LayerPlan
    from moecover.planning.selection import Budget
    from moecover.profiling.artifact import Profile


@METHODS("aimer", label="AIMER", paper="arXiv 2603.18492", blind=True, rank=7)
def aimer(profile: Profile, budget: Budget, *, structure: Structure) -> list[LayerPlan]:
    """The experts with the lowest mean |w| over root mean square of w, over all weights of their matrices together.

    It needs no text, and reads the weights once. Experts whose weights are all 0 go first.

    Args:
        profile: only its topology is used.
        budget: experts to keep.
        structure: the checkpoint.

    Raises:
        InputError: the weights are quantised, or not finite.
    """
    from moecover.checkpoints.magnitudes import magnitudes
    from moecover.corpora.sources import ALL_CORPORA
    from moecover.planning.selection import layer_plan, ranked

    absolute, squared, number = magnitudes(structure)
    evenness = absolute / (squared * number + (squared == 0)) ** 0.5  # (mean |w|) / sqrt(mean w^2), in [0, 1]
    utility = 1 - evenness
    utility[squared == 0] = 0
    plans = []
    for layer, order in enumerate(ranked(utility).tolist()):
        room = budget.room(layer)
        plans.append(layer_plan(profile, layer, room, room.fill(order), utility={ALL_CORPORA: utility}))
    return plans
