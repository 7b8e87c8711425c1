"""Exhaustive search: every subset that a budget allows, where there are few enough."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from moecover.errors import InputError, arg
from moecover.planning.search.products import Products
from moecover.planning.selection import Budget

EXHAUSTIVE = 100_000  # subsets; above it the search is greedy


def subsets(budget: Budget, required: frozenset[int]) -> Iterator[tuple[int, ...]]:
    """All subsets that a budget allows, in lexicographic order within every group."""
    size, share = budget.num_experts // budget.num_groups, budget.keep // budget.num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(budget.num_groups)]
    for parts in itertools.product(*(itertools.combinations(group, share) for group in groups)):
        subset = tuple(itertools.chain(*parts))
        if required <= set(subset):
            yield subset


def count_subsets(budget: Budget) -> int:
    """How many subsets a budget allows, required experts not considered."""
    size = budget.num_experts // budget.num_groups
    return int(math.comb(size, budget.keep // budget.num_groups) ** budget.num_groups)


def exhaust(products: Products, budget: Budget, required: frozenset[int]) -> list[int]:
    """The subset of least loss; among equals the first in lexicographic order."""
    import torch

    best: tuple[float, tuple[int, ...]] = (math.inf, ())
    allowed = subsets(budget, required)
    while chunk := list(itertools.islice(allowed, 1024)):
        alive = torch.zeros(len(chunk), products.num_experts, dtype=torch.bool, device=products.gram.device)
        alive.scatter_(1, torch.tensor(chunk, device=alive.device), True)
        losses = products.losses(alive)
        first = int(losses.argmin())
        best = min(best, (float(losses[first]), chunk[first]), key=lambda pair: pair[0])
    return list(best[1])


def kind_of_search(budget: Budget, search: str) -> str:
    """``exhaustive`` or ``greedy`` for a budget.

    Raises:
        InputError: an exhaustive search of too many subsets.
    """
    number = count_subsets(budget)
    if search == "exhaustive" and number > 100 * EXHAUSTIVE:
        raise InputError(
            f"{arg('search', search)} would try {number:.3g} subsets of {budget.num_experts} experts in every layer. "
            f"Use {arg('search', 'greedy')}"
        )
    if search == "auto":
        return "exhaustive" if number <= EXHAUSTIVE else "greedy"
    return search
