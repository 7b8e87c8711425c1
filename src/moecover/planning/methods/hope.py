"""HOPE: a quadratic programme over pairs of experts, layer by layer (arXiv 2609.18916, its authors' code)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moecover.errors import InputError
from moecover.planning.method import METHODS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moecover.planning.artifact import LayerPlan
    from moecover.planning.selection import Budget
    from moecover.profiling.artifact import Profile

ITERATIONS, TOLERANCE = 1000, 1e-12  # as the authors' code has them


@METHODS("hope", label="HOPE", paper="arXiv 2609.18916", pairs=True, rank=6)
def hope(profile: Profile, budget: Budget) -> list[LayerPlan]:
    """The experts outside the set whose pairs add least together, from a relaxed quadratic programme.

    F_ab is the mean of g_a ||f_a|| g_b ||f_b|| over the tokens that go to both a and b, 0 where there are none. A layer
    minimises b^T F b over 0 <= b <= 1, with the number of experts that go in each router group as the sum of its
    entries; the experts with the largest b go, of equals the lower id. F need not be positive semidefinite: the result
    is the local optimum that SLSQP reaches from equal entries. It needs no pass of its own.

    Args:
        profile: statistics of every corpus, which are added up.
        budget: experts to keep.

    Raises:
        InputError: a corpus of the profile has no statistics of pairs.
    """
    import numpy as np

    from moecover.planning.selection import layer_plan

    if lacking := [corpus for corpus in profile.statistics if corpus not in profile.pairs]:
        raise InputError(
            f"method hope needs the statistics of pairs, which the profile of {lacking[0]} does not have: an older "
            "version made it, or another program. Run `moecover profile` again"
        )
    plans, experts = [], budget.num_experts
    counts, sums = np.sum(list(profile.pairs.values()), axis=0)
    for layer in range(len(profile.topology.decoder_layers)):
        room = budget.room(layer)
        dropped = _relaxed(mean_products(counts[layer], sums[layer], experts), budget, list(room.chosen))
        order = np.argsort(-dropped, kind="stable")[::-1]  # the last to go first; of equals, the higher id stays
        plans.append(layer_plan(profile, layer, room, room.fill(order.tolist())))
    return plans


def mean_products(counts: NDArray[np.float64], sums: NDArray[np.float64], experts: int) -> NDArray[np.float64]:
    """F of a layer, ``[expert, expert]``, from what the profile has of its pairs, each ``[pair]``."""
    import numpy as np

    from moecover.profiling.wide import square

    return square(np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0), experts)


def _relaxed(products: NDArray[np.float64], budget: Budget, required: list[int]) -> NDArray[np.float64]:
    """The relaxed solution b, ``[expert]``; required experts stay, and every router group loses the same number."""
    import numpy as np
    from scipy.optimize import minimize

    groups, size = budget.num_groups, budget.num_experts // budget.num_groups
    go = (budget.num_experts - budget.keep) // groups  # of every group
    start, upper = np.full(budget.num_experts, go / size), np.ones(budget.num_experts)
    upper[required] = 0
    if not go:
        return np.zeros_like(start)
    members = np.repeat(np.eye(groups), size, axis=1)
    found = minimize(
        lambda b: b @ products @ b,
        np.minimum(start, upper),
        jac=lambda b: 2 * products @ b,
        method="SLSQP",
        bounds=list(zip(np.zeros_like(upper), upper, strict=True)),
        constraints={"type": "eq", "fun": lambda b: members @ b - go, "jac": lambda b: members},
        options={"maxiter": ITERATIONS, "ftol": TOLERANCE},
    )
    return np.asarray(found.x, dtype=np.float64)
