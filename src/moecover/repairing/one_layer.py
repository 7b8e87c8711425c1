"""Merge and repair of one live MoE layer, in that order: reads its inputs and the original's output, gives new weights.

The merge is of whole experts; the plan's channels are cut afterwards, and what is repaired are merged and cut experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moecover.merging.method import NONE, Merge
from moecover.repairing.applied import LayerRepair, repaired_layer
from moecover.repairing.blocks import SHARED, blocks_of, output_of
from moecover.repairing.calibration import Calibration
from moecover.repairing.merged import in_all, merged_layer
from moecover.repairing.moving import moved_block
from moecover.repairing.solver import HELD_SHARE, REFIT, Fit, FitOptions, fit
from moecover.runtime.forwards import with_forward
from moecover.runtime.masking import masked_layer

if TYPE_CHECKING:
    import torch

    from moecover.checkpoints.structure import Structure
    from moecover.planning.artifact import LayerPlan
    from moecover.repairing.parts import Part
    from moecover.repairing.sums import Block
    from moecover.repairing.targets import Place


@dataclass(frozen=True)
class Layer:
    """A layer whose weights are in memory, and the text that it is fitted on.

    Attributes:
        model: the model.
        structure: its checkpoint.
        number: index of the MoE layer.
        plan: which of its experts stay.
        place: where its parameters are stored.
        router: of the layer.
        block: the MoE block.
        forward: of the block, which may have another one meanwhile.
        arrived: the block's input in every batch of the pruned model's pass.
        masks: of every batch, bool ``[token]``, False for padding.
        target: the original's output, ``[token, hidden]``.
        part: the tokens among those of all processes.
        weights: of the corpora.
    """

    model: torch.nn.Module
    structure: Structure
    number: int
    plan: LayerPlan
    place: Place
    router: torch.nn.Module
    block: torch.nn.Module
    forward: Callable[[torch.Tensor], torch.Tensor]
    arrived: Sequence[torch.Tensor]
    masks: Sequence[torch.Tensor]
    target: torch.Tensor
    part: Part
    weights: Sequence[float]

    def masked(self) -> contextlib.AbstractContextManager[None]:
        """The layer with the plan's experts and channels only."""
        channels = self.plan.channels or None
        return masked_layer(self.model, self.structure, self.router, self.number, self.plan.kept, channels)

    def calibration(self) -> Calibration:
        """How the tokens count."""
        return Calibration(self.target, self.part, self.weights, HELD_SHARE)

    def errors(self) -> list[float]:
        """Squared error of every corpus with the layer as it is, as a share of its squared target."""
        import torch

        pairs = zip(self.arrived, self.masks, strict=True)
        found = torch.cat([output_of(self.structure, self.forward(batch))[mask] for batch, mask in pairs])
        errors: list[float] = self.calibration().losses(self.target.float() - found.float()).tolist()
        return errors


def made(
    layer: Layer, originals: Sequence[torch.Tensor], *, merge: Merge | None, kind: str, options: FitOptions
) -> LayerRepair:
    """Merge and repair a layer.

    Args:
        layer: neither masked nor merged.
        originals: the block's input in every batch of the original's pass.
        merge: None for none.
        kind: of the repair, or ``none``.
        options: of `solver.fit`.
    """
    structure, kept = layer.structure, layer.plan.kept
    if merge is None or len(kept) == structure.topology.num_experts:
        with layer.masked():
            return _repaired(layer, kind, options)
    with layer.masked():
        before = layer.errors()
    merged = merged_layer(
        layer.model,
        structure,
        layer.number,
        layer.place,
        layer.router,
        layer.forward,
        layer.arrived if merge.sequential else originals,
        layer.masks,
        layer.part,
        kept,
        merge,
    )
    with repaired_layer(layer.model, structure, layer.number, merged), layer.masked():
        found = _repaired(layer, kind, options)
        return in_all(layer.model, structure, layer.number, layer.place, merged, found, before)


def _repaired(layer: Layer, kind: str, options: FitOptions) -> LayerRepair:
    """The repair of a masked layer."""
    import torch

    structure, place, kept = layer.structure, layer.place, layer.plan.kept
    if kind == NONE:
        errors = layer.errors()
        return LayerRepair(layer.plan.decoder_layer, {}, None, Fit({}, errors, errors, {}, {}))
    parts = blocks_of(layer.model, structure, layer.number, place, layer.forward, layer.arrived, layer.masks, kept)
    solved = _solved(layer, parts, kind, options)
    if kind != REFIT:
        return solved
    trial = _solved(layer, parts, kind, options, everything=False)
    del parts
    pairs = zip(layer.arrived, layer.masks, strict=True)
    arrived = torch.cat([batch.reshape(-1, batch.shape[-1])[mask] for batch, mask in pairs])
    with with_forward(layer.block, layer.forward):
        return moved_block(
            layer.model,
            structure,
            layer.number,
            place,
            kept,
            (trial, solved),
            arrived,
            layer.target,
            layer.calibration(),
        )


def _solved(
    layer: Layer, parts: Sequence[Block], kind: str, options: FitOptions, *, everything: bool = True
) -> LayerRepair:
    """The repair in closed form; ``everything``: also on the tokens that are held out."""
    place = layer.place
    found = fit(parts, layer.target, layer.part, kind=kind, weights=layer.weights, everything=everything, **options)
    experts = {int(name): weight for name, weight in found.weights.items() if name != SHARED}
    shared = (place.shared[0], found.weights[SHARED]) if place.shared and SHARED in found.weights else None
    return LayerRepair(layer.plan.decoder_layer, experts, shared, found)
