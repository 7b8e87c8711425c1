"""Greedy elimination: experts are dropped one by one, each time the one whose removal costs least."""

from __future__ import annotations

from collections.abc import Sequence

from moecover.planning.search.products import Products
from moecover.planning.selection import Budget


def eliminate(products: Products, budgets: Sequence[Budget], required: frozenset[int]) -> list[list[int]]:
    """Kept experts of every budget by greedy elimination, nested; among equals the highest id goes first.

    With router groups every group loses one expert a round, so that they stay equal.
    """
    import torch

    groups = budgets[0].num_groups
    size = products.num_experts // groups
    alive = torch.ones(products.num_experts, dtype=torch.bool, device=products.gram.device)
    free = [e for e in range(products.num_experts) if e not in required]
    kept: dict[int, list[int]] = {products.num_experts: list(range(products.num_experts))}
    while int(alive.sum()) > min(b.keep for b in budgets):
        counts = alive.view(groups, size).sum(1).tolist()
        losses = products.losses_without(alive).tolist()
        candidates = [e for e in free if counts[e // size] == max(counts)]
        worst = min(candidates, key=lambda e: (losses[e], -e))
        alive[worst] = False
        free.remove(worst)
        kept[int(alive.sum())] = alive.nonzero().flatten().tolist()
    return [kept[budget.keep] for budget in budgets]
