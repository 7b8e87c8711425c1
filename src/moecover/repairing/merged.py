"""The merge of a live MoE layer: runs its experts on calibration text, gives the kept ones with others averaged in.

The layer is whole here, neither masked nor thinned: channels of an expert are matched with those of the kept one that
it joins, in whose order they stay, so that a plan's channels of that expert are cut afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.names import kind_of
from moecover.errors import InputError, arg
from moecover.merging.averages import Average, channel_rows, matched, reordered
from moecover.merging.method import GATED, ROUTER, Merge, Pair
from moecover.repairing.applied import LayerRepair, repaired_layer
from moecover.repairing.merge_facts import Called, activation_cosines, called_with, layer_facts, router_matrix
from moecover.repairing.solver import Fit
from moecover.repairing.targets import Place
from moecover.runtime.distributed import of_first

if TYPE_CHECKING:
    import torch

    from moecover.checkpoints.structure import Structure
    from moecover.checkpoints.topology import ChannelAxis
    from moecover.merging.facts import Groups
    from moecover.repairing.parts import Part


def check_merged(structure: Structure, where: Sequence[Place], merge: Merge | None) -> None:
    """Refuse a merge that a family's experts do not allow.

    Raises:
        InputError: parameters of the experts are not stored as they are used, or their channels are not known.
    """
    if merge is None:
        return
    reasons = [place.parameters for place in where if isinstance(place.parameters, str)]
    if merge.cost is not None and isinstance(structure.width, str):
        reasons.append(f"the channels of its experts are not known ({structure.width})")
    if reasons:
        raise InputError(
            f"{arg('merge', merge.name)} does not run on {structure.topology.family}: {reasons[0]}. "
            f"Use {arg('merge', 'none')}"
        )


def merged_layer(
    model: torch.nn.Module,
    structure: Structure,
    layer: int,
    place: Place,
    router: torch.nn.Module,
    forward: Callable[[torch.Tensor], torch.Tensor],
    arrived: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    part: Part,
    kept: Sequence[int],
    merge: Merge,
) -> LayerRepair:
    """Merge the experts of a layer that a plan drops into those that it keeps.

    Args:
        model: the layer's weights are in memory, all experts in use.
        structure: its checkpoint.
        layer: index of the MoE layer.
        place: where its parameters are stored.
        router: of the layer, see `routers`.
        forward: of the MoE block.
        arrived: the block's input in every batch.
        masks: of every batch, bool ``[token]``, False for padding.
        part: the tokens among those of all processes.
        kept: ids of the kept experts, ascending.
        merge: the method.

    Returns:
        A repair with the whole parameters of all kept experts and without figures; without parameters where no expert
        has another one in its average.

    Raises:
        InputError: the router is no single matrix, or a number is not finite.
    """
    experts: Any = model.get_submodule(structure.experts_modules[layer])
    matrix = router_matrix(model, structure, layer) if merge.needs & {ROUTER, GATED} else None
    called = called_with(structure, experts, router, matrix, forward, arrived, masks)
    facts = layer_facts(experts, called, part, kept, merge.needs)
    groups = of_first(part.here, _checked(merge, merge.function(facts), kept, structure.topology.num_experts))
    members, live = groups.members(), _Experts(structure, layer, experts, place)
    for centre, others in members.items():
        average = Average(live.expert(centre), float(groups.weights[centre]))
        for other in others:
            order = _order(live, merge, called, part, centre, other)
            average.add(live.in_order(other, order), float(groups.weights[other]))
        live.put(kept.index(centre), average)
    number = structure.topology.decoder_layers[layer]
    values = live.values(kept) if members else {}
    return LayerRepair(number, {}, None, Fit({}, [], [], {}, {}), values, kept, merged=members)


def _checked(merge: Merge, groups: Groups, kept: Sequence[int], experts: int) -> Groups:
    """The groups of a merge, which may be a plugin's.

    Raises:
        InputError: not one place an expert; an expert joins a dropped one, a kept one joins another, or a weight is
            negative or not finite.
    """
    if {len(groups.centre_of), len(groups.weights)} != {experts}:
        raise InputError(f"merge {merge.name}: give a centre and a weight for each of the {experts} experts")
    for expert, centre in enumerate(groups.centre_of.tolist()):
        if centre not in (-1, *kept) or (expert in kept and centre != expert):
            raise InputError(
                f"merge {merge.name}: expert {expert} joins {centre}. Allowed: a kept expert, which joins itself, or -1"
            )
    for expert, weight in enumerate(groups.weights.tolist()):
        if not 0 <= weight < math.inf:
            raise InputError(f"merge {merge.name}: the weight of expert {expert} is {weight}. Give 0 or more")
    return groups


def _order(live: _Experts, merge: Merge, called: Called, part: Part, centre: int, other: int) -> list[int] | None:
    """The channel of an expert for every channel of the kept one that it joins; None where they stay as they are."""
    if merge.cost is None:
        return None
    cosines = activation_cosines(live.module, called, part, centre, other) if merge.by_activations else None
    pair = Pair(live.channel_rows(centre), live.channel_rows(other), cosines)
    return of_first(part.here, matched(merge.cost(pair)))


def in_all(
    model: torch.nn.Module,
    structure: Structure,
    layer: int,
    place: Place,
    merged: LayerRepair,
    made: LayerRepair,
    before: Sequence[float],
) -> LayerRepair:
    """Merge and repair of a layer as one.

    Args:
        model: the layer is merged and masked.
        structure: its checkpoint.
        layer: index of the MoE layer.
        place: where its parameters are stored.
        merged: the merge.
        made: the repair of the merged layer.
        before: error of every corpus without both.

    Returns:
        A repair that holds all parameters that differ from the original's.
    """
    import torch

    assert not isinstance(place.parameters, str)
    values = dict(made.parameters)
    with repaired_layer(model, structure, layer, made):
        for name in merged.parameters if not values else ():
            dtype = getattr(torch, place.parameters[name][0].dtype)
            values[name] = model.get_parameter(name).data[list(merged.kept)].to(dtype)
    if values:
        values |= dict([made.shared] if made.shared is not None else [])
    fit = replace(made.fit, weights={}, before=list(before))
    return replace(made, parameters=values, kept=merged.kept, fit=fit, merged=merged.merged)


class _Experts:
    """The experts of a live layer, one at a time, and the new ones."""

    def __init__(self, structure: Structure, layer: int, module: Any, place: Place) -> None:
        assert not isinstance(place.parameters, str)
        self._inside = f"{structure.experts_modules[layer]}."
        self.module = module
        self._whole = {name: value.data for name, value in module.named_parameters()}
        self._rows = {name: place.parameters[f"{self._inside}{name}"] for name in self._whole}
        self.channels, self.axes = 0, dict[str, "ChannelAxis"]()
        if not isinstance(structure.width, str):
            kinds = {name: kind_of(f"{self._inside}{name}") for name in self._whole}
            known = structure.width.parameters
            self.channels = structure.width.channels
            self.axes = {name: known[kind] for name, kind in kinds.items() if kind in known}
        self._new: dict[int, dict[str, torch.Tensor]] = {}

    def expert(self, number: int) -> dict[str, torch.Tensor]:
        """The tensors of an expert by parameter."""
        return {name: value[number] for name, value in self._whole.items()}

    def in_order(self, number: int, order: Sequence[int] | None) -> dict[str, torch.Tensor]:
        """The same with its channels in some order."""
        expert = self.expert(number)
        return expert if order is None else reordered(expert, order, self.axes, self.channels)

    def channel_rows(self, number: int) -> torch.Tensor:
        """All weights of every channel of an expert, see `averages.channel_rows`."""
        return channel_rows(self.expert(number), self.axes, self.channels)

    def put(self, place: int, average: Average) -> None:
        """Take an average as the values of a kept expert, in the dtypes of the file."""
        import torch

        stored = {name: getattr(torch, rows[0].dtype) for name, rows in self._rows.items()}
        self._new[place] = {name: value.to(stored[name]) for name, value in average.values().items()}

    def values(self, kept: Sequence[int]) -> dict[str, torch.Tensor]:
        """The parameters of all kept experts, ``[kept, ...]``, by their names in the model."""
        import torch

        found = {}
        for name, whole in self._whole.items():
            rows = [self._new[at][name] if at in self._new else whole[expert] for at, expert in enumerate(kept)]
            dtype = getattr(torch, self._rows[name][0].dtype)
            found[f"{self._inside}{name}"] = torch.stack([row.to(dtype) for row in rows])
        return found
