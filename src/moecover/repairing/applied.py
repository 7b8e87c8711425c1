"""The repair of a layer in a live model: new weights take the place of its own until a block ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.structure import Structure
from moecover.repairing.solver import Fit
from moecover.runtime.running import Within

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LayerRepair:
    """The repair of one MoE layer.

    Attributes:
        decoder_layer: its index.
        experts: new down projections ``[hidden, width]`` by the expert's id in the original; behind a merge they are in
            ``parameters`` too.
        shared: name of the shared expert's down projection in the model and its new weight; None where it is unchanged.
        fit: errors and penalties.
        parameters: new values of all parameters of the block, applied after ``experts`` and ``shared``, by their name
            in the model, see `refit`; those of the experts module hold the kept experts only.
        kept: ids of these, ascending.
        held: see `refit.Refitted`.
        merged: by kept expert, the ids of those that were merged into it.
    """

    decoder_layer: int
    experts: dict[int, torch.Tensor]
    shared: tuple[str, torch.Tensor] | None
    fit: Fit
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    kept: Sequence[int] = ()
    held: tuple[float, float] | None = None
    merged: Mapping[int, Sequence[int]] = field(default_factory=dict)


@contextlib.contextmanager
def repaired_layer(model: torch.nn.Module, structure: Structure, layer: int, repair: LayerRepair) -> Iterator[None]:
    """Apply the repair of one MoE layer, whose weights are in memory; they are restored when the context exits."""
    import torch

    experts: Any = model.get_submodule(structure.experts_modules[layer])
    places = [(experts.down_proj.data[expert], weight) for expert, weight in repair.experts.items()]
    if repair.shared is not None:
        places.append((model.get_parameter(repair.shared[0]).data, repair.shared[1]))
    inside = f"{structure.experts_modules[layer]}."
    for name, values in repair.parameters.items():
        whole = model.get_parameter(name).data
        if name.startswith(inside):
            places += zip((whole[expert] for expert in repair.kept), values, strict=True)
        else:
            places.append((whole, values))
    with torch.inference_mode():
        originals = [place.clone() for place, _ in places]
        for place, weight in places:
            place.copy_(weight)
    try:
        yield
    finally:
        with torch.inference_mode():
            for (place, _), original in zip(places, originals, strict=True):
                place.copy_(original)


def with_repairs(
    model: torch.nn.Module, structure: Structure, within: Within, repair_of: Callable[[int], LayerRepair]
) -> Within:
    """Add the repair of each MoE layer to a context for decoder layers; it is read when the layer is entered."""
    layer_of = {number: layer for layer, number in enumerate(structure.topology.decoder_layers)}

    @contextlib.contextmanager
    def both(number: int) -> Iterator[None]:
        with within(number), contextlib.ExitStack() as stack:
            if number in layer_of:
                layer = layer_of[number]
                stack.enter_context(repaired_layer(model, structure, layer, repair_of(layer)))
            yield

    return both


@contextlib.contextmanager
def repaired(model: torch.nn.Module, structure: Structure, repairs: Sequence[LayerRepair]) -> Iterator[torch.nn.Module]:
    """Apply all repairs to a model in memory; use it within `planning.masking.masked`."""
    with contextlib.ExitStack() as stack:
        for layer, repair in enumerate(repairs):
            stack.enter_context(repaired_layer(model, structure, layer, repair))
        yield model
