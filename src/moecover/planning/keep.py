"""How many experts a layer may keep: what the router allows, and how a fraction or a multiple becomes a number."""

from __future__ import annotations

import math

from moecover.checkpoints.topology import Topology
from moecover.errors import InputError, arg


def _least(topology: Topology) -> int:
    """The fewest experts per group with which every token still finds its top-k in the groups that it may use."""
    return max(2, -(-topology.top_k // topology.top_groups))


def allowed_keeps(topology: Topology, multiple_of: int | None = None) -> list[int]:
    """All numbers of experts that a layer may keep, ascending: what `resolve_keep` accepts.

    Args:
        topology: of the model.
        multiple_of: only multiples of this number.

    Raises:
        InputError: there is none.
    """
    multiple_of = 1 if multiple_of is None else multiple_of
    if multiple_of < 1:
        raise InputError(f"{arg('multiple_of', multiple_of)} is out of range: 1 or more")
    groups = topology.num_groups
    least = topology.top_k if groups == 1 else max(topology.top_k, groups * _least(topology))
    step = math.lcm(multiple_of, groups)
    counts = [count for count in range(step, topology.num_experts + 1, step) if count >= least]
    if not counts:
        raise InputError(
            f"no count from {least} to {topology.num_experts} experts is a multiple of {step}. "
            f"Give a smaller {arg('multiple_of')}"
        )
    return counts


def _nearest_multiple(topology: Topology, keep: int, multiple_of: int) -> int:
    """The allowed count nearest to ``keep`` (the larger of two) that is a multiple of a number."""
    counts = allowed_keeps(topology, multiple_of)
    return min(counts, key=lambda count: (abs(count - keep), -count))


def resolve_keep(topology: Topology, *, keep: int | None, retain: float | None, multiple_of: int | None = None) -> int:
    """Experts kept per layer from exactly one of a count and a fraction (rounded to the nearest, halves up).

    Args:
        topology: of the model.
        keep: experts per layer.
        retain: fraction of them.
        multiple_of: round to the nearest allowed multiple of this number (servers need some, see `servers`).

    Raises:
        InputError: both or neither given, out of range, or fewer than the router's top-k.
    """
    experts, top_k = topology.num_experts, topology.top_k
    if (keep is None) == (retain is None):
        raise InputError(
            f"give exactly one of {arg('keep')} (experts per layer) and {arg('retain')} (fraction in (0, 1])"
        )
    if retain is not None:
        if not 0 < retain <= 1:
            raise InputError(
                f"{arg('retain', retain)} is out of range: a fraction above 0 and at most 1 (0.5 keeps half)"
            )
        keep = int(retain * experts + 0.5)
        given = f"{arg('retain', retain)} keeps {keep} of {experts} experts, which"
    else:
        given = arg("keep", keep)
    assert keep is not None
    if keep > experts:
        raise InputError(
            f"{given} is above the {experts} experts of a layer of {topology.family}. Allowed: {top_k} to {experts}"
        )
    if multiple_of is not None:
        keep = _nearest_multiple(topology, keep, multiple_of)
    if keep < top_k:
        raise InputError(
            f"{given} leaves fewer experts than the router's top-k of {top_k}. "
            f"Allowed: {arg('keep', f'{top_k} to {experts}')}"
        )
    if (groups := topology.num_groups) > 1:
        least = _least(topology)
        if keep % groups or keep // groups < least:
            near = sorted({min(experts, max(least * groups, n * groups)) for n in (keep // groups, keep // groups + 1)})
            raise InputError(
                f"{given} does not fit the router's {groups} groups of experts: every group must keep the same number, "
                f"{least} or more. Near: {arg('keep', ' or '.join(map(str, near)))}"
            )
    return keep
