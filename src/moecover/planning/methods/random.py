"""Random: the baseline that looks at no statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moecover.planning.method import METHODS
from moecover.planning.options import SEED

if TYPE_CHECKING:
    from moecover.planning.artifact import LayerPlan
    from moecover.planning.selection import Budget
    from moecover.profiling.artifact import Profile


@METHODS("random", paper="baseline", options=(SEED,), blind=True, baseline=True, compared=True, rank=2)
def random(profile: Profile, budget: Budget, *, seed: int = 0) -> list[LayerPlan]:
    """A seeded choice, different in every layer; a smaller budget keeps a subset of what a larger one keeps.

    Args:
        profile: only its topology is used.
        budget: experts to keep.
        seed: of the choice.
    """
    import numpy as np

    from moecover.planning.selection import layer_plan

    plans = []
    for layer in range(len(profile.topology.decoder_layers)):
        room, rng = budget.room(layer), np.random.default_rng((seed, layer))
        plans.append(layer_plan(profile, layer, room, room.fill(rng.permutation(budget.num_experts).tolist())))
    return plans
