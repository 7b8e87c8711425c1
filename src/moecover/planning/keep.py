"""How many experts a layer may keep and how many channels an expert: what is allowed, what a fraction is."""

from __future__ import annotations

import math

from moecover.checkpoints.topology import WIDTH_STEP, Topology
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


def allowed_widths(channels: int, multiple_of: int | None = None) -> list[int]:
    """All numbers of channels that an expert may keep, ascending: what `resolve_width` accepts.

    Multiples of 8, for the grouped matrix product of torch, which transformers runs experts through, takes no others;
    and all channels, whatever their number.

    Args:
        channels: of an expert of the source.
        multiple_of: only multiples of this number.

    Raises:
        InputError: there is none.
    """
    if multiple_of is not None and multiple_of < 1:
        raise InputError(f"{arg('width_multiple_of', multiple_of)} is out of range: 1 or more")
    step = math.lcm(multiple_of or 1, WIDTH_STEP)
    found = sorted({*range(step, channels + 1, step), *([channels] if multiple_of is None else [])})
    if not found:
        raise InputError(
            f"no width up to {channels} channels is a multiple of {step}. Give a smaller {arg('width_multiple_of')}"
        )
    return found


def resolve_width(channels: int, *, width: int | None, retain: float | None, multiple_of: int | None = None) -> int:
    """Channels kept of every expert from exactly one of a count and a fraction (of the allowed ones the nearest).

    Args:
        channels: of an expert of the source.
        width: how many.
        retain: fraction of them.
        multiple_of: round to the nearest multiple of this number (servers need some, see `servers`).

    Raises:
        InputError: both or neither given, or out of range.
    """
    if (width is None) == (retain is None):
        raise InputError(
            f"give exactly one of {arg('width')} (channels of an expert) and {arg('retain_width')} (fraction)"
        )
    allowed = allowed_widths(channels, multiple_of)
    if retain is not None:
        if not 0 < retain <= 1:
            raise InputError(f"{arg('retain_width', retain)} is out of range: a fraction above 0 and at most 1")
        return min(allowed, key=lambda count: (abs(count - retain * channels), -count))
    assert width is not None
    if not 1 <= width <= channels:
        raise InputError(f"{arg('width', width)} is out of range: 1 to the {channels} channels of an expert")
    if multiple_of is not None:
        return min(allowed, key=lambda count: (abs(count - width), -count))
    if width not in allowed:
        near = sorted(allowed, key=lambda count: abs(count - width))[:2]
        raise InputError(
            f"{arg('width', width)} is no multiple of {WIDTH_STEP}: the grouped matrix product that transformers runs "
            f"experts through takes no others. Near: {arg('width', ' or '.join(map(str, sorted(near))))}"
        )
    return width
