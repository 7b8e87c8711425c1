"""What thinner experts keep: reads a plan with a width and a profile's channel energies, gives facts, JSON-ready."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moecover.errors import InputError
from moecover.planning.artifact import Plan
from moecover.planning.explaining.records import ChannelChanges, ChannelFacts, LayerEnergy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moecover.profiling.artifact import Profile


def turns_of(plan: Plan, corpora: Sequence[str]) -> dict[str, int]:
    """By corpus, the turns that ``protect_channels`` gave it in every kept expert, see `choose_channels`."""
    protect = plan.options.get("protect_channels", 0)
    if plan.width is None or not protect or "channel_groups" in plan.options:  # turns of groups promise no channel
        return {}
    given = plan.options.get("weights")
    weights = given if isinstance(given, Mapping) else {}
    cycle = [corpus for corpus in corpora for _ in range(int(weights.get(corpus, 1)))]
    turns = [cycle[turn % len(cycle)] for turn in range(int(protect * plan.width + 0.5))]
    return {corpus: turns.count(corpus) for corpus in corpora}


def best_kept(energy: NDArray[np.float64], kept: NDArray[np.bool_]) -> int:
    """How many of the channels of highest energy are kept without a gap, the least over experts.

    A channel without energy is no loss, so an expert that a corpus does not use bounds nothing.

    Args:
        energy: float64 ``[expert, channel]``.
        kept: bool of the same shape.
    """
    order = np.argsort(-energy, axis=1, kind="stable")
    fine = np.take_along_axis(kept | (energy <= 0), order, axis=1)
    return int(np.cumprod(fine, axis=1).sum(axis=1).min())


def _layer_energy(
    energy: Mapping[str, NDArray[np.float64]], kept: Sequence[int], channels: Sequence[Sequence[int]]
) -> LayerEnergy:
    """Facts of one layer; ``energy`` is ``[expert, channel]`` by corpus."""
    mask = np.zeros((len(kept), next(iter(energy.values())).shape[1]), dtype=bool)
    for row, ids in zip(mask, channels, strict=True):
        row[list(ids)] = True
    found: LayerEnergy = {"of_experts": {}, "of_layer": {}, "best": {}}
    for corpus, values in energy.items():
        of_kept = values[list(kept)]
        stays, before, total = float(of_kept[mask].sum()), float(of_kept.sum()), float(values.sum())
        found["of_experts"][corpus] = stays / before if before > 0 else 1.0
        found["of_layer"][corpus] = stays / total if total > 0 else 1.0
        found["best"][corpus] = best_kept(of_kept, mask)
    return found


def channel_facts(plan: Plan, profile: Profile | None) -> ChannelFacts | None:
    """What stays of the kept experts' channels; None for a plan of whole experts.

    Args:
        plan: of a model.
        profile: of the same model; without one, or without channel energies in it, only the width is told.

    Raises:
        InputError: the plan names channels that the profile does not have.
    """
    if plan.width is None:
        return None
    found: ChannelFacts = {"width": plan.width, "channels": None, "turns": {}, "layers": []}
    if profile is None or not profile.channels:
        return found
    channels = next(iter(profile.channels.values())).shape[2]
    if any(ids[-1] >= channels for row in plan.layers for ids in row.channels):
        raise InputError(
            f"the plan keeps channels above the {channels - 1} of the profile: they do not belong together"
        )
    corpora = list(profile.channels)
    layers = [
        _layer_energy({c: values[i] for c, values in profile.channels.items()}, row.kept, row.channels)
        for i, row in enumerate(plan.layers)
    ]
    least = {c: min(range(len(layers)), key=lambda i: layers[i]["of_experts"][c]) for c in corpora}
    found |= {
        "channels": channels,
        "turns": turns_of(plan, corpora),
        "layers": layers,
        "of_experts": {c: statistics.fmean(row["of_experts"][c] for row in layers) for c in corpora},
        "of_layer": {c: statistics.fmean(row["of_layer"][c] for row in layers) for c in corpora},
        "least": {c: layers[at]["of_experts"][c] for c, at in least.items()},
        "least_layer": {c: plan.layers[at].decoder_layer for c, at in least.items()},
        "best": {c: min(row["best"][c] for row in layers) for c in corpora},
    }
    return found


def channel_changes(plan: Plan, other: Plan) -> ChannelChanges | None:
    """How the channels of experts that two plans both keep differ; None where either keeps all of them."""
    if plan.width is None or other.width is None:
        return None
    overlaps = list[float | None]()
    for a, b in zip(plan.layers, other.layers, strict=True):
        theirs = dict(zip(b.kept, b.channels, strict=True))
        pairs = [(set(ids), set(theirs[e])) for e, ids in zip(a.kept, a.channels, strict=True) if e in theirs]
        overlaps.append(statistics.fmean(len(x & y) / len(x | y) for x, y in pairs) if pairs else None)
    known = [value for value in overlaps if value is not None]
    return {"jaccard": statistics.fmean(known) if known else None, "layers": overlaps}
