"""Local search after an elimination: single exchanges of a kept expert for a dropped one, as long as the loss falls."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from moecover.planning.search.products import Products
from moecover.planning.selection import Budget

LEAST_GAIN = 1e-9  # an exchange that lowers the loss by a smaller share is rounding


def exchange(products: Products, kept: Sequence[int], budget: Budget, required: frozenset[int]) -> list[int]:
    """Kept experts after exchanges, each of which lowers the loss; ends when no single exchange does.

    Dropped experts are tried in order, each in place of the kept expert whose removal costs least (in its own router
    group, none of the required ones); among equals the highest id goes.
    """
    import torch

    size = budget.num_experts // budget.num_groups
    alive = torch.zeros(budget.num_experts, dtype=torch.bool, device=products.gram.device)
    alive[list(kept)] = True
    loss, since = float(products.losses(alive[None])[0]), 0
    for enters in itertools.cycle(range(budget.num_experts)):
        if since == budget.num_experts:  # every one was tried since the last exchange
            return [int(e) for e in alive.nonzero().flatten()]
        since += 1
        places = [
            e for e in range(budget.num_experts) if alive[e] and e // size == enters // size and e not in required
        ]
        if alive[enters] or not places:
            continue
        alive[enters] = True
        losses = products.losses_without(alive).tolist()
        leaves = min(places, key=lambda e: (losses[e], -e))
        better = losses[leaves] < loss * (1 - LEAST_GAIN)
        alive[leaves if better else enters] = False
        if better:
            loss, since = losses[leaves], 0
    raise AssertionError("unreachable")
