"""The places of a layer and how methods fill them: budgets, ranking, scaling, and the rule of TB-Coverage.

All methods share this: ties go to the lower id, every router group keeps the same number, required experts stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.errors import InputError, arg
from moecover.planning.artifact import LayerPlan
from moecover.planning.keep import allowed_keeps

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moecover.checkpoints.topology import Topology
    from moecover.profiling.artifact import Profile


def ranked(utility: NDArray[Any]) -> NDArray[np.int64]:
    """Expert ids from the highest utility to the lowest, ties by the lower id; ``utility`` is ``[..., expert]``."""
    return np.argsort(-utility, axis=-1, kind="stable")


class Room:
    """The places of one layer: which experts have one, and whether another still fits.

    Attributes:
        chosen: experts that have a place, in the order in which they took it; the required ones come first.
    """

    def __init__(self, keep: int, num_experts: int, *, num_groups: int = 1, required: Iterable[int] = ()) -> None:
        self._group_size = num_experts // num_groups
        self._free = [keep // num_groups] * num_groups
        self.chosen: dict[int, None] = {}
        for expert in sorted(required):
            if not self.take(expert):
                raise InputError(
                    f"{len(set(required))} super experts do not fit into {arg('keep', keep)}. Keep more, or leave "
                    f"{arg('protect_super_experts')} out"
                )

    def __len__(self) -> int:
        """Number of free places."""
        return sum(self._free)

    def take(self, expert: int) -> bool:
        """Give an expert a place; False if it has one already or its group is full."""
        group = expert // self._group_size
        if expert in self.chosen or not self._free[group]:
            return False
        self._free[group] -= 1
        self.chosen[expert] = None
        return True

    def fill(self, order: Iterable[int]) -> list[int]:
        """Give places in an order until there are none; returns the experts that got one."""
        return [expert for expert in order if len(self) and self.take(expert)]


@dataclass(frozen=True)
class Budget:
    """How many experts every layer keeps, and which ones whatever the method says.

    Attributes:
        keep: experts per layer.
        num_experts: experts per layer.
        num_groups: router groups, which all keep the same number.
        required: by MoE layer, experts that are kept whatever a method says.
    """

    keep: int
    num_experts: int
    num_groups: int = 1
    required: tuple[frozenset[int], ...] = field(default=())

    def room(self, layer: int) -> Room:
        """The places of a MoE layer; the required experts have theirs already."""
        required = self.required[layer] if self.required else ()
        return Room(self.keep, self.num_experts, num_groups=self.num_groups, required=required)


def scaled(utility: NDArray[np.float64]) -> NDArray[np.float64]:
    """Utilities ``[..., expert]`` scaled to sum 1; a row of zeros stays zero."""
    totals = utility.sum(axis=-1, keepdims=True)
    result: NDArray[np.float64] = np.divide(utility, totals, out=np.zeros_like(utility), where=totals > 0)
    return result


def shared_budget(utility: NDArray[np.float64], budget: Budget, topology: Topology) -> list[int]:
    """Numbers of experts of the layers by one ranking of the shares of all, ``budget.keep`` on average.

    Every layer has at least the allowed minimum, and room for its required experts. Ties go to the layer that comes
    first.

    Args:
        utility: non-negative, ``[layer, expert]``.
        budget: of the plan.
        topology: of the model.
    """
    groups, layers = budget.num_groups, len(utility)
    by_group = np.sort(scaled(utility).reshape(layers, groups, -1), axis=-1)[..., ::-1]
    steps = by_group.mean(axis=1)  # what the next expert of each group adds, [layer, step], descending
    counts = np.full(layers, allowed_keeps(topology)[0] // groups)
    for layer, required in enumerate(budget.required):
        in_group = np.bincount([e // (budget.num_experts // groups) for e in required], minlength=groups)
        counts[layer] = max(counts[layer], in_group.max())
    order = ranked(np.where(np.arange(steps.shape[1]) < counts[:, None], -1.0, steps).reshape(-1))
    left = budget.keep * layers // groups - int(counts.sum())
    if left < 0:
        raise InputError(f"{arg('keep', budget.keep)} is below what routers and super experts need in every layer")
    for place in order[:left].tolist():
        counts[place // steps.shape[1]] += 1
    return [int(count) * groups for count in counts]


def cover(
    utility: NDArray[np.float64], room: Room, turns: int, weights: Sequence[int] | None = None
) -> tuple[list[list[int]], list[int]]:
    """TB-Coverage in one layer (arXiv 2607.01710, this project's reading).

    Every corpus's utilities are scaled to sum 1. Corpora take turns, in their order, each protecting its best expert
    that has no place yet. A corpus that is left with experts of utility 0 protects nothing in its further turns, and
    the others get none of them. The remaining places are filled by the mean scaled utility. Ties go to the lower id. A
    corpus that had t turns keeps its t best experts (in a router with groups: those of them whose group was not full
    yet; of a corpus with fewer experts of utility above 0, those).

    Args:
        utility: non-negative, ``[corpus, expert]``.
        room: the places of the layer, filled by this call.
        turns: how many experts are protected, the room permitting.
        weights: turns of each corpus per round, and its weight in the mean; default 1 each.

    Returns:
        The protected experts by corpus, in the order of the turns, and the filled ones, best first.
    """
    shares = scaled(utility)
    protected = take_turns(shares, room, turns, weights)
    return protected, room.fill(ranked(np.average(shares, axis=0, weights=weights)).tolist())


def take_turns(
    utility: NDArray[np.float64], room: Room, turns: int, weights: Sequence[int] | None = None
) -> list[list[int]]:
    """The turns of `cover`: what every corpus protects, in the order of its turns; the places are taken."""
    weights = [1] * len(utility) if weights is None else list(weights)
    orders = [iter(order[row[order] > 0].tolist()) for row, order in zip(utility, ranked(utility), strict=True)]
    cycle = [corpus for corpus, weight in enumerate(weights) for _ in range(weight)]
    protected: list[list[int]] = [[] for _ in orders]
    for turn in range(min(turns, len(room))):
        corpus = cycle[turn % len(cycle)]
        if (best := next((e for e in orders[corpus] if room.take(e)), None)) is not None:
            protected[corpus].append(best)
    return protected


def layer_plan(
    profile: Profile,
    layer: int,
    room: Room,
    filled: list[int],
    *,
    protected: Mapping[str, list[int]] | None = None,
    utility: Mapping[str, NDArray[np.float64]] | None = None,
) -> LayerPlan:
    """The choice in one MoE layer, from the room that was filled.

    Args:
        profile: that was planned on.
        layer: MoE layer.
        room: its places, all taken.
        filled: experts that took a place by the method's own order, best first.
        protected: by corpus, the experts that it protected, in the order of its turns.
        utility: by corpus, the saliency ``[layer, expert]``, recorded in the plan.
    """
    named = {e for ids in (protected or {}).values() for e in ids} | set(filled)
    return LayerPlan(
        decoder_layer=profile.topology.decoder_layers[layer],
        kept=sorted(room.chosen),
        required=[e for e in room.chosen if e not in named],
        protected=dict(protected or {}),
        filled=filled,
        saliency={corpus: values[layer].tolist() for corpus, values in (utility or {}).items()},
    )
